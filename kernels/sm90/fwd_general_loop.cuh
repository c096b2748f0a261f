/* fwd_general_loop.cuh - a general variant's runs of blocks of keys with one change of scores, each
 * in a loop of its own. The loop over all blocks of a tile, by their tags, is in fwd_consume.cuh.
 *
 * fwd_plain_loop.cuh has the loops of the other variants.
 */
#ifndef FASTATTN_SM90_FWD_GENERAL_LOOP_CUH
#define FASTATTN_SM90_FWD_GENERAL_LOOP_CUH

#include "sm90/fwd_attend.cuh"
#include "sm90/fwd_tags.cuh"

/* `run` blocks from `key` to the left, which all rows see whole, with one change. */
template <enum changes ONLY>
DEVICE void attend_run(const kernel_args &a, smem_layout &smem, int32_t n, rows_state &st,
                       cursor &kv, uint64_t q, uint32_t q_last, int32_t key, int32_t run,
                       int warpgroup) {
    for (; run > 0; --run, key -= BLOCK_N)
        attend<BEHIND, false, WATCH, ONLY>(a, smem, n, st, kv, q, run == 1 ? q_last : 0, key, false,
                                           st.fresh, warpgroup);
}

/* The block of this tag and those behind it, while they have no holes and some row sees them, with
 * a bool mask; returns the last one's tag. */
DEVICE uint32_t attend_words(const kernel_args &a, smem_layout &smem, int32_t n, rows_state &st,
                             cursor &kv, uint64_t q, uint32_t q_empty, uint32_t tag,
                             int warpgroup) {
    for (;;) {
        attend<BEHIND, true, WATCH, WORDS>(a, smem, n, st, kv, q, tag & TAG_LAST ? q_empty : 0,
                                           (int32_t)(tag >> TAG_BLOCK) * BLOCK_N,
                                           tag_visibility(tag, warpgroup) == PART, st.fresh,
                                           warpgroup);
        if (tag & TAG_LAST) return tag;
        uint32_t next = peek_tag(smem, kv);
        if (next & TAG_HOLES || tag_visibility(next, warpgroup) == NONE) return tag;
        tag = next;
    }
}

/* The blocks from the i-th on, at `key`, that lie side by side and are seen whole, with the one
 * change that there is; returns their number. */
DEVICE int32_t attend_whole(const kernel_args &a, smem_layout &smem, int32_t n, rows_state &st,
                            cursor &kv, uint64_t q, uint32_t q_empty, int32_t i, int32_t key,
                            int warpgroup) {
    const work_tile &t = smem.tiles[n % TILE_SLOTS];
    const int32_t run = whole_blocks(t, i, key / BLOCK_N, warpgroup);
    const uint32_t q_last = i + run == t.end - t.begin ? q_empty : 0;
    switch (a.scores.only) {
        case CAPS:
            attend_run<CAPS>(a, smem, n, st, kv, q, q_last, key, run, warpgroup);
            break;
        case TILES:
            attend_run<TILES>(a, smem, n, st, kv, q, q_last, key, run, warpgroup);
            break;
        case ALIBI:
            attend_run<ALIBI>(a, smem, n, st, kv, q, q_last, key, run, warpgroup);
            break;
        default:
            attend_run<DROPS>(a, smem, n, st, kv, q, q_last, key, run, warpgroup);
    }
    return run;
}

#endif
