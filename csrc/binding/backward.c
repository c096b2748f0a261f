/* backward.c - one call of attention_backward or attention_varlen_backward: the forward's
 * arguments, its results and their gradients, borrowed; the gradients asked for, made and handed
 * over.
 */
#include "call.h"
#include "options.h"

#include <stdio.h>
#include <string.h>

static const char *const names[FA_GRADIENTS] = {"dq", "dk", "dv", "dmask", "dsink"};

/* The array that gradient i is like: the mask has a dtype of its own. */
static const borrowed *like(const call *f, int i) {
    const borrowed *a = f->arrays;
    while (i == FA_OF_MASK && &a->array != f->request.mask) a++;
    return a;
}

/* Outputs from the caller's allocator, then the backend. */
static fa_status run(backward_call *c) {
    call *f = &c->forward;
    fa_backward *b = &c->backward;
    fa_error *error = &f->error;
    if (!fa_choose_backward(b, f->backend, &c->chosen, NULL, error)) return FA_UNSUPPORTED;
    if (b->forward.where.device_type == FA_CPU) TRY(threads_warn(f->state));
    for (int i = 0; i < FA_GRADIENTS; i++) {
        const fa_gradient *g = &c->gradients[i];
        if (!g->wanted || c->given[i]) continue;
        TRY(tensor_new(f->state, like(f, i), g->ndim, g->shape, NULL, g->dtype, &c->made[i],
                       error));
        fa_bind_gradient(b, i, &c->made[i].memory.array, f->plan.layout);
    }
    const int64_t bytes = fa_backward_workspace(b, &c->chosen);
    call_work work;
    TRY(call_begin_work(&work, f->state, f->arrays, bytes, &b->forward, error));
    fa_status status = fa_run_backward(b, &c->chosen, work.memory, error);
    call_end_work(&work);
    for (int i = 0; i < FA_GRADIENTS && status == FA_OK; i++)
        if (c->given[i]) status = torch_mark_written(f->state, c->given[i]);
    return status;
}

/* (dq, dk, dv, dmask, dsink), None where not asked for. */
static PyObject *hand_over(backward_call *c) {
    PyObject *result = PyTuple_New(FA_GRADIENTS);
    for (int i = 0; i < FA_GRADIENTS && result; i++) {
        PyObject *one = Py_None;
        if (c->given[i])
            one = Py_NewRef(c->given[i]->object);
        else if (c->gradients[i].wanted)
            one = tensor_hand_over(c->forward.state, c->forward.arrays, &c->made[i]);
        else
            Py_INCREF(one);
        if (!one || PyTuple_SetItem(result, i, one) < 0) Py_CLEAR(result);
    }
    return result;
}

static fa_status get_gradients(backward_call *c, const arguments *a) {
    PyObject *const need[FA_GRADIENTS] = {a->need_dq, a->need_dk, a->need_dv, a->need_dmask,
                                          a->need_dsink};
    PyObject *const given[] = {a->dq, a->dk, a->dv};
    call *f = &c->forward;
    char name[16] = "need_";
    for (int i = 0; i < FA_GRADIENTS; i++) {
        strcpy(name + 5, names[i]);
        TRY(option_bool(f->state, need[i], name, &c->request.need[i], &f->error));
    }
    for (int i = 0; i < 3; i++) {
        if (given[i] == Py_None) continue;
        c->given[i] = &f->arrays[f->count];
        TRY(prepare_written(f, given[i], names[i], &c->request.given[i]));
    }
    return FA_OK;
}

fa_status backward_prepare(backward_call *c, const arguments *a, int which) {
    call *f = &c->forward;
    fa_backward_request *r = &c->request;
    f->is_backward = 1;
    TRY(prepare_forward(f, a, which == BACKWARD ? ATTENTION : VARLEN));
    if (f->draws)
        return fa_fail(&f->error, FA_VALUE,
                       "`seed` must be the forward's where dropout_p > 0, got None");
    if (a->dout != Py_None) TRY(prepare_array(f, a->dout, "dout", 1, &r->dout));
    TRY(prepare_array(f, a->out, "out", 1, &r->out));
    TRY(prepare_array(f, a->lse, "lse", 1, &r->lse));
    if (a->dlse != Py_None) TRY(prepare_array(f, a->dlse, "dlse", 1, &r->dlse));
    TRY(prepare_followed(f));
    TRY(get_gradients(c, a));
    r->deterministic = f->deterministic;
    return fa_check_backward(&f->request, r, &f->plan, &c->backward, c->gradients, &f->error);
}

void backward_start(backward_call *c, module_state *state) {
    call_start(&c->forward, state);
    fa_clear(&c->request, sizeof c->request);
    fa_clear(c->given, sizeof c->given);
    fa_clear(c->made, sizeof c->made);
}

fa_status backward_expect(const call *c, fa_error *reasons, fa_error *error) {
    fa_backward later = {.forward = c->plan.params, .deterministic = c->deterministic};
    const borrowed *mask = (const borrowed *)c->request.mask; /* whose first member it is */
    fa_chosen chosen;
    if (mask && mask->requires_grad) later.dmask = later.forward.scores.mask;
    if (fa_choose_backward(&later, c->backend, &chosen, reasons, error)) return FA_OK;
    const size_t used = strlen(error->text);
    snprintf(error->text + used, sizeof error->text - used,
             "; where no gradient is wanted call it under torch.no_grad()");
    return FA_UNSUPPORTED;
}

PyObject *backward_compute(module_state *state, const arguments *a, int which) {
    backward_call c;
    PyObject *result = NULL;
    backward_start(&c, state);
    fa_status status = backward_prepare(&c, a, which);
    if (status == FA_OK) status = run(&c);
    if (status == FA_OK) result = hand_over(&c);
    if (!result)
        for (int i = 0; i < FA_GRADIENTS; i++) tensor_drop(&c.made[i]);
    call_release(&c.forward);
    if (call_is_elsewhere(status) && !PyErr_Occurred())
        return call_hand_on(state, a, which, status);
    return call_finish(state, result, status, 0, &c.forward.error);
}

fa_status backward_explain(module_state *state, const arguments *a, int which,
                           const fa_backend **chosen, const char **kernel, fa_error *reasons,
                           fa_error *error) {
    backward_call c;
    backward_start(&c, state);
    fa_status status = backward_prepare(&c, a, which);
    if (status == FA_OK) {
        *chosen = fa_choose_backward(&c.backward, c.forward.backend, &c.chosen, reasons,
                                     &c.forward.error);
        if (*chosen) *kernel = fa_backward_kernel(&c.backward, &c.chosen);
    }
    *error = c.forward.error;
    call_release(&c.forward);
    return status;
}
