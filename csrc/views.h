/* views.h - arrays of the public interface, of any rank and layout, as the rank-4 (b, h, s, d) that
 * the contract knows; and the output's own layout. */
#ifndef FASTATTN_VIEWS_H
#define FASTATTN_VIEWS_H

#include "check.h"

/* An array as `lead` leading dimensions and the rank-4 tail of the contract. */
typedef struct fa_view {
    fa_tensor tensor; /* shape[0] and stride[0] are set by fa_fold_batch() */
    int64_t lead_shape[FA_OUTER], lead_stride[FA_OUTER];
} fa_view;

/* The last three dimensions (h, s, d), missing ones of size 1, and the leading ones, right-aligned
 * to n of them; size-1 strides become 0, so that a later broadcast is a change of shape alone. */
static inline void fa_view_array(const fa_array *a, int32_t n, fa_layout layout, fa_view *out) {
    static const int axis_of[2][4] = {{0, 1, 2, 3}, {0, 2, 1, 3}};
    out->tensor.data = a->data;
    for (int32_t i = 0; i < n + 3; i++) {
        int32_t from = i - (n + 3) + a->ndim;
        if (layout == FA_BSHD) from = axis_of[1][i] - 4 + a->ndim; /* rank 4 or 3, n = 1 */
        int64_t shape = from < 0 ? 1 : a->shape[from];
        int64_t stride = shape == 1 ? 0 : a->stride[from];
        if (i < n)
            out->lead_shape[i] = shape, out->lead_stride[i] = stride;
        else
            out->tensor.shape[i - n + 1] = shape, out->tensor.stride[i - n + 1] = stride;
    }
}

/* Common size of a broadcast dimension; -1 if two sizes other than 1 differ. */
static inline int64_t fa_broadcast(int64_t a, int64_t b) {
    return a == b || b == 1 ? a : a == 1 ? b : -1;
}

/* Stretches a size-1 dimension (whose stride is 0) to size; 0 if it has another size. */
static inline int fa_stretch(int64_t *shape, int64_t size) {
    if (*shape == 1) *shape = size;
    return *shape == size;
}

/* Turns the n leading dimensions into b and as few outer dimensions as the strides of all arrays
 * allow; NULL where there is no such array. */
void fa_fold_batch(fa_view *const views[FA_OPERANDS], int32_t n, fa_plan *plan);

/* The output's shape in the caller's layout, and its dense strides: contiguous, or its axes in the
 * order of q's, found as torch's empty_like() does. The last one stays innermost, for backends
 * write whole rows. */
fa_status fa_lay_out(const fa_request *r, const int64_t *lead, int32_t n, int32_t ndim,
                     fa_plan *plan, fa_view *out, fa_error *error);

/* An array of rank 4 at most, or a lse (b, h, s) or (h, total) with a last dimension of 1. */
void fa_bind(fa_tensor *tensor, const fa_array *a, fa_layout layout);
void fa_bind_lse(fa_tensor *tensor, const fa_array *a);

/* The same of contiguous ones that are to come. */
void fa_expect(fa_tensor *tensor, int32_t ndim, const int64_t *shape, fa_layout layout);
void fa_expect_lse(fa_tensor *tensor, int32_t ndim, const int64_t *shape);

#endif
