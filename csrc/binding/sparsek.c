/* sparsek.c - sparsek and sparsek_lists, and the gradient of either: arrays borrowed, checked, run,
 * results handed over.
 */
#include "call.h"
#include "options.h"

typedef struct sparsek_call {
    call base; /* the first array is scores */
    fa_sparsek_request request;
    fa_sparsek forward;
    fa_sparsek_backward backward;
    fa_result results[FA_SPARSEK_RESULTS];
    output made[FA_SPARSEK_RESULTS];
    fa_chosen chosen;
    int is_backward;
} sparsek_call;

/* scores, k, and what else there is, in the order of the public signature. */
enum { SCORES, K, LENGTHS, SPARSEK_ARGUMENTS };
enum { SQ = 2, WINDOW, Q_OFFSET, Q_LENGTHS, K_LENGTHS, K_START, LISTS_ARGUMENTS };

static fa_status prepare_lists(sparsek_call *c, PyObject *const *given) {
    call *b = &c->base;
    fa_request *r = &b->request;
    int overflow;
    TRY(option_int(given[SQ], "sq", "be an int", &c->request.sq, &overflow, &b->error));
    TRY(option_int(given[WINDOW], "window", "be an int of at least 0", &c->request.window,
                   &overflow, &b->error));
    if (c->request.window > FA_MAX_SHIFT) c->request.window = FA_MAX_SHIFT;
    TRY(prepare_offset(b, given[Q_OFFSET]));
    TRY(prepare_some(b, given[Q_LENGTHS], "q_lengths", &r->q_lengths));
    TRY(prepare_some(b, given[K_LENGTHS], "k_lengths", &r->k_lengths));
    return prepare_some(b, given[K_START], "k_start", &r->k_start);
}

/* more: of the gradient: tau, dgates and, with lists, key_lists. */
static fa_status prepare(sparsek_call *c, PyObject *const *given, PyObject *const *more) {
    call *b = &c->base;
    fa_sparsek_request *r = &c->request;
    TRY(prepare_array(b, given[SCORES], "scores", 1, &r->scores));
    TRY(option_double(b->state, given[K], "k", &r->k, &b->error));
    if (r->has_lists)
        TRY(prepare_lists(c, given));
    else
        TRY(prepare_some(b, given[LENGTHS], "lengths", &r->lengths));
    if (more) {
        TRY(prepare_array(b, more[0], "tau", 0, &r->tau));
        TRY(prepare_array(b, more[1], "dgates", 0, &r->dgates));
        if (r->has_lists) TRY(prepare_array(b, more[2], "key_lists", 0, &r->key_lists));
    }
    TRY(fa_check_sparsek(&b->request, r, &c->forward, c->results, &b->error));
    if (more) TRY(fa_check_sparsek_backward(r, &c->forward, c->results, &c->backward, &b->error));
    return prepare_followed(b);
}

static fa_status make(sparsek_call *c, int which, fa_streams *to) {
    const fa_result *r = &c->results[which];
    call *b = &c->base;
    TRY(tensor_new(b->state, b->arrays, r->ndim, r->shape, NULL, r->dtype, &c->made[which],
                   &b->error));
    to->data = c->made[which].memory.array.data;
    return FA_OK;
}

static fa_status run_forward(sparsek_call *c) {
    call *b = &c->base;
    fa_sparsek *r = &c->forward;
    call_work work;
    if (!fa_choose_sparsek(r, &c->chosen, &b->error)) return FA_UNSUPPORTED;
    if (r->where.device_type == FA_CPU) TRY(threads_warn(b->state));
    TRY(make(c, FA_GATES, &r->gates));
    TRY(make(c, FA_TAU, &r->tau));
    if (r->has_lists) TRY(make(c, FA_KEY_LISTS, &r->key_lists));
    const int64_t bytes = fa_sparsek_workspace(r, &c->chosen);
    TRY(call_begin_work(&work, b->state, b->arrays, bytes, NULL, &b->error));
    const fa_status status = fa_run_sparsek(r, &c->chosen, work.memory, &b->error);
    call_end_work(&work);
    return status;
}

static fa_status run_backward(sparsek_call *c) {
    call *b = &c->base;
    fa_sparsek_backward *r = &c->backward;
    call_work work;
    if (!fa_choose_sparsek_backward(r, &c->chosen, &b->error)) return FA_UNSUPPORTED;
    if (r->forward.where.device_type == FA_CPU) TRY(threads_warn(b->state));
    TRY(make(c, FA_DSCORES, &r->dscores));
    const int64_t bytes = fa_sparsek_backward_workspace(r, &c->chosen);
    TRY(call_begin_work(&work, b->state, b->arrays, bytes, NULL, &b->error));
    const fa_status status = fa_run_sparsek_backward(r, &c->chosen, work.memory, &b->error);
    call_end_work(&work);
    return status;
}

/* dscores; (gates, tau); (key_lists, gates, tau). */
static PyObject *hand_over(sparsek_call *c) {
    static const int order[] = {FA_KEY_LISTS, FA_GATES, FA_TAU};
    call *b = &c->base;
    const int first = c->request.has_lists ? 0 : 1, count = 3 - first;
    if (c->is_backward) return tensor_hand_over(b->state, b->arrays, &c->made[FA_DSCORES]);
    PyObject *all = PyTuple_New(count);
    for (int i = 0; i < count && all; i++) {
        PyObject *one = tensor_hand_over(b->state, b->arrays, &c->made[order[first + i]]);
        if (!one || PyTuple_SetItem(all, i, one) < 0) Py_CLEAR(all);
    }
    return all;
}

/* given: `more` arguments of the gradient, then those of the function. */
static PyObject *compute(PyObject *module, PyObject *const *given, Py_ssize_t count, int has_lists,
                         int more, const char *name, const char *elsewhere) {
    const int wanted = more + (has_lists ? (int)LISTS_ARGUMENTS : (int)SPARSEK_ARGUMENTS);
    module_state *state = PyModule_GetState(module);
    sparsek_call c;
    PyObject *result = NULL;
    if (count != wanted)
        return PyErr_Format(PyExc_TypeError, "_C.%s() takes %d arguments, got %zd", name, wanted,
                            count);
    fa_clear(&c, sizeof c);
    call_start(&c.base, state);
    c.request.has_lists = has_lists, c.is_backward = more > 0;
    fa_status status = prepare(&c, given + more, more ? given : NULL);
    const int described = status == FA_OK && c.base.arrays[0].kind == KIND_DESCRIBED;
    if (status == FA_OK && !described) status = more ? run_backward(&c) : run_forward(&c);
    if (status == FA_OK) result = described ? Py_NewRef(Py_None) : hand_over(&c);
    for (int i = 0; i < FA_SPARSEK_RESULTS; i++) tensor_drop(&c.made[i]);
    call_release(&c.base);
    if (call_is_elsewhere(status) && !PyErr_Occurred()) {
        PyObject *all = PyTuple_New(count);
        for (Py_ssize_t i = 0; i < count && all; i++)
            if (PyTuple_SetItem(all, i, Py_NewRef(given[i])) < 0) Py_CLEAR(all);
        return state_hand_on(state, status, elsewhere, all);
    }
    return call_finish(state, result, status, 0, &c.base.error);
}

#define ENTRY(name, has_lists, more, elsewhere)                                  \
    PyObject *name(PyObject *module, PyObject *const *given, Py_ssize_t count) { \
        return compute(module, given, count, has_lists, more, #name, elsewhere); \
    }
ENTRY(sparsek, 0, 0, "take_sparsek")
ENTRY(sparsek_lists, 1, 0, "take_sparsek_lists")
ENTRY(sparsek_backward, 0, 2, "take_sparsek_backward")
ENTRY(sparsek_lists_backward, 1, 3, "take_sparsek_lists_backward")
#undef ENTRY
