/* explain.c - which backend and kernel a call would run, and why the others refuse. */
#include "call.h"

/* What a call would do: the backend and the kernel, NULL if all refuse, and each one's reason. */
typedef struct explanation {
    const fa_backend *backend;
    const char *kernel;
    fa_error reasons[FA_MAX_BACKENDS], error;
} explanation;

/* The reasons of the backward pass where the forward pass would run. */
static void expect_gradient(const call *c, explanation *e) {
    fa_error later[FA_MAX_BACKENDS];
    if (backward_expect(c, later, &e->error) == FA_OK) return;
    e->backend = NULL;
    for (int32_t i = 0; i < fa_backend_count(); i++)
        if (!e->reasons[i].text[0]) e->reasons[i] = later[i];
}

static fa_status explain_forward(module_state *state, const arguments *a, int which,
                                 int differentiated, explanation *e) {
    call c;
    call_start(&c, state);
    fa_status status = prepare_forward(&c, a, which);
    if (status == FA_OK) {
        fa_expect_outputs(&c.plan, c.has_out ? &c.out.array : NULL, c.return_lse || differentiated);
        e->backend = fa_choose(&c.plan, c.backend, e->reasons, &c.error);
        if (e->backend && differentiated) expect_gradient(&c, e);
        if (e->backend) e->kernel = fa_kernel(&c.plan);
    }
    e->error = c.error;
    call_release(&c);
    return status;
}

static PyObject *explain(module_state *state, const arguments *a, int which, int differentiated) {
    explanation e = {0};
    const fa_status status =
        which == KVCACHE ? kvcache_explain(state, a, &e.backend, &e.kernel, e.reasons, &e.error)
        : which >= SPARSEK
            ? selection_explain(state, a, which, &e.backend, &e.kernel, e.reasons, &e.error)
        : which >= SPARSE
            ? sparse_explain(state, a, which, &e.backend, &e.kernel, e.reasons, &e.error)
        : which >= BACKWARD
            ? backward_explain(state, a, which, &e.backend, &e.kernel, e.reasons, &e.error)
            : explain_forward(state, a, which, differentiated, &e);
    if (call_is_elsewhere(status) && !PyErr_Occurred()) {
        const signature *s = &state->signatures[which];
        PyObject *all = arguments_pack(s, a);
        return state_hand_on(state, status, "explain",
                             all ? Py_BuildValue("(sN)", s->method.ml_name, all) : NULL);
    }
    if (status != FA_OK || PyErr_Occurred())
        return call_raise(state, status, which == SDPA, &e.error);
    PyObject *refused = PyDict_New();
    for (int32_t i = 0; i < fa_backend_count() && refused; i++) {
        PyObject *reason = e.reasons[i].text[0] ? PyUnicode_FromString(e.reasons[i].text) : NULL;
        if (!e.reasons[i].text[0]) continue;
        if (!reason || PyDict_SetItemString(refused, fa_backend_at(i)->name, reason) < 0)
            Py_CLEAR(refused);
        Py_XDECREF(reason);
    }
    if (!refused) return NULL;
    return Py_BuildValue("(zzN)", e.backend ? e.backend->name : NULL, e.kernel, refused);
}

PyObject *call_explain(PyObject *module, PyObject *const *given, Py_ssize_t count,
                       PyObject *keywords) {
    char name[64] = "";
    if (count) state_text(Py_NewRef(given[0]), sizeof name, name);
    const int which = arguments_function(name);
    module_state *state = PyModule_GetState(module);
    if (which == FUNCTIONS || !state->signatures[which].text)
        return PyErr_Format(PyExc_TypeError, "_C has no function %s", name);
    arguments a;
    if (arguments_parse(&state->signatures[which], given + 1, count - 1, keywords, &a) < 0)
        return NULL;
    return explain(state, &a, which, 0);
}

PyObject *call_explain_forward(PyObject *module, PyObject *const *given, Py_ssize_t count) {
    module_state *state = PyModule_GetState(module);
    char name[64] = "";
    if (count == 2) state_text(Py_NewRef(given[0]), sizeof name, name);
    const int which = arguments_function(name);
    arguments a;
    if (which < BACKWARD && state->signatures[which].text &&
        arguments_unpack(&state->signatures[which], given[1], &a) == 0)
        return explain(state, &a, which, 1);
    if (PyErr_Occurred()) return NULL;
    return PyErr_Format(PyExc_TypeError, "_C has no forward %s", name);
}
