/* softmax.cuh - the online softmax of a warpgroup's 64 rows, on wgmma's register fragments.
 *
 * A thread holds two rows of S and O: registers 4j, 4j+1 are two neighbouring columns of the first,
 * 4j+2, 4j+3 of the second; a row lies in a quad of lanes.
 *
 * P = 2^((s - top) * scale - MARGIN), as one FFMA and one ex2 an element. `top` need not be the
 * row's maximum, only near it: it is raised, and O and l rescaled, when a score passes its limit. A
 * warp decides that with one integer maximum of three an instruction (floats order as integers
 * where the limit is not negative), and nearly never takes the branch.
 */
#ifndef FASTATTN_SM90_SOFTMAX_CUH
#define FASTATTN_SM90_SOFTMAX_CUH

#include <math.h>
#include <stdint.h>

#include "sm90/ptx.cuh"
#include "sm90/variant.h"
#include "sm90/wgmma.cuh"

/* bf16's P has float's range: the top has P = 2^-MARGIN, so that one that is kept may be exceeded
 * by 2^(120 + MARGIN). fp16's P reaches from 2^-24 to 2^15. A score that makes P greater than
 * 2^SLACK raises the top: of GENERAL variants 8 times the top's, for a row that a mask leaves to
 * one great score shows how that was rounded. */
static constexpr float SOFTMAX_MARGIN = IS_BF16 && !GENERAL ? 24.f : 0.f,
                       SOFTMAX_SLACK = GENERAL   ? 3.f
                                       : IS_BF16 ? 0.f
                                                 : 14.f;

struct softmax_rows {
    float top[2];   /* a raw score; -inf until the row has seen a finite one */
    float minus[2]; /* what the FFMA adds: -(top * scale + MARGIN), or 0 where top is -inf */
    float l[2];     /* this thread's part of the row sum of P */
};

/* How far a raw score may be above its top: softmax_slack(scale) on the host, an argument here. */
static float softmax_slack(float scale) {
    return (SOFTMAX_MARGIN + SOFTMAX_SLACK) / (scale < 0.f ? -scale : scale);
}

DEVICE void softmax_start(softmax_rows &rows) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        rows.top[r] = -INFINITY;
        rows.minus[r] = 0.f;
        rows.l[r] = 0.f;
    }
}

/* Raises `top` to the greatest of each row, as integers: so floats order that are not negative. */
template <int N>
DEVICE void softmax_tops(const float (&x)[N], int32_t (&top)[2]) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
        top[0] = __vimax3_s32(top[0], __float_as_int(x[i]), __float_as_int(x[i + 1]));
        top[1] = __vimax3_s32(top[1], __float_as_int(x[i + 2]), __float_as_int(x[i + 3]));
    }
}

/* Whether a score of these two rows passes its limit. */
template <int N>
DEVICE bool softmax_exceeds(const softmax_rows &rows, const float (&s)[N], float slack) {
    int32_t top[2] = {__float_as_int(s[0]), __float_as_int(s[2])};
    softmax_tops(s, top);
    bool exceeds = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) { /* a negative limit is passed by all: the branch looks closer */
        float limit = rows.top[r] + slack;
        exceeds |= __int_as_float(top[r]) > limit || limit < 0.f;
    }
    return exceeds;
}

/* Raises the tops of the rows that need it, and shrinks their l; returns the factor by which O must
 * shrink before it grows again. FIRST: only of rows that have none yet, whose O and l are 0. */
template <bool FIRST, int N>
DEVICE float2 softmax_raise(softmax_rows &rows, const float (&s)[N], float scale, float slack) {
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float top = s[2 * r];
#pragma unroll
        for (int i = 2 * r; i < N; i += 4) top = fmaxf(top, fmaxf(s[i], s[i + 1]));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        float before = rows.top[r];
        bool raise = top > (FIRST && before != -INFINITY ? INFINITY : before + slack);
        top = raise ? top : before;
        factor[r] = raise ? ex2_approx((before - top) * scale) : 1.f;
        rows.top[r] = top;
        rows.minus[r] = top == -INFINITY ? 0.f : -fmaf(top, scale, SOFTMAX_MARGIN);
        if (!FIRST) rows.l[r] *= factor[r];
    }
    return make_float2(factor[0], factor[1]);
}

/* Raises the tops of rows whose P has passed its limit, to P of their greatest score, and shrinks
 * that P and l; true if O must shrink by `factor`. */
template <int N>
DEVICE bool softmax_follow(softmax_rows &rows, float (&p)[N], float scale, float2 &factor) {
    constexpr int32_t LIMIT = 127 + (int)SOFTMAX_SLACK << 23; /* 2^SLACK: P orders as integers */
    int32_t top[2] = {0, 0};
    softmax_tops(p, top);
    if (!__any_sync(~0u, max(top[0], top[1]) > LIMIT)) return false;
    float shrink[2];
    bool gone = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float most = __int_as_float(top[r]);
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
        const bool raise = most > __int_as_float(LIMIT);
        const float up = raise ? __log2f(most) : 0.f;
        shrink[r] = raise ? rcp_approx(most) : 1.f;
        rows.top[r] += __fdividef(up, scale);
        rows.minus[r] -= up;
        rows.l[r] *= shrink[r];
        /* Beyond that the reciprocal is 0. */
        gone |= most >= 0x1p120f;
#pragma unroll
        for (int i = 2 * r; i < N; i += 4) p[i] *= shrink[r], p[i + 1] *= shrink[r];
    }
    if (__any_sync(~0u, gone)) { /* the tile comes again: no more of this warp's P, and the vote */
        rows.minus[0] = rows.minus[1] = -INFINITY;
        rows.l[0] = rows.l[1] = INFINITY;
    }
    factor = make_float2(shrink[0], shrink[1]);
    return true;
}

template <int N>
DEVICE void softmax_shrink(float (&o)[N], float2 factor) {
#pragma unroll
    for (int i = 0; i < N; ++i) o[i] *= i / 2 & 1 ? factor.y : factor.x;
}

/* Whether `minus` is rounded so coarsely that P of the top is no power of 2: the rounding of P
 * would then show even in a row of one key. */
DEVICE bool softmax_is_coarse(float minus) { return fabsf(minus) > 8192.f; }
DEVICE bool softmax_is_coarse(const softmax_rows &rows) {
    return softmax_is_coarse(fmaxf(fabsf(rows.minus[0]), fabsf(rows.minus[1])));
}

/* Whether both rows have tops, and P of them is a power of 2. */
DEVICE bool softmax_is_settled(const softmax_rows &rows) {
    return (fminf(rows.top[0], rows.top[1]) > -INFINITY) & !softmax_is_coarse(rows);
}

/* Scores from their row's top on, in rows that need it; returns what the FFMA then adds. */
template <int N>
DEVICE float2 softmax_center(const softmax_rows &rows, float (&s)[N]) {
    float minus[2] = {rows.minus[0], rows.minus[1]};
    if (__any_sync(~0u, softmax_is_coarse(rows))) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            if (!softmax_is_coarse(minus[r])) continue;
            minus[r] = -SOFTMAX_MARGIN;
#pragma unroll
            for (int i = 2 * r; i < N; i += 4) s[i] -= rows.top[r], s[i + 1] -= rows.top[r];
        }
    }
    return make_float2(minus[0], minus[1]);
}

/* P in place of scores, and its row sums. */
template <bool SUM, int N>
DEVICE void softmax_exp(softmax_rows &rows, float (&s)[N], float scale, float2 minus) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
        s[i] = ex2_approx(fmaf(s[i], scale, i / 2 & 1 ? minus.y : minus.x));
        if (SUM) rows.l[i / 2 & 1] += s[i];
    }
}

/* Rounds P; four registers of 16 columns are wgmma's A fragment as they come. */
template <int N>
DEVICE void softmax_pack(const float (&s)[N], uint32_t *p) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) p[i] = cvt_pack(s[2 * i], s[2 * i + 1]);
}

/* The whole row's sum, in all four lanes of its quad. */
DEVICE float softmax_row_sum(float l) {
    l += __shfl_xor_sync(~0u, l, 1);
    return l + __shfl_xor_sync(~0u, l, 2);
}

#endif
