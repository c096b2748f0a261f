/* bwd_waits.cuh - the MMA warpgroups wait for what was brought, and clear what nobody sees: 0 * NaN
 * is NaN.
 */
#ifndef FASTATTN_SM90_BWD_WAITS_CUH
#define FASTATTN_SM90_BWD_WAITS_CUH

#include "common/compiler.cuh"
#include "sm90/bwd_args.cuh"
#include "sm90/bwd_smem.h"
#include "sm90/bwd_walk.cuh"
#include "sm90/ptx.cuh"
#if VARIANT_GENERAL
#include "sm90/bwd_scores.cuh"
#endif

enum { ROWS_BARRIER = 1 }; /* of all MMA threads */

/* Zeros in the rows of a block for which `cleared` says so. By all MMA threads. */
template <int PANELS, int BYTES, typename F>
DEVICE void clear_rows_if(uint8_t (&block)[PANELS][BYTES], F cleared) {
    for (int32_t i = threadIdx.x; i < PANELS * BYTES / 16; i += MMA_THREADS)
        if (cleared(i * 16 % BYTES / 128)) st_shared_v4(smem_address(block) + 16 * i, 0, 0, 0, 0);
}

/* Those outside begin .. end. */
template <int PANELS, int BYTES>
DEVICE void clear_rows(uint8_t (&block)[PANELS][BYTES], int32_t begin, int32_t end) {
    clear_rows_if(block, [=](int32_t row) { return row < begin || row >= end; });
}

/* The blocks of rows that lie whole in a range. */
DEVICE fa_row_range whole_blocks(const fa_row_range &rows) {
    return fa_row_range{uniform((rows.begin + BLOCK_M - 1) / BLOCK_M), uniform(rows.end / BLOCK_M)};
}

/* Waits for block m of Q or dO. */
template <int PANELS, int BYTES>
DEVICE void wait_for_rows(uint8_t (&block)[PANELS][BYTES], uint64_t &full, uint32_t parity,
                          const work_tile &t, const fa_row_range &clean, int32_t m) {
    mbarrier_wait(smem_address(&full), parity);
    if (m >= clean.begin && m < clean.end) return;
    clear_rows(block, t.rows.begin - m * BLOCK_M, t.rows.end - m * BLOCK_M);
    fence_proxy_async();
    bar_sync(ROWS_BARRIER, MMA_THREADS);
}

#if VARIANT_GENERAL
/* Both are there: rows that a mask leaves no key have no lse. */
DEVICE void clear_empty_rows(smem_layout &smem, uint32_t stage) {
    const float (&lse)[BLOCK_M] = smem.lse[stage];
    if (!has_empty_rows(lse)) return;
    clear_rows_if(smem.q[stage], [&](int32_t row) { return lse[row] == INFINITY; });
    clear_rows_if(smem.dout[stage], [&](int32_t row) { return lse[row] == INFINITY; });
    fence_proxy_async();
    bar_sync(ROWS_BARRIER, MMA_THREADS);
}

/* K and V of keys that a bool mask hides from every row. */
DEVICE void clear_unseen_keys(const bwd_args &a, smem_layout &smem, smem_keys &kv,
                              const work_tile &t) {
    if (a.scores.mask != BITS) return;
    if (threadIdx.x < BLOCK_N) smem.seen[threadIdx.x] = is_seen(a, t, t.key + threadIdx.x);
    bar_sync(ROWS_BARRIER, MMA_THREADS);
    clear_rows_if(kv.k, [&](int32_t key) { return !smem.seen[key]; });
    clear_rows_if(kv.v, [&](int32_t key) { return !smem.seen[key]; });
    fence_proxy_async();
    bar_sync(ROWS_BARRIER, MMA_THREADS);
}
#endif

/* Waits for K and V. */
DEVICE void wait_for_keys([[maybe_unused]] const bwd_args &a, smem_layout &smem, smem_keys &kv,
                          const work_tile &t, uint32_t place, uint32_t parity) {
    mbarrier_wait(smem_address(&smem.kv_full[place]), parity);
#if VARIANT_GENERAL
    clear_unseen_keys(a, smem, kv, t);
#endif
    if (pair_key(t) >= t.keys.begin && pair_key(t) + TILE_N <= t.keys.end) return;
    clear_rows(kv.k, t.keys.begin - t.key, t.keys.end - t.key);
    clear_rows(kv.v, t.keys.begin - t.key, t.keys.end - t.key);
#if VARIANT_CLUSTER
    clear_rows(smem.other_k, t.keys.begin - other_key(t), t.keys.end - other_key(t));
#endif
    fence_proxy_async();
    bar_sync(ROWS_BARRIER, MMA_THREADS);
}

#endif
