/* bwd_ends.cuh - what comes before and behind the backward's main kernel, a part of each variant.
 *
 * bwd_rows(): lse in the units of exponents, delta = dout . out - dlse, zeros in dQ's sums, and
 * whose turn at these it is first. bwd_dq(): dQ of its sums, which lie as the warps of bwd.cu added
 * them.
 */
#ifndef FASTATTN_SM90_BWD_ENDS_CUH
#define FASTATTN_SM90_BWD_ENDS_CUH

#include "common/element.cuh"
#include "common/stream.cuh"
#include "sm90/bwd_args.cuh"
#include "sm90/bwd_smem.h"
#include "sm90/bwd_store.cuh"
#include "sm90/bwd_turns.cuh"
#include "sm90/wgmma.cuh"
#if VARIANT_GENERAL
#include "sm90/bwd_scores.cuh"
#endif

enum { ENDS_THREADS = 256 };
static constexpr int LANES = V_PANELS > 2 ? 32 : V_PANELS * 8; /* of a row: 16 bytes each */
static constexpr int ROWS_OF_BLOCK = ENDS_THREADS / LANES;
static_assert(BLOCK_M % ROWS_OF_BLOCK == 0, "all are of one block of rows");

/* A row's dot product, of LANES threads side by side. */
DEVICE float dot_row(const uint16_t *x, const uint16_t *y, int64_t x_step, int64_t y_step,
                     int32_t columns, bool wide) {
    typedef element<VARIANT_DTYPE> E;
    const int32_t lane = threadIdx.x % LANES;
    float sum = 0.f;
    if (wide) {
        uint32_t u[4] = {}, v[4] = {};
        if (8 * lane < columns) {
            load_once(u, x + 8 * lane);
            load_once(v, y + 8 * lane);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            float p[2], q[2];
            E::unpack(p, u[j]);
            E::unpack(q, v[j]);
            sum = fmaf(p[0], q[0], fmaf(p[1], q[1], sum));
        }
    } else {
        for (int32_t i = lane; i < columns; i += LANES)
            sum = fmaf(E::widen(x[i * x_step]), E::widen(y[i * y_step]), sum);
    }
#pragma unroll
    for (int i = LANES / 2; i; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);
    return sum;
}

/* lse of great scores has been rounded four times on its way here, by half an ulp each, and is off
 * by more than the scores' differences. It is lowered by as much: a row's one greatest score keeps
 * the weight of 1, beyond which weight() lets none. */
DEVICE float lowered(float lse) {
    const float beyond = fabsf(lse) - 0x1p13f;
    return beyond > 0.f && beyond < INFINITY ? fmaf(beyond, -0x1p-21f, lse) : lse;
}

/* Of a block's sequence; of the rows of none, zeros. b: of the arrays. */
DEVICE fa_lengths lengths_of(const bwd_rows_args &a, const row_block &rows, int32_t b) {
    if (a.varlen.cu_q) b = rows.b;
    if (b >= a.b) return fa_lengths{0, 0, 0, 0, 0, 0};
    return fa_find_sequence(&a.varlen, &a.masks, b, a.sq, a.sk).lengths;
}

/* The turn of the last keys that a block of rows sees. */
DEVICE int32_t first_turn(const bwd_rows_args &a, const row_block &rows, int32_t b) {
    const fa_lengths lengths = lengths_of(a, rows, b);
    const int32_t last = min(rows.row + BLOCK_M, lengths.sq) - 1;
    return turn_of(fa_row_interval(lengths, last).end - 1, a.sk);
}

#if VARIANT_GENERAL
/* Whether the mask and the interval leave it a key: row `i` of a block. */
DEVICE bool mask_leaves_some(const bwd_rows_args &a, const row_block &rows, int32_t i, int32_t b,
                             int32_t h) {
    fa_lengths lengths = {0, 0, 0, 0, 0, 0};
    if (i < rows.count) lengths = lengths_of(a, rows, b);
    if (a.varlen.cu_q) b = rows.b;
    return sees_some<LANES>(a, lengths, b, h, rows.row + i);
}
#endif

static __global__ void __launch_bounds__(ENDS_THREADS)
    bwd_rows(const __grid_constant__ bwd_rows_args a) {
    wait_for_stream();
    let_next_start();
    if (blockIdx.x == 0 && threadIdx.x == 0) *a.taken = 0;
    /* Divisions are the whole block's: each thread's own took 6 of 82 us. */
    const int32_t blocks = a.rows / ROWS_OF_BLOCK; /* of a head */
    const int32_t head = blockIdx.x / blocks, h = head % a.hq, b = head / a.hq;
    const int32_t first = blockIdx.x % blocks * ROWS_OF_BLOCK; /* its first row, of the head's */
    const row_block rows = find_rows(a.varlen, a.b, a.sq, BLOCK_M, first / BLOCK_M);
    const int32_t place = first % BLOCK_M + threadIdx.x / LANES, row = rows.first + place;
    const int64_t number = (int64_t)blockIdx.x * ROWS_OF_BLOCK + threadIdx.x / LANES;
    const fa_tensor &o = a.out, &g = a.dout, &l = a.lse, &dl = a.dlse;
    float lse = INFINITY, delta = 0.f;
    if (place < rows.count) {
        const float x =
            ((const float *)l.data)[b * l.stride[0] + h * l.stride[1] + row * l.stride[2]];
        if (x != -INFINITY)
            lse = GENERAL ? lowered(x * 1.4426950408889634f) : x * 1.4426950408889634f;
        if (dl.data)
            delta =
                -((const float *)dl.data)[b * dl.stride[0] + h * dl.stride[1] + row * dl.stride[2]];
    }
    [[maybe_unused]] const float minus_dlse = delta;
    if (g.data) { /* all threads, for they exchange sums */
        const int32_t there = min(row, (int32_t)o.shape[2] - 1);
        const float dot = dot_row(
            (const uint16_t *)o.data + b * o.stride[0] + h * o.stride[1] + there * o.stride[2],
            (const uint16_t *)g.data + b * g.stride[0] + h * g.stride[1] + there * g.stride[2],
            o.stride[3], g.stride[3], a.dv, a.wide);
        delta += dot;
    }
    if (lse == INFINITY) delta = 0.f;
#if VARIANT_GENERAL
    if (a.words && !mask_leaves_some(a, rows, place, b, h)) {
        lse = INFINITY;
        delta = minus_dlse;
    }
#endif
    if (threadIdx.x % LANES == 0) {
        a.scaled_lse[number] = lse;
        a.delta[number] = delta;
        if (a.turns && place == 0) a.turns[number / BLOCK_M] = first_turn(a, rows, b);
    }
    /* The block's share of zeros, wherever they lie. */
    if (a.dq) {
        constexpr int QUADS = ROWS_OF_BLOCK * SUM_COLUMNS / 4;
        for (int32_t i = threadIdx.x; i < QUADS; i += ENDS_THREADS)
            a.dq[(int64_t)blockIdx.x * QUADS + i] = make_float4(0.f, 0.f, 0.f, 0.f);
    }
}

/* Eight columns of one row, `factor` times; `row` is column 0. */
DEVICE void store_eight(const fa_tensor &to, uint16_t *row, int32_t column, const float (&x)[8],
                        float factor, bool wide) {
    if (wide) {
        uint32_t y[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) y[j] = cvt_pack(x[2 * j] * factor, x[2 * j + 1] * factor);
        if (column < to.shape[3]) *(uint4 *)(row + column) = make_uint4(y[0], y[1], y[2], y[3]);
    } else {
#pragma unroll
        for (int j = 0; j < 8; j += 2)
            store_pair(to, row, column + j, x[j] * factor, x[j + 1] * factor, false);
    }
}

/* A block has one block of rows of one head. Four quads of a warp's lanes side by side are eight
 * columns of two rows: one thread stores them. */
static __global__ void __launch_bounds__(ENDS_THREADS)
    bwd_dq(const __grid_constant__ bwd_dq_args a) {
    wait_for_stream();
    const int32_t m = blockIdx.x % a.m_blocks, head = blockIdx.x / a.m_blocks;
    const row_block rows = find_rows(a.varlen, a.b, a.sq, BLOCK_M, m);
    const float4 *from = (const float4 *)a.sums + (int64_t)blockIdx.x * (BLOCK_M * SUM_COLUMNS / 4);
    const fa_tensor &to = a.dq;
    uint16_t *base = (uint16_t *)to.data + head / a.hq * to.stride[0] + head % a.hq * to.stride[1] +
                     rows.first * to.stride[2];
    constexpr int EIGHTS = DQ_COLUMNS / 8;
#pragma unroll
    for (int32_t n = threadIdx.x; n < BLOCK_M * SUM_COLUMNS / 16; n += ENDS_THREADS) {
        const int32_t eight = n % EIGHTS, r = n / EIGHTS % 8, warp = n / EIGHTS / 8;
        const int32_t warpgroup = warp / 4;
        const int32_t row = (DQ_BY_ROWS ? 64 * warpgroup : 0) + warp % 4 * 16 + r;
        const int32_t column = (DQ_BY_ROWS ? 0 : DQ_COLUMNS * warpgroup) + 8 * eight;
        float upper[8], lower[8];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float4 x = from[(warp * EIGHTS + eight) * 32 + 4 * r + j];
            upper[2 * j] = x.x, upper[2 * j + 1] = x.y, lower[2 * j] = x.z, lower[2 * j + 1] = x.w;
        }
        uint16_t *at = base + row * to.stride[2];
        if (row < rows.count) store_eight(to, at, column, upper, a.scale, a.wide);
        if (row + 8 < rows.count)
            store_eight(to, at + 8 * to.stride[2], column, lower, a.scale, a.wide);
    }
}

#endif
