/* check_sparsek_attention.c - sparsek_attention: scores, k and the window, after the checks of
 * attention, as one fa_sparsek_attention.
 */
#include "check_sparsek_attention.h"

#include <math.h>

#include "check_attention.h"

/* Of a key or a row each: of padded sequences (b, hk, n), of packed ones (hk, n). */
static void shape_of(const fa_plan *plan, int64_t n, fa_any_dtype dtype, fa_result *result) {
    const fa_what *w = &plan->params.what;
    const int64_t shape[3] = {w->b, w->k.shape[1], n};
    result->dtype = dtype;
    result->ndim = plan->params.varlen.cu_q ? 2 : 3;
    memcpy(result->shape, shape + 3 - result->ndim, (size_t)result->ndim * sizeof *shape);
}

static fa_status check_scores(const fa_request *r, const fa_array *scores, const fa_plan *plan,
                              fa_sparsek_attention *to, fa_error *error) {
    const fa_dtype dtype = plan->params.what.dtype;
    char got[32];
    fa_result like;
    TRY(fa_check_float(scores, &to->scores_dtype, error));
    if (to->scores_dtype != dtype && (dtype == FA_F64 || to->scores_dtype != FA_F32))
        return fa_fail(error, FA_TYPE, "`%s` must be %s `%s`, got %s", scores->name,
                       dtype == FA_F64   ? "float64 like"
                       : dtype == FA_F32 ? "float32 like"
                                         : "float32 or of the dtype of",
                       r->q->name, fa_dtype_name(scores->dtype, got));
    shape_of(plan, plan->params.what.k.shape[2], scores->dtype, &like);
    TRY(fa_check_rank(scores, like.ndim, like.ndim == 2 ? "(hk, total_k)" : "(b, hk, sk)", error));
    TRY(fa_check_shape(scores, like.ndim, like.shape, error));
    TRY(fa_check_place(scores, r->q, error));
    fa_bind_lse(&to->scores, scores);
    return FA_OK;
}

fa_status fa_check_selection(const fa_request *r, const fa_selection_request *q,
                             const fa_plan *plan, fa_sparsek_attention *to,
                             fa_result results[FA_SELECTION_RESULTS], fa_error *error) {
    const fa_what *w = &plan->params.what;
    fa_clear(to, sizeof *to);
    to->forward = plan->params;
    if (w->hk != w->hv)
        return fa_fail(error, FA_VALUE, "`%s` must have hk = %d like `%s`, got %d", r->v->name,
                       w->hk, r->k->name, w->hv);
    TRY(check_scores(r, q->scores, plan, to, error));
    if (!isfinite(q->k)) return fa_fail(error, FA_VALUE, "`k_keep` must be finite, got %g", q->k);
    if (q->window < 0)
        return fa_fail(error, FA_VALUE, "`window` must be at least 0, got %lld",
                       (long long)q->window);
    to->k = q->k;
    to->kept = q->k <= 0 ? 0 : q->k < FA_MAX_LENGTH ? (int32_t)ceil(q->k) : FA_MAX_LENGTH;
    to->window = q->window < FA_MAX_SHIFT ? (int32_t)q->window : FA_MAX_SHIFT;
    to->keep_all = q->keep_all, to->key_gate = q->key_gate;
    shape_of(plan, w->q.shape[2], fa_lse_dtype(w->dtype), &results[FA_SELECTION_TAU]);
    shape_of(plan, w->k.shape[2], fa_int32, &results[FA_SELECTION_ENDS]);
    fa_expect_lse(&to->tau, results[FA_SELECTION_TAU].ndim, results[FA_SELECTION_TAU].shape);
    fa_expect_lse(&to->ends, results[FA_SELECTION_ENDS].ndim, results[FA_SELECTION_ENDS].shape);
    return FA_OK;
}

fa_status fa_check_selection_out(const fa_request *r, const fa_selection_request *q,
                                 const fa_plan *plan, const fa_array *out, fa_error *error) {
    const fa_array *inputs[FA_MAX_INPUTS + 1];
    fa_list_inputs(r, inputs);
    inputs[FA_MAX_INPUTS] = q->scores;
    return fa_check_written(out, plan->out_ndim, plan->out_shape, r->q, FA_MAX_INPUTS + 1, inputs,
                            error);
}

fa_status fa_check_selection_backward(const fa_selection_request *q,
                                      const fa_sparsek_attention *forward,
                                      const fa_result results[FA_SELECTION_RESULTS],
                                      fa_sparsek_attention_backward *b, fa_gradient *dscores,
                                      fa_error *error) {
    const fa_array *const given[FA_SELECTION_RESULTS] = {q->tau, q->ends};
    fa_tensor *const to[FA_SELECTION_RESULTS] = {&b->selection.tau, &b->selection.ends};
    b->selection = *forward;
    b->selection.forward = b->attention.forward;
    for (int i = 0; i < FA_SELECTION_RESULTS; i++) {
        TRY(fa_check_dtype(given[i], results[i].dtype, NULL, error));
        TRY(fa_check_shape(given[i], results[i].ndim, results[i].shape, error));
        TRY(fa_check_place(given[i], q->scores, error));
        fa_bind_lse(to[i], given[i]);
    }
    *dscores = (fa_gradient){.wanted = q->need_dscores};
    if (!q->need_dscores) return FA_OK;
    dscores->dtype = q->scores->dtype;
    dscores->ndim = q->scores->ndim, dscores->shape = q->scores->shape;
    fa_expect_lse(&b->dscores, q->scores->ndim, q->scores->shape);
    return FA_OK;
}
