/* kvcache.c - one call of attention_kvcache: its arrays borrowed, the caches among them, which it
 * writes where new keys come; checked whole; run; out, and what else was asked for, handed over.
 */
#include "call.h"
#include "options.h"

typedef struct kvcache_call {
    call forward; /* q, k_cache and v_cache are its q, k and v */
    fa_kvcache_request request;
    fa_kvcache cache;
    int64_t mass_shape[3];
    fa_chosen chosen;
    int return_mass;
    const borrowed *written[3]; /* out, k_cache and v_cache, of forward.arrays; NULL: not written */
    output out, lse, mass;
} kvcache_call;

/* A cache: only read where no new keys come. */
static fa_status borrow_cache(kvcache_call *c, PyObject *object, const char *name, int is_written,
                              int which, const fa_array **out) {
    if (!is_written) return prepare_array(&c->forward, object, name, 0, out);
    c->written[which] = &c->forward.arrays[c->forward.count];
    return prepare_written(&c->forward, object, name, out);
}

/* cache_seqlens=: an int or an array. */
static fa_status get_lengths(kvcache_call *c, PyObject *object) {
    call *f = &c->forward;
    int overflow;
    const int array = prepare_is_array(object);
    if (array < 0) return FA_RAISED;
    if (array) return prepare_array(f, object, "cache_seqlens", 0, &c->request.lengths);
    return option_int(object, "cache_seqlens", "be an int or an int32 array (b,)",
                      &c->request.length, &overflow, &f->error);
}

/* cu_seqlens_q= and max_seqlen_q=: the queries are packed. */
static fa_status get_packed(call *f, const arguments *a) {
    fa_request *r = &f->request;
    int overflow;
    TRY(prepare_some(f, a->cu_seqlens_q, "cu_seqlens_q", &r->cu_q));
    if (a->max_seqlen_q != Py_None && !r->cu_q)
        return fa_fail(&f->error, FA_VALUE,
                       "`max_seqlen_q` must be None without `cu_seqlens_q`, got a number");
    if (a->max_seqlen_q != Py_None)
        return option_int(a->max_seqlen_q, "max_seqlen_q", "be an int", &r->max_sq, &overflow,
                          &f->error);
    r->max_sq = r->q->ndim ? r->q->shape[0] : 0;
    if (r->max_sq > FA_MAX_LENGTH) r->max_sq = FA_MAX_LENGTH;
    return FA_OK;
}

/* What is in the signature and not served yet. */
static fa_status refuse_later(call *f, const arguments *a) {
    const struct {
        PyObject *object;
        const char *name, *why;
    } later[] = {
        {a->k_scale, "k_scale", "caches have the dtype of `q`"},
        {a->v_scale, "v_scale", "caches have the dtype of `q`"},
    };
    for (size_t i = 0; i < sizeof later / sizeof *later; i++)
        if (later[i].object != Py_None)
            return fa_fail(&f->error, FA_UNSUPPORTED, "`%s` is not built yet: %s", later[i].name,
                           later[i].why);
    return FA_OK;
}

static fa_status get_arrays(kvcache_call *c, const arguments *a) {
    call *f = &c->forward;
    fa_request *r = &f->request;
    fa_kvcache_request *q = &c->request;
    const int appends = a->k != Py_None || a->v != Py_None;
    TRY(prepare_array(f, a->q, "q", 0, &r->q));
    TRY(borrow_cache(c, a->k_cache, "k_cache", appends, 1, &r->k));
    TRY(borrow_cache(c, a->v_cache, "v_cache", appends, 2, &r->v));
    TRY(get_lengths(c, a->cache_seqlens));
    TRY(prepare_some(f, a->k, "k", &q->k_new));
    TRY(prepare_some(f, a->v, "v", &q->v_new));
    TRY(prepare_some(f, a->page_table, "page_table", &q->page_table));
    TRY(prepare_some(f, a->cache_batch_idx, "cache_batch_idx", &q->batch_idx));
    TRY(prepare_some(f, a->cache_leftpad, "cache_leftpad", &r->k_start));
    TRY(get_packed(f, a));
    TRY(refuse_later(f, a));
    TRY(prepare_some(f, a->rotary_cos, "rotary_cos", &q->cos));
    TRY(prepare_some(f, a->rotary_sin, "rotary_sin", &q->sin));
    TRY(option_bool(f->state, a->rotary_interleaved, "rotary_interleaved", &q->interleaved,
                    &f->error));
    TRY(prepare_some(f, a->alibi_slopes, "alibi_slopes", &r->alibi_slopes));
    return prepare_some(f, a->sink, "sink", &r->sink);
}

static fa_status get_options(kvcache_call *c, const arguments *a) {
    call *f = &c->forward;
    fa_request *r = &f->request;
    fa_error *error = &f->error;
    int64_t splits;
    int overflow;
    TRY(option_causal(f->state, a->causal, r, error));
    TRY(option_int(a->num_splits, "num_splits", "be an int", &splits, &overflow, error));
    if (splits < 0)
        return fa_fail(error, FA_VALUE, "`num_splits` must be at least 0, got %lld",
                       (long long)splits);
    TRY(option_layout(a->layout, &r->layout, error));
    TRY(option_bool(f->state, a->return_lse, "return_lse", &f->return_lse, error));
    TRY(option_bool(f->state, a->return_mass, "return_mass", &c->return_mass, error));
    TRY(option_window(a->window, "window", r, error));
    TRY(option_double(f->state, a->softcap, "softcap", &r->softcap, error));
    r->has_scale = a->scale != Py_None;
    if (r->has_scale) TRY(option_double(f->state, a->scale, "scale", &r->scale, error));
    TRY(option_bool(f->state, a->batch_invariant, "batch_invariant", &r->batch_invariant, error));
    return option_backend(a->backend, &f->backend, error);
}

static fa_status prepare(kvcache_call *c, const arguments *a) {
    call *f = &c->forward;
    const fa_array *out = NULL;
    TRY(get_arrays(c, a));
    TRY(get_options(c, a));
    TRY(fa_check_kvcache(&f->request, &c->request, &f->plan, &c->cache, c->mass_shape, &f->error));
    if (a->out != Py_None) {
        c->written[0] = &f->arrays[f->count];
        TRY(prepare_written(f, a->out, "out", &out));
        TRY(fa_check_kvcache_out(&f->request, &c->request, &f->plan, out, &f->error));
    }
    fa_expect_outputs(&f->plan, out, f->return_lse);
    fa_expect_kvcache(&f->plan, c->mass_shape, c->return_mass, &c->cache);
    return FA_OK;
}

/* An output that is to come from the caller's allocator. */
static fa_status make(kvcache_call *c, int32_t ndim, const int64_t *shape, const int64_t *stride,
                      fa_any_dtype dtype, output *out, fa_tensor *to) {
    call *f = &c->forward;
    TRY(tensor_new(f->state, f->arrays, ndim, shape, stride, dtype, out, &f->error));
    to->data = out->memory.array.data;
    return FA_OK;
}

static fa_status run(kvcache_call *c) {
    static const fa_any_dtype float32 = {FA_CODE_FLOAT, 32, 1};
    call *f = &c->forward;
    fa_plan *plan = &f->plan;
    fa_kvcache *k = &c->cache;
    if (!fa_choose_kvcache(k, f->backend, &c->chosen, NULL, &f->error)) return FA_UNSUPPORTED;
    if (k->forward.where.device_type == FA_CPU) TRY(threads_warn(f->state));
    if (!c->written[0])
        TRY(make(c, plan->out_ndim, plan->out_shape, plan->out_stride, plan->out_dtype, &c->out,
                 &k->forward.what.out));
    if (f->return_lse)
        TRY(make(c, plan->lse_ndim, plan->lse_shape, NULL, plan->lse_dtype, &c->lse,
                 &k->forward.what.lse));
    if (c->return_mass) TRY(make(c, 3, c->mass_shape, NULL, float32, &c->mass, &k->mass));
    const int64_t bytes = fa_kvcache_workspace(k, &c->chosen);
    call_work work;
    TRY(call_begin_work(&work, f->state, f->arrays, bytes, &k->forward, &f->error));
    fa_status status = fa_run_kvcache(k, &c->chosen, work.memory, &f->error);
    call_end_work(&work);
    for (int i = 0; i < 3 && status == FA_OK; i++)
        if (c->written[i]) status = torch_mark_written(f->state, c->written[i]);
    return status;
}

/* out, or a tuple of it and what else was asked for. */
static PyObject *hand_over(kvcache_call *c) {
    call *f = &c->forward;
    PyObject *results[3] = {NULL}, *all = NULL;
    Py_ssize_t n = 0, made;
    results[n++] = c->written[0] ? Py_NewRef(c->written[0]->object)
                                 : tensor_hand_over(f->state, f->arrays, &c->out);
    if (f->return_lse) results[n++] = tensor_hand_over(f->state, f->arrays, &c->lse);
    if (c->return_mass) results[n++] = tensor_hand_over(f->state, f->arrays, &c->mass);
    for (made = 0; made < n && results[made];) made++;
    if (made == n && n == 1) return results[0];
    if (made == n && (all = PyTuple_New(n)))
        for (Py_ssize_t i = 0; i < n; i++) PyTuple_SetItem(all, i, Py_NewRef(results[i]));
    for (Py_ssize_t i = 0; i < n; i++) Py_XDECREF(results[i]);
    return all;
}

static void start(kvcache_call *c, module_state *state) {
    fa_clear(c, sizeof *c);
    call_start(&c->forward, state);
}

PyObject *kvcache_compute(module_state *state, const arguments *a) {
    kvcache_call c;
    PyObject *result = NULL;
    start(&c, state);
    fa_status status = prepare(&c, a);
    if (status == FA_OK) status = run(&c);
    if (status == FA_OK) result = hand_over(&c);
    if (!result) {
        tensor_drop(&c.out);
        tensor_drop(&c.lse);
        tensor_drop(&c.mass);
    }
    call_release(&c.forward);
    if (call_is_elsewhere(status) && !PyErr_Occurred())
        return call_hand_on(state, a, KVCACHE, status);
    return call_finish(state, result, status, 0, &c.forward.error);
}

fa_status kvcache_explain(module_state *state, const arguments *a, const fa_backend **chosen,
                          const char **kernel, fa_error *reasons, fa_error *error) {
    kvcache_call c;
    start(&c, state);
    fa_status status = prepare(&c, a);
    if (status == FA_OK) {
        *chosen =
            fa_choose_kvcache(&c.cache, c.forward.backend, &c.chosen, reasons, &c.forward.error);
        if (*chosen) *kernel = fa_kvcache_kernel(&c.cache, &c.chosen);
    }
    *error = c.forward.error;
    call_release(&c.forward);
    return status;
}
