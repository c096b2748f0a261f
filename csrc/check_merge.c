/* check_merge.c - merge_states: the parts, each like the first, as one fa_merge. */
#include "check_array.h"
#include "views.h"

fa_status fa_check_merge(int32_t n, const fa_array *outs, const fa_array *lses, fa_layout layout,
                         fa_tensor *tensors, fa_merge *merge, fa_plan *plan, fa_error *error) {
    const fa_array *first = outs;
    memset(merge, 0, sizeof *merge);
    memset(plan, 0, sizeof *plan);
    TRY(fa_check_float(first, &merge->dtype, error));
    plan->lse_dtype = fa_lse_dtype(merge->dtype);
    TRY(fa_check_rank(first, 4, layout == FA_BHSD ? "(b, h, s, dv)" : "(b, s, h, dv)", error));
    int64_t lse_shape[3] = {first->shape[0], first->shape[layout == FA_BHSD ? 1 : 2],
                            first->shape[layout == FA_BHSD ? 2 : 1]};
    for (int32_t i = 0; i < n; i++) {
        TRY(fa_check_dtype(&outs[i], first->dtype, first, error));
        TRY(fa_check_shape(&outs[i], 4, first->shape, error));
        TRY(fa_check_place(&outs[i], first, error));
        TRY(fa_check_dtype(&lses[i], plan->lse_dtype, NULL, error));
        TRY(fa_check_shape(&lses[i], 3, lse_shape, error));
        TRY(fa_check_place(&lses[i], first, error));
        fa_bind(&tensors[i], &outs[i], layout);
        fa_bind_lse(&tensors[n + i], &lses[i]);
    }
    merge->n = n, merge->outs = tensors, merge->lses = tensors + n;
    merge->where = fa_where_of(first);
    fa_expect(&merge->out, 4, first->shape, layout);
    fa_expect_lse(&merge->lse, 3, lse_shape);
    plan->out_dtype = first->dtype;
    plan->out_ndim = 4, plan->lse_ndim = 3;
    memcpy(plan->out_shape, first->shape, 4 * sizeof *first->shape);
    memcpy(plan->lse_shape, lse_shape, sizeof lse_shape);
    return FA_OK;
}
