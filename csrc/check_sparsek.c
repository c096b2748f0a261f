/* check_sparsek.c - sparsek and sparsek_lists: scores, k and lengths as one fa_sparsek, or one
 * sentence; and what their gradient gets back. */
#include "check_attention.h"

#include <math.h>

static const char *const rule_of_shape[2] = {"(..., m)", "(b, hk, sk)"};

/* The axes of an array after the leading ones: a row, a column, or both. */
enum { ROW = 1, COLUMN = 2 };

static void place(const fa_sparsek *s, int tail, const int64_t *shape, const int64_t *stride,
                  fa_streams *to) {
    int32_t at = s->lead;
    for (int32_t i = 0; i < s->lead; i++) to->lead[i] = shape[i] == 1 ? 0 : stride[i];
    if (tail & ROW) to->row = shape[at] == 1 ? 0 : stride[at], at++;
    if (tail & COLUMN) to->column = shape[at] == 1 ? 0 : stride[at];
}

static void bind(const fa_sparsek *s, int tail, const fa_array *a, fa_streams *to) {
    to->data = a->data;
    place(s, tail, a->shape, a->stride, to);
}

/* A result (leading axes, row, column) that is to come; kept: its columns. */
static fa_status expect(const fa_sparsek *s, int tail, int64_t kept, fa_any_dtype dtype,
                        fa_streams *to, fa_result *result, fa_error *error) {
    int64_t stride[FA_MAX_RANK], size = 1;
    memset(result, 0, sizeof *result);
    result->dtype = dtype;
    memcpy(result->shape, s->shape, (size_t)s->lead * sizeof *s->shape);
    result->ndim = s->lead;
    if (tail & ROW) result->shape[result->ndim++] = s->sq;
    if (tail & COLUMN) result->shape[result->ndim++] = kept;
    for (int32_t i = result->ndim - 1; i >= 0; i--) {
        stride[i] = size;
        if (result->shape[i] && __builtin_mul_overflow(size, result->shape[i], &size)) size = -1;
        if (size < 0 || size > (int64_t)1 << 56)
            return fa_fail(error, FA_VALUE,
                           "`k` = %g gives lists of more entries than there can be", s->k);
    }
    to->data = FA_TO_COME;
    place(s, tail, result->shape, stride, to);
    return FA_OK;
}

static fa_status check_k(double k, int has_lists, fa_error *error) {
    if (!isfinite(k)) return fa_fail(error, FA_VALUE, "`k` must be finite, got %g", k);
    if (!has_lists || k <= FA_MAX_LENGTH) return FA_OK;
    return fa_fail(error, FA_VALUE, "`k` must be at most %d, got %g", FA_MAX_LENGTH, k);
}

/* int32, broadcastable to the leading axes; on a GPU only the kernels see them, and clamp. */
static fa_status check_lengths(const fa_array *a, const fa_array *scores, fa_sparsek *s,
                               fa_error *error) {
    int64_t shape[FA_MAX_LEAD] = {0}, stride[FA_MAX_LEAD] = {0}, count = 1;
    const int32_t missing = s->lead - a->ndim;
    char want[192], got[192];
    int fits = missing >= 0;
    TRY(fa_check_dtype(a, fa_int32, NULL, error));
    for (int32_t i = 0; i < a->ndim && fits; i++) {
        fits = a->shape[i] == 1 || a->shape[i] == s->shape[missing + i];
        shape[missing + i] = a->shape[i], stride[missing + i] = a->stride[i];
        count *= a->shape[i];
    }
    if (!fits)
        return fa_fail(error, FA_VALUE, "`%s` must broadcast to %s, got %s", a->name,
                       fa_shape_text(s->lead, s->shape, want),
                       fa_shape_text(a->ndim, a->shape, got));
    TRY(fa_check_place(a, scores, error));
    for (int32_t i = 0; i < missing; i++) shape[i] = 1;
    s->lengths.data = a->data;
    place(s, 0, shape, stride, &s->lengths);
    for (int64_t n = 0; n < count && a->device_type == FA_CPU; n++) {
        int64_t at = 0, left = n;
        for (int32_t i = a->ndim; i-- > 0; left /= a->shape[i])
            at += left % a->shape[i] * a->stride[i];
        const int32_t length = ((const int32_t *)a->data)[at];
        if (length < 0 || length > s->sk)
            return fa_fail(error, FA_VALUE, "`%s` must be from 0 to m = %d, got %d", a->name, s->sk,
                           length);
    }
    return FA_OK;
}

/* Which keys a row of lists sees: a causal mask that is moved by the window. */
static fa_status check_keys(const fa_request *keys, const fa_sparsek_request *r, fa_sparsek *s,
                            fa_error *error) {
    fa_request request = *keys;
    fa_plan plan;
    if (r->sq < 0 || r->sq > FA_MAX_LENGTH)
        return fa_fail(error, FA_VALUE, "`sq` must be from 0 to %d, got %lld", FA_MAX_LENGTH,
                       (long long)r->sq);
    if (r->window < 0)
        return fa_fail(error, FA_VALUE, "`window` must be at least 0, got %lld",
                       (long long)r->window);
    memset(&plan, 0, sizeof plan);
    request.q = r->scores;
    request.has_right = 1, request.right = -r->window;
    plan.params.what.b = (int32_t)s->shape[0];
    plan.params.what.sq = s->sq = (int32_t)r->sq, plan.params.what.sk = s->sk;
    TRY(fa_check_masks(&request, &plan, error));
    s->masks = plan.params.masks;
    return FA_OK;
}

fa_status fa_check_sparsek(const fa_request *keys, const fa_sparsek_request *r, fa_sparsek *s,
                           fa_result results[FA_SPARSEK_RESULTS], fa_error *error) {
    const fa_array *scores = r->scores;
    const int tail = r->has_lists ? ROW | COLUMN : COLUMN;
    memset(s, 0, sizeof *s);
    TRY(fa_check_float(scores, &s->dtype, error));
    const fa_any_dtype real = fa_lse_dtype(s->dtype);
    if (r->has_lists) TRY(fa_check_rank(scores, 3, rule_of_shape[1], error));
    if (!scores->ndim)
        return fa_fail(error, FA_VALUE, "`%s` must have at least 1 dimension %s, got 0",
                       scores->name, rule_of_shape[0]);
    s->lead = scores->ndim - 1, s->sq = 1, s->k = r->k, s->has_lists = r->has_lists;
    memcpy(s->shape, scores->shape, (size_t)s->lead * sizeof *s->shape);
    TRY(fa_check_range(scores, scores->shape[s->lead], r->has_lists ? "sk" : "m", 0, FA_MAX_LENGTH,
                       error));
    if (r->has_lists) TRY(fa_check_range(scores, scores->shape[0], "b", 0, INT32_MAX, error));
    s->sk = (int32_t)scores->shape[s->lead];
    s->where = fa_where_of(scores);
    bind(s, COLUMN, scores, &s->scores);
    TRY(check_k(r->k, r->has_lists, error));
    if (r->has_lists) TRY(check_keys(keys, r, s, error));
    if (r->lengths) TRY(check_lengths(r->lengths, scores, s, error));
    s->kept = r->has_lists && r->k > 0 ? (int32_t)ceil(r->k) : 0;
    const int64_t gates = r->has_lists ? s->kept : s->sk;
    TRY(expect(s, tail & ROW, 0, real, &s->tau, &results[FA_TAU], error));
    TRY(expect(s, tail, gates, real, &s->gates, &results[FA_GATES], error));
    if (!r->has_lists) return FA_OK;
    return expect(s, tail, s->kept, fa_int32, &s->key_lists, &results[FA_KEY_LISTS], error);
}

/* One that the forward pass gave, or is like it. */
static fa_status check_given(const fa_array *a, const fa_sparsek_request *r, const fa_result *like,
                             fa_error *error) {
    TRY(fa_check_dtype(a, like->dtype, NULL, error));
    TRY(fa_check_shape(a, like->ndim, like->shape, error));
    return fa_check_place(a, r->scores, error);
}

fa_status fa_check_sparsek_backward(const fa_sparsek_request *r, const fa_sparsek *forward,
                                    fa_result results[FA_SPARSEK_RESULTS], fa_sparsek_backward *b,
                                    fa_error *error) {
    const int tail = r->has_lists ? ROW | COLUMN : COLUMN;
    memset(b, 0, sizeof *b);
    b->forward = *forward;
    b->forward.gates.data = NULL;
    TRY(check_given(r->tau, r, &results[FA_TAU], error));
    TRY(check_given(r->dgates, r, &results[FA_GATES], error));
    bind(forward, tail & ROW, r->tau, &b->forward.tau);
    bind(forward, tail, r->dgates, &b->dgates);
    if (r->has_lists) {
        TRY(check_given(r->key_lists, r, &results[FA_KEY_LISTS], error));
        bind(forward, tail, r->key_lists, &b->forward.key_lists);
    }
    return expect(forward, COLUMN, forward->sk, r->scores->dtype, &b->dscores, &results[FA_DSCORES],
                  error);
}
