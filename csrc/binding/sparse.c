/* sparse.c - one call of attention_sparse, attention_sparse_varlen or attention_sparse_backward:
 * arrays borrowed, options read, checked whole; run; results handed over.
 */
#include "sparse.h"

#include "options.h"

#include <string.h>

void sparse_start(sparse_call *c, module_state *state) {
    fa_clear(c, sizeof *c);
    call_start(&c->forward, state);
}

/* ---- arguments ---- */

fa_status sparse_borrow(call *c, PyObject *object, const char *name, int is_followed,
                        const fa_array **out) {
    return object == Py_None ? FA_OK : prepare_array(c, object, name, is_followed, out);
}

fa_status sparse_get_size(call *f, PyObject *object, const char *name, int64_t *to) {
    int overflow;
    return option_int(object, name, "be an int", to, &overflow, &f->error);
}

static fa_status get_lists(sparse_call *c, const arguments *a) {
    call *f = &c->forward;
    fa_sparse_request *q = &c->request;
    fa_request window = {.causal = 0};
    TRY(prepare_array(f, a->key_lists, "key_lists", 0, &q->entries));
    TRY(sparse_borrow(f, a->counts, "counts", 0, &q->counts));
    TRY(sparse_get_size(f, a->q_block, "q_block", &q->q_block));
    TRY(sparse_get_size(f, a->k_block, "k_block", &q->k_block));
    TRY(sparse_borrow(f, a->gate, "gate", 1, &q->gate));
    TRY(option_bool(f->state, a->key_gate, "key_gate", &q->key_gate, &f->error));
    TRY(option_window(a->window_union, "window_union", &window, &f->error));
    q->has_window = a->window_union != Py_None;
    q->has_left = window.has_left, q->left = window.left;
    q->has_right = window.has_right, q->right = window.right;
    if (!a->validate) return FA_OK; /* of the backward */
    return option_bool(f->state, a->validate, "validate", &q->validate, &f->error);
}

/* Lengths, or where sequences are packed, their ends. */
fa_status sparse_get_sequences(call *f, const arguments *a) {
    fa_request *r = &f->request;
    const int packed = a->cu_seqlens_q && a->cu_seqlens_q != Py_None;
    TRY(prepare_offset(f, a->q_offset));
    if (a->q_lengths) {
        TRY(sparse_borrow(f, a->q_lengths, "q_lengths", 0, &r->q_lengths));
        TRY(sparse_borrow(f, a->k_lengths, "k_lengths", 0, &r->k_lengths));
        TRY(sparse_borrow(f, a->k_start, "k_start", 0, &r->k_start));
        TRY(option_layout(a->layout, &r->layout, &f->error));
    }
    if (!packed) return FA_OK;
    r->layout = FA_BSHD;
    TRY(prepare_array(f, a->cu_seqlens_q, "cu_seqlens_q", 0, &r->cu_q));
    TRY(prepare_array(f, a->cu_seqlens_k, "cu_seqlens_k", 0, &r->cu_k));
    TRY(sparse_get_size(f, a->max_seqlen_q, "max_seqlen_q", &r->max_sq));
    TRY(sparse_get_size(f, a->max_seqlen_k, "max_seqlen_k", &r->max_sk));
    TRY(sparse_borrow(f, a->seqused_q, "seqused_q", 0, &r->q_lengths));
    return sparse_borrow(f, a->seqused_k, "seqused_k", 0, &r->k_lengths);
}

/* What all three functions have, and the verdict on it. */
static fa_status get_forward(sparse_call *c, const arguments *a) {
    call *f = &c->forward;
    fa_request *r = &f->request;
    fa_error *error = &f->error;
    TRY(prepare_operand(f, a->q, "q", &r->q));
    TRY(prepare_operand(f, a->k, "k", &r->k));
    TRY(prepare_operand(f, a->v, "v", &r->v));
    TRY(get_lists(c, a));
    TRY(option_causal(f->state, a->causal, r, error));
    TRY(option_window(a->window, "window", r, error));
    TRY(sparse_get_sequences(f, a));
    TRY(option_double(f->state, a->softcap, "softcap", &r->softcap, error));
    TRY(sparse_borrow(f, a->sink, "sink", 1, &r->sink));
    r->has_scale = a->scale != Py_None;
    if (r->has_scale) TRY(option_double(f->state, a->scale, "scale", &r->scale, error));
    TRY(option_bool(f->state, a->deterministic, "deterministic", &f->deterministic, error));
    TRY(option_backend(a->backend, &f->backend, error));
    TRY(fa_check_attention(r, &f->plan, error));
    return fa_check_lists(r, &c->request, &f->plan, &c->sparse.lists, error);
}

static fa_status get_out(sparse_call *c, PyObject *object) {
    call *f = &c->forward;
    const fa_array *out = NULL;
    if (object != Py_None) {
        if (f->is_followed)
            return fa_fail(&f->error, FA_VALUE,
                           "`out` must be None where a gradient is asked for, got an array");
        c->out = &f->arrays[f->count];
        TRY(prepare_written(f, object, "out", &out));
        TRY(fa_check_sparse_out(&f->request, &c->request, &f->plan, out, &f->error));
    }
    fa_expect_outputs(&f->plan, out, f->return_lse);
    c->sparse.forward = f->plan.params;
    if (c->return_mass) fa_expect_like(c->request.entries, &c->sparse.mass);
    return FA_OK;
}

/* Of the backward: the forward's results and what of the gradients is wanted. */
static fa_status get_gradients(sparse_call *c, const arguments *a) {
    call *f = &c->forward;
    fa_backward_request *r = &c->backward_request;
    const struct {
        PyObject *object;
        const char *name;
        int *to;
    } needs[] = {{a->need_dq, "need_dq", &r->need[FA_OF_Q]},
                 {a->need_dk, "need_dk", &r->need[FA_OF_K]},
                 {a->need_dv, "need_dv", &r->need[FA_OF_V]},
                 {a->need_dgate, "need_dgate", &c->need_dgate},
                 {a->need_dsink, "need_dsink", &r->need[FA_OF_SINK]}};
    TRY(sparse_borrow(f, a->dout, "dout", 0, &r->dout));
    TRY(prepare_array(f, a->out, "out", 0, &r->out));
    TRY(prepare_array(f, a->lse, "lse", 0, &r->lse));
    TRY(sparse_borrow(f, a->dlse, "dlse", 0, &r->dlse));
    for (size_t i = 0; i < sizeof needs / sizeof *needs; i++)
        TRY(option_bool(f->state, needs[i].object, needs[i].name, needs[i].to, &f->error));
    if (c->need_dgate && !c->request.gate)
        return fa_fail(&f->error, FA_VALUE, "`need_dgate` must be False without a gate, got True");
    r->deterministic = f->deterministic;
    TRY(fa_check_backward(&f->request, r, &f->plan, &c->backward.attention, c->gradients,
                          &f->error));
    c->backward.lists = c->sparse.lists;
    if (!c->need_dgate) return FA_OK;
    const fa_array *gate = c->request.gate;
    c->gradients[FA_OF_MASK] = (fa_gradient){1, gate->dtype, gate->ndim, gate->shape};
    fa_expect_like(gate, &c->backward.dgate);
    return FA_OK;
}

fa_status sparse_prepare(sparse_call *c, const arguments *a, int which) {
    call *f = &c->forward;
    f->is_backward = which == SPARSE_BACKWARD;
    TRY(get_forward(c, a));
    if (f->is_backward) {
        if (f->is_followed)
            return fa_fail(&f->error, FA_UNSUPPORTED,
                           "attention_sparse has no second derivatives: pass tensors without "
                           "a gradient");
        return get_gradients(c, a);
    }
    TRY(option_bool(f->state, a->return_lse, "return_lse", &f->return_lse, &f->error));
    TRY(option_bool(f->state, a->return_mass, "return_mass", &c->return_mass, &f->error));
    TRY(get_out(c, a->out));
    return prepare_followed(f);
}

/* ---- runs ---- */

/* An output that is to come from the caller's allocator. */
static fa_status make(sparse_call *c, int32_t ndim, const int64_t *shape, const int64_t *stride,
                      fa_any_dtype dtype, output *out) {
    call *f = &c->forward;
    return tensor_new(f->state, f->arrays, ndim, shape, stride, dtype, out, &f->error);
}

static fa_status run_forward(sparse_call *c) {
    static const fa_any_dtype float32 = {FA_CODE_FLOAT, 32, 1};
    call *f = &c->forward;
    const fa_plan *plan = &f->plan;
    const fa_array *lists = c->request.entries;
    fa_sparse *s = &c->sparse;
    if (!fa_choose_sparse(s, f->backend, &c->chosen, NULL, &f->error)) return FA_UNSUPPORTED;
    if (s->forward.where.device_type == FA_CPU) TRY(threads_warn(f->state));
    if (!c->out) {
        TRY(make(c, plan->out_ndim, plan->out_shape, plan->out_stride, plan->out_dtype,
                 &c->made[0]));
        s->forward.what.out.data = c->made[0].memory.array.data;
    }
    if (f->return_lse) {
        TRY(make(c, plan->lse_ndim, plan->lse_shape, NULL, plan->lse_dtype, &c->made[1]));
        s->forward.what.lse.data = c->made[1].memory.array.data;
    }
    if (c->return_mass) {
        TRY(make(c, lists->ndim, lists->shape, NULL, float32, &c->made[2]));
        s->mass.data = c->made[2].memory.array.data;
    }
    call_work work;
    TRY(call_begin_work(&work, f->state, f->arrays, fa_sparse_workspace(s, &c->chosen), NULL,
                        &f->error));
    fa_status status = fa_run_sparse(s, &c->chosen, work.memory, &f->error);
    call_end_work(&work);
    if (status == FA_OK && c->out) status = torch_mark_written(f->state, c->out);
    return status;
}

static fa_status run_backward(sparse_call *c) {
    call *f = &c->forward;
    fa_sparse_backward *b = &c->backward;
    if (!fa_choose_sparse_backward(b, f->backend, &c->chosen, NULL, &f->error))
        return FA_UNSUPPORTED;
    if (b->attention.forward.where.device_type == FA_CPU) TRY(threads_warn(f->state));
    for (int i = 0; i < FA_GRADIENTS; i++) {
        const fa_gradient *g = &c->gradients[i];
        if (!g->wanted) continue;
        TRY(make(c, g->ndim, g->shape, NULL, g->dtype, &c->made[i]));
        if (i == FA_OF_MASK)
            b->dgate.data = c->made[i].memory.array.data;
        else
            fa_bind_gradient(&b->attention, i, &c->made[i].memory.array, f->plan.layout);
    }
    call_work work;
    TRY(call_begin_work(&work, f->state, f->arrays, fa_sparse_backward_workspace(b, &c->chosen),
                        NULL, &f->error));
    fa_status status = fa_run_sparse_backward(b, &c->chosen, work.memory, &f->error);
    call_end_work(&work);
    return status;
}

/* out, or a tuple of it, lse and mass as far as asked for; or (dq, dk, dv, dgate, dsink). */
static PyObject *hand_over(sparse_call *c) {
    call *f = &c->forward;
    PyObject *results[FA_GRADIENTS], *all = NULL;
    Py_ssize_t n = 0, fine = 1;
    for (int i = 0; i < FA_GRADIENTS && fine; i++) {
        const int wanted = f->is_backward
                               ? c->gradients[i].wanted
                               : i == 0 || (i == 1 && f->return_lse) || (i == 2 && c->return_mass);
        if (!wanted && !f->is_backward) continue;
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

PyObject *sparse_compute(module_state *state, const arguments *a, int which) {
    sparse_call c;
    PyObject *result = NULL;
    sparse_start(&c, state);
    fa_status status = sparse_prepare(&c, a, which);
    if (status == FA_OK) status = c.forward.is_backward ? run_backward(&c) : run_forward(&c);
    if (status == FA_OK) result = hand_over(&c);
    for (int i = 0; i < FA_GRADIENTS && !result; i++) tensor_drop(&c.made[i]);
    call_release(&c.forward);
    if (call_is_elsewhere(status) && !PyErr_Occurred())
        return call_hand_on(state, a, which, status);
    return call_finish(state, result, status, 0, &c.forward.error);
}

fa_status sparse_explain(module_state *state, const arguments *a, int which,
                         const fa_backend **chosen, const char **kernel, fa_error *reasons,
                         fa_error *error) {
    sparse_call c;
    sparse_start(&c, state);
    call *f = &c.forward;
    fa_status status = sparse_prepare(&c, a, which);
    if (status == FA_OK && f->is_backward) {
        *chosen = fa_choose_sparse_backward(&c.backward, f->backend, &c.chosen, reasons, &f->error);
        if (*chosen) *kernel = fa_sparse_backward_kernel(&c.backward, &c.chosen);
    } else if (status == FA_OK) {
        *chosen = fa_choose_sparse(&c.sparse, f->backend, &c.chosen, reasons, &f->error);
        if (*chosen) *kernel = fa_sparse_kernel(&c.sparse, &c.chosen);
    }
    *error = f->error;
    call_release(f);
    return status;
}
