/* check_attention.c - from a request's arrays and options to one fa_params, or one sentence naming
 * the argument.
 *
 * Stop 3 of 6. Knows no Python and reads no array but lengths, cu_seqlens and a seed of 32 bits on
 * the CPU: only shapes, strides, dtypes and devices. Next: fa_run() in csrc/dispatch.c.
 */
#include "check_attention.h"

#include <math.h>

#include "check_pages.h"

static fa_status check_what(const fa_request *r, const fa_view *q, const fa_view *k,
                            const fa_view *v, fa_plan *plan, fa_error *error) {
    fa_what *w = &plan->params.what;
    TRY(fa_check_range(r->q, q->tensor.shape[3], "d", 0, FA_MAX_LENGTH, error));
    TRY(fa_check_range(r->v, v->tensor.shape[3], "dv", 0, FA_MAX_LENGTH, error));
    TRY(fa_check_equal(r->k, k->tensor.shape[3], "d", r->q, q->tensor.shape[3], error));
    const char *const sq = r->cu_q ? "total_q" : "sq", *const sk = r->cu_q ? "total_k" : "sk";
    const int64_t most = r->cu_q ? INT32_MAX : FA_MAX_LENGTH;
    TRY(fa_check_range(r->q, q->tensor.shape[2], sq, 0, most, error));
    TRY(fa_check_range(r->k, k->tensor.shape[2], sk, 0, most, error));
    TRY(fa_check_equal(r->v, v->tensor.shape[2], sk, r->k, k->tensor.shape[2], error));
    w->sq = (int32_t)q->tensor.shape[2], w->sk = (int32_t)k->tensor.shape[2];
    w->d = (int32_t)q->tensor.shape[3], w->dv = (int32_t)v->tensor.shape[3];
    w->scale = r->has_scale ? r->scale : w->d ? 1 / sqrt(w->d) : 1;
    w->batch_invariant = r->batch_invariant;
    if (!isfinite(w->scale))
        return fa_fail(error, FA_VALUE, "`scale` must be finite, got %g", r->scale);
    return FA_OK;
}

/* Whether the heads would fit if heads and rows changed places; then the layout, as a clause. */
static const char *layout_mend(const fa_request *r, const fa_view *q, const fa_view *k,
                               const fa_view *v) {
    const int64_t hq = q->tensor.shape[2], hk = k->tensor.shape[2], hv = v->tensor.shape[2];
    const int fits = k->tensor.shape[1] == v->tensor.shape[1] && hq && hk && hk == hv && !(hq % hk);
    if (r->cu_q || !fits || r->q->ndim != 4 || (r->sdpa && !r->enable_gqa && hq != hk)) return "";
    if (r->sdpa) return ": attention(layout=\"bshd\") would fit";
    return r->layout == FA_BHSD ? ": layout=\"bshd\" would fit" : ": layout=\"bhsd\" would fit";
}

/* hq, hk and hv. Without grouped heads sdpa broadcasts them like any leading dimension. */
static fa_status check_heads(const fa_request *r, fa_view *q, fa_view *k, fa_view *v, fa_plan *plan,
                             fa_error *error) {
    int64_t hq = q->tensor.shape[1], hk = k->tensor.shape[1], hv = v->tensor.shape[1];
    TRY(fa_check_range(r->q, hq, "hq", 0, INT32_MAX, error));
    TRY(fa_check_range(r->k, hk, "hk", hq > 0, INT32_MAX, error));
    TRY(fa_check_range(r->v, hv, "hk", hq > 0, INT32_MAX, error));
    const int broadcasts = r->sdpa && !r->enable_gqa;
    if (!r->sdpa || (broadcasts && hk != 1 && hv != 1))
        TRY(fa_check_equal(r->v, hv, "hk", r->k, hk, error));
    if (broadcasts) {
        hk = hv = fa_broadcast(hk, hv);
        if (hq == 1) hq = hk;
    }
    const struct {
        const fa_array *a;
        int64_t heads;
    } sides[2] = {{r->k, hk}, {r->v, hv}};
    for (int i = 0; i < 2; i++)
        if (sides[i].heads ? hq % sides[i].heads : hq)
            return fa_fail(
                error, FA_VALUE,
                "`%s` must have a number of heads that is a multiple of `%s`'s %lld, got %lld%s",
                r->q->name, sides[i].a->name, (long long)sides[i].heads, (long long)hq,
                layout_mend(r, q, k, v));
    if (broadcasts && hk != 1 && hk != hq)
        return fa_fail(error, FA_VALUE,
                       "`%s` must have hk = %lld like `%s` or 1 without enable_gqa, got %lld%s",
                       r->k->name, (long long)hq, r->q->name, (long long)hk,
                       layout_mend(r, q, k, v));
    q->tensor.shape[1] = hq, k->tensor.shape[1] = hk, v->tensor.shape[1] = hv;
    fa_what *w = &plan->params.what;
    w->hq = (int32_t)hq, w->hk = hk ? (int32_t)hk : 1, w->hv = hv ? (int32_t)hv : 1;
    return FA_OK;
}

/* Ranks, dtypes and places of q, k and v. */
static fa_status check_operands(const fa_request *r, fa_plan *plan, fa_error *error) {
    enum { PACKED = FA_BSHD + 1 };
    static const char *const dimensions[][3] = {
        [FA_BHSD] = {"(b, hq, sq, d)", "(b, hk, sk, d)", "(b, hk, sk, dv)"},
        [FA_BSHD] = {"(b, sq, hq, d)", "(b, sk, hk, d)", "(b, sk, hk, dv)"},
        [PACKED] = {"(total_q, hq, d)", "(total_k, hk, d)", "(total_k, hk, dv)"}};
    const fa_array *const arrays[] = {r->q, r->k, r->v};
    TRY(fa_check_float(r->q, &plan->params.what.dtype, error));
    for (int i = 0; i < 3; i++) {
        const fa_array *a = arrays[i];
        const char *const wanted = dimensions[r->cu_q ? PACKED : (int)r->layout][i];
        if (!r->sdpa) TRY(fa_check_rank(a, r->cu_q ? 3 : 4, wanted, error));
        if (a->ndim < 2)
            return fa_fail(error, FA_VALUE, "`%s` must have at least 2 dimensions, got %d", a->name,
                           a->ndim);
        TRY(fa_check_dtype(a, r->q->dtype, r->q, error));
        TRY(fa_check_place(a, r->q, error));
    }
    return FA_OK;
}

/* The n leading dimensions, into lead and into the views: equal for attention, broadcast for sdpa.
 */
static fa_status check_lead(const fa_request *r, int32_t n, int64_t *lead, fa_view *q, fa_view *k,
                            fa_view *v, fa_error *error) {
    int64_t runs = 1;
    for (int32_t i = 0; i < n; i++) {
        const int64_t of_kv = fa_broadcast(k->lead_shape[i], v->lead_shape[i]);
        lead[i] = fa_broadcast(q->lead_shape[i], of_kv);
        if (!r->sdpa) {
            TRY(fa_check_equal(r->k, k->lead_shape[i], "b", r->q, q->lead_shape[i], error));
            TRY(fa_check_equal(r->v, v->lead_shape[i], "b", r->q, q->lead_shape[i], error));
        } else if (of_kv < 0 || lead[i] < 0) {
            return fa_fail(error, FA_VALUE,
                           "`%s`, `%s` and `%s` must have leading dimensions that broadcast, got "
                           "%lld, %lld and %lld",
                           r->q->name, r->k->name, r->v->name, (long long)q->lead_shape[i],
                           (long long)k->lead_shape[i], (long long)v->lead_shape[i]);
        }
        q->lead_shape[i] = k->lead_shape[i] = v->lead_shape[i] = lead[i];
        if (__builtin_mul_overflow(runs, lead[i], &runs) || runs > INT32_MAX)
            return fa_fail(error, FA_VALUE, "`%s` must have a batch of at most %d", r->q->name,
                           INT32_MAX);
    }
    return FA_OK;
}

fa_status fa_check_attention(const fa_request *r, fa_plan *plan, fa_error *error) {
    fa_what *w = &plan->params.what;
    if (r->page_table) return fa_check_paged(r, plan, error);
    fa_clear(plan, sizeof *plan);
    plan->layout = r->layout;
    TRY(check_operands(r, plan, error));

    fa_view q, k, v, mask, out;
    int32_t ndim = r->q->ndim > r->k->ndim ? r->q->ndim : r->k->ndim;
    if (r->v->ndim > ndim) ndim = r->v->ndim;
    const int32_t n = ndim > 4 ? ndim - 3 : 1;
    int64_t lead[FA_OUTER];
    fa_view_array(r->q, n, r->layout, &q);
    fa_view_array(r->k, n, r->layout, &k);
    fa_view_array(r->v, n, r->layout, &v);
    TRY(check_what(r, &q, &k, &v, plan, error));
    TRY(check_heads(r, &q, &k, &v, plan, error));
    TRY(check_lead(r, n, lead, &q, &k, &v, error));

    TRY(fa_lay_out(r, lead, n, ndim, plan, &out, error));
    const int64_t lse_shape[3] = {lead[0], w->hq, w->sq};
    plan->lse_ndim = r->cu_q ? 2 : 3;
    memcpy(plan->lse_shape, lse_shape + 3 - plan->lse_ndim, plan->lse_ndim * sizeof *lse_shape);

    if (r->cu_q) {
        TRY(fa_check_varlen(r, plan, error));
        lead[0] = w->b;
    }
    if (r->mask) TRY(fa_check_mask(r, n, lead, plan, &mask, error));
    fa_view *const views[FA_OPERANDS] = {
        [FA_OPERAND_Q] = &q,     [FA_OPERAND_K] = &k,
        [FA_OPERAND_V] = &v,     [FA_OPERAND_MASK] = r->mask && !r->cu_q ? &mask : NULL,
        [FA_OPERAND_OUT] = &out,
    };
    fa_fold_batch(views, n, plan);
    w->q = q.tensor, w->k = k.tensor, w->v = v.tensor, w->out = out.tensor;
    if (r->cu_q) /* the mask alone has a batch */
        mask.tensor.shape[0] = w->b, mask.tensor.stride[0] = mask.lead_stride[0];
    else
        w->b = (int32_t)w->q.shape[0];
    if (r->mask) plan->params.scores.mask = mask.tensor;
    plan->params.where = fa_where_of(r->q);
    TRY(fa_check_masks(r, plan, error));
    TRY(fa_check_scores(r, plan, error));
    return fa_check_dropout(r, plan, error);
}
