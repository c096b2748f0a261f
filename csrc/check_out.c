/* check_out.c - what the caller lets us write, as out=: of the output's shape, apart from the
 * inputs, of distinct elements. */
#include "check_array.h"

#include <string.h>

/* The bytes [lo, hi) that an array lies in; empty if it has no element. tensor.c has seen to it
 * that no sum overflows. */
static void extent(const fa_array *a, uintptr_t *lo, uintptr_t *hi) {
    int64_t size = (a->dtype.bits + 7) / 8, below = 0, above = size;
    *lo = *hi = (uintptr_t)a->data;
    for (int32_t i = 0; i < a->ndim; i++) {
        if (!a->shape[i]) return;
        int64_t reach = (a->shape[i] - 1) * a->stride[i] * size;
        *(reach < 0 ? &below : &above) += reach;
    }
    *lo += (uintptr_t)below, *hi += (uintptr_t)above;
}

/* Whether two indices may be one element: false if each dimension, in the order of their strides,
 * steps over all smaller ones. */
static int overlaps_itself(const fa_array *a) {
    int64_t reach = 0; /* of the dimensions so far, in elements */
    for (int32_t used = 0, next;; used |= 1 << next) {
        int64_t step = INT64_MAX;
        next = -1;
        for (int32_t i = 0; i < a->ndim; i++) {
            int64_t stride = a->stride[i] < 0 ? -a->stride[i] : a->stride[i];
            if (a->shape[i] > 1 && !(used >> i & 1) && stride < step) step = stride, next = i;
        }
        if (next < 0) return 0;
        if (step <= reach) return 1;
        reach += step * (a->shape[next] - 1);
    }
}

/* Sums c_0 s_0 + c_1 s_1 + ... of strides s > 0 in bytes, where c_i is any of low .. high. */
typedef struct lattice {
    int32_t n;
    struct {
        int64_t stride, low, high;
    } step[2 * FA_MAX_RANK]; /* by falling stride */
    int32_t budget;          /* sums that may still be tried */
} lattice;

/* Adds sign * i * stride of each dimension. Equal strides are one step: the differences of all
 * pairs of indices are all numbers between the ends. */
static void add_steps(lattice *l, const fa_array *a, int sign) {
    const int64_t size = (a->dtype.bits + 7) / 8;
    for (int32_t i = 0; i < a->ndim; i++) {
        const int64_t signed_stride = sign * a->stride[i] * size, last = a->shape[i] - 1;
        const int64_t stride = signed_stride < 0 ? -signed_stride : signed_stride;
        int32_t at = 0;
        if (!stride || !last) continue;
        while (at < l->n && l->step[at].stride > stride) at++;
        if (at == l->n || l->step[at].stride != stride) {
            memmove(&l->step[at + 1], &l->step[at], (size_t)(l->n - at) * sizeof *l->step);
            l->step[at].stride = stride, l->step[at].low = l->step[at].high = 0;
            l->n++;
        }
        *(signed_stride < 0 ? &l->step[at].low : &l->step[at].high) +=
            signed_stride < 0 ? -last : last;
    }
}

/* Whether one of the sums of the steps from `at` on is in lo .. hi; yes too once the budget is
 * spent. Exact for what slicing makes: there at most a few multiples of a stride come so close that
 * the smaller ones reach the rest. */
static int reaches(lattice *l, int32_t at, int64_t lo, int64_t hi) {
    if (lo > hi) return 0;
    if (l->budget-- <= 0) return 1;
    if (at == l->n) return lo <= 0 && 0 <= hi;
    int64_t below = 0, above = 0; /* what the smaller strides can add */
    for (int32_t i = at + 1; i < l->n; i++)
        below += l->step[i].low * l->step[i].stride, above += l->step[i].high * l->step[i].stride;
    const int64_t stride = l->step[at].stride, from = lo - above, to = hi - below;
    int64_t first = from / stride + (from % stride > 0), last = to / stride - (to % stride < 0);
    if (first < l->step[at].low) first = l->step[at].low;
    if (last > l->step[at].high) last = l->step[at].high;
    for (int64_t c = first; c <= last; c++)
        if (reaches(l, at + 1, lo - c * stride, hi - c * stride)) return 1;
    return 0;
}

/* Whether an element of a and one of b may share a byte. Exact for arrays that are slices of one
 * buffer (columns, every other row, one of q, k, v and out side by side); a pair of strides so odd
 * that 10,000 sums do not decide counts as sharing. */
static int overlap(const fa_array *a, const fa_array *b) {
    uintptr_t lo, hi, from, to;
    extent(a, &lo, &hi);
    extent(b, &from, &to);
    if (lo == hi || from == to || lo >= to || from >= hi) return 0;
    /* They share one where the address of an element of b less that of one of a, which is the
     * distance of the first ones plus a sum, is more than -(size of b) and less than size of a. */
    lattice l = {.budget = 10000};
    add_steps(&l, b, 1);
    add_steps(&l, a, -1);
    const int64_t distance = (int64_t)((uintptr_t)b->data - (uintptr_t)a->data);
    return reaches(&l, 0, 1 - (b->dtype.bits + 7) / 8 - distance,
                   (a->dtype.bits + 7) / 8 - 1 - distance);
}

void fa_list_inputs(const fa_request *r, const fa_array *inputs[FA_MAX_INPUTS]) {
    const fa_array *const all[FA_MAX_INPUTS] = {
        r->q,    r->k,         r->v,         r->mask,      r->cu_q,
        r->cu_k, r->q_lengths, r->k_lengths, r->k_start,   r->alibi_slopes,
        r->sink, r->seed,      r->q_offset,  r->page_table};
    memcpy(inputs, all, sizeof all);
}

fa_status fa_check_written(const fa_array *a, int32_t ndim, const int64_t *shape,
                           const fa_array *like, int32_t n, const fa_array *const *inputs,
                           fa_error *error) {
    TRY(fa_check_shape(a, ndim, shape, error));
    TRY(fa_check_dtype(a, like->dtype, like, error));
    TRY(fa_check_place(a, like, error));
    for (int32_t i = 0; i < n; i++)
        if (inputs[i] && overlap(a, inputs[i]))
            return fa_fail(error, FA_VALUE, "`%s` must not overlap `%s` in memory", a->name,
                           inputs[i]->name);
    uintptr_t lo, hi;
    extent(a, &lo, &hi);
    if (lo < hi && overlaps_itself(a))
        return fa_fail(error, FA_VALUE, "`%s` must have distinct elements, got overlapping strides",
                       a->name);
    return FA_OK;
}

fa_status fa_check_out(const fa_request *r, const fa_plan *plan, const fa_array *out,
                       fa_error *error) {
    const fa_array *inputs[FA_MAX_INPUTS];
    fa_list_inputs(r, inputs);
    return fa_check_written(out, plan->out_ndim, plan->out_shape, r->q, FA_MAX_INPUTS, inputs,
                            error);
}
