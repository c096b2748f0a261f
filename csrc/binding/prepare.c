/* prepare.c - a public function's arguments become a request: arrays are borrowed, options read.
 *
 * In the order of the signature, so that the first argument that is wrong is the one that a
 * sentence names; relations between arguments are check_attention.c's.
 */
#include "call.h"
#include "options.h"

fa_status prepare_array(call *c, PyObject *object, const char *name, int is_followed,
                        const fa_array **out) {
    if (c->count == MAX_ARRAYS)
        return fa_fail(&c->error, FA_RUNTIME, "`%s` is one array more than a call has room for",
                       name);
    borrowed *b = &c->arrays[c->count];
    TRY(tensor_borrow(c->state, &c->now, object, name, b, &c->error));
    c->count++;
    *out = &b->array;
    if (!b->requires_grad) return FA_OK;
    c->is_followed |= is_followed;
    if (is_followed) return FA_OK;
    return fa_fail(&c->error, FA_UNSUPPORTED,
                   "`%s` requires grad, and its gradient is not served: pass its detach()", name);
}

static fa_status borrow(call *c, PyObject *object, const char *name, const fa_array **out) {
    return prepare_array(c, object, name, 0, out);
}

/* q, k, v or a mask, which torch's autocast casts; the backward pass gets what came of that. */
fa_status prepare_operand(call *c, PyObject *object, const char *name, const fa_array **out) {
    TRY(prepare_array(c, object, name, 1, out));
    if (c->is_backward) return FA_OK;
    return torch_autocast(c->state, &c->now, &c->arrays[c->count - 1], &c->error);
}

fa_status prepare_some(call *c, PyObject *object, const char *name, const fa_array **out) {
    return object == Py_None ? FA_OK : borrow(c, object, name, out);
}

/* Whether there is dropout and so a seed has a meaning; check_attention.c refuses what is out of
 * range. */
static int drops(const call *c) { return c->request.dropout_p > 0 && c->request.dropout_p <= 1; }

static int is_torch(const call *c) { return torch_owns(c->state, c->arrays[0].object); }

int prepare_is_array(PyObject *object) {
    PyObject *method = PyObject_GetAttrString(object, "__dlpack__");
    Py_XDECREF(method);
    if (method) return 1;
    if (!PyErr_ExceptionMatches(PyExc_AttributeError)) return -1;
    PyErr_Clear();
    return 0;
}

/* seed=: an int, an array, or None; then run() asks the generator of torch. */
static fa_status get_seed(call *c, PyObject *object) {
    char got[64];
    int overflow;
    int64_t *value = &c->request.seed_value;
    if (!drops(c)) return FA_OK;
    c->draws = object == Py_None && is_torch(c);
    if (c->draws) return FA_OK;
    if (object == Py_None)
        return fa_fail(&c->error, FA_VALUE,
                       "`seed` must be an int or a one-element array where dropout_p > 0 and `q` "
                       "is no torch tensor, got None");
    const int array = prepare_is_array(object);
    if (array) return array < 0 ? FA_RAISED : borrow(c, object, "seed", &c->request.seed);
    TRY(option_int(object, "seed", "be an int or a one-element array", value, &overflow,
                   &c->error));
    if (!overflow) return FA_OK;
    return fa_fail(&c->error, FA_VALUE, "`seed` must be from -2^63 to 2^63 - 1, got %s",
                   state_repr(object, got));
}

fa_status prepare_offset(call *c, PyObject *object) {
    fa_request *r = &c->request;
    int overflow;
    if (object == Py_None) return FA_OK;
    const int array = prepare_is_array(object);
    if (array) return array < 0 ? FA_RAISED : borrow(c, object, "q_offset", &r->q_offset);
    r->has_offset = 1;
    return option_int(object, "q_offset", "be an int or an int32 array (b,)", &r->offset, &overflow,
                      &c->error);
}

static fa_status check_writeable(call *c, const borrowed *b) {
    const char *const named = b->array.name;
    if (b->requires_grad)
        return fa_fail(&c->error, FA_UNSUPPORTED,
                       "`%s` requires grad, and what is written has none: pass its detach()",
                       named);
    TRY(torch_check_writable(c->state, b, &c->error));
    if (!b->writeable)
        return fa_fail(&c->error, FA_VALUE, "`%s` must be writeable, got a read-only array", named);
    if (b->kind == KIND_DLPACK) {
        PyObject *of = state_call(c->state, "never_written", "(O)", b->object);
        char name[16];
        if (!of) return FA_RAISED;
        if (of != Py_None) {
            state_text(of, sizeof name, name);
            return fa_fail(&c->error, FA_TYPE,
                           "`%s` must not be %s %s array: %s arrays are never written", named,
                           *name == 'M' ? "an" : "a", name, name);
        }
        Py_DECREF(of);
    }
    return FA_OK;
}

fa_status prepare_written(call *c, PyObject *object, const char *name, const fa_array **out) {
    borrowed *b = &c->arrays[c->count];
    TRY(tensor_borrow(c->state, &c->now, object, name, b, &c->error));
    c->count++;
    *out = &b->array;
    return check_writeable(c, b);
}

static fa_status check_out(call *c, PyObject *object) {
    TRY(tensor_borrow(c->state, &c->now, object, "out", &c->out, &c->error));
    c->has_out = 1;
    TRY(check_writeable(c, &c->out));
    return fa_check_out(&c->request, &c->plan, &c->out.array, &c->error);
}

/* What changes the scores, of attention and attention_varlen. */
static fa_status get_scores(call *c, const arguments *a) {
    fa_request *r = &c->request;
    fa_error *error = &c->error;
    if (a->mask != Py_None) TRY(prepare_operand(c, a->mask, "mask", &r->mask));
    TRY(option_double(c->state, a->softcap, "softcap", &r->softcap, error));
    TRY(prepare_some(c, a->alibi_slopes, "alibi_slopes", &r->alibi_slopes));
    if (a->sink != Py_None) TRY(prepare_array(c, a->sink, "sink", 1, &r->sink));
    r->has_scale = a->scale != Py_None;
    if (r->has_scale) TRY(option_double(c->state, a->scale, "scale", &r->scale, error));
    TRY(option_double(c->state, a->dropout_p, "dropout_p", &r->dropout_p, error));
    return get_seed(c, a->seed);
}

/* How they run and what they return, and the verdict on all arguments. */
static fa_status get_rest(call *c, const arguments *a) {
    if (!c->is_backward)
        TRY(option_bool(c->state, a->return_lse, "return_lse", &c->return_lse, &c->error));
    TRY(option_bool(c->state, a->deterministic, "deterministic", &c->deterministic, &c->error));
    TRY(option_bool(c->state, a->batch_invariant, "batch_invariant", &c->request.batch_invariant,
                    &c->error));
    TRY(option_backend(a->backend, &c->backend, &c->error));
    if (c->request.page_table && c->is_followed)
        return fa_fail(
            &c->error, FA_UNSUPPORTED,
            "`page_table` must be None where a gradient is asked for: keys in pages have "
            "none");
    TRY(fa_check_attention(&c->request, &c->plan, &c->error));
    if (c->is_backward || a->out == Py_None) return FA_OK;
    if (c->is_followed)
        return fa_fail(&c->error, FA_VALUE,
                       "`out` must be None where a gradient is asked for, got an array");
    return check_out(c, a->out);
}

static fa_status prepare_attention(call *c, const arguments *a) {
    fa_request *r = &c->request;
    fa_error *error = &c->error;
    TRY(prepare_operand(c, a->q, "q", &r->q));
    TRY(prepare_operand(c, a->k, "k", &r->k));
    TRY(prepare_operand(c, a->v, "v", &r->v));
    TRY(option_causal(c->state, a->causal, r, error));
    TRY(option_window(a->window, "window", r, error));
    TRY(prepare_offset(c, a->q_offset));
    TRY(prepare_some(c, a->q_lengths, "q_lengths", &r->q_lengths));
    TRY(prepare_some(c, a->k_lengths, "k_lengths", &r->k_lengths));
    TRY(prepare_some(c, a->k_start, "k_start", &r->k_start));
    TRY(get_scores(c, a));
    TRY(option_layout(a->layout, &r->layout, error));
    return get_rest(c, a);
}

/* page_table=: keys and values lie in pages, as many as seqused_k says. */
static fa_status get_pages(call *c, const arguments *a) {
    fa_error *error = &c->error;
    if (a->page_table == Py_None) return FA_OK;
    if (c->is_backward)
        return fa_fail(error, FA_UNSUPPORTED,
                       "`page_table` must be None: keys in pages have no gradient");
    if (a->cu_seqlens_k != Py_None)
        return fa_fail(error, FA_VALUE,
                       "`cu_seqlens_k` must be None with `page_table`, where `seqused_k` says how "
                       "many keys there are");
    if (a->seqused_k == Py_None)
        return fa_fail(error, FA_VALUE, "`seqused_k` must be given with `page_table`, got None");
    return borrow(c, a->page_table, "page_table", &c->request.page_table);
}

static fa_status prepare_varlen(call *c, const arguments *a) {
    fa_request *r = &c->request;
    fa_error *error = &c->error;
    int overflow;
    r->layout = FA_BSHD;
    TRY(prepare_operand(c, a->q, "q", &r->q));
    TRY(prepare_operand(c, a->k, "k", &r->k));
    TRY(prepare_operand(c, a->v, "v", &r->v));
    TRY(borrow(c, a->cu_seqlens_q, "cu_seqlens_q", &r->cu_q));
    if (a->page_table == Py_None) TRY(borrow(c, a->cu_seqlens_k, "cu_seqlens_k", &r->cu_k));
    TRY(option_int(a->max_seqlen_q, "max_seqlen_q", "be an int", &r->max_sq, &overflow, error));
    TRY(option_int(a->max_seqlen_k, "max_seqlen_k", "be an int", &r->max_sk, &overflow, error));
    TRY(prepare_some(c, a->seqused_q, "seqused_q", &r->q_lengths));
    TRY(prepare_some(c, a->seqused_k, "seqused_k", &r->k_lengths));
    TRY(prepare_offset(c, a->q_offset));
    TRY(get_pages(c, a));
    TRY(option_causal(c->state, a->causal, r, error));
    TRY(option_window(a->window, "window", r, error));
    TRY(get_scores(c, a));
    return get_rest(c, a);
}

/* attn_mask=: None, an array, or torch's CausalBias, which stands for one. */
static fa_status get_attn_mask(call *c, PyObject *object) {
    fa_request *r = &c->request;
    int64_t sq, sk;
    if (object == Py_None) return FA_OK;
    TRY(torch_causal_bias(c->state, object, &r->causal, &r->top_left, &sq, &sk));
    if (!r->causal) return prepare_operand(c, object, "attn_mask", &r->mask);
    const int64_t q_rows = r->q->ndim < 2 ? 0 : r->q->shape[r->q->ndim - 2];
    const int64_t k_rows = r->k->ndim < 2 ? 0 : r->k->shape[r->k->ndim - 2];
    if (r->top_left || (sq == q_rows && sk == k_rows)) return FA_OK;
    return fa_fail(&c->error, FA_VALUE,
                   "`attn_mask` must be the CausalBias of %lld queries and %lld keys, got one of "
                   "%lld and %lld",
                   (long long)q_rows, (long long)k_rows, (long long)sq, (long long)sk);
}

static fa_status prepare_sdpa(call *c, const arguments *a) {
    fa_request *r = &c->request;
    fa_error *error = &c->error;
    r->sdpa = 1;
    TRY(prepare_operand(c, a->query, "query", &r->q));
    TRY(prepare_operand(c, a->key, "key", &r->k));
    TRY(prepare_operand(c, a->value, "value", &r->v));
    r->keeps_order = is_torch(c);
    TRY(get_attn_mask(c, a->attn_mask));
    TRY(option_double(c->state, a->dropout_p, "dropout_p", &r->dropout_p, error));
    c->draws = drops(c);
    if (c->draws && !is_torch(c))
        return fa_fail(
            error, FA_VALUE,
            "`dropout_p` > 0 needs a torch generator here: use attention(seed=) for other arrays");
    int is_causal;
    TRY(option_bool(c->state, a->is_causal, "is_causal", &is_causal, error));
    if (is_causal && a->attn_mask != Py_None)
        return fa_fail(error, FA_VALUE, "`attn_mask` must be None with is_causal=True, got both");
    if (is_causal) r->causal = r->top_left = 1;
    r->has_scale = a->scale != Py_None;
    if (r->has_scale) TRY(option_double(c->state, a->scale, "scale", &r->scale, error));
    TRY(option_bool(c->state, a->enable_gqa, "enable_gqa", &r->enable_gqa, error));
    return fa_check_attention(r, &c->plan, error);
}

/* Results are of q's kind: of another framework's they would have no gradient. */
fa_status prepare_followed(call *c) {
    char got[128];
    if (!c->is_followed) return FA_OK;
    if (is_torch(c)) return FA_TO_TORCH;
    return fa_fail(&c->error, FA_TYPE,
                   "`%s` must be a torch tensor where a gradient is asked for, got %s",
                   c->arrays[0].array.name, state_type_name(c->arrays[0].object, got));
}

fa_status prepare_forward(call *c, const arguments *a, int which) {
    static fa_status (*const prepare[])(call *, const arguments *) = {
        [ATTENTION] = prepare_attention, [SDPA] = prepare_sdpa, [VARLEN] = prepare_varlen};
    TRY(prepare[which](c, a));
    return prepare_followed(c);
}
