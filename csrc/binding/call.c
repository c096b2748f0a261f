/* call.c - one call of a public function: prepared, run, handed over.
 *
 * Stop 2 of 6. Next: fa_check_attention() in csrc/check_attention.c, which prepare.c calls; then
 * run() asks dispatch.c for a backend, and runs it without the GIL.
 */
#include "call.h"

#include <string.h>

PyObject *call_raise(const module_state *state, fa_status status, int sdpa, const fa_error *error) {
    PyObject *type = PyExc_RuntimeError;
    if (PyErr_Occurred()) return NULL; /* FA_RAISED, or a Ctrl-C while the sentence was made */
    switch ((int)status) {
        case FA_VALUE:
            type = sdpa ? state->value_error : PyExc_ValueError;
            break;
        case FA_TYPE:
            type = sdpa ? state->type_error : PyExc_TypeError;
            break;
        case FA_UNSUPPORTED:
            type = PyExc_NotImplementedError;
            break;
        case FA_MEMORY:
            type = PyExc_MemoryError;
            break;
        default:
            break;
    }
    /* A name that was cut to fit may end within a character. */
    PyObject *text = PyUnicode_DecodeUTF8(error->text, (Py_ssize_t)strlen(error->text), "replace");
    if (text) PyErr_SetObject(type, text);
    Py_XDECREF(text);
    return NULL;
}

PyObject *call_finish(const module_state *state, PyObject *result, fa_status status, int sdpa,
                      const fa_error *error) {
    if (status != FA_OK) return call_raise(state, status, sdpa, error);
    if (result && PyErr_Occurred()) Py_CLEAR(result);
    return result;
}

void call_release(call *c) {
    if (c->drawn) tensor_drop(&c->seed);
    for (int i = 0; i < c->count; i++) tensor_release(&c->arrays[i]);
    if (c->has_out) tensor_release(&c->out);
}

/* Some microseconds of work: letting another thread in would cost as much. */
static int is_tiny(const fa_params *p) {
    const fa_what *w = &p->what;
    double products = (double)w->b * w->hq * w->sq * w->sk * (w->d + w->dv);
    return p->where.device_type == FA_CPU && products < 3e4;
}

fa_status call_begin_work(call_work *w, module_state *state, const borrowed *like, int64_t bytes,
                          const fa_params *p, fa_error *error) {
    static const fa_any_dtype byte = {FA_CODE_UINT, 8, 1};
    w->memory = NULL;
    if (bytes) {
        fa_clear(&w->workspace, sizeof w->workspace);
        TRY(tensor_new(state, like, 1, &bytes, NULL, byte, &w->workspace, error));
        w->memory = w->workspace.memory.array.data;
    }
    w->thread = p && is_tiny(p) ? NULL : PyEval_SaveThread();
    return FA_OK;
}

void call_end_work(call_work *w) {
    if (w->thread) PyEval_RestoreThread(w->thread);
    if (w->memory) tensor_drop(&w->workspace);
}

fa_status call_run(call *c, output *out, output *lse) {
    fa_plan *plan = &c->plan;
    fa_error *error = &c->error;
    fa_expect_outputs(plan, c->has_out ? &c->out.array : NULL, c->return_lse);
    if (!fa_choose(plan, c->backend, NULL, error)) return FA_UNSUPPORTED;
    if (c->is_differentiated) TRY(backward_expect(c, NULL, error));
    if (plan->params.where.device_type == FA_CPU) TRY(threads_warn(c->state));
    if (c->draws) {
        c->drawn = 1;
        TRY(torch_draw_seed(c->state, &c->arrays[0], &c->seed, error));
        plan->params.dropout.seed_data = c->seed.memory.array.data;
    }
    if (!c->has_out) {
        TRY(tensor_new(c->state, &c->arrays[0], plan->out_ndim, plan->out_shape, plan->out_stride,
                       plan->out_dtype, out, error));
        plan->params.what.out.data = out->memory.array.data;
    }
    if (c->return_lse) {
        TRY(tensor_new(c->state, &c->arrays[0], plan->lse_ndim, plan->lse_shape, NULL,
                       plan->lse_dtype, lse, error));
        plan->params.what.lse.data = lse->memory.array.data;
    }
    call_work work;
    TRY(call_begin_work(&work, c->state, &c->arrays[0], fa_workspace(plan), &plan->params, error));
    fa_status status = fa_run(plan, work.memory, error);
    call_end_work(&work);
    if (status == FA_OK && c->has_out) status = torch_mark_written(c->state, &c->out);
    return status;
}

PyObject *call_hand_over(module_state *state, const borrowed *like, output *out, output *lse,
                         PyObject *given, int return_lse) {
    PyObject *second = NULL;
    PyObject *first = given ? Py_NewRef(given) : tensor_hand_over(state, like, out);
    if (!first || !return_lse) {
        tensor_drop(lse);
        return first;
    }
    second = tensor_hand_over(state, like, lse);
    PyObject *pair = second ? PyTuple_Pack(2, first, second) : NULL;
    Py_DECREF(first);
    Py_XDECREF(second);
    return pair;
}

void call_start(call *c, module_state *state) {
    c->state = state;
    c->now = (torch_now){0};
    c->count = c->has_out = c->return_lse = c->deterministic = c->draws = c->drawn = 0;
    c->is_backward = c->is_followed = c->is_differentiated = 0;
    c->backend = NULL;
    c->error.text[0] = 0;
    fa_clear(&c->request, sizeof c->request);
}

PyObject *call_hand_on(module_state *state, const arguments *a, int which, fa_status status) {
    const signature *s = &state->signatures[which];
    PyObject *all = arguments_pack(s, a);
    return state_hand_on(state, status, status == FA_TO_GRAPH ? "record" : "call",
                         all ? Py_BuildValue("(sN)", s->method.ml_name, all) : NULL);
}

static PyObject *compute(module_state *state, const arguments *a, int which) {
    call c;
    output out, lse;
    PyObject *result = NULL;
    call_start(&c, state);
    fa_clear(&out, sizeof out);
    fa_clear(&lse, sizeof lse);
    fa_status status = prepare_forward(&c, a, which);
    if (status == FA_OK) status = call_run(&c, &out, &lse);
    if (status == FA_OK) {
        result = call_hand_over(c.state, &c.arrays[0], &out, &lse, c.has_out ? c.out.object : NULL,
                                c.return_lse);
    } else {
        tensor_drop(&out);
        tensor_drop(&lse);
    }
    if (status == FA_TO_TORCH && (result = autograd_apply(&c, a, which))) status = FA_OK;
    call_release(&c);
    if (call_is_elsewhere(status) && !PyErr_Occurred())
        return call_hand_on(state, a, which, status);
    return call_finish(state, result, status, c.request.sdpa, &c.error);
}

static PyObject *call_public(PyObject *module, int which, PyObject *const *given, Py_ssize_t count,
                             PyObject *keywords) {
    module_state *state = PyModule_GetState(module);
    arguments a;
    if (arguments_parse(&state->signatures[which], given, count, keywords, &a) < 0) return NULL;
    if (which == KVCACHE) return kvcache_compute(state, &a);
    if (which >= SPARSEK) return selection_compute(state, &a, which);
    if (which >= SPARSE) return sparse_compute(state, &a, which);
    return which >= BACKWARD ? backward_compute(state, &a, which) : compute(state, &a, which);
}

/* A builtin is called without its number. */
#define ENTRY(name, which)                                                            \
    static PyObject *name(PyObject *module, PyObject *const *given, Py_ssize_t count, \
                          PyObject *keywords) {                                       \
        return call_public(module, which, given, count, keywords);                    \
    }
ENTRY(attention, ATTENTION)
ENTRY(scaled_dot_product_attention, SDPA)
ENTRY(attention_varlen, VARLEN)
ENTRY(attention_backward, BACKWARD)
ENTRY(attention_varlen_backward, VARLEN_BACKWARD)
ENTRY(attention_kvcache, KVCACHE)
ENTRY(attention_sparse, SPARSE)
ENTRY(attention_sparse_varlen, SPARSE_VARLEN)
ENTRY(attention_sparse_backward, SPARSE_BACKWARD)
ENTRY(sparsek_attention, SPARSEK)
ENTRY(sparsek_attention_varlen, SPARSEK_VARLEN)
ENTRY(sparsek_attention_backward, SPARSEK_BACKWARD)
#undef ENTRY

static PyObject *(*const entries[FUNCTIONS])(PyObject *, PyObject *const *, Py_ssize_t,
                                             PyObject *) = {
    [ATTENTION] = attention,
    [SDPA] = scaled_dot_product_attention,
    [VARLEN] = attention_varlen,
    [BACKWARD] = attention_backward,
    [VARLEN_BACKWARD] = attention_varlen_backward,
    [KVCACHE] = attention_kvcache,
    [SPARSE] = attention_sparse,
    [SPARSE_VARLEN] = attention_sparse_varlen,
    [SPARSE_BACKWARD] = attention_sparse_backward,
    [SPARSEK] = sparsek_attention,
    [SPARSEK_VARLEN] = sparsek_attention_varlen,
    [SPARSEK_BACKWARD] = sparsek_attention_backward,
};

PyObject *call_function(PyObject *module, PyObject *args) {
    PyObject *text, *names, *values;
    Py_ssize_t positional;
    if (!PyArg_ParseTuple(args, "SO!O!n", &text, &PyTuple_Type, &names, &PyTuple_Type, &values,
                          &positional))
        return NULL;
    const int which = arguments_function(PyBytes_AsString(text));
    if (which == FUNCTIONS) return PyErr_Format(PyExc_TypeError, "_C has no function of %R", text);
    signature *s = &((module_state *)PyModule_GetState(module))->signatures[which];
    PyCFunction entry = (PyCFunction)(void (*)(void))entries[which];
    /* A package that is imported again keeps the first one's. */
    if (!s->text && arguments_learn(s, text, names, values, positional, entry) < 0) return NULL;
    PyObject *package = PyUnicode_FromString("fastattn");
    PyObject *result = package ? PyCFunction_NewEx(&s->method, module, package) : NULL;
    Py_XDECREF(package);
    return result;
}
