/* bwd_rows.cuh - what comes before the backward's kernels: lse and delta = dout . out - dlse of
 * each row, a warp a row. A row that sees no key has lse +inf, so that its P is 0, and delta -dlse,
 * for the sink; padding has neither.
 */
#ifndef FASTATTN_SM80_BWD_ROWS_CUH
#define FASTATTN_SM80_BWD_ROWS_CUH

#include "mask.h"
#include "sm80/bwd_args.cuh"

enum { ROWS_THREADS = 256 };

/* What a row belongs to: its sequence, and its number there. */
struct row_place {
    int32_t b, row;
    fa_lengths lengths;
};
DEVICE row_place place_of(const request_args &a, int32_t batch, int32_t row) {
    row_place p = {batch, row, {0, 0, 0, 0, 0, 0}};
    if (a.varlen.cu_q) p.b = fa_packed_at(&a.varlen, a.b, row);
    const fa_sequence s = fa_find_sequence(&a.varlen, &a.masks, p.b, a.sq, a.sk);
    p.row = row - s.q;
    if (row >= s.q && row < s.q_end) p.lengths = s.lengths;
    return p;
}

#if VARIANT_GENERAL
/* Whether a bool mask leaves the row one of the keys of its interval. The whole warp asks. */
DEVICE bool mask_leaves_some(const score_args &a, const row_place &p, int32_t h, fa_interval keys) {
    const int64_t plane = fa_bits_plane(&a.bits, p.b, h);
    bool some = false;
    for (int32_t key = keys.begin + threadIdx.x % 32; key < keys.end; key += 32) {
        const int32_t bit = key % FA_BITS_KEYS / 8 * 2 + key % 2;
        const int64_t at = fa_bits_at(&a.bits, plane, key / FA_BITS_KEYS, p.row);
        some |= a.words[4 * at + key % 8 / 2] >> bit & 1;
    }
    return __any_sync(~0u, some);
}
#endif

static __global__ void __launch_bounds__(ROWS_THREADS)
    bwd_rows(const __grid_constant__ bwd_rows_args a) {
    typedef element<DTYPE> E;
    wait_for_stream();
    let_next_start();
    const int64_t number = (int64_t)blockIdx.x * (ROWS_THREADS / 32) + threadIdx.x / 32;
    if (number >= a.all_rows) return;
    const int32_t row = (int32_t)(number % a.terms_rows), lane = threadIdx.x % 32;
    const int64_t head = number / a.terms_rows;
    const int32_t h = (int32_t)(head % a.hq), batch = (int32_t)(head / a.hq);
    const row_place p = place_of(a, batch, row);
    const fa_interval keys = fa_row_interval(p.lengths, p.row);
    bool sees = keys.begin < keys.end;
#if VARIANT_GENERAL
    if (a.scores.map && sees) sees = mask_leaves_some(a.scores, p, h, keys);
#endif
    real dot = 0;
    if (sees && a.dout.data) {
        const char *x =
            a.out.data + batch * a.out.stride[0] + h * a.out.stride[1] + row * a.out.stride[2];
        const char *y =
            a.dout.data + batch * a.dout.stride[0] + h * a.dout.stride[1] + row * a.dout.stride[2];
        for (int32_t i = lane; i < a.out.columns; i += 32)
            dot = fma((real)E::widen(*(const E::stored *)(x + i * a.out.stride[3])),
                      (real)E::widen(*(const E::stored *)(y + i * a.dout.stride[3])), dot);
    }
#pragma unroll
    for (int i = 16; i; i /= 2) dot += __shfl_xor_sync(~0u, dot, i);
    if (lane > 0) return;
    row_terms terms = {{INFINITY, 0}};
    if (p.row < p.lengths.sq) {
        const real lse =
            a.lse[batch * a.lse_stride[0] + h * a.lse_stride[1] + row * a.lse_stride[2]];
        if (sees && lse != -INFINITY) terms.x[0] = lse, terms.x[1] = dot;
        if (a.dlse)
            terms.x[1] -=
                a.dlse[batch * a.dlse_stride[0] + h * a.dlse_stride[1] + row * a.dlse_stride[2]];
    }
    a.terms[number] = terms;
}

#endif
