/* views.c - arrays of the public interface, of any rank and layout, as the rank-4 (b, h, s, d) that
 * the contract knows; and the output's own layout. */
#include "views.h"

#include <stdlib.h>

#include "check_array.h"

void fa_fold_batch(fa_view *const views[FA_OPERANDS], int32_t n, fa_plan *plan) {
    int64_t shape[FA_OUTER + 1], stride[FA_OUTER + 1][FA_OPERANDS];
    int32_t kept = 0; /* groups of dimensions, innermost first */
    for (int32_t i = n - 1; i >= 0; i--) {
        int64_t size = views[0]->lead_shape[i];
        if (size == 1) continue;
        int joins = kept > 0;
        for (int32_t t = 0; t < FA_OPERANDS && joins; t++)
            if (views[t] && views[t]->lead_stride[i] != stride[kept - 1][t] * shape[kept - 1])
                joins = 0;
        if (joins) {
            shape[kept - 1] *= size;
            continue;
        }
        for (int32_t t = 0; t < FA_OPERANDS; t++)
            stride[kept][t] = views[t] ? views[t]->lead_stride[i] : 0;
        shape[kept++] = size;
    }
    if (!kept) {
        memset(stride[0], 0, sizeof stride[0]);
        shape[kept++] = 1;
    }
    for (int32_t t = 0; t < FA_OPERANDS; t++)
        if (views[t])
            views[t]->tensor.shape[0] = shape[0], views[t]->tensor.stride[0] = stride[0][t];
    plan->outer_ndim = kept - 1;
    for (int32_t i = 1; i < kept; i++) {
        plan->outer_shape[i - 1] = shape[i];
        memcpy(plan->outer_stride[i - 1], stride[i], sizeof stride[i]);
    }
}

/* Whether axis a of `like` lies outside of axis b: 1, or inside: -1; 0 says nothing. shape is the
 * output's, to which `like` broadcasts. */
static int lies_outside(const fa_array *like, int32_t ndim, const int64_t *shape, int32_t a,
                        int32_t b) {
    const int32_t from = ndim - like->ndim, axis[2] = {a - from, b - from};
    int64_t step[2];
    for (int i = 0; i < 2; i++)
        step[i] = axis[i] < 0 || like->shape[axis[i]] != shape[axis[i] + from]
                      ? 0
                      : llabs(like->stride[axis[i]]);
    if (!step[0] || !step[1]) return 0;
    if (step[0] != step[1]) return step[0] > step[1] ? 1 : -1;
    return shape[a] > shape[b];
}

fa_status fa_lay_out(const fa_request *r, const int64_t *lead, int32_t n, int32_t ndim,
                     fa_plan *plan, fa_view *out, fa_error *error) {
    const fa_what *w = &plan->params.what;
    const int64_t tail[2][3] = {{w->hq, w->sq, w->dv}, {w->sq, w->hq, w->dv}};
    int64_t bytes = r->q->dtype.bits / 8, stride = 1;
    int32_t order[FA_MAX_RANK]; /* axes, innermost first */
    fa_array array;
    plan->out_ndim = array.ndim = ndim;
    plan->out_dtype = r->q->dtype, plan->lse_dtype = fa_lse_dtype(w->dtype);
    for (int32_t i = 0; i < ndim; i++) {
        const int32_t at = i - ndim + 3;
        order[i] = ndim - 1 - i;
        array.shape[i] = at < 0 ? lead[n + at] : tail[r->layout][at];
        if (__builtin_mul_overflow(bytes, array.shape[i] ? array.shape[i] : 1, &bytes))
            return fa_fail(error, FA_VALUE, "`%s` is too large for an output", r->q->name);
    }
    for (int32_t i = 2; i < ndim && r->keeps_order; i++)
        for (int32_t j = i - 1, moved = i; j >= 1; j--) {
            const int outside = lies_outside(r->q, ndim, array.shape, order[j], order[moved]);
            if (outside < 0) break;
            if (!outside) continue;
            const int32_t axis = order[j];
            order[j] = order[moved], order[moved] = axis, moved = j;
        }
    for (int32_t i = 0; i < ndim; i++) {
        array.stride[order[i]] = stride;
        if (array.shape[order[i]]) stride *= array.shape[order[i]];
    }
    memcpy(plan->out_shape, array.shape, (size_t)ndim * sizeof *array.shape);
    memcpy(plan->out_stride, array.stride, (size_t)ndim * sizeof *array.stride);
    array.data = FA_TO_COME;
    fa_view_array(&array, n, r->layout, out);
    return FA_OK;
}

void fa_bind(fa_tensor *tensor, const fa_array *a, fa_layout layout) {
    fa_view v;
    fa_view_array(a, 1, layout, &v);
    *tensor = v.tensor;
    tensor->shape[0] = v.lead_shape[0], tensor->stride[0] = v.lead_stride[0];
}

void fa_bind_lse(fa_tensor *tensor, const fa_array *a) {
    fa_array column = *a;
    column.shape[a->ndim] = 1, column.stride[a->ndim] = 0;
    column.ndim++;
    fa_bind(tensor, &column, FA_BHSD);
}

void fa_expect(fa_tensor *tensor, int32_t ndim, const int64_t *shape, fa_layout layout) {
    fa_array a = {.data = FA_TO_COME, .ndim = ndim};
    int64_t stride = 1;
    for (int32_t i = ndim - 1; i >= 0; i--) {
        a.shape[i] = shape[i], a.stride[i] = stride;
        if (shape[i]) stride *= shape[i];
    }
    fa_bind(tensor, &a, layout);
}

void fa_expect_lse(fa_tensor *tensor, int32_t ndim, const int64_t *shape) {
    const int64_t b = ndim == 3 ? shape[0] : 1, h = shape[ndim - 2], rows = shape[ndim - 1];
    *tensor = (fa_tensor){
        FA_TO_COME, {b, h, rows, 1}, {b == 1 ? 0 : h * rows, h == 1 ? 0 : rows, rows != 1, 0}};
}

void fa_expect_outputs(fa_plan *plan, const fa_array *out, int wants_lse) {
    if (out) fa_bind(&plan->params.what.out, out, plan->layout);
    if (wants_lse) fa_expect_lse(&plan->params.what.lse, plan->lse_ndim, plan->lse_shape);
}
