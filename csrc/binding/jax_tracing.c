/* jax_tracing.c - what fastattn.jax asks for while JAX traces: a call checked and taken apart
 * into operands, attributes and results, and the workspace of one that JAX compiles for a GPU.
 *
 * What then runs is jax_ffi.c's.
 */
#include "call.h"
#include "jax_ffi.h"
#include "options.h"
#include "selection.h"
#include "sparse.h"

#include <stdlib.h>

static const char *const targets[JAX_TARGETS] = {
    "forward",         "backward",          "merge",
    "sparsek",         "sparsek_backward",  "sparse",
    "sparse_backward", "sparsek_attention", "sparsek_attention_backward"};

/* ---- a call taken apart ---- */

static PyObject *shape_tuple(int32_t n, const int64_t *shape) {
    PyObject *tuple = PyTuple_New(n);
    for (int32_t i = 0; i < n && tuple; i++) {
        PyObject *size = PyLong_FromLongLong(shape[i]);
        if (!size || PyTuple_SetItem(tuple, i, size) < 0) Py_CLEAR(tuple);
    }
    return tuple;
}

/* 0 with an exception. */
static int add_result(PyObject *list, const char *name, int32_t n, const int64_t *shape,
                      fa_any_dtype dtype) {
    char buffer[32];
    PyObject *sizes = shape_tuple(n, shape);
    PyObject *result =
        sizes ? Py_BuildValue("(sNs)", name, sizes, fa_dtype_name(dtype, buffer)) : NULL;
    const int added = result && PyList_Append(list, result) == 0;
    Py_XDECREF(result);
    return added;
}

static PyObject *list_operands(const call *c) {
    PyObject *list = PyList_New(0);
    for (int i = 0; i < c->count && list; i++) {
        PyObject *operand = Py_BuildValue("(sO)", c->arrays[i].array.name, c->arrays[i].object);
        if (!operand || PyList_Append(list, operand) < 0) Py_CLEAR(list);
        Py_XDECREF(operand);
    }
    return list;
}

/* Those that are not 0. */
static PyObject *list_attributes(const jax_call *j, const char *backend) {
    PyObject *dict = PyDict_New();
    for (int i = 0; i < JAX_ATTRIBUTES && dict; i++) {
        const jax_attribute *a = &jax_attributes[i];
        const char *field = (const char *)j + a->offset;
        const double number = a->kind == JAX_DOUBLE ? *(const double *)field : 0;
        const int64_t value = a->kind == JAX_INT     ? *(const int *)field
                              : a->kind == JAX_INT64 ? *(const int64_t *)field
                                                     : number != 0;
        if (!value) continue;
        PyObject *object =
            a->kind == JAX_DOUBLE ? PyFloat_FromDouble(number) : PyLong_FromLongLong(value);
        if (!object || PyDict_SetItemString(dict, a->name, object) < 0) Py_CLEAR(dict);
        Py_XDECREF(object);
    }
    PyObject *name = dict && backend ? PyUnicode_FromString(backend) : NULL;
    if (dict && backend && (!name || PyDict_SetItemString(dict, "backend", name) < 0))
        Py_CLEAR(dict);
    Py_XDECREF(name);
    return dict;
}

static PyObject *list_results(const call *c, const fa_gradient *gradients,
                              const char *const names[FA_GRADIENTS]) {
    const fa_plan *p = &c->plan;
    PyObject *list = PyList_New(0);
    int fine = list != NULL;
    if (fine && !gradients)
        fine = add_result(list, "out", p->out_ndim, p->out_shape, p->out_dtype) &&
               (!c->return_lse || add_result(list, "lse", p->lse_ndim, p->lse_shape, p->lse_dtype));
    for (int i = 0; gradients && i < FA_GRADIENTS && fine; i++)
        if (gradients[i].wanted)
            fine = add_result(list, names[i], gradients[i].ndim, gradients[i].shape,
                              gradients[i].dtype);
    if (!fine) Py_CLEAR(list);
    return list;
}

/* (operands, attributes, results), or NULL with an exception; it takes over results. */
static PyObject *make_plan(const call *f, const jax_call *j, PyObject *results) {
    PyObject *operands = list_operands(f), *attributes = list_attributes(j, f->backend);
    PyObject *plan =
        operands && attributes && results ? PyTuple_Pack(3, operands, attributes, results) : NULL;
    Py_XDECREF(operands);
    Py_XDECREF(attributes);
    Py_XDECREF(results);
    return plan;
}

static PyObject *finish_plan(module_state *state, call *f, PyObject *plan, fa_status status) {
    call_release(f);
    if (call_is_elsewhere(status) || f->is_followed) /* by torch */
        status = fa_fail(&f->error, FA_TYPE, "arrays of JAX and of another framework in one call");
    return call_finish(state, plan, status, 0, &f->error);
}

/* dgate has the place of dmask. */
static PyObject *list_sparse_results(const sparse_call *c) {
    static const char *const names[FA_GRADIENTS] = {"dq", "dk", "dv", "dgate", "dsink"};
    const fa_array *lists = c->request.entries;
    PyObject *list = list_results(&c->forward, c->forward.is_backward ? c->gradients : NULL, names);
    if (list && c->return_mass &&
        !add_result(list, "mass", lists->ndim, lists->shape, (fa_any_dtype){FA_CODE_FLOAT, 32, 1}))
        Py_CLEAR(list);
    return list;
}

static PyObject *plan_sparse(module_state *state, int which, PyObject *values) {
    arguments a;
    sparse_call c;
    call *f = &c.forward;
    PyObject *plan = NULL;
    if (arguments_unpack(&state->signatures[which], values, &a) < 0) return NULL;
    sparse_start(&c, state);
    fa_status status = sparse_prepare(&c, &a, which);
    if (status == FA_OK) status = threads_warn(state);
    if (status == FA_OK) {
        const jax_call j = {.request = f->request,
                            .backward = {.deterministic = f->deterministic},
                            .sparse = c.request};
        plan = make_plan(f, &j, list_sparse_results(&c));
    }
    return finish_plan(state, f, plan, status);
}

/* dscores has the place of dmask. */
static PyObject *list_selection_results(const selection_call *c) {
    static const char *const names[FA_GRADIENTS] = {"dq", "dk", "dv", "dscores", "dsink"};
    static const char *const more[FA_SELECTION_RESULTS] = {"tau", "ends"};
    const int is_backward = c->forward.is_backward;
    PyObject *list = list_results(&c->forward, is_backward ? c->gradients : NULL, names);
    for (int i = 0; i < FA_SELECTION_RESULTS && list && !is_backward; i++) {
        const fa_result *r = &c->results[i];
        if (!add_result(list, more[i], r->ndim, r->shape, r->dtype)) Py_CLEAR(list);
    }
    return list;
}

static PyObject *plan_selection(module_state *state, int which, PyObject *values) {
    arguments a;
    selection_call c;
    call *f = &c.forward;
    PyObject *plan = NULL;
    if (arguments_unpack(&state->signatures[which], values, &a) < 0) return NULL;
    selection_start(&c, state);
    fa_status status = selection_prepare(&c, &a, which);
    if (status == FA_OK) status = threads_warn(state);
    if (status == FA_OK) {
        const jax_call j = {.request = f->request,
                            .backward = {.deterministic = f->deterministic},
                            .selection = c.request};
        plan = make_plan(f, &j, list_selection_results(&c));
    }
    return finish_plan(state, f, plan, status);
}

PyObject *jax_plan(PyObject *module, PyObject *const *given, Py_ssize_t count) {
    static const char *const names[FA_GRADIENTS] = {"dq", "dk", "dv", "dmask", "dsink"};
    module_state *state = PyModule_GetState(module);
    char name[64] = "";
    if (count == 2) state_text(Py_NewRef(given[0]), sizeof name, name);
    const int which = arguments_function(name);
    arguments a;
    backward_call c;
    call *f = &c.forward;
    if (which >= SPARSEK && which < FUNCTIONS) return plan_selection(state, which, given[1]);
    if (which >= SPARSE && which < FUNCTIONS) return plan_sparse(state, which, given[1]);
    if (which >= KVCACHE || arguments_unpack(&state->signatures[which], given[1], &a) < 0)
        return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_TypeError, "_C has no plan %s", name);
    backward_start(&c, state);
    fa_status status =
        which >= BACKWARD ? backward_prepare(&c, &a, which) : prepare_forward(f, &a, which);
    PyObject *result = NULL;
    if (status == FA_OK) status = threads_warn(state);
    if (status == FA_OK) {
        jax_call j = {.request = f->request, .backward = {.deterministic = f->deterministic}};
        result = make_plan(f, &j, list_results(f, which >= BACKWARD ? c.gradients : NULL, names));
    }
    return finish_plan(state, f, result, status);
}

/* ---- workspace ---- */

/* One (name, shape, code, bits), without memory. */
static fa_status read_array(PyObject *object, const jax_call *c, int has_axis, jax_array *to,
                            fa_error *error) {
    fa_array *a = &to->array;
    PyObject *sizes;
    int code, bits;
    if (!PyTuple_Check(object) ||
        !PyArg_ParseTuple(object, "sO!ii", &a->name, &PyTuple_Type, &sizes, &code, &bits))
        return FA_RAISED;
    a->data = FA_TO_COME;
    a->device_type = FA_CUDA, a->device_id = 0;
    a->dtype = (fa_any_dtype){(uint8_t)code, (uint8_t)bits, 1};
    a->ndim = (int32_t)PyTuple_Size(sizes);
    if (a->ndim > FA_MAX_RANK)
        return fa_fail(error, FA_VALUE, "`%s` has %d dimensions", a->name, a->ndim);
    for (int32_t i = 0; i < a->ndim; i++)
        a->shape[i] = PyLong_AsLongLong(PyTuple_GetItem(sizes, i));
    return PyErr_Occurred() ? FA_RAISED : jax_lay_out(c, to, has_axis, error);
}

/* 0 with an exception. */
static int read_attributes(PyObject *dict, jax_call *c) {
    for (int i = 0; i < JAX_ATTRIBUTES; i++) {
        const jax_attribute *a = &jax_attributes[i];
        PyObject *value = PyDict_GetItemString(dict, a->name);
        void *field = (char *)c + a->offset;
        if (!value) continue;
        if (a->kind == JAX_DOUBLE)
            *(double *)field = PyFloat_AsDouble(value);
        else if (a->kind == JAX_INT64)
            *(int64_t *)field = PyLong_AsLongLong(value);
        else
            *(int *)field = (int)PyLong_AsLong(value);
    }
    PyObject *backend = PyDict_GetItemString(dict, "backend");
    if (backend) state_text(Py_NewRef(backend), sizeof c->backend, c->backend);
    return !PyErr_Occurred();
}

PyObject *jax_workspace(PyObject *module, PyObject *args) {
    PyObject *operands, *attributes, *results;
    const char *target;
    fa_error error = {""};
    jax_call c = {0};
    int64_t bytes = 0;
    if (!PyArg_ParseTuple(args, "sO!O!O!", &target, &PyTuple_Type, &operands, &PyDict_Type,
                          &attributes, &PyTuple_Type, &results))
        return NULL;
    while (c.target < JAX_TARGETS && strcmp(targets[c.target], target)) c.target++;
    c.operand_count = (int32_t)PyTuple_Size(operands);
    c.result_count = (int32_t)PyTuple_Size(results);
    jax_array *arrays = calloc((size_t)(c.operand_count + c.result_count) + 1, sizeof *arrays);
    if (!arrays) return PyErr_NoMemory();
    c.operands = arrays, c.results = arrays + c.operand_count;
    fa_status status = c.target < JAX_TARGETS && read_attributes(attributes, &c)
                           ? FA_OK
                           : fa_fail(&error, FA_TYPE, "_C has no target %s", target);
    for (int32_t i = 0; i < c.operand_count && status == FA_OK; i++)
        status = read_array(PyTuple_GetItem(operands, i), &c, jax_has_axis(&c, i), &c.operands[i],
                            &error);
    for (int32_t i = 0; i < c.result_count && status == FA_OK; i++)
        status = read_array(PyTuple_GetItem(results, i), &c, jax_has_axis(&c, -1), &c.results[i],
                            &error);
    if (status == FA_OK) status = jax_run(&c, &bytes, &error);
    free(arrays);
    if (status != FA_OK) return call_raise(PyModule_GetState(module), status, 0, &error);
    return PyLong_FromLongLong(bytes);
}

/* ---- handlers ---- */

static PyObject *capsule(xla_handler *handler) {
    void *address;
    memcpy(&address, &handler, sizeof address);
    return PyCapsule_New(address, NULL, NULL);
}

PyObject *jax_handlers(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    PyObject *dict = PyDict_New();
    for (int i = 0; i < JAX_TARGETS && dict; i++) {
        PyObject *pair =
            Py_BuildValue("(NN)", capsule(jax_handler[i][0]), capsule(jax_handler[i][1]));
        if (!pair || PyDict_SetItemString(dict, targets[i], pair) < 0) Py_CLEAR(dict);
        Py_XDECREF(pair);
    }
    return dict;
}
