/* autograd.c - a call whose gradient torch is to take: to an autograd function of torch, as
 * fastattn/torch.py has it, and back.
 *
 * On the way it is a record and tensors, for autograd sees tensors alone. The record is (name of
 * the function, values, places): `values` in the order of its signature, None where a tensor
 * stands; the characters of `places` say where (a graph of torch's has no bytes for constants).
 */
#include "call.h"

#include <stddef.h>

enum { RESULTS = 3 }; /* out, lse and the seed that was drawn, or None */

/* What torch was given and comes back with at once: prepared already. */
static _Thread_local call *on_its_way;

static PyObject **field_of(arguments *a, size_t offset) {
    return (PyObject **)((char *)a + offset);
}

/* Which gradient an argument of the forward pass has, attention's five and the drop-in's of them;
 * -1: none. */
static int gradient_of(size_t field) {
    static const size_t followed[] = {
        offsetof(arguments, q),    offsetof(arguments, k),     offsetof(arguments, v),
        offsetof(arguments, mask), offsetof(arguments, sink),  offsetof(arguments, query),
        offsetof(arguments, key),  offsetof(arguments, value), offsetof(arguments, attn_mask),
    };
    for (size_t i = 0; i < sizeof followed / sizeof *followed; i++)
        if (followed[i] == field) return (int)(i % FA_GRADIENTS);
    return -1;
}

/* (record, *tensors) */
static PyObject *pack(module_state *state, const signature *s, arguments *a) {
    char places[MAX_PARAMETERS];
    PyObject *tensors[MAX_PARAMETERS], *record = NULL, *all = NULL;
    Py_ssize_t n = 0;
    for (Py_ssize_t i = 0; i < s->count; i++) {
        PyObject **value = field_of(a, s->field[i]);
        if (!torch_owns(state, *value)) continue;
        tensors[n] = *value, places[n++] = (char)i;
        *value = Py_None;
    }
    PyObject *values = arguments_pack(s, a), *where = PyUnicode_FromStringAndSize(places, n);
    if (values && where) record = PyTuple_Pack(3, s->function, values, where);
    if (record) all = PyTuple_New(1 + n);
    for (Py_ssize_t i = 0; i < n && all; i++) PyTuple_SetItem(all, 1 + i, Py_NewRef(tensors[i]));
    if (all) PyTuple_SetItem(all, 0, Py_NewRef(record));
    Py_XDECREF(values);
    Py_XDECREF(where);
    Py_XDECREF(record);
    return all;
}

/* Learnt already, and of this name. */
static int is_function(const signature *s, PyObject *name) {
    return s->function && !PyUnicode_Compare(name, s->function);
}

/* The arguments again, and their places; the function, or -1 with an exception. */
static int unpack(module_state *state, PyObject *record, PyObject *const *tensors, Py_ssize_t count,
                  arguments *a, const char **places) {
    Py_ssize_t n;
    int which = 0;
    PyObject *name, *values, *where;
    if (!PyArg_ParseTuple(record, "O!OO!", &PyUnicode_Type, &name, &values, &PyUnicode_Type,
                          &where))
        return -1;
    const char *const at = PyUnicode_AsUTF8AndSize(where, &n);
    if (!at) return -1;
    while (which < BACKWARD && !is_function(&state->signatures[which], name)) which++;
    const signature *s = &state->signatures[which];
    int known = which < BACKWARD && n == count;
    for (Py_ssize_t i = 0; i < n && known; i++) known = (unsigned char)at[i] < s->count;
    if (!known)
        return PyErr_Format(PyExc_TypeError, "_C has no forward %R of %zd tensors at %R", name,
                            count, where),
               -1;
    if (arguments_unpack(s, values, a) < 0) return -1;
    for (Py_ssize_t i = 0; i < n; i++) /* None: an int may stand there, such as a seed */
        if (tensors[i] != Py_None) *field_of(a, s->field[(int)at[i]]) = tensors[i];
    *places = at;
    return which;
}

/* Whether attention's backward pass is that of the drop-in's call, too: rank 4, nothing to
 * broadcast but whole groups of heads. */
static int is_plain(const fa_request *r) {
    const fa_array *q = r->q, *k = r->k, *v = r->v;
    if (!r->sdpa) return 1;
    return q->ndim == 4 && k->ndim == 4 && v->ndim == 4 && k->shape[0] == q->shape[0] &&
           v->shape[0] == q->shape[0] && k->shape[1] == v->shape[1] && k->shape[1] > 0 &&
           k->shape[1] <= q->shape[1];
}

/* What autocast made of them. */
static void put_cast(const call *c, arguments *a) {
    const fa_request *r = &c->request;
    PyObject **const to[] = {r->sdpa ? &a->query : &a->q, r->sdpa ? &a->key : &a->k,
                             r->sdpa ? &a->value : &a->v, r->sdpa ? &a->attn_mask : &a->mask};
    const fa_array *const of[] = {r->q, r->k, r->v, r->mask};
    for (int i = 0; i < 4; i++)
        if (of[i]) *to[i] = ((const borrowed *)of[i])->object;
}

PyObject *autograd_apply(call *c, const arguments *given, int which) {
    module_state *state = c->state;
    if (!state->abi.offset || c->now.is_seen || c->now.dual_level || !is_plain(&c->request))
        return NULL;
    if (torch_is_transformed(state)) return NULL;
    if (!state->follow && !(state->follow = state_of(state, FA_TO_TORCH, "follow"))) return NULL;
    arguments a = *given;
    put_cast(c, &a);
    PyObject *all = pack(state, &state->signatures[which], &a);
    if (!all) return NULL;
    c->record = PyTuple_GetItem(all, 0);
    on_its_way = c;
    PyObject *result = PyObject_CallObject(state->follow, all);
    on_its_way = NULL;
    Py_DECREF(all);
    return result;
}

/* What the backward pass will read, to the context of the autograd function. */
static int remember(const module_state *state, PyObject *context, PyObject *record,
                    PyObject *const *results, PyObject *const *tensors, Py_ssize_t count) {
    PyObject *saved = PyTuple_New(RESULTS + count);
    for (Py_ssize_t i = 0; i < RESULTS + count && saved; i++)
        PyTuple_SetItem(saved, i, Py_NewRef(i < RESULTS ? results[i] : tensors[i - RESULTS]));
    const int failed = !saved || PyObject_SetAttr(context, state->to_save, saved) < 0 ||
                       PyObject_SetAttr(context, state->materialize_grads, Py_False) < 0 ||
                       PyObject_SetAttr(context, state->call, record) < 0;
    Py_XDECREF(saved);
    return failed ? -1 : 0;
}

static PyObject *hand_over(call *c, output *out, output *lse, int wants_lse, PyObject *const *given,
                           Py_ssize_t count) {
    PyObject *result = NULL;
    PyObject *results[RESULTS] = {
        c->has_out ? Py_NewRef(c->out.object) : tensor_hand_over(c->state, c->arrays, out), NULL,
        c->drawn ? c->seed.object : Py_None};
    if (results[0]) results[1] = tensor_hand_over(c->state, c->arrays, lse);
    if (results[1] && given[0] == Py_None)
        result = PyTuple_Pack(RESULTS, results[0], results[1], results[2]);
    else if (results[1] &&
             remember(c->state, given[0], given[1], results, given + 2, count - 2) == 0)
        result = wants_lse ? PyTuple_Pack(2, results[0], results[1]) : Py_NewRef(results[0]);
    Py_XDECREF(results[0]);
    Py_XDECREF(results[1]);
    return result;
}

PyObject *autograd_forward(PyObject *module, PyObject *const *given, Py_ssize_t count) {
    module_state *state = PyModule_GetState(module);
    call own, *c = on_its_way;
    fa_status status = FA_OK;
    if (count < 2 || !PyTuple_Check(given[1]))
        return PyErr_Format(PyExc_TypeError, "forward() takes a context and a record");
    on_its_way = NULL;
    if (!c || c->record != given[1]) {
        arguments a;
        const char *places;
        const int which = unpack(state, given[1], given + 2, count - 2, &a, &places);
        if (which < 0) return NULL;
        c = &own;
        call_start(c, state);
        status = prepare_forward(c, &a, which);
    }
    const int wants_lse = c->return_lse;
    output out, lse;
    fa_clear(&out, sizeof out);
    fa_clear(&lse, sizeof lse);
    c->is_differentiated = c->return_lse = 1;
    if (status == FA_OK) status = call_run(c, &out, &lse);
    PyObject *result = status == FA_OK ? hand_over(c, &out, &lse, wants_lse, given, count) : NULL;
    tensor_drop(&out);
    tensor_drop(&lse);
    if (c == &own) call_release(c);
    if (call_is_elsewhere(status))
        status = fa_fail(&c->error, FA_TYPE, "tensors with and without values in one call");
    return call_finish(state, result, status, c->request.sdpa, &c->error);
}

/* scaled_dot_product_attention's arguments as attention's, whose backward pass it has. */
static fa_status as_attention(module_state *state, arguments *a) {
    int is_bias, top_left;
    int64_t sq, sk;
    arguments b = state->signatures[ATTENTION].defaults;
    b.q = a->query, b.k = a->key, b.v = a->value, b.mask = a->attn_mask;
    b.scale = a->scale, b.dropout_p = a->dropout_p;
    TRY(torch_causal_bias(state, a->attn_mask, &is_bias, &top_left, &sq, &sk));
    if (is_bias) b.mask = Py_None;
    const int from_start = is_bias ? top_left : PyObject_IsTrue(a->is_causal);
    if (from_start < 0) return FA_RAISED;
    b.causal = from_start ? state->top_left : is_bias ? Py_True : Py_False;
    *a = b;
    return FA_OK;
}

PyObject *autograd_gradients(PyObject *module, PyObject *const *given, Py_ssize_t count) {
    module_state *state = PyModule_GetState(module);
    arguments a;
    const char *places;
    PyObject *tensors[MAX_PARAMETERS], *const saved = count == 6 ? given[1] : NULL;
    const Py_ssize_t n = saved && PyTuple_Check(saved) ? PyTuple_Size(saved) - RESULTS : -1;
    if (n < 0 || n > MAX_PARAMETERS || !PyTuple_Check(given[0]) || !PyTuple_Check(given[2]) ||
        PyTuple_Size(given[2]) != 1 + n)
        return PyErr_Format(PyExc_TypeError, "gradients() takes what forward() has saved");
    for (Py_ssize_t i = 0; i < n; i++) tensors[i] = PyTuple_GetItem(saved, RESULTS + i);
    const int which = unpack(state, given[0], tensors, n, &a, &places);
    if (which < 0 || (which == SDPA && as_attention(state, &a) != FA_OK)) return NULL;
    PyObject **const need[FA_GRADIENTS] = {&a.need_dq, &a.need_dk, &a.need_dv, &a.need_dmask,
                                           &a.need_dsink};
    int of[MAX_PARAMETERS];
    for (int i = 0; i < FA_GRADIENTS; i++) *need[i] = Py_False;
    for (Py_ssize_t i = 0; i < n; i++) {
        of[i] = gradient_of(state->signatures[which].field[(int)places[i]]);
        if (of[i] >= 0) *need[of[i]] = PyTuple_GetItem(given[2], 1 + i);
    }
    PyObject *const seed = PyTuple_GetItem(saved, 2);
    a.out = PyTuple_GetItem(saved, 0), a.lse = PyTuple_GetItem(saved, 1);
    PyObject *const dout = torch_resolve(state, given[3]), *const dlse =
                                                               dout ? torch_resolve(state, given[4])
                                                                    : NULL;
    a.dout = dout, a.dlse = dlse;
    a.dq = a.dk = a.dv = Py_None;
    if (seed != Py_None) a.seed = seed;
    if (given[5] == Py_True) a.deterministic = Py_True;
    PyObject *found = NULL, *result = dout && dlse ? PyTuple_New(1 + n) : NULL;
    if (result && (a.dout != Py_None || a.dlse != Py_None)) {
        found = backward_compute(state, &a, which == VARLEN ? VARLEN_BACKWARD : BACKWARD);
        if (!found) Py_CLEAR(result);
    }
    for (Py_ssize_t i = -1; i < n && result; i++) {
        PyObject *one = found && i >= 0 && of[i] >= 0 ? PyTuple_GetItem(found, of[i]) : Py_None;
        if (!one || PyTuple_SetItem(result, 1 + i, Py_NewRef(one)) < 0) Py_CLEAR(result);
    }
    Py_XDECREF(found);
    Py_XDECREF(dout);
    Py_XDECREF(dlse);
    return result;
}
