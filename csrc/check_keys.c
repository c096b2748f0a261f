/* check_keys.c - which keys a row may see: windows, lengths, offsets, packed sequences. */
#include "check_attention.h"

/* (b,) int32 of lengths, or places: from 0 to `most`, or to the rows between a sequence's offsets.
 * On a GPU only the kernels see them, and clamp. */
static fa_status check_lengths(const fa_array *a, const fa_request *r, const fa_plan *plan,
                               int64_t most, const int32_t *cu, int64_t cu_stride,
                               const int32_t **data, int64_t *stride, fa_error *error) {
    const int64_t b = plan->params.what.b;
    TRY(fa_check_vector(a, r->q, fa_int32, b, (const void **)data, stride, error));
    if (!a || a->device_type != FA_CPU) return FA_OK;
    for (int64_t i = 0; i < b; i++) {
        const int32_t length = (*data)[i * *stride];
        if (cu) most = cu[(i + 1) * cu_stride] - cu[i * cu_stride];
        if (length < 0)
            return fa_fail(error, FA_VALUE, "`%s` must be at least 0, got %d for sequence %lld",
                           a->name, length, (long long)i);
        if (length > most)
            return fa_fail(error, FA_VALUE,
                           "`%s` must be at most the %lld %s of sequence %lld, got %d", a->name,
                           (long long)most,
                           cu                  ? "rows"
                           : a == r->q_lengths ? "queries"
                                               : "keys",
                           (long long)i, length);
    }
    return FA_OK;
}

static int32_t clamp_shift(int64_t x) {
    return x < -FA_MAX_SHIFT ? -FA_MAX_SHIFT : x > FA_MAX_SHIFT ? FA_MAX_SHIFT : (int32_t)x;
}

fa_status fa_check_masks(const fa_request *r, fa_plan *plan, fa_error *error) {
    fa_masks *m = &plan->params.masks;
    const fa_varlen *v = &plan->params.varlen;
    const fa_what *w = &plan->params.what;
    m->left = clamp_shift(r->left), m->right = clamp_shift(r->right);
    if (r->has_left && r->has_right && (int64_t)m->left + m->right < 0)
        return fa_fail(error, FA_VALUE, "`window` (%lld, %lld) sees no key; unbounded is None",
                       (long long)r->left, (long long)r->right);
    if (r->causal && (!r->has_right || m->right > 0)) m->right = 0;
    if (r->top_left && (r->has_offset || r->q_offset))
        return fa_fail(error, FA_VALUE,
                       "`q_offset` must be None with causal='top-left', whose offset is 0, got %s",
                       r->q_offset ? "an array" : "an int");
    m->flags = (r->has_left ? FA_HAS_LEFT : 0) | (r->has_right || r->causal ? FA_HAS_RIGHT : 0) |
               (r->has_offset || r->top_left ? FA_HAS_OFFSET : 0);
    m->offset = clamp_shift(r->offset);
    TRY(fa_check_vector(r->q_offset, r->q, fa_int32, w->b, (const void **)&m->q_offset,
                        &m->q_offset_stride, error));
    TRY(check_lengths(r->q_lengths, r, plan, w->sq, v->cu_q, v->cu_q_stride, &m->q_lengths,
                      &m->q_lengths_stride, error));
    TRY(check_lengths(r->k_lengths, r, plan, w->sk, v->cu_k, v->cu_k_stride, &m->k_lengths,
                      &m->k_lengths_stride, error));
    return check_lengths(r->k_start, r, plan, w->sk, NULL, 0, &m->k_start, &m->k_start_stride,
                         error);
}

/* The offsets of packed sequences; on a GPU only the kernels see them, and clamp. */
static fa_status check_offsets(const fa_array *cu, const fa_array *packed, int64_t longest,
                               const char *limit, const int32_t **data, int64_t *stride,
                               fa_error *error) {
    const int64_t total = packed->shape[0];
    int64_t before = 0;
    *data = cu->data, *stride = cu->shape[0] == 1 ? 0 : cu->stride[0];
    if (packed->device_type != FA_CPU) return FA_OK;
    for (int64_t i = 0; i < cu->shape[0]; i++) {
        const int64_t at = (*data)[i * *stride];
        if (i == 0 && at != 0)
            return fa_fail(error, FA_VALUE, "`%s` must start at 0, got %lld", cu->name,
                           (long long)at);
        if (at < before)
            return fa_fail(error, FA_VALUE, "`%s` must not decrease, got %lld after %lld", cu->name,
                           (long long)at, (long long)before);
        if (at > total)
            return fa_fail(error, FA_VALUE, "`%s` must not run past `%s`'s %lld rows, got %lld",
                           cu->name, packed->name, (long long)total, (long long)at);
        if (at - before > longest)
            return fa_fail(error, FA_VALUE,
                           "`%s` must have sequences of at most `%s` = %lld rows, got %lld",
                           cu->name, limit, (long long)longest, (long long)(at - before));
        before = at;
    }
    return FA_OK;
}

fa_status fa_check_varlen(const fa_request *r, fa_plan *plan, fa_error *error) {
    fa_varlen *v = &plan->params.varlen;
    fa_what *w = &plan->params.what;
    const struct {
        const fa_array *cu;
        const char *limit;
        int64_t longest;
    } sides[2] = {{r->cu_q, "max_seqlen_q", r->max_sq}, {r->cu_k, "max_seqlen_k", r->max_sk}};
    for (int i = 0; i < 2; i++) {
        const fa_array *cu = sides[i].cu;
        if (!cu) continue; /* of a cache */
        TRY(fa_check_dtype(cu, fa_int32, NULL, error));
        TRY(fa_check_rank(cu, 1, "(b + 1,)", error));
        TRY(fa_check_place(cu, r->q, error));
        TRY(fa_check_range(cu, cu->shape[0], "b + 1", 1, INT32_MAX, error));
        TRY(fa_check_equal(cu, cu->shape[0], "b + 1", r->cu_q, r->cu_q->shape[0], error));
        if (sides[i].longest < 0 || sides[i].longest > FA_MAX_LENGTH)
            return fa_fail(error, FA_VALUE, "`%s` must be from 0 to %d, got %lld", sides[i].limit,
                           FA_MAX_LENGTH, (long long)sides[i].longest);
    }
    TRY(check_offsets(r->cu_q, r->q, r->max_sq, "max_seqlen_q", &v->cu_q, &v->cu_q_stride, error));
    if (r->cu_k)
        TRY(check_offsets(r->cu_k, r->k, r->max_sk, "max_seqlen_k", &v->cu_k, &v->cu_k_stride,
                          error));
    v->total_q = w->sq, v->total_k = w->sk;
    w->sq = (int32_t)r->max_sq, w->sk = (int32_t)r->max_sk;
    w->b = (int32_t)(r->cu_q->shape[0] - 1);
    return FA_OK;
}
