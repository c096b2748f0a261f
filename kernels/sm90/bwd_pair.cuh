/* bwd_pair.cuh - two blocks of a cluster that have neighbouring keys and walk over the same rows.
 *
 * dQ's sums in memory are what bounds a block of 64 keys at d 256. So the two send each other their
 * dS^T, and each adds half of dQ's columns, of the keys of both: half as many sums.
 *
 * Nobody asks whether the other's place for dS^T is free. Who has the other's of block n knows that
 * it has computed dQ of block n - 1, and received what it was sent of that; and there are two
 * places.
 */
#ifndef FASTATTN_SM90_BWD_PAIR_CUH
#define FASTATTN_SM90_BWD_PAIR_CUH

#include "common/compiler.cuh"
#include "sm90/bwd_args.cuh"
#include "sm90/bwd_block.cuh"
#include "sm90/bwd_loop.cuh"
#include "sm90/bwd_products.cuh"
#include "sm90/bwd_smem.h"
#include "sm90/bwd_waits.cuh"
#include "sm90/bwd_walk.cuh"
#include "sm90/ptx.cuh"
#include "sm90/wgmma.cuh"

DEVICE void init_pair(smem_layout &smem) {
    for (int i = 0; i < 2; ++i) {
        mbarrier_init(smem_address(&smem.p_full[i]), MMA_THREADS / 32);
        mbarrier_init(smem_address(&smem.other_full[i]), 1);
    }
    mbarrier_init(smem_address(&smem.number_full), 1);
    mbarrier_init(smem_address(&smem.number_empty), 1);
}

/* The same place in the other block. */
template <typename T>
DEVICE uint32_t in_other(const T &x) {
    return mapa(smem_address(&x), pair_rank() ^ 1);
}

/* The first block says which tile is the i-th, the second hears. */
DEVICE void say_number(smem_layout &smem, int32_t number, uint32_t i) {
    mbarrier_wait(smem_address(&smem.number_empty), i % 2 ^ 1);
    st_async(in_other(smem.number), number, in_other(smem.number_full));
}
DEVICE int32_t hear_number(smem_layout &smem, uint32_t i) {
    mbarrier_arrive_expect_tx(smem_address(&smem.number_full), sizeof smem.number);
    mbarrier_wait(smem_address(&smem.number_full), i % 2);
    const int32_t number = ld_shared(smem_address(&smem.number));
    mbarrier_arrive_cluster(in_other(smem.number_empty));
    return number;
}

/* K of the other's keys, the columns of this block's dQ. */
DEVICE void bring_other_keys(const bwd_args &a, smem_layout &smem, uint64_t &full,
                             const work_tile &t) {
    const uint32_t barrier = smem_address(&full);
    const int32_t key = t.k + other_key(t), first = pair_rank() * (QK_PANELS / 2);
    mbarrier_arrive_expect_tx(barrier, sizeof smem.other_k);
#pragma unroll
    for (int i = 0; i < QK_PANELS / 2; ++i)
        cp_async_bulk_tensor_load(smem_address(smem.other_k[i]), &a.k, 64 * (first + i), key,
                                  t.h_k * a.moves[1][0], t.batch * a.moves[1][1], barrier,
                                  EVICT_FIRST);
}

/* One thread sends each block's dS^T, once it is whole. */
DEVICE void send_ds(const bwd_args &a, smem_layout &smem) {
    uint32_t n = 0; /* blocks of rows so far */
    for (uint32_t i = 0;; ++i) {
        const work_tile &t = next_tile(smem, i, i % 2);
        if (t.key < 0) return;
        const uint32_t end = n + a.group * (t.end - t.begin);
        mbarrier_arrive(smem_address(&smem.tile_empty[i % 2]));
        for (; n < end; ++n) {
            const uint32_t place = n % 2;
            mbarrier_wait(smem_address(&smem.ds_full[place]), n / 2 % 2);
            mbarrier_arrive_expect_tx(smem_address(&smem.other_full[place]), PANEL_N);
            cp_async_bulk_cluster(in_other(smem.other_ds[place]), smem_address(smem.ds[place]),
                                  PANEL_N, in_other(smem.other_full[place]));
        }
    }
}

/* P^T or dS^T. */
DEVICE void mask_and_store(float (&x)[ROWS / 2], uint8_t (&to)[BLOCK_M / 64][PANEL_N],
                           const work_tile &t, const fa_row_range &plain, int32_t m,
                           int32_t warpgroup) {
    uint32_t rounded[ROWS / 16][4];
    mask_block(x, t, plain, m, warpgroup);
    pack(x, rounded);
    store_ds(rounded, to, warpgroup);
}

static constexpr int PARTS = DQ_COLUMNS / 8;

/* Some of the PARTS of this warp's dQ. */
template <int FIRST, int END>
DEVICE void add_some_dq(const float (&dq)[DQ_COLUMNS / 2], float *sums, int32_t block) {
    const int32_t warp = uniform(threadIdx.x / 32) + pair_rank() * (MMA_THREADS / 32);
    float *to = sums + (int64_t)block * (BLOCK_M * SUM_COLUMNS) + warp * (16 * DQ_COLUMNS) +
                threadIdx.x % 32 * 4;
#pragma unroll
    for (int i = FIRST; i < END; ++i)
        red_add_v4(to + 128 * i, dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]);
}

/* S^T of the next rows is begun in this block's. dQ of this block's keys is begun before it, of the
 * other's behind, for which dS^T has so much time to come. It is in flight over the loop's end, and
 * added in two parts with a fence between them: a warp that adds much at once waits. */
DEVICE int32_t walk_pair(const bwd_args &a, smem_layout &smem, smem_keys &kv, const work_tile &t,
                         int32_t warpgroup, uint32_t before, float (&dk)[DK_COLUMNS / 2],
                         float (&dv)[DV_COLUMNS / 2]) {
    const int32_t panel = pair_rank() * (QK_PANELS / 2) + warpgroup; /* of K, for dQ */
    const fa_row_range clean = whole_blocks(t.rows), plain = whole_blocks(t.all);
    if (t.begin == t.end) return -1;
    const uint32_t first_n = uniform(before),
                   last = uniform(before + a.group * (t.end - t.begin) - 1);
    int32_t m = uniform(t.begin), sums = sums_of(a, t, {t.h_k * a.group, m, 0});
    float s[ROWS / 2], dq[DQ_COLUMNS / 2];
    uint32_t n = first_n;
    wait_for_rows(smem.q[n % 2], smem.q_full[n % 2], n / 2 % 2, t, clean, m);
    issue_transposed<QK_PANELS, D>(s, kv.k, smem.q[n % 2], warpgroup);
    wgmma_wait_group<0>();
    wgmma_accumulators(s);
    for (;; ++n) {
        const uint32_t place = n % 2, parity = n / 2 % 2;
        const bool adds = n > first_n && a.dq;
        float dp[ROWS / 2];
        wait_for_rows(smem.dout[0], smem.dout_full[0], n % 2, t, clean, m);
        exponentials(s, smem.lse[place] + own_row(warpgroup), a.scale_log2);
        mask_and_store(s, smem.p[place], t, plain, m, warpgroup);
        wgmma_wait_group<0>();
        wgmma_accumulators(dq); /* of the block before */
        issue_transposed<V_PANELS, DV>(dp, kv.v, smem.dout[0], warpgroup);
        hand_over(smem.p_full[place]);
        mbarrier_wait(smem_address(&smem.p_full[place]), parity);
        issue_shared_sum(dv, smem.p[place], smem.dout[0], warpgroup, n == first_n);
        if (adds) add_some_dq<0, PARTS / 2>(dq, a.dq, sums);
        wgmma_wait_group<1>();
        wgmma_accumulators(dp);
        slopes(s, dp, smem.delta[0] + own_row(warpgroup));
        mask_and_store(dp, smem.ds[place], t, plain, m, warpgroup);
        hand_over(smem.ds_full[place]);
        if (adds) add_some_dq<PARTS / 2, PARTS>(dq, a.dq, sums);
        if (n > first_n) sums += next_sums(a, m, t.begin, t.end);
        /* Of the last block once more, which nobody reads, rather than products in a branch. */
        const uint32_t ahead = n < last ? n + 1 : n, next = ahead % 2;
        m = m + 1 == t.end ? t.begin : m + 1;
        if (n < last) wait_for_rows(smem.q[next], smem.q_full[next], ahead / 2 % 2, t, clean, m);
        mbarrier_wait(smem_address(&smem.ds_full[place]), parity);
        issue_shared_sum(dk, smem.ds[place], smem.q[place], warpgroup, n == first_n);
        issue_dq_of_keys(dq, smem.ds[place][0], kv.k[panel], true);
        issue_transposed<QK_PANELS, D>(s, kv.k, smem.q[next], warpgroup);
        wgmma_wait_group<3>();
        wgmma_accumulators(dv);
        mbarrier_arrive(smem_address(&smem.dout_empty[0]));
        mbarrier_wait(smem_address(&smem.other_full[place]), parity);
        issue_dq_of_keys(dq, smem.other_ds[place], smem.other_k[warpgroup], false);
        wgmma_wait_group<1>();
        wgmma_accumulators(dk);
        wgmma_accumulators(s);
        mbarrier_arrive(smem_address(&smem.q_empty[place]));
        if (n == last) break;
    }
    wgmma_wait_group<0>();
    wgmma_accumulators(dq);
    if (a.dq) add_some_dq<0, PARTS>(dq, a.dq, sums);
    return sums;
}

#endif
