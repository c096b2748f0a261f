/* fwd_producers.cuh - what brings Q, K and V, each a thread (or, without the copy engine, the
 * lanes) of a warp of its own. With the scheduler (fwd_scheduler.cuh) they serve the MMA
 * warpgroups.
 *
 * Loops over what comes once a tile are not unrolled: their code would push the warpgroups' loops
 * out of the instruction cache (with the scheduler's divisions by multiplication: s 512 2.5 to
 * 5.8 %).
 */
#ifndef FASTATTN_SM90_FWD_PRODUCERS_CUH
#define FASTATTN_SM90_FWD_PRODUCERS_CUH

#include "sm90/fwd_args.cuh"
#include "sm90/fwd_pipeline.cuh"
#include "sm90/fwd_scheduler.cuh"
#include "sm90/fwd_smem.h"
#include "sm90/fwd_visibility.cuh"
#include "sm90/ptx.cuh"
#if IS_RAW
#include "sm90/fwd_load_raw.cuh"
#elif IS_STRIDED
#include "sm90/fwd_load_strided.cuh"
#else
#include "sm90/fwd_load_boxes.cuh"
#endif
#if IS_PAGED
#include "sm90/fwd_load_pages.cuh"
#endif
#if VARIANT_GENERAL
#include "sm90/fwd_mask_tiles.cuh"
#include "sm90/fwd_tags.cuh"
#endif

/* Short calls read K and V once or twice: there is no use in keeping them in the L2 longest. */
[[maybe_unused]] static constexpr uint64_t KV_POLICY =
    BLOCKS_PER_SM > 1 && !DELAYED ? EVICT_NORMAL : EVICT_LAST;

DEVICE void bring_q(const kernel_args &a, smem_layout &smem) {
    for (int32_t n = 0;; ++n) {
        const work_tile &t = wait_tile(smem, n);
        if (t.last) return;
#pragma unroll 1
        for (int w = 0; w < WARPGROUPS; ++w) {
            const int32_t place_ = n * WARPGROUPS + w, slot = place_ % Q_SLOTS;
            const uint32_t full = smem_address(&smem.q_full[slot]);
            mbarrier_wait(smem_address(&smem.q_empty[slot]), place_ / Q_SLOTS & 1 ^ 1);
            if (t.warpgroups >> w & 1)
                load<64, D, 0>(a, smem_address(smem.q[slot]), a.q, t.q + t.row + 64 * w, t.h, t.b,
                               a.moves[0], full, EVICT_FIRST);
            else
                mbarrier_arrive(full);
        }
    }
}

/* K or V: the same blocks in the same order, into a ring of their own.
 *
 * Longer than a function should be: a block's load as a function of its own gives raw variants
 * other machine code. */
template <bool IS_K, int COLUMNS, int BYTES>
DEVICE void bring(const kernel_args &a, smem_layout &smem, const array &from,
                  const int32_t (&moves)[2], uint8_t (&stages)[STAGES][BYTES],
                  uint64_t (&full)[STAGES], uint64_t (&empty)[STAGES]) {
    cursor kv = {0, 0};
#if IS_RAW
    raw_rows raw = raw_rows_of(from, smem.raw[IS_K], smem.raw_full[IS_K]);
#endif
#if VARIANT_GENERAL
    uint32_t tiles = 0; /* of the mask, so far */
#endif
    for (int32_t n = 0;; ++n) {
        const work_tile &t = wait_tile(smem, n);
        if (t.last) return;
        const int32_t blocks = t.end - t.begin;
#if IS_RAW
        raw.head = (int64_t)element_at(from, t.b, t.h_k, t.k, 0);
        const int32_t rows = (int32_t)from.shape[2] - t.k;
#endif
#if VARIANT_GENERAL
        /* A tile with keys has a stage even if its mask hides them all: the warpgroups wait for the
         * tag that says so. */
        const bool bits = a.scores.mask == BITS;
        block_walk walk = {(uint32_t)t.end, ~0u};
        int32_t found = bits ? next_block(a.scores, t.score, walk, t.row, t.begin) : 0;
#endif
        bool more = blocks > 0;
#pragma unroll 1
        for (int32_t i = 0; more; ++i, advance(kv)) {
            int32_t block = key_block(t, i);
            more = i + 1 < blocks;
#if VARIANT_GENERAL
            uint32_t tag = 0;
            if (bits) {
                block = found;
                if (IS_K) tag = block_tag(a.scores, t, walk, block);
                if (block >= 0) found = next_block(a.scores, t.score, walk, t.row, t.begin);
                more = block >= 0 && found >= 0;
            }
#endif
            mbarrier_wait(smem_address(&empty[kv.stage]), kv.parity ^ 1);
#if VARIANT_GENERAL
            if (IS_K && bits && threadIdx.x % 32 == 0)
                *(volatile uint32_t *)&smem.tags[kv.stage] = more ? tag : tag | TAG_LAST;
            if (block < 0) {
                mbarrier_arrive(smem_address(&full[kv.stage]));
                continue;
            }
#endif
#if IS_RAW
            const int32_t first = block * BLOCK_N, next = key_block(t, i + 1) * BLOCK_N;
            load_raw<BLOCK_N>(raw, smem_address(stages[kv.stage]), first, rows - first, next,
                              more ? rows - next : 0, smem_address(&full[kv.stage]));
#elif IS_PAGED
            load_pages<COLUMNS, 2 - IS_K>(a, t, smem_address(stages[kv.stage]), from,
                                          block * BLOCK_N, moves, smem_address(&full[kv.stage]),
                                          KV_POLICY);
#else
            load<BLOCK_N, COLUMNS, 2 - IS_K>(a, smem_address(stages[kv.stage]), from,
                                             t.k + block * BLOCK_N, t.h_k, t.b, moves,
                                             smem_address(&full[kv.stage]), KV_POLICY);
#endif
#if VARIANT_GENERAL
            if (IS_K && a.scores.tiles && threadIdx.x % 32 == 0)
                bring_mask(a, smem, t, block * BLOCK_N, tiles);
#endif
        }
        leave_tile(smem, n);
    }
}

DEVICE void bring_k(const kernel_args &a, smem_layout &smem) {
    bring<true, D>(a, smem, a.k, a.moves[1], smem.k, smem.k_full, smem.k_empty);
}

DEVICE void bring_v(const kernel_args &a, smem_layout &smem) {
    bring<false, DV>(a, smem, a.v, a.moves[2], smem.v, smem.v_full, smem.v_empty);
}

#endif
