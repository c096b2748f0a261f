/* fwd_plain_loop.cuh - a plain variant's blocks of keys: masked ones one by one, then the loop.
 *
 * fwd_general_loop.cuh has the loops of variants that change scores.
 */
#ifndef FASTATTN_SM90_FWD_PLAIN_LOOP_CUH
#define FASTATTN_SM90_FWD_PLAIN_LOOP_CUH

#include "sm90/fwd_attend.cuh"
#include "sm90/fwd_visibility.cuh"

/* The blocks that not all rows see whole, the first one, and those that are skipped before it;
 * returns how many. */
DEVICE int32_t attend_masked(const kernel_args &a, smem_layout &smem, int32_t n, rows_state &st,
                             cursor &kv, uint64_t q, uint32_t q_empty, int32_t blocks, bool &next,
                             int32_t skip, int32_t masked, int32_t watch, int warpgroup) {
    const work_tile &t = smem.tiles[n % TILE_SLOTS];
    int32_t i = 0;
    for (; i < masked; ++i) {
        const int32_t number = uniform(key_block(t, i)), key = number * BLOCK_N;
        const uint32_t q_done = i == blocks - 1 ? q_empty : 0;
        const enum visibility seen = i < skip ? NONE : visibility_of(t, number, warpgroup);
        const bool cut = seen == PART;
        if (seen == NONE) {
            if (!next) finish_pv(a, st, smem);
            skip_block(smem, kv, q_done, warpgroup);
        } else if (next) {
            attend<NEXT, true, WATCH>(a, smem, n, st, kv, q, q_done, key, cut, st.fresh, warpgroup);
            next = false;
        } else if (DELAYED && !st.held) {
            attend<ALONE, true, WATCH>(a, smem, n, st, kv, q, q_done, key, cut, st.fresh,
                                       warpgroup);
        } else if (OFFSET == KEEP && !watch) {
            attend<BEHIND, true, KEEP>(a, smem, n, st, kv, q, q_done, key, cut, st.fresh,
                                       warpgroup);
        } else {
            attend<BEHIND, true, WATCH>(a, smem, n, st, kv, q, q_done, key, cut, st.fresh,
                                        warpgroup);
        }
    }
    return i;
}

/* The blocks from the i-th on, which all rows see whole. `second`: the one whose P V issued with it
 * is the tile's first, or -1. */
template <enum offset HOW>
DEVICE void attend_whole(const kernel_args &a, smem_layout &smem, int32_t n, rows_state &st,
                         cursor &kv, uint64_t q, uint32_t q_empty, int32_t i, int32_t blocks,
                         int32_t second, int warpgroup) {
    for (; i < blocks; ++i)
        attend<BEHIND, false, HOW>(a, smem, n, st, kv, q, !Q_AHEAD && i == blocks - 1 ? q_empty : 0,
                                   0, false, i == second, warpgroup);
}

/* All blocks of the n-th tile. `next`: the first that is computed ends the tile before in passing;
 * `skip`, `masked`, `watch`: as the tile says. */
DEVICE void attend_blocks(const kernel_args &a, smem_layout &smem, int32_t n, rows_state &st,
                          cursor &kv, uint64_t q, uint32_t q_empty, int32_t blocks, bool next,
                          int32_t skip, int32_t masked, int32_t watch, int warpgroup) {
    const int32_t i =
        attend_masked(a, smem, n, st, kv, q, q_empty, blocks, next, skip, masked, watch, warpgroup);
    const bool late = Q_AHEAD && i < blocks;
    const int32_t second = uniform(DELAYED && st.fresh ? i : -1);
    if (!watch)
        attend_whole<OFFSET>(a, smem, n, st, kv, q, q_empty, i, blocks, second, warpgroup);
    else
        attend_whole<WATCH>(a, smem, n, st, kv, q, q_empty, i, blocks, second, warpgroup);
    if (late) release(q_empty);
}

#endif
