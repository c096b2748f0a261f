/* selection.c - one call of sparsek_attention, sparsek_attention_varlen or
 * sparsek_attention_backward: arrays borrowed, options read, checked whole; run; results handed
 * over.
 */
#include "selection.h"

#include "options.h"
#include "sparse.h"

void selection_start(selection_call *c, module_state *state) {
    fa_clear(c, sizeof *c);
    call_start(&c->forward, state);
}

/* ---- arguments ---- */

/* window=: a number of keys, where attention has bounds. */
static fa_status get_window(call *f, PyObject *object, int64_t *to) {
    int overflow;
    return option_int(object, "window",
                      "be an int of at least 0, how many keys up to the query's own are seen", to,
                      &overflow, &f->error);
}

/* What all three functions have, and the verdict on it. */
static fa_status get_forward(selection_call *c, const arguments *a) {
    call *f = &c->forward;
    fa_request *r = &f->request;
    fa_selection_request *q = &c->request;
    fa_error *error = &f->error;
    TRY(prepare_operand(f, a->q, "q", &r->q));
    TRY(prepare_operand(f, a->k, "k", &r->k));
    TRY(prepare_operand(f, a->v, "v", &r->v));
    TRY(prepare_array(f, a->scores, "scores", 1, &q->scores));
    TRY(option_double(f->state, a->k_keep, "k_keep", &q->k, error));
    TRY(get_window(f, a->window, &q->window));
    TRY(option_bool(f->state, a->key_gate, "key_gate", &q->key_gate, error));
    TRY(option_bool(f->state, a->keep_all, "keep_all", &q->keep_all, error));
    r->causal = 1;
    TRY(sparse_get_sequences(f, a));
    TRY(option_double(f->state, a->softcap, "softcap", &r->softcap, error));
    TRY(sparse_borrow(f, a->sink, "sink", 1, &r->sink));
    r->has_scale = a->scale != Py_None;
    if (r->has_scale) TRY(option_double(f->state, a->scale, "scale", &r->scale, error));
    TRY(option_bool(f->state, a->deterministic, "deterministic", &f->deterministic, error));
    TRY(option_backend(a->backend, &f->backend, error));
    TRY(fa_check_attention(r, &f->plan, error));
    return fa_check_selection(r, q, &f->plan, &c->selection, c->results, error);
}

static fa_status get_out(selection_call *c, PyObject *object) {
    call *f = &c->forward;
    const fa_array *out = NULL;
    if (object != Py_None) {
        if (f->is_followed)
            return fa_fail(&f->error, FA_VALUE,
                           "`out` must be None where a gradient is asked for, got an array");
        c->out = &f->arrays[f->count];
        TRY(prepare_written(f, object, "out", &out));
        TRY(fa_check_selection_out(&f->request, &c->request, &f->plan, out, &f->error));
    }
    fa_expect_outputs(&f->plan, out, f->return_lse);
    c->selection.forward = f->plan.params;
    return FA_OK;
}

/* Of the backward: the forward's results and what of the gradients is wanted. */
static fa_status get_gradients(selection_call *c, const arguments *a) {
    call *f = &c->forward;
    fa_backward_request *r = &c->backward_request;
    const struct {
        PyObject *object;
        const char *name;
        int *to;
    } needs[] = {{a->need_dq, "need_dq", &r->need[FA_OF_Q]},
                 {a->need_dk, "need_dk", &r->need[FA_OF_K]},
                 {a->need_dv, "need_dv", &r->need[FA_OF_V]},
                 {a->need_dscores, "need_dscores", &c->request.need_dscores},
                 {a->need_dsink, "need_dsink", &r->need[FA_OF_SINK]}};
    TRY(sparse_borrow(f, a->dout, "dout", 0, &r->dout));
    TRY(prepare_array(f, a->out, "out", 0, &r->out));
    TRY(prepare_array(f, a->lse, "lse", 0, &r->lse));
    TRY(prepare_array(f, a->tau, "tau", 0, &c->request.tau));
    TRY(prepare_array(f, a->ends, "ends", 0, &c->request.ends));
    TRY(sparse_borrow(f, a->dlse, "dlse", 0, &r->dlse));
    for (size_t i = 0; i < sizeof needs / sizeof *needs; i++)
        TRY(option_bool(f->state, needs[i].object, needs[i].name, needs[i].to, &f->error));
    r->deterministic = f->deterministic;
    TRY(fa_check_backward(&f->request, r, &f->plan, &c->backward.attention, c->gradients,
                          &f->error));
    return fa_check_selection_backward(&c->request, &c->selection, c->results, &c->backward,
                                       &c->gradients[FA_OF_MASK], &f->error);
}

fa_status selection_prepare(selection_call *c, const arguments *a, int which) {
    call *f = &c->forward;
    f->is_backward = which == SPARSEK_BACKWARD;
    TRY(get_forward(c, a));
    if (f->is_backward) {
        if (f->is_followed)
            return fa_fail(&f->error, FA_UNSUPPORTED,
                           "sparsek_attention has no second derivatives: pass tensors without "
                           "a gradient");
        return get_gradients(c, a);
    }
    TRY(option_bool(f->state, a->return_lse, "return_lse", &f->return_lse, &f->error));
    TRY(option_bool(f->state, a->return_selection, "return_selection", &c->return_selection,
                    &f->error));
    TRY(get_out(c, a->out));
    return prepare_followed(f);
}

/* ---- runs ---- */

/* An output that is to come from the caller's allocator. */
static fa_status make(selection_call *c, int32_t ndim, const int64_t *shape, const int64_t *stride,
                      fa_any_dtype dtype, output *out) {
    call *f = &c->forward;
    return tensor_new(f->state, f->arrays, ndim, shape, stride, dtype, out, &f->error);
}

static fa_status run_forward(selection_call *c) {
    call *f = &c->forward;
    const fa_plan *plan = &f->plan;
    fa_sparsek_attention *r = &c->selection;
    fa_tensor *const more[FA_SELECTION_RESULTS] = {&r->tau, &r->ends};
    if (!fa_choose_sparsek_attention(r, f->backend, &c->chosen, NULL, &f->error))
        return FA_UNSUPPORTED;
    if (r->forward.where.device_type == FA_CPU) TRY(threads_warn(f->state));
    if (!c->out) {
        TRY(make(c, plan->out_ndim, plan->out_shape, plan->out_stride, plan->out_dtype,
                 &c->made[0]));
        r->forward.what.out.data = c->made[0].memory.array.data;
    }
    if (f->return_lse) {
        TRY(make(c, plan->lse_ndim, plan->lse_shape, NULL, plan->lse_dtype, &c->made[1]));
        r->forward.what.lse.data = c->made[1].memory.array.data;
    }
    for (int i = 0; i < FA_SELECTION_RESULTS; i++) {
        const fa_result *of = &c->results[i];
        TRY(make(c, of->ndim, of->shape, NULL, of->dtype, &c->made[2 + i]));
        more[i]->data = c->made[2 + i].memory.array.data;
    }
    call_work work;
    TRY(call_begin_work(&work, f->state, f->arrays, fa_sparsek_attention_workspace(r, &c->chosen),
                        NULL, &f->error));
    fa_status status = fa_run_sparsek_attention(r, &c->chosen, work.memory, &f->error);
    call_end_work(&work);
    if (status == FA_OK && c->out) status = torch_mark_written(f->state, c->out);
    return status;
}

static fa_status run_backward(selection_call *c) {
    call *f = &c->forward;
    fa_sparsek_attention_backward *b = &c->backward;
    if (!fa_choose_sparsek_attention_backward(b, f->backend, &c->chosen, NULL, &f->error))
        return FA_UNSUPPORTED;
    if (b->attention.forward.where.device_type == FA_CPU) TRY(threads_warn(f->state));
    for (int i = 0; i < FA_GRADIENTS; i++) {
        const fa_gradient *g = &c->gradients[i];
        if (!g->wanted) continue;
        TRY(make(c, g->ndim, g->shape, NULL, g->dtype, &c->made[i]));
        if (i == FA_OF_MASK)
            b->dscores.data = c->made[i].memory.array.data;
        else
            fa_bind_gradient(&b->attention, i, &c->made[i].memory.array, f->plan.layout);
    }
    call_work work;
    TRY(call_begin_work(&work, f->state, f->arrays,
                        fa_sparsek_attention_backward_workspace(b, &c->chosen), NULL, &f->error));
    const fa_status status =
        fa_run_sparsek_attention_backward(b, &c->chosen, work.memory, &f->error);
    call_end_work(&work);
    return status;
}

/* out, or a tuple of it, lse, tau and ends as far as asked for; or (dq, dk, dv, dscores, dsink). */
static PyObject *hand_over(selection_call *c) {
    call *f = &c->forward;
    const int wanted_of_forward[FA_GRADIENTS] = {1, f->return_lse, c->return_selection,
                                                 c->return_selection, 0};
    PyObject *results[FA_GRADIENTS], *all = NULL;
    Py_ssize_t n = 0, fine = 1;
    for (int i = 0; i < FA_GRADIENTS && fine; i++) {
        const int wanted = f->is_backward ? c->gradients[i].wanted : wanted_of_forward[i];
        if (!wanted && !f->is_backward) {
            tensor_drop(&c->made[i]);
            continue;
        }
        results[n] = !wanted            ? Py_NewRef(Py_None)
                     : i == 0 && c->out ? Py_NewRef(c->out->object)
                                        : tensor_hand_over(f->state, f->arrays, &c->made[i]);
        fine = results[n] != NULL;
        n += fine;
    }
    if (fine && n == 1) return results[0];
    if (fine && (all = PyTuple_New(n)))
        for (Py_ssize_t i = 0; i < n; i++) PyTuple_SetItem(all, i, Py_NewRef(results[i]));
    for (Py_ssize_t i = 0; i < n; i++) Py_DECREF(results[i]);
    return all;
}

PyObject *selection_compute(module_state *state, const arguments *a, int which) {
    selection_call c;
    PyObject *result = NULL;
    selection_start(&c, state);
    fa_status status = selection_prepare(&c, a, which);
    if (status == FA_OK) status = c.forward.is_backward ? run_backward(&c) : run_forward(&c);
    if (status == FA_OK) result = hand_over(&c);
    for (int i = 0; i < FA_GRADIENTS && !result; i++) tensor_drop(&c.made[i]);
    call_release(&c.forward);
    if (call_is_elsewhere(status) && !PyErr_Occurred())
        return call_hand_on(state, a, which, status);
    return call_finish(state, result, status, 0, &c.forward.error);
}

fa_status selection_explain(module_state *state, const arguments *a, int which,
                            const fa_backend **chosen, const char **kernel, fa_error *reasons,
                            fa_error *error) {
    selection_call c;
    selection_start(&c, state);
    call *f = &c.forward;
    fa_status status = selection_prepare(&c, a, which);
    if (status == FA_OK && f->is_backward) {
        *chosen = fa_choose_sparsek_attention_backward(&c.backward, f->backend, &c.chosen, reasons,
                                                       &f->error);
        if (*chosen) *kernel = fa_sparsek_attention_backward_kernel(&c.backward, &c.chosen);
    } else if (status == FA_OK) {
        *chosen =
            fa_choose_sparsek_attention(&c.selection, f->backend, &c.chosen, reasons, &f->error);
        if (*chosen) *kernel = fa_sparsek_attention_kernel(&c.selection, &c.chosen);
    }
    *error = f->error;
    call_release(f);
    return status;
}
