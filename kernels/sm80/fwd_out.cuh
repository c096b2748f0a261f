/* fwd_out.cuh - how the rows of a tile leave: the sink, the division, lse, the way to memory. */
#ifndef FASTATTN_SM80_FWD_OUT_CUH
#define FASTATTN_SM80_FWD_OUT_CUH

#include "sm80/fwd_scores.cuh"
#include "sm80/fwd_softmax.cuh"
#include "sm80/store.cuh"
#include "sm80/tile.cuh"

static constexpr double LOG2_E = 1.4426950408889634, LN_2 = 0.6931471805599453;

DEVICE float log2_of(float x) { return __log2f(x); }
DEVICE double log2_of(double x) { return log2(x); }

/* The sink joins a row's sum of 2^minus; its weight may be far beyond the row's. Returns what O is
 * multiplied by. */
DEVICE real add_sink(real sink, real &sum, real &minus) {
    const real over = fma(sink, (real)LOG2_E, minus);
    const real shrink = over > 0 ? exp2_of(-over) : (real)1;
    sum = fma(sum, shrink, over > 0 ? (real)1 : exp2_of(over));
    minus -= over > 0 ? over : (real)0;
    return shrink / sum;
}

/* What row i of this lane is multiplied by, 0: it is 0 whatever O holds; writes its lse. */
DEVICE real finish_row(const kernel_args &a, const tile &t, rows_state &st, int i, real sink) {
    real sum = st.sum[i], minus = st.minus[i];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    const int32_t row = row_of(t, i);
    const bool exists = row < t.lengths.sq; /* padding has sums of its own where nothing is cut */
    const bool empty = sum == 0 || !exists; /* the top gives 1 */
    real inverse = a.sink ? add_sink(sink, sum, minus) : (real)1 / sum;
    inverse = empty ? (real)0 : inverse * a.gain;
    if (a.lse && row < t.rows && threadIdx.x % 4 == 0 && threadIdx.x / 32 % COLUMN_WARPS == 0) {
        const real lse = empty ? sink : (log2_of(sum) - minus) * (real)LN_2;
        a.lse[t.batch * a.lse_stride[0] + t.h * a.lse_stride[1] + (t.q + row) * a.lse_stride[2]] =
            exists ? lse : -INFINITY;
    }
    return inverse;
}

DEVICE void store_rows(const kernel_args &a, const tile &t, rows_state &st) {
    const real sink = a.sink ? (real)a.sink[t.h * a.sink_stride] : (real)-INFINITY;
    char *out = a.out.data + t.batch * a.out.stride[0] + t.h * a.out.stride[1];
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        const int32_t row = row_of(t, i);
        const real inverse = finish_row(a, t, st, i, sink);
#pragma unroll
        for (int n = 0; n < OWN / 8; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                real &x = st.o[i / 2][n][i % 2 * 2 + e];
                x = inverse == 0 ? (real)0 : x * inverse; /* of an empty row O may be NaN */
            }
        store_row(a.out, st.o, out + (t.q + row) * a.out.stride[2], row < t.rows, i);
    }
}

#endif
