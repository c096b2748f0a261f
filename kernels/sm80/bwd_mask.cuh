/* bwd_mask.cuh - the gradient of a float mask: dS, summed over all that the mask broadcasts to, in
 * the same order every time.
 *
 * A kernel of its own, part of each general variant: it computes S and dP again, so that a block of
 * the gradient is summed in registers. A block has BLOCK_M rows by BLOCK_N keys of the mask, or all
 * of an axis that is summed, and walks over the scores of all batches and heads that these stand
 * for.
 */
#ifndef FASTATTN_SM80_BWD_MASK_CUH
#define FASTATTN_SM80_BWD_MASK_CUH

#include "sm80/bwd_args.cuh"
#include "sm80/bwd_scores.cuh"
#include "sm80/bwd_walk.cuh"

/* The part of the mask that a block has. */
struct mask_part {
    fa_interval batches, heads;
    int32_t row, end_row, key, end_key; /* whole tiles and blocks: they may end behind the mask */
};

/* Where an axis has this size, the batches or heads that its element `at` stands for. */
DEVICE fa_interval summed(int64_t size, int32_t all, int64_t at) {
    if (size == 1) return fa_interval{0, all};
    return fa_interval{(int32_t)at, (int32_t)at + 1};
}

DEVICE mask_part find_part(const bwd_mask_args &a, int64_t &plane) {
    const int64_t *shape = a.to.shape;
    const int32_t key_block = blockIdx.x % a.key_blocks, rest = blockIdx.x / a.key_blocks;
    const int32_t row_block = rest % a.row_blocks;
    plane = rest / a.row_blocks;
    mask_part p;
    p.batches = summed(shape[0], a.b, plane / shape[1]);
    p.heads = summed(shape[1], a.hq, plane % shape[1]);
    p.row = row_block * BLOCK_M, p.end_row = shape[2] == 1 ? a.sq : p.row + BLOCK_M;
    p.key = key_block * BLOCK_N, p.end_key = shape[3] == 1 ? a.sk : p.key + BLOCK_N;
    return p;
}

/* A tile of a sequence's rows, and the blocks of keys that these see of the part. */
DEVICE tile part_tile(const bwd_mask_args &a, const mask_part &p, const fa_sequence &s, int32_t b,
                      int32_t h, int32_t row) {
    tile t;
    t.b = b, t.h = h, t.batch = a.varlen.cu_q ? 0 : b;
    t.row = row, t.rows = s.q_end - s.q;
    t.q = s.q, t.k = s.k, t.lengths = s.lengths;
    find_scores(a.scores, t, a.b);
    find_visible(t);
    t.begin = max(t.begin, p.key / BLOCK_N);
    t.end = min(t.end, (p.end_key + BLOCK_N - 1) / BLOCK_N);
    return t;
}

/* Adds dS of a tile. */
template <bool GUARDED>
DEVICE void add_tile(const bwd_mask_args &a, const tile &t, row_scores &sums, uint32_t smem) {
    const uint32_t panels = smem + 2 * Q_BYTES;
    __syncthreads(); /* the tile before has been read */
    load_query_rows(a, t, smem);
    bwd_ring r = start_ring<false>(a, t, t.h, t.h + 1, BLOCK_PANELS<2>, panels);
#pragma unroll 1
    for (int32_t block = t.begin; block < t.end; ++block) {
        row_scores s = {}, dp = {};
        multiply_rows<false, GUARDED>(a, t, r, s, dp, smem);
        weigh<false, true>(a, t, s, dp, t.h, block);
#pragma unroll
        for (int m = 0; m < STRIPS; ++m)
#pragma unroll
            for (int n = 0; n < SCORES; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) sums[m][n][i] += dp[m][n][i];
    }
}

template <bool GUARDED>
DEVICE void add_part(const bwd_mask_args &a, const mask_part &p, row_scores &sums, uint32_t smem) {
    for (int32_t b = p.batches.begin; b < p.batches.end; ++b) {
        const fa_sequence s = fa_find_sequence(&a.varlen, &a.masks, b, a.sq, a.sk);
        const int32_t end = min(p.end_row, s.lengths.sq);
        for (int32_t h = p.heads.begin; h < p.heads.end; ++h)
            for (int32_t row = p.row; row < end; row += BLOCK_M) {
                const tile t = part_tile(a, p, s, b, h, row);
                if (t.begin < t.end) add_tile<GUARDED>(a, t, sums, smem);
            }
    }
}

/* ---- the way to memory ------------------------------------------------------------------------*/

DEVICE void store_mask(const bwd_mask_args &a, int64_t at, real x) {
    const fa_dtype dtype = a.scores.mask_dtype;
    if (dtype == FA_F64)
        ((double *)a.to.data)[at] = x;
    else if (dtype == FA_F32)
        ((float *)a.to.data)[at] = (float)x;
    else
        ((uint16_t *)a.to.data)[at] = dtype == FA_BF16 ? element<FA_BF16>::narrow((float)x)
                                                       : element<FA_F16>::narrow((float)x);
}

/* Over the columns of this lane's row i, and over those of its quad. */
DEVICE real sum_row(const row_scores &x, int i) {
    real sum = 0;
#pragma unroll
    for (int n = 0; n < SCORES; ++n) sum += x[i / 2][n][i % 2 * 2] + x[i / 2][n][i % 2 * 2 + 1];
    sum += __shfl_xor_sync(~0u, sum, 1);
    return sum + __shfl_xor_sync(~0u, sum, 2);
}

/* Over all rows of this warp, of a lane's column e of fragment n. */
DEVICE real sum_column(const row_scores &x, int n, int e) {
    real sum = 0;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) sum += x[i / 2][n][i % 2 * 2 + e];
#pragma unroll
    for (int bit = 4; bit < 32; bit *= 2) sum += __shfl_xor_sync(~0u, sum, bit);
    return sum;
}

/* Sums over an axis meet in shared memory: a row's is whole, a column's has a part a warp. */
DEVICE void store_sums(const bwd_mask_args &a, const mask_part &p, const row_scores &x,
                       int64_t base, real *shared) {
    const int64_t *shape = a.to.shape, *stride = a.to.stride;
    const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32 / COLUMN_WARPS;
    const bool mine = threadIdx.x / 32 % COLUMN_WARPS == 0; /* others have the same scores */
    const bool by_rows = shape[3] == 1;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        const real sum = sum_row(x, i);
        if (by_rows && mine && lane % 4 == 0) shared[warp * WARP_ROWS + 8 * i + lane / 4] = sum;
    }
#pragma unroll
    for (int n = 0; n < SCORES; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const real sum = sum_column(x, n, e);
            if (!by_rows && mine && lane < 4) shared[warp * BLOCK_N + 8 * n + 2 * lane + e] = sum;
        }
    __syncthreads();
    const bool one = by_rows && shape[2] == 1;
    const int32_t first = by_rows ? p.row : p.key, count = one ? 1 : by_rows ? BLOCK_M : BLOCK_N;
    const int32_t parts = one ? BLOCK_M : by_rows ? 1 : ROW_WARPS;
    for (int32_t i = threadIdx.x; i < count; i += THREADS) {
        if (first + i >= shape[by_rows ? 2 : 3]) return;
        real sum = 0;
        for (int32_t part = 0; part < parts; ++part) sum += shared[part * (one ? 1 : BLOCK_N) + i];
        store_mask(a, base + (first + i) * stride[by_rows ? 2 : 3], sum);
    }
}

DEVICE void store_part(const bwd_mask_args &a, const mask_part &p, const row_scores &x,
                       int64_t plane, real *shared) {
    const int64_t *shape = a.to.shape, *stride = a.to.stride;
    const int64_t base = plane / shape[1] * stride[0] + plane % shape[1] * stride[1];
    if (shape[2] == 1 || shape[3] == 1) return store_sums(a, p, x, base, shared);
    if (threadIdx.x / 32 % COLUMN_WARPS) return;
    const int32_t warp = threadIdx.x / 32 / COLUMN_WARPS, lane = threadIdx.x % 32;
    const int32_t row = p.row + warp * WARP_ROWS + lane / 4, key = p.key + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
        for (int n = 0; n < SCORES; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int32_t y = row + 8 * i, column = key + 8 * n + e;
                if (y < shape[2] && column < shape[3])
                    store_mask(a, base + y * stride[2] + column * stride[3],
                               x[i / 2][n][i % 2 * 2 + e]);
            }
}

DEVICE void run_part(const bwd_mask_args &a, uint8_t *raw) {
    int64_t plane;
    const mask_part p = find_part(a, plane);
    const uint32_t smem = smem_address(raw);
    row_scores sums = {};
    add_part<false>(a, p, sums, smem);
#if IS_F32
    if (__syncthreads_or(!all_finite(sums))) {
        memset(sums, 0, sizeof sums);
        add_part<true>(a, p, sums, smem);
    }
#endif
    store_part(a, p, sums, plane, (real *)raw);
}

#endif
