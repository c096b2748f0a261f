/* bwd_block.cuh - what a warpgroup of the backward does with a block of rows besides products:
 * weights and slopes, dS and dQ on their ways, and at the end its keys' gradients.
 */
#ifndef FASTATTN_SM90_BWD_BLOCK_CUH
#define FASTATTN_SM90_BWD_BLOCK_CUH

#include "common/compiler.cuh"
#include "sm90/bwd_args.cuh"
#include "sm90/bwd_smem.h"
#include "sm90/bwd_store.cuh"
#include "sm90/bwd_turns.cuh"
#include "sm90/ptx.cuh"
#include "sm90/wgmma.cuh"

/* ---- weights and slopes; bwd_scores.cuh has what changes scores -------------------------------*/

/* Columns (rows of Q) from `low` on and before `high`, of this thread's two keys. */
struct seen_rows {
    int32_t low[2], high[2];
};

DEVICE seen_rows seen_rows_of(const work_tile &t, int32_t key, int32_t row) {
    seen_rows s;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int32_t k = key + 8 * r;
        const fa_row_range rows = fa_rows_seeing_some(t.lengths, fa_interval{k, k + 1});
        s.low[r] = rows.begin - row;
        s.high[r] = rows.end - row;
    }
    return s;
}

template <int N>
DEVICE void mask_columns(const seen_rows &seen, float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const int32_t column = i / 4 * 8 + i % 2, r = i / 2 % 2;
        if (column < seen.low[r] || column >= seen.high[r]) x[i] = 0.f;
    }
}

/* Whether lse of one of a warpgroup's rows is so great (or inf) that P may come out above 1. All of
 * a warp find the same. */
DEVICE bool has_great_rows(const float *lse) {
    bool some = false;
#pragma unroll
    for (int i = 0; i < ROWS; i += 32) some |= fabsf(lse[i + threadIdx.x % 32]) > GREAT_LSE;
    return __any_sync(~0u, some);
}

/* P of an exponent; NaN of NaN. */
template <bool GREAT>
DEVICE float weight(float x) {
    return ex2_approx(GREAT && x > 0.f ? 0.f : x);
}

template <bool GREAT>
DEVICE void exponentials(float (&s)[ROWS / 2], const float *lse, float scale) {
    const uint32_t from = smem_address(lse) + threadIdx.x % 4 * 8;
#pragma unroll
    for (int j = 0; j < ROWS / 8; ++j) {
        const float2 l = ld_shared_v2(from + 32 * j);
        s[4 * j] = weight<GREAT>(fmaf(s[4 * j], scale, -l.x));
        s[4 * j + 1] = weight<GREAT>(fmaf(s[4 * j + 1], scale, -l.y));
        s[4 * j + 2] = weight<GREAT>(fmaf(s[4 * j + 2], scale, -l.x));
        s[4 * j + 3] = weight<GREAT>(fmaf(s[4 * j + 3], scale, -l.y));
    }
}

/* P^T of S^T, in place. `great`: has_great_rows(), asked for while S is computed; in plain variants
 * the branch costs 2 to 3 %. */
DEVICE void exponentials(float (&s)[ROWS / 2], const float *lse, float scale, bool great = false) {
    if (great)
        exponentials<true>(s, lse, scale);
    else
        exponentials<false>(s, lse, scale);
}

/* dS^T of P^T, in place of dP^T. */
DEVICE void slopes(const float (&p)[ROWS / 2], float (&dp)[ROWS / 2], const float *delta) {
    const uint32_t from = smem_address(delta) + threadIdx.x % 4 * 8;
#pragma unroll
    for (int j = 0; j < ROWS / 8; ++j) {
        const float2 d = ld_shared_v2(from + 32 * j);
        dp[4 * j] = p[4 * j] * (dp[4 * j] - d.x);
        dp[4 * j + 1] = p[4 * j + 1] * (dp[4 * j + 1] - d.y);
        dp[4 * j + 2] = p[4 * j + 2] * (dp[4 * j + 2] - d.x);
        dp[4 * j + 3] = p[4 * j + 3] * (dp[4 * j + 3] - d.y);
    }
}

/* Zeros where a row of block m does not see this thread's keys; `plain`: blocks that see all. */
DEVICE void mask_block(float (&x)[ROWS / 2], const work_tile &t, const fa_row_range &plain,
                       int32_t m, int32_t warpgroup) {
    if (m >= plain.begin && m < plain.end) return;
    const int32_t thread = threadIdx.x % 128;
    const int32_t key = t.key + own_key(warpgroup) + thread / 32 * 16 + thread % 32 / 4;
    mask_columns(seen_rows_of(t, key, m * BLOCK_M + own_row(warpgroup) + thread % 4 * 2), x);
}

/* Rounded pairs: four registers of 16 columns are wgmma's A fragment as they come. */
DEVICE void pack(const float (&x)[ROWS / 2], uint32_t (&y)[ROWS / 16][4]) {
#pragma unroll
    for (int i = 0; i < ROWS / 4; ++i) y[i / 4][i % 4] = cvt_pack(x[2 * i], x[2 * i + 1]);
}

/* ---- what goes through shared memory ----------------------------------------------------------*/

/* This warp's 16 keys of dS^T, for dQ; of SHARED_KEYS of P^T, too. */
DEVICE void store_ds(const uint32_t (&ds)[ROWS / 16][4], uint8_t (&to)[BLOCK_M / 64][PANEL_N],
                     int32_t warpgroup) {
    const int32_t thread = threadIdx.x % (SHARED_KEYS ? 128 : MMA_THREADS), lane = thread % 32;
    const int32_t key = thread / 32 * 16 + lane % 16; /* matrices 0, 2 and 1, 3 */
    const int32_t first = own_row(warpgroup) / 8;
#pragma unroll
    for (int i = 0; i < ROWS / 16; ++i) {
        const int32_t eight = first + 2 * i, chunk = eight % 8 + lane / 16;
        stmatrix_x4(smem_address(to[eight / 8]) + key * 128 + ((chunk ^ key % 8) << 4), ds[i][0],
                    ds[i][1], ds[i][2], ds[i][3]);
    }
}

/* This warp's share of dQ, put where the copy engine has read the one before, */
DEVICE void store_dq(const float (&dq)[DQ_COLUMNS / 2], smem_layout &smem) {
    const int32_t lane = threadIdx.x % 32;
    if (lane == 0) cp_async_bulk_wait_group_read();
    __syncwarp();
#pragma unroll
    for (int i = 0; i < DQ_COLUMNS / 8; ++i)
        *(float4 *)smem.dq[threadIdx.x / 32][i][lane] =
            make_float4(dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]);
}
/* and, after a fence, added to the sums of block n of those that all tiles walk over; `more`: the
 * tile has added to others. */
DEVICE void add_dq(smem_layout &smem, const bwd_args &a, const work_tile &t, int32_t block,
                   uint32_t n, bool more, int32_t warp) {
    if (more) end_turn(a, smem, n - 1);
    wait_for_turn(a, smem, t, block, n);
    if (threadIdx.x % 32 == 0 && a.dq) {
        const int32_t columns = DQ_BY_ROWS ? D : min(DQ_COLUMNS, D - warp / 4 * DQ_COLUMNS);
        cp_reduce_async_bulk_add(
            a.dq + (int64_t)block * (BLOCK_M * SUM_COLUMNS) + warp * (16 * DQ_COLUMNS),
            smem_address(smem.dq[warp]), 16 * 4 * columns);
        cp_async_bulk_commit_group();
        if (!HELPED) hand_on(a, block);
    }
}

/* Or from registers, four side by side, in two halves. */
template <int HALF>
DEVICE void add_dq(const float (&dq)[DQ_COLUMNS / 2], smem_layout &smem, const bwd_args &a,
                   const work_tile &t, int32_t block, uint32_t n, int32_t warp) {
    if (!a.dq) return;
    if (HALF == 0) wait_for_turn(a, smem, t, block, n);
    float *to = a.dq + (int64_t)block * (BLOCK_M * SUM_COLUMNS) + warp * (16 * DQ_COLUMNS) +
                threadIdx.x % 32 * 4;
#pragma unroll
    for (int i = HALF * (DQ_COLUMNS / 16); i < (HALF + 1) * (DQ_COLUMNS / 16); ++i)
        red_add_v4(to + 128 * i, dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]);
    if (HALF == 0 || !a.turns) return;
    __syncwarp();
    if (threadIdx.x % 32) return;
    if (HELPED)
        mbarrier_arrive(smem_address(&smem.turn_added[n % TURNS]));
    else
        hand_on(a, block);
}

/* What this warp has stored, dS and dQ, may be read by the tensor cores and the copy engine. */
DEVICE void hand_over(uint64_t &full) {
    fence_proxy_async();
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(smem_address(&full));
}

/* ---- the end ----------------------------------------------------------------------------------*/

/* 64 keys of dK or dV, `factor` times, to their rows. */
template <int COLUMNS>
DEVICE void store_keys(const float (&x)[COLUMNS / 2], const fa_tensor &to, smem_layout &smem,
                       const work_tile &t, int32_t warpgroup, float factor) {
    const int32_t thread = thread_here(), warp = thread / 32, lane = thread % 32;
    const int32_t first = t.key + own_key(warpgroup) + warp % 4 * 16;
    const int32_t left = SHARED_OUT ? COLUMNS * warpgroup : 0;
    if (!to.data) return;
    uint16_t *head = (uint16_t *)to.data + t.batch * to.stride[0] + t.h_k * to.stride[1] +
                     (int64_t)(t.k + first) * to.stride[2];
    if (PAIRED || !has_eights(to)) { /* a pair has no room */
        const bool words = has_words(to);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int32_t key = lane / 4 + 8 * r;
            if (first + key >= t.k_rows) continue;
#pragma unroll
            for (int j = 0; j < COLUMNS / 8; ++j)
                store_pair(to, head + key * to.stride[2], left + lane % 4 * 2 + 8 * j,
                           x[4 * j + 2 * r] * factor, x[4 * j + 2 * r + 1] * factor, words);
        }
        return;
    }
    /* Through this warp's place for dQ, or its share of dS and P: sixteen rows, so that threads
     * side by side have columns side by side. */
    constexpr int EIGHTS = COLUMNS / 8, PITCH = (COLUMNS + 63) / 64 * 128;
    static_assert(!DIRECT_DQ || PAIRED || MMA_THREADS / 2 * PITCH <= sizeof smem.ds + sizeof smem.p,
                  "room");
    const uint32_t place = DIRECT_DQ ? smem_address(smem.ds) + warp * (16 * PITCH)
                                     : smem_address(smem.dq[DIRECT_DQ ? 0 : warp]);
    if (lane == 0) cp_async_bulk_wait_group_read();
    __syncwarp();
#pragma unroll
    for (int j = 0; j < EIGHTS / 2; ++j) {
        uint32_t y[4];
#pragma unroll
        for (int r = 0; r < 4; ++r)
            y[r] = cvt_pack(x[8 * j + 2 * r] * factor, x[8 * j + 2 * r + 1] * factor);
        stmatrix_x4(place + lane % 16 * PITCH + ((2 * j + lane / 16 ^ lane % 8) << 4), y[0], y[1],
                    y[2], y[3]);
    }
    __syncwarp();
#pragma unroll
    for (int j = 0; j < EIGHTS / 2; ++j) {
        const int32_t eight = (32 * j + lane) % EIGHTS, key = (32 * j + lane) / EIGHTS;
        const float4 y = ld_shared_v4(place + key * PITCH + ((eight ^ key % 8) << 4));
        const int32_t column = left + 8 * eight;
        if (first + key < t.k_rows && column < to.shape[3])
            *(float4 *)(head + key * to.stride[2] + column) = y;
    }
    __syncwarp();
}

/* Zeros there: no row sees the keys. */
template <int COLUMNS>
DEVICE void clear_keys(const fa_tensor &to, const work_tile &t, int32_t warpgroup) {
    const int32_t left = SHARED_OUT ? COLUMNS * warpgroup : 0;
    if (!to.data) return;
    uint16_t *head = (uint16_t *)to.data + t.batch * to.stride[0] + t.h_k * to.stride[1];
    for (int32_t i = threadIdx.x % 128; i < 64 * COLUMNS; i += 128) {
        const int32_t key = t.key + own_key(warpgroup) + i / COLUMNS, column = left + i % COLUMNS;
        if (key < t.k_rows && column < to.shape[3])
            head[(t.k + key) * to.stride[2] + column * to.stride[3]] = 0;
    }
}

#endif
