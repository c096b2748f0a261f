/* bwd_turns.cuh - where the same bits are wanted every time: whose turn it is to add to dQ's sums.
 *
 * Blocks of keys add to the sums of a block of rows one after the other, the last keys first: under
 * a diagonal their walks are the first to come there. A counter for each block of rows, in the
 * workspace, counts the warps that have added; it begins with those of keys behind all that its
 * rows see (bwd_rows()). Tiles are numbered in this order, too, and taken by blocks of threads that
 * run already: a tile waits for tiles that were taken before, so that one always goes on.
 *
 * Two threads beside the producer ask for the turn of each block of rows, ahead of the MMA warps,
 * and hand it on behind them: a look at the counter and a fence take half of a block's time each.
 * Strided variants have no such threads: there each warp does both itself.
 */
#ifndef FASTATTN_SM90_BWD_TURNS_CUH
#define FASTATTN_SM90_BWD_TURNS_CUH

#include "common/compiler.cuh"
#include "sm90/bwd_args.cuh"
#include "sm90/bwd_smem.h"
#include "sm90/bwd_walk.cuh"
#include "sm90/ptx.cuh"

enum { ADDERS = MMA_THREADS / 32 }; /* warps that add to each block of rows */

/* What the counter says when it is the turn of the block with this key; sk: of the longest. */
DEVICE int32_t turn_of(int32_t key, int32_t sk) {
    return ADDERS * ((sk - 1) / BLOCK_N - key / BLOCK_N);
}

/* ---- the MMA warps: n counts the blocks of rows of all tiles ----------------------------------*/

/* By whole warps: what waits in a branch leaves the loop around it without uniform registers. */
DEVICE void wait_for_turn(const bwd_args &a, smem_layout &smem, const work_tile &t, int32_t block,
                          uint32_t n) {
    if (!a.turns) return;
    if (HELPED) {
        mbarrier_wait(smem_address(&smem.turn_full[n % TURNS]), n / TURNS % 2);
    } else {
        while (uniform(load_acquire(a.turns + block)) < t.turn) continue;
        fence_proxy_async_global();
    }
}

/* What the warp's first lane gave the copy engine for block n has been added: as late as can be,
 * for that takes a step of the loop. */
DEVICE void end_turn(const bwd_args &a, smem_layout &smem, uint32_t n) {
    if (!HELPED || !a.turns || threadIdx.x % 32) return;
    cp_async_bulk_wait_group();
    mbarrier_arrive(smem_address(&smem.turn_added[n % TURNS]));
}

/* By the first lane of a warp without help, once it has added. */
DEVICE void hand_on(const bwd_args &a, int32_t block) {
    if (!a.turns) return;
    cp_async_bulk_wait_group();
    red_release_add(a.turns + block, 1);
}

/* ---- the two threads --------------------------------------------------------------------------*/

/* f(n, its counter, the tile's turn) for each block of rows of each tile. */
template <typename F>
DEVICE void follow_turns(const bwd_args &a, smem_layout &smem, F f) {
    uint32_t n = 0;
    for (uint32_t i = 0;; ++i) {
        const work_tile &t = next_tile(smem, i, i % 2);
        if (t.key < 0) return;
        const int32_t turn = t.turn, blocks = t.end - t.begin;
        int32_t *first = a.turns + first_row_of(a, t, t.h_k * a.group) / BLOCK_M + t.begin;
        if (STAYS) mbarrier_arrive(smem_address(&smem.tile_empty[i % 2]));
        for (int32_t g = 0; g < a.group; ++g, first += a.m_blocks)
            for (int32_t m = 0; m < blocks; ++m, ++n) f(n, first + m, turn);
        if (!STAYS) return;
    }
}

DEVICE void ask_for_turns(const bwd_args &a, smem_layout &smem) {
    follow_turns(a, smem, [&](uint32_t n, int32_t *counter, int32_t turn) {
        mbarrier_wait(smem_address(&smem.turn_empty[n % TURNS]), n / TURNS % 2 ^ 1);
        while (load_acquire(counter) < turn) continue;
        fence_proxy_async_global();
        mbarrier_arrive(smem_address(&smem.turn_full[n % TURNS]));
    });
}

DEVICE void hand_turns_on(const bwd_args &a, smem_layout &smem) {
    follow_turns(a, smem, [&](uint32_t n, int32_t *counter, int32_t) {
        mbarrier_wait(smem_address(&smem.turn_added[n % TURNS]), n / TURNS % 2);
        red_release_add(counter, ADDERS);
        mbarrier_arrive(smem_address(&smem.turn_empty[n % TURNS]));
    });
}

#endif
