/* bwd_loop.cuh - the loop over blocks of rows of all variants but those of bwd_ahead.cuh: each
 * block has its products to itself.
 */
#ifndef FASTATTN_SM90_BWD_LOOP_CUH
#define FASTATTN_SM90_BWD_LOOP_CUH

#include "common/compiler.cuh"
#include "sm90/bwd_args.cuh"
#include "sm90/bwd_block.cuh"
#include "sm90/bwd_products.cuh"
#include "sm90/bwd_smem.h"
#include "sm90/bwd_waits.cuh"
#include "sm90/bwd_walk.cuh"
#include "sm90/ptx.cuh"
#include "sm90/wgmma.cuh"
#if VARIANT_GENERAL
#include "sm90/bwd_scores.cuh"
#endif

/* dV is begun before the fence behind dS, but where registers are short. */
static constexpr bool EARLY_DV = !SHARED_KEYS && (!GENERAL || D < 128);

/* A block of rows, as a warpgroup comes to it. */
struct row_step {
    walk_step block;
    int32_t warpgroup;
    uint32_t n; /* blocks before it, of all tiles */
    bool fresh; /* the tile's first */
};

#if VARIANT_GENERAL
/* What scores_of_block() does where scores change; dV is computed, for P^T makes room for dP^T. */
DEVICE void weigh_block(const bwd_args &a, smem_layout &smem, smem_keys &kv, const work_tile &t,
                        const row_step &at, const score_bits &bits, float (&dv)[DV_COLUMNS / 2],
                        float (&s)[ROWS / 2], uint32_t (&p)[ROWS / 16][4], float (&dp)[ROWS / 2]) {
    const uint32_t stage = at.n % STAGES;
    issue_transposed<QK_PANELS, D>(s, kv.k, smem.q[stage], at.warpgroup);
    wgmma_wait_group<0>();
    wgmma_accumulators(s);
    weigh(a, t, at.block, at.warpgroup, smem.lse[stage], bits, s, p);
    if (SHARED_KEYS) {
        store_ds(p, smem.p[at.n % 2], at.warpgroup);
    } else {
        issue_sum<V_PANELS, DV_COLUMNS>(dv, p, smem.dout[stage], at.fresh);
        wgmma_wait_group<0>();
        wgmma_accumulators(dv);
    }
    issue_transposed<V_PANELS, DV>(dp, kv.v, smem.dout[stage], at.warpgroup);
    wgmma_wait_group<0>();
    wgmma_accumulators(dp);
    bit_slopes(bits, a.scores.gain, s, dp, smem.delta[stage] + own_row(at.warpgroup));
}
#endif

/* P^T and dS^T of a block of rows, in place of S^T and dP^T. PLAIN: nothing but what is seen
 * changes a score; else weigh_block(). */
template <bool PLAIN>
DEVICE void scores_of_block(const bwd_args &a, smem_layout &smem, smem_keys &kv, const work_tile &t,
                            const row_step &at, const fa_row_range &plain,
                            float (&dv)[DV_COLUMNS / 2], float (&s)[ROWS / 2],
                            uint32_t (&p)[ROWS / 16][4], float (&dp)[ROWS / 2]) {
    const uint32_t stage = at.n % STAGES;
#if VARIANT_GENERAL
    clear_empty_rows(smem, stage);
    const score_bits bits = bits_of(a, t, at.block, at.warpgroup);
    if (!PLAIN) return weigh_block(a, smem, kv, t, at, bits, dv, s, p, dp);
    const auto hide = [&](float (&x)[ROWS / 2]) { hide_scores(x, bits); };
#else
    const auto hide = [&](float (&x)[ROWS / 2]) {
        mask_block(x, t, plain, at.block.m, at.warpgroup);
    };
#endif
    issue_transposed<QK_PANELS, D>(s, kv.k, smem.q[stage], at.warpgroup);
    issue_transposed<V_PANELS, DV>(dp, kv.v, smem.dout[stage], at.warpgroup);
    const float *lse = smem.lse[stage] + own_row(at.warpgroup);
    const bool great = GENERAL && has_great_rows(lse);
    wgmma_wait_group<1>();
    wgmma_accumulators(s);
    exponentials(s, lse, a.scale_log2, great);
    hide(s);
    pack(s, p);
    if (SHARED_KEYS) store_ds(p, smem.p[at.n % 2], at.warpgroup);
    wgmma_wait_group<0>();
    wgmma_accumulators(dp);
    slopes(s, dp, smem.delta[stage] + own_row(at.warpgroup));
    hide(dp);
}

/* Returns as walk_ahead() does. */
template <bool PLAIN>
DEVICE int32_t walk(const bwd_args &a, smem_layout &smem, smem_keys &kv, const work_tile &t,
                    int32_t warpgroup, uint32_t before, float (&dk)[DK_COLUMNS / 2],
                    float (&dv)[DV_COLUMNS / 2]) {
    const int32_t warp = uniform(threadIdx.x / 32), begin = uniform(t.begin), end = uniform(t.end);
    const fa_row_range clean = whole_blocks(t.rows), plain = whole_blocks(t.all);
    const int32_t first = SPREAD ? uniform(t.first) : begin;
    const uint32_t blocks = a.group * (end - begin); /* of rows, where none is passed by */
    walk_step at = {t.h_k * a.group, first, 0};
    int32_t sums = sums_of(a, t, at);
    uint32_t i = 0, n = uniform(before);
    for (; GENERAL || i < blocks; ++i, ++n) {
        const uint32_t stage = n % STAGES, parity = n / STAGES % 2;
#if VARIANT_GENERAL
        at = next_step(smem, stage, parity);
        if (at.m < 0) break;
#endif
        const int32_t m = at.m;
        float s[ROWS / 2], dp[ROWS / 2], dq[DQ_COLUMNS / 2];
        uint32_t p[ROWS / 16][4], ds[ROWS / 16][4];
        wait_for_rows(smem.q[stage], smem.q_full[stage], parity, t,
                      GENERAL ? whole_blocks(t.rows) : clean, m);
        wait_for_rows(smem.dout[stage], smem.dout_full[stage], parity, t,
                      GENERAL ? whole_blocks(t.rows) : clean, m);
        scores_of_block<PLAIN>(a, smem, kv, t, {at, warpgroup, n, i == 0}, plain, dv, s, p, dp);
        pack(dp, ds);
        store_ds(ds, smem.ds[n % 2], warpgroup);
        if (PLAIN && EARLY_DV) issue_sum<V_PANELS, DV_COLUMNS>(dv, p, smem.dout[stage], i == 0);
        hand_over(smem.ds_full[n % 2]);
        if (i > 0 && !DIRECT_DQ) add_dq(smem, a, t, sums, n - 1, i > 1, warp);
        if (GENERAL)
            sums = sums_of(a, t, at);
        else if (i > 0)
            sums += next_sums(a, m, begin, end, first);
        if (PLAIN && !EARLY_DV && !SHARED_KEYS)
            issue_sum<V_PANELS, DV_COLUMNS>(dv, p, smem.dout[stage], i == 0);
        mbarrier_wait(smem_address(&smem.ds_full[n % 2]), n / 2 % 2);
        issue_dq(dq, kv, smem.ds[n % 2], warpgroup);
        if (SHARED_KEYS) {
            issue_shared_sum(dv, smem.p[n % 2], smem.dout[stage], warpgroup, i == 0);
            issue_shared_sum(dk, smem.ds[n % 2], smem.q[stage], warpgroup, i == 0);
        } else {
            issue_sum<QK_PANELS, DK_COLUMNS>(dk, ds, smem.q[stage], i == 0);
        }
        wgmma_wait_group<SHARED_KEYS ? 2 : 1>(); /* dQ */
        wgmma_accumulators(dq);
        if (DIRECT_DQ)
            add_dq<0>(dq, smem, a, t, sums, n, warp);
        else
            store_dq(dq, smem);
        wgmma_wait_group<1>();
        wgmma_accumulators(dv);
        mbarrier_arrive(smem_address(&smem.dout_empty[stage]));
        if (DIRECT_DQ) add_dq<1>(dq, smem, a, t, sums, n, warp);
        wgmma_wait_group<0>();
        wgmma_accumulators(dk);
        mbarrier_arrive(smem_address(&smem.q_empty[stage]));
        if (!GENERAL) at.m = m + 1 == end ? begin : m + 1;
    }
    return i ? sums : -1;
}

#endif
