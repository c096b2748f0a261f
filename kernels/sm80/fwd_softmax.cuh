/* fwd_softmax.cuh - the online softmax of a warp's rows: P = 2^(s * units - top * units), where
 * `top` is the greatest score of the row so far.
 *
 * Row i of a lane is row 8 i + lane / 4 of its warp's.
 */
#ifndef FASTATTN_SM80_FWD_SOFTMAX_CUH
#define FASTATTN_SM80_FWD_SOFTMAX_CUH

#include <math.h>

#include "sm80/fragments.cuh"
#include "sm80/ptx.cuh"

static constexpr int ROWS = 2 * STRIPS; /* of a lane */

/* What a warp has of its rows. */
struct rows_state {
    row_values o;
    real top[ROWS];   /* -inf until the row has seen a greater score */
    real minus[ROWS]; /* -(top * units), or 0 where top is -inf */
    real sum[ROWS];   /* of P, this lane's columns */
};

DEVICE float exp2_of(float x) { return ex2_approx(x); }
DEVICE double exp2_of(double x) { return exp2(x); }
DEVICE float greater(float a, float b) { return fmaxf(a, b); }
DEVICE double greater(double a, double b) { return fmax(a, b); }

DEVICE void start_rows(rows_state &st) {
#pragma unroll
    for (int m = 0; m < STRIPS; ++m)
#pragma unroll
        for (int n = 0; n < OWN / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) st.o[m][n][i] = 0;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) st.top[i] = -INFINITY, st.minus[i] = st.sum[i] = 0;
}

/* Whether all of this lane's are. (x * 0 is NaN if x is not finite.) */
DEVICE bool is_finite(const rows_state &st) {
    real probe = 0;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) probe = fma(st.sum[i], (real)0, probe);
#pragma unroll
    for (int m = 0; m < STRIPS; ++m)
#pragma unroll
        for (int n = 0; n < OWN / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) probe = fma(st.o[m][n][i], (real)0, probe);
    return probe == 0;
}

/* Raises the tops of rows, and shrinks what they have summed. */
DEVICE void raise_tops(rows_state &st, const row_scores &s, real units) {
    real factor[ROWS];
    bool raised = false;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        real top = st.top[i];
#pragma unroll
        for (int n = 0; n < SCORES; ++n)
            top = greater(top, greater(s[i / 2][n][i % 2 * 2], s[i / 2][n][i % 2 * 2 + 1]));
        top = greater(top, __shfl_xor_sync(~0u, top, 1));
        top = greater(top, __shfl_xor_sync(~0u, top, 2));
        factor[i] = top > st.top[i] ? exp2_of((st.top[i] - top) * units) : (real)1;
        raised |= top > st.top[i];
        st.top[i] = top;
        st.minus[i] = top == -INFINITY ? (real)0 : -top * units;
    }
    if (!__any_sync(~0u, raised)) return;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        st.sum[i] *= factor[i];
#pragma unroll
        for (int n = 0; n < OWN / 8; ++n)
            st.o[i / 2][n][i % 2 * 2] *= factor[i], st.o[i / 2][n][i % 2 * 2 + 1] *= factor[i];
    }
}

/* P in place of scores, and its sums. Where the rounding of top * units shows in P of the top,
 * which should be 1, scores count from the top on before they are multiplied: always in float32. */
static constexpr real COARSE = IS_HALF ? 8192 : 0;

DEVICE void weigh(rows_state &st, row_scores &s, real units) {
    raise_tops(st, s, units);
    real minus[ROWS];
    bool coarse = false;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) minus[i] = st.minus[i], coarse |= fabs(minus[i]) > COARSE;
    if (COARSE == 0 || __any_sync(~0u, coarse)) {
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            if (!(fabs(minus[i]) > COARSE)) continue;
            minus[i] = 0;
#pragma unroll
            for (int n = 0; n < SCORES; ++n)
                s[i / 2][n][i % 2 * 2] -= st.top[i], s[i / 2][n][i % 2 * 2 + 1] -= st.top[i];
        }
    }
#pragma unroll
    for (int m = 0; m < STRIPS; ++m)
#pragma unroll
        for (int n = 0; n < SCORES; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                s[m][n][i] = exp2_of(fma(s[m][n][i], units, minus[2 * m + i / 2]));
                st.sum[2 * m + i / 2] += s[m][n][i];
            }
}

#endif
