/* bwd_roles.cuh - what the two warpgroups of a pair's block do: the first computes S, P and dV, the
 * second dP, dS and dK, each of all 64 keys, 64 rows and columns; each adds half of dQ's columns
 * that the block has.
 *
 *     first:   P | P to the second | dV, the next S | dQ of the block before to its sums | dQ
 *     second:  dP | dQ of the block before to its sums | P, dS for all | dK | dQ
 *
 * S of 64 by 64 reads less of shared memory than two of 64 by 32, and P^T and dS^T are operands of
 * dV and dK as registers: 376 KB through shared memory a block of rows, in place of 448. And one
 * has exponentials to do while the other's products run.
 *
 * P is put where the second has read the last one: it says so with its dS. Before the first says
 * that P of block n is there, its dQ of block n - 1 has been computed, as the other block relies on
 * (bwd_pair.cuh).
 */
#ifndef FASTATTN_SM90_BWD_ROLES_CUH
#define FASTATTN_SM90_BWD_ROLES_CUH

#include "common/compiler.cuh"
#include "sm90/bwd_args.cuh"
#include "sm90/bwd_block.cuh"
#include "sm90/bwd_pair.cuh"
#include "sm90/bwd_products.cuh"
#include "sm90/bwd_smem.h"
#include "sm90/bwd_waits.cuh"
#include "sm90/bwd_walk.cuh"
#include "sm90/ptx.cuh"
#include "sm90/wgmma.cuh"

enum { FIRST_BARRIER = 2 }; /* of the first warpgroup's threads */

/* Zeros, by one warpgroup, in the rows of block m that no key sees. */
template <int PANELS, int BYTES>
DEVICE void clear_rows_alone(uint8_t (&block)[PANELS][BYTES], const work_tile &t, int32_t m) {
    const int32_t begin = t.rows.begin - m * BLOCK_M, end = t.rows.end - m * BLOCK_M;
    for (int32_t i = threadIdx.x % 128; i < PANELS * BYTES / 16; i += 128) {
        const int32_t row = i * 16 % BYTES / 128;
        if (row < begin || row >= end) st_shared_v4(smem_address(block) + 16 * i, 0, 0, 0, 0);
    }
    fence_proxy_async();
}

/* A tile's walk; n: blocks before one, of all tiles. */
struct role_walk {
    const bwd_args &a;
    smem_layout &smem;
    smem_keys &kv;
    const work_tile &t;
    const fa_row_range clean, plain;
    const uint32_t first, last;
    int32_t m, sums; /* the block of rows; where sums of dQ in flight lie */

    __device__ __forceinline__ bool is_clean() const { return m >= clean.begin && m < clean.end; }
    /* Q, by the first warpgroup: who has P knows that Q is there. */
    __device__ __forceinline__ void wait_for_q(uint32_t n) {
        mbarrier_wait(smem_address(&smem.q_full[n % 2]), n / 2 % 2);
        if (is_clean()) return;
        clear_rows_alone(smem.q[n % 2], t, m);
        bar_sync(FIRST_BARRIER, 128);
    }
    /* dO, by both; the second clears it. */
    __device__ __forceinline__ void wait_for_dout(uint32_t n, bool clears) {
        mbarrier_wait(smem_address(&smem.dout_full[0]), n % 2);
        if (is_clean()) return;
        if (clears) clear_rows_alone(smem.dout[0], t, m);
        bar_sync(ROWS_BARRIER, MMA_THREADS);
    }
    __device__ __forceinline__ void next_block() { m = m + 1 == t.end ? t.begin : m + 1; }

    /* dQ of block n, of both blocks' keys: `column`, of those panels of the columns that this block
     * has. */
    __device__ __forceinline__ void begin_dq(float (&dq)[DQ_COLUMNS / 2], uint32_t n,
                                             int32_t column) {
        const uint32_t place = n % 2, parity = n / 2 % 2;
        mbarrier_wait(smem_address(&smem.ds_full[place]), parity);
        issue_dq_of_keys(dq, smem.ds[place][0], kv.k[pair_rank() * (QK_PANELS / 2) + column], true);
        mbarrier_wait(smem_address(&smem.other_full[place]), parity);
        issue_dq_of_keys(dq, smem.other_ds[place], smem.other_k[column], false);
    }
    /* And to its sums; `next`: of the block behind it. */
    __device__ __forceinline__ void add_dq(const float (&dq)[DQ_COLUMNS / 2], int32_t next) {
        if (a.dq) add_pair_dq(dq, a.dq, sums);
        sums += next_sums(a, next, t.begin, t.end, t.begin);
    }

    __device__ __forceinline__ void put_p(const float (&p)[ROWS / 2]) {
#pragma unroll
        for (int j = 0; j < ROWS / 8; ++j)
            *(float4 *)smem.exact_p[j][threadIdx.x % 128] =
                make_float4(p[4 * j], p[4 * j + 1], p[4 * j + 2], p[4 * j + 3]);
        mbarrier_arrive(smem_address(&smem.p_full));
    }
    /* dS^T of dP^T. */
    __device__ __forceinline__ void slope(float (&dp)[ROWS / 2]) {
        const uint32_t from = smem_address(smem.delta[0]) + threadIdx.x % 4 * 8;
#pragma unroll
        for (int j = 0; j < ROWS / 8; ++j) {
            const float2 d = ld_shared_v2(from + 32 * j);
            const float4 p = *(const float4 *)smem.exact_p[j][threadIdx.x % 128];
            dp[4 * j] = p.x * (dp[4 * j] - d.x);
            dp[4 * j + 1] = p.y * (dp[4 * j + 1] - d.y);
            dp[4 * j + 2] = p.z * (dp[4 * j + 2] - d.x);
            dp[4 * j + 3] = p.w * (dp[4 * j + 3] - d.y);
        }
    }

    /* The first warpgroup's. S of the next block is begun in this one's. */
    __device__ __forceinline__ void compute_dv(float (&dv)[DV / 2]) {
        float s[ROWS / 2], dq[DQ_COLUMNS / 2];
        uint32_t p[ROWS / 16][4], n = first;
        wait_for_q(n);
        issue_transposed<QK_PANELS, D>(s, kv.k, smem.q[n % 2], 0);
        wgmma_wait_group<0>();
        wgmma_accumulators(s);
        for (;; ++n) {
            exponentials(s, smem.lse[n % 2], a.scale_log2);
            mask_block(s, t, plain, m, 0);
            pack(s, p);
            wgmma_wait_group<0>();
            wgmma_accumulators(dq); /* of the block before */
            put_p(s);
            mbarrier_arrive(smem_address(&smem.q_empty[n % 2]));
            wait_for_dout(n, false);
            issue_sum<V_PANELS, DV>(dv, p, smem.dout[0], n == first);
            /* Of the last block once more, which nobody reads, rather than products in a branch. */
            const uint32_t ahead = n < last ? n + 1 : n;
            const int32_t here = m;
            next_block();
            if (n < last) wait_for_q(ahead);
            issue_transposed<QK_PANELS, D>(s, kv.k, smem.q[ahead % 2], 0);
            if (n > first) add_dq(dq, here);
            wgmma_wait_group<1>();
            wgmma_accumulators(dv);
            mbarrier_arrive(smem_address(&smem.dout_empty[0]));
            begin_dq(dq, n, 0);
            wgmma_wait_group<1>();
            wgmma_accumulators(s);
            if (n == last) break;
        }
        wgmma_wait_group<0>();
        wgmma_accumulators(dq);
        add_dq(dq, m);
    }
    /* The second's. */
    __device__ __forceinline__ void compute_dk(float (&dk)[D / 2]) {
        float dp[ROWS / 2], dq[DQ_COLUMNS / 2];
        uint32_t ds[ROWS / 16][4];
        for (uint32_t n = first;; ++n) {
            wgmma_wait_group<0>();
            wgmma_accumulators(dq); /* of the block before */
            wait_for_dout(n, true);
            issue_transposed<V_PANELS, DV>(dp, kv.v, smem.dout[0], 1);
            if (n > first) add_dq(dq, m);
            mbarrier_wait(smem_address(&smem.p_full), n % 2);
            wgmma_wait_group<0>();
            wgmma_accumulators(dp);
            slope(dp);
            mask_block(dp, t, plain, m, 1);
            mbarrier_arrive(smem_address(&smem.dout_empty[0]));
            pack(dp, ds);
            store_ds(ds, smem.ds[n % 2], 1);
            fence_proxy_async();
            mbarrier_arrive(smem_address(&smem.ds_full[n % 2]));
            issue_sum<QK_PANELS, D>(dk, ds, smem.q[n % 2], n == first);
            begin_dq(dq, n, 1);
            wgmma_wait_group<1>();
            wgmma_accumulators(dk);
            mbarrier_arrive(smem_address(&smem.q_empty[n % 2]));
            next_block();
            if (n == last) break;
        }
        wgmma_wait_group<0>();
        wgmma_accumulators(dq);
        add_dq(dq, m);
    }
};

/* Tile after tile; dV of its keys in the end, or dK. */
DEVICE void consume_by_roles(const bwd_args &a, smem_layout &smem) {
    uint32_t n = 0; /* blocks of rows so far */
    for (uint32_t i = 0;; ++i) {
        const work_tile &t = next_tile(smem, i, uniform(i % 2));
        if (t.key < 0) return;
        float sum[D / 2];
        smem_keys &kv = smem.keys[0];
        wait_for_keys(a, smem, kv, t, 0, i % 2);
        const uint32_t before = uniform(n);
        n += a.group * (t.end - t.begin);
        if (t.begin < t.end) {
            const int32_t m = uniform(t.begin);
            role_walk walk = {a,
                              smem,
                              kv,
                              t,
                              whole_blocks(t.rows),
                              whole_blocks(t.all),
                              before,
                              uniform(n) - 1,
                              m,
                              sums_of(a, t, {t.h_k * a.group, m, 0})};
            if (uniform(thread_here() / 128))
                walk.compute_dk(sum);
            else
                walk.compute_dv(sum);
        }
        mbarrier_arrive(smem_address(&smem.kv_empty[0]));
        /* (What is asked here needs no register around the walk.) */
        const bool second = uniform(thread_here() / 128);
        const fa_tensor &to = second ? a.dk : a.dv;
        if (t.begin < t.end)
            store_keys<D>(sum, to, smem, t, 0, second ? a.scale : 1.f);
        else
            clear_keys<D>(to, t, 0);
        mbarrier_arrive(smem_address(&smem.tile_empty[i % 2]));
    }
}

#endif
