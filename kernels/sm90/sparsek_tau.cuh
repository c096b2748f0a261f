/* sparsek_tau.cuh - the threshold tau of the SparseK operator (sparsek.h) of scores that lie
 * anywhere, by a warp or by a block.
 *
 * f(tau), the sum of clip(z - tau, 0, 1), is linear between the numbers z and z - 1. Each look at
 * all scores from a c finds f there and the ends of c's piece; tau is on it, or beyond one of its
 * ends, where Newton's step leads, or every third time the middle. In float64 arithmetic, whatever
 * the scores are.
 */
#ifndef FASTATTN_SM90_SPARSEK_TAU_CUH
#define FASTATTN_SM90_SPARSEK_TAU_CUH

#include "common/element.cuh"
#include "common/stream.cuh"
#include "sm90/ptx.cuh"
#include "sparsek.h"

enum { SPARSEK_THREADS = 128, SPARSEK_WARPS = SPARSEK_THREADS / 32, SPARSEK_BARRIER = 1 };

/* Score `at` of an array. */
DEVICE double read_score(const void *data, fa_dtype dtype, int64_t at) {
    if (dtype == FA_F64) return ((const double *)data)[at];
    if (dtype == FA_F32) return ((const float *)data)[at];
    const uint16_t x = ((const uint16_t *)data)[at];
    return dtype == FA_F16 ? element<FA_F16>::widen(x) : element<FA_BF16>::widen(x);
}

/* For ranks a NaN is like +inf. */
DEVICE double rank_of(double z) { return z == z ? z : INFINITY; }

/* The gate of a score by its row's tau, in the arithmetic of tau's dtype. */
template <typename REAL>
DEVICE REAL gate_of(REAL z, REAL tau, double k) {
    const REAL p = z - tau;
    if ((z == INFINITY || z == -INFINITY) && tau == tau) return z > 0 && k > 0 ? 1 : 0;
    if (z == -INFINITY) return 0;
    return p < 0 ? 0 : p > 1 ? 1 : p;
}
DEVICE double gate_by(fa_dtype dtype, double z, double tau, double k) {
    return dtype == FA_F64 ? gate_of<double>(z, tau, k) : gate_of<float>((float)z, (float)tau, k);
}

/* ---- what all threads know together -----------------------------------------------------------*/

enum fold { SUM, LEAST, GREATEST };

template <fold HOW>
DEVICE double fold_two(double x, double y) {
    return HOW == SUM ? x + y : (HOW == LEAST) == (y < x) ? y : x;
}

/* Of a warp; with `shared`, SPARSEK_WARPS numbers, of the block. */
template <fold HOW>
DEVICE double fold_all(double x, double *shared) {
#pragma unroll
    for (int i = 16; i; i /= 2) x = fold_two<HOW>(x, __shfl_xor_sync(~0u, x, i));
    if (!shared) return x;
    bar_sync(SPARSEK_BARRIER, SPARSEK_THREADS);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    bar_sync(SPARSEK_BARRIER, SPARSEK_THREADS);
    x = shared[0];
#pragma unroll
    for (int i = 1; i < SPARSEK_WARPS; ++i) x = fold_two<HOW>(x, shared[i]);
    return x;
}

/* Which scores a thread looks at. */
DEVICE int32_t first_of(const double *shared) { return shared ? threadIdx.x : threadIdx.x % 32; }
DEVICE int32_t step_of(const double *shared) { return shared ? SPARSEK_THREADS : 32; }

/* What is seen from c. */
struct outlook {
    double f;            /* f(c) */
    double slope;        /* how many are above it, by 1 or less */
    double below, above; /* the ends of its piece */
};

template <typename SCORES>
DEVICE outlook look_from(double c, const SCORES &z, int32_t n, double *shared) {
    double ones = 0, some = 0, sum = 0, below = -INFINITY, above = INFINITY;
#pragma unroll 1
    for (int32_t i = first_of(shared); i < n; i += step_of(shared)) {
        const double x = z(i), y = x - 1;
        if (x == INFINITY || x == -INFINITY) continue;
        if (x <= c)
            below = fmax(below, x);
        else
            above = fmin(above, x);
        if (y <= c)
            below = fmax(below, y);
        else
            above = fmin(above, y);
        if (y > c)
            ++ones;
        else if (x > c)
            ++some, sum += x - c;
    }
    outlook o;
    o.slope = fold_all<SUM>(some, shared);
    o.f = fold_all<SUM>(ones, shared) + fold_all<SUM>(sum, shared);
    o.below = fold_all<GREATEST>(below, shared);
    o.above = fold_all<LEAST>(above, shared);
    return o;
}

/* The middle of the plateau where f is k, if tau is on one; `dropped`: the greatest score that is
 * not among z. */
template <typename SCORES>
DEVICE double middle_of(double tau, double k, const SCORES &z, int32_t n, double dropped,
                        double *shared) {
    const double c = tau + 0.5;
    double count = 0, below = dropped, above = INFINITY;
#pragma unroll 1
    for (int32_t i = first_of(shared); i < n; i += step_of(shared)) {
        const double x = z(i);
        if (x == INFINITY || x == -INFINITY) continue;
        if (x > c)
            ++count, above = fmin(above, x);
        else
            below = fmax(below, x);
    }
    count = fold_all<SUM>(count, shared);
    below = fold_all<GREATEST>(below, shared);
    above = fold_all<LEAST>(above, shared);
    return count == k && above - below >= 1 ? 0.5 * (above - 1) + 0.5 * below : tau;
}

/* tau of scores z(0) .. z(n - 1), of which none is NaN. Others that are candidates, too, lie at or
 * below `dropped`, which is below tau. guess: anything. */
template <typename SCORES>
DEVICE double find_tau(double k, const SCORES &z, int32_t n, double dropped, double guess,
                       double *shared) {
    double count = 0, infinite = 0, low = INFINITY, high = -INFINITY;
#pragma unroll 1
    for (int32_t i = first_of(shared); i < n; i += step_of(shared)) {
        const double x = z(i);
        if (x == -INFINITY) continue;
        if (x == INFINITY)
            ++infinite;
        else
            ++count, low = fmin(low, x), high = fmax(high, x);
    }
    k -= fold_all<SUM>(infinite, shared);
    count = fold_all<SUM>(count, shared);
    if (k <= 0) return INFINITY;
    if (k >= count && (k > count || dropped == -INFINITY)) return -INFINITY;
    low = fold_all<LEAST>(low, shared), high = fold_all<GREATEST>(high, shared);
    low = (dropped > -INFINITY ? fmin(low, dropped) : low) - 1; /* a plateau may begin there */
    double tau = high, c = guess;
#pragma unroll 1
    for (int32_t i = 0; low < high; ++i) {
        const double middle = 0.5 * low + 0.5 * high;
        if (i && !(middle > low && middle < high)) break; /* f steps over k at `high` */
        if (!(c > low && c < high) || i % 3 == 2) c = middle;
        const outlook o = look_from(c, z, n, shared);
        const double next = o.slope > 0 ? c + (o.f - k) / o.slope : c;
        const bool is_before = o.f >= k; /* tau is at c or behind */
        if (o.slope > 0 ? (is_before ? next <= o.above : next >= o.below) : o.f == k) {
            tau = next;
            break;
        }
        if (is_before)
            low = fmax(low, o.above);
        else
            high = fmin(high, o.below);
        tau = high, c = next;
    }
    return k == floor(k) ? middle_of(tau, k, z, n, dropped, shared) : tau;
}

#endif
