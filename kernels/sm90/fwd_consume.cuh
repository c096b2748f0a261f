/* fwd_consume.cuh - an MMA warpgroup: its 64 rows of one work tile after another.
 */
#ifndef FASTATTN_SM90_FWD_CONSUME_CUH
#define FASTATTN_SM90_FWD_CONSUME_CUH

#include "common/compiler.cuh"
#include "sm90/fwd_args.cuh"
#include "sm90/fwd_attend.cuh"
#include "sm90/fwd_compiler.cuh"
#include "sm90/fwd_pipeline.cuh"
#include "sm90/fwd_smem.h"
#if VARIANT_GENERAL
#include "sm90/fwd_general_loop.cuh"
#else
#include "sm90/fwd_plain_loop.cuh"
#endif

/* Longer than a function should be: the loop of general variants as a function of its own, or
 * wait_tile() (fwd_pipeline.cuh) here, give those other machine code. */
DEVICE void consume(const kernel_args &a, smem_layout &smem, int warpgroup) {
    cursor kv = {0, 0};
    rows_state st = {};
    softmax_start(st.softmax);
    close_rows(st, output_rows{});
    if (warpgroup == WARPGROUPS - 1) pass_turn(warpgroup); /* the first turn is warpgroup 0's */

    for (int32_t n = 0;; ++n) {
        const work_tile &t = smem.tiles[n % TILE_SLOTS];
        mbarrier_wait(smem_address(&smem.tile_full[n % TILE_SLOTS]), n / TILE_SLOTS & 1);
        const int slot = q_slot(n, warpgroup);
        const int32_t last = uniform(t.last), blocks = uniform(t.end - t.begin);

        /* The tile before ends: in passing if this one has a block for it before its V is needed,
         * or here. */
#if VARIANT_GENERAL
        uint32_t tag = blocks ? read_tag(a, smem, t, kv, 0, warpgroup) : 0;
        bool next = st.held && blocks && tag_visibility(tag, warpgroup) != NONE;
#else
        const int32_t skip = uniform(t.skip[warpgroup]), masked = uniform(t.masked[warpgroup]);
        const bool next = DELAYED && st.held && skip < masked && skip < STAGES;
        const int32_t watch = REDOES ? uniform(t.watch) : 1;
#endif
        if (DELAYED && st.open && !next) finish_tile(a, smem, n - 1, st, warpgroup);
        if (last) { /* the copy engine may not have read all that has been stored */
            if (STAGED && threadIdx.x % 32 == 0) cp_async_bulk_wait_group_read();
            return;
        }

        const uint64_t q = q_descriptor(a, smem, slot);
        const uint32_t q_empty = smem_address(&smem.q_empty[slot]);
        mbarrier_wait(smem_address(&smem.q_full[slot]), q_parity(n, warpgroup));
        if (SLICES) clear_other_heads<64, 0>(a, t, smem.q[slot], warpgroup);
        if (blocks == 0) { /* all warps have met this Q, or one could miss two of its phases */
            sync_warpgroup(warpgroup);
            release(q_empty);
        }
        if (REDOES && uniform(t.warpgroups) == 0) { /* no rows to compute: none to end */
            leave_tile(smem, n);
            continue;
        }

#if VARIANT_GENERAL
        for (int32_t i = 0; blocks;) {
            const int32_t key = (int32_t)(tag >> TAG_BLOCK) * BLOCK_N;
            const uint32_t q_done = tag & TAG_LAST ? q_empty : 0;
            const enum visibility seen = tag_visibility(tag, warpgroup);
            const bool cut = seen == PART, holes = tag & TAG_HOLES;
            if (seen == NONE) {
                finish_pv(a, st, smem);
                pass_mask_tiles(a.scores, mask_tile_of(smem, kv, warpgroup));
                skip_block(smem, kv, q_done, warpgroup);
            } else if (next) {
                attend<NEXT, true, WATCH>(a, smem, n, st, kv, q, q_done, key, cut, st.fresh,
                                          warpgroup, holes);
                next = false;
            } else if (!st.held) {
                attend<ALONE, true, WATCH>(a, smem, n, st, kv, q, q_done, key, cut, st.fresh,
                                           warpgroup, holes);
            } else if (SPECIAL && a.scores.only == WORDS && !holes) {
                tag = attend_words(a, smem, n, st, kv, q, q_empty, tag, warpgroup);
            } else if (SPECIAL && a.scores.only && a.scores.only != WORDS && !cut) {
                i += attend_whole(a, smem, n, st, kv, q, q_empty, i, key, warpgroup);
                if (i == t.end - t.begin) break;
                tag = interval_tag(t, i, warpgroup);
                continue;
            } else {
                attend<BEHIND, true, WATCH>(a, smem, n, st, kv, q, q_done, key, cut, st.fresh,
                                            warpgroup, holes);
            }
            if (tag & TAG_LAST) break;
            tag = read_tag(a, smem, t, kv, ++i, warpgroup);
        }
#else
        attend_blocks(a, smem, n, st, kv, q, q_empty, blocks, next, skip, masked, watch, warpgroup);
#endif
        st.open = true;
        if (!DELAYED) finish_tile(a, smem, n, st, warpgroup);
    }
}

#endif
