/* bwd_ahead.cuh - the loop over blocks of 64 rows of plain variants: scores of the next block are
 * begun between the sums of this one, so that tensor cores have something to do whatever threads
 * wait for or work out.
 *
 *     dQ, S' | dQ to its sums | dP', dK | P' of S' | dS' of dP' | dV' | fence, others' dS' | dQ'
 *
 * In flight meanwhile: S', then dP' and dK, and dV', which comes before the fence. dK is the
 * product of dS in shared memory: its registers are the next block's.
 */
#ifndef FASTATTN_SM90_BWD_AHEAD_CUH
#define FASTATTN_SM90_BWD_AHEAD_CUH

#include "common/compiler.cuh"
#include "sm90/bwd_args.cuh"
#include "sm90/bwd_block.cuh"
#include "sm90/bwd_products.cuh"
#include "sm90/bwd_smem.h"
#include "sm90/bwd_waits.cuh"
#include "sm90/bwd_walk.cuh"
#include "sm90/ptx.cuh"
#include "sm90/wgmma.cuh"

/* A tile's walk. n: blocks before one, of all tiles; begin_...() wait for what they read. */
struct tile_walk {
    const bwd_args &a;
    smem_layout &smem;
    smem_keys &kv;
    const work_tile &t;
    const int32_t warpgroup, warp;
    const fa_row_range clean, plain;
    const uint32_t first, last;
    int32_t m, sums; /* the block of rows of S; where sums of that of dQ lie */
    float (&dk)[DK_COLUMNS / 2], (&dv)[DV_COLUMNS / 2], (&dq)[DQ_COLUMNS / 2];
    float (&s)[ROWS / 2], (&dp)[ROWS / 2];
    uint32_t (&p)[ROWS / 16][4];

    __device__ __forceinline__ void begin_s(uint32_t n) {
        const uint32_t q = n % Q_STAGES;
        wait_for_rows(smem.q[q], smem.q_full[q], n / Q_STAGES % 2, t, clean, m);
        issue_transposed<QK_PANELS, D>(s, kv.k, smem.q[q], warpgroup);
    }
    __device__ __forceinline__ void begin_dp(uint32_t n) {
        const uint32_t stage = n % STAGES;
        wait_for_rows(smem.dout[stage], smem.dout_full[stage], n / STAGES % 2, t, clean, m);
        issue_transposed<V_PANELS, DV>(dp, kv.v, smem.dout[stage], warpgroup);
    }
    __device__ __forceinline__ void begin_dq(uint32_t n) {
        mbarrier_wait(smem_address(&smem.ds_full[n % 2]), n / 2 % 2);
        issue_dq(dq, kv, smem.ds[n % 2], warpgroup);
    }
    __device__ __forceinline__ void begin_dk(uint32_t n) {
        issue_shared_sum(dk, smem.ds[n % 2], smem.q[n % Q_STAGES], warpgroup, n == first);
    }
    __device__ __forceinline__ void begin_dv(uint32_t n) {
        issue_sum<V_PANELS, DV_COLUMNS>(dv, p, smem.dout[n % STAGES], n == first);
    }
    __device__ __forceinline__ void end_dk(uint32_t n) {
        wgmma_accumulators(dk);
        mbarrier_arrive(smem_address(&smem.q_empty[n % Q_STAGES]));
    }
    __device__ __forceinline__ void end_dv(uint32_t n) {
        wgmma_accumulators(dv);
        mbarrier_arrive(smem_address(&smem.dout_empty[n % STAGES]));
    }

    /* P of S. */
    __device__ __forceinline__ void weigh(uint32_t n) {
        wgmma_accumulators(s);
        exponentials(s, smem.lse[n % Q_STAGES], a.scale_log2);
        mask_block(s, t, plain, m, warpgroup);
        pack(s, p);
    }
    /* dS of dP; the fence takes a while. */
    __device__ __forceinline__ void slope(uint32_t n) {
        uint32_t ds[ROWS / 16][4];
        wgmma_accumulators(dp);
        slopes(s, dp, smem.delta[n % STAGES]);
        mask_block(dp, t, plain, m, warpgroup);
        pack(dp, ds);
        store_ds(ds, smem.ds[n % 2], warpgroup);
        begin_dv(n);
        hand_over(smem.ds_full[n % 2]);
    }
    __device__ __forceinline__ void start() {
        begin_s(first);
        begin_dp(first);
        wgmma_wait_group<1>();
        weigh(first);
        wgmma_wait_group<0>();
        slope(first);
    }
    /* The sums of block n, and the scores of the next. */
    __device__ __forceinline__ void step(uint32_t n) {
        begin_dq(n);
        wgmma_wait_group<1>();
        end_dv(n);
        m = m + 1 == t.end ? t.begin : m + 1;
        begin_s(n + 1);
        wgmma_wait_group<1>();
        wgmma_accumulators(dq);
        store_dq(dq, smem);
        begin_dp(n + 1);
        begin_dk(n);
        wgmma_wait_group<2>();
        weigh(n + 1);
        wgmma_wait_group<1>();
        slope(n + 1);
        wgmma_wait_group<1>();
        end_dk(n);
        add_dq(smem, a, t, sums, n, n > first, warp);
        sums += next_sums(a, m, t.begin, t.end, SPREAD ? t.first : t.begin);
    }
    __device__ __forceinline__ void finish() {
        begin_dq(last);
        begin_dk(last);
        wgmma_wait_group<1>();
        end_dv(last);
        wgmma_accumulators(dq);
        store_dq(dq, smem);
        wgmma_wait_group<0>();
        end_dk(last);
    }
};

/* Returns where dQ's sums of the last block of rows lie, or -1 if there was none. */
DEVICE int32_t walk_ahead(const bwd_args &a, smem_layout &smem, smem_keys &kv, const work_tile &t,
                          int32_t warpgroup, uint32_t before, float (&dk)[DK_COLUMNS / 2],
                          float (&dv)[DV_COLUMNS / 2]) {
    if (t.begin == t.end) return -1;
    const uint32_t first = uniform(before), last = first + uniform(a.group * (t.end - t.begin)) - 1;
    const int32_t warp = uniform(threadIdx.x / 32), m = uniform(t.first);
    const fa_row_range clean = whole_blocks(t.rows), plain = whole_blocks(t.all);
    const int32_t sums = sums_of(a, t, {t.h_k * a.group, m, 0});
    float dq[DQ_COLUMNS / 2], s[ROWS / 2], dp[ROWS / 2];
    uint32_t p[ROWS / 16][4];
    tile_walk walk = {a,    smem, kv,   t,  warpgroup, warp, clean, plain, first,
                      last, m,    sums, dk, dv,        dq,   s,     dp,    p};
    walk.start();
    for (uint32_t n = first; n < last; ++n) walk.step(n);
    walk.finish();
    return walk.sums;
}

#endif
