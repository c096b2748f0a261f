/* fwd_attend.cuh - what a warpgroup does with a block of keys, and how it ends a tile.
 */
#ifndef FASTATTN_SM90_FWD_ATTEND_CUH
#define FASTATTN_SM90_FWD_ATTEND_CUH

#include "common/compiler.cuh"
#include "sm90/fwd_args.cuh"
#include "sm90/fwd_compiler.cuh"
#include "sm90/fwd_out.cuh"
#include "sm90/fwd_pipeline.cuh"
#include "sm90/fwd_products.cuh"
#include "sm90/fwd_slices.cuh"
#include "sm90/fwd_smem.h"
#include "sm90/fwd_visibility.cuh"
#include "sm90/softmax.cuh"
#if VARIANT_GENERAL
#include "sm90/fwd_bool_mask.cuh"
#include "sm90/fwd_mask_tiles.cuh"
#include "sm90/fwd_scores.cuh"
#endif

/* What comes before a block: nothing (ALONE), the block before it in its tile (BEHIND), or the last
 * block of the tile before (NEXT). If DELAYED, the P V of those two is issued behind Q K^T. */
enum place { ALONE, BEHIND, NEXT };

/* One key block: S = Q K^T, P = 2^(S scale - offset), O += P V. On return P V may still run, or, if
 * DELAYED, has not begun. NEXT ends the tile before in passing, so that the tensor cores have work
 * while its rows are divided and stored. MASKED: rows see the block in part; HOW: the offset.
 * `q_done`: the barrier to tell that Q was read for the last time, or 0. `fresh`: the P V issued
 * here is its tile's first. ONLY: the one change of scores of a general variant's loop.
 *
 * Longer than a function should be: those of its parts that were tried as functions of their own
 * and are not (the masks and changes of scores, raising the offset) gave other machine code. */
template <place PLACE, bool MASKED, enum offset HOW, enum changes ONLY = ANY>
DEVICE void attend(const kernel_args &a, smem_layout &smem, int32_t n, rows_state &st, cursor &kv,
                   uint64_t q, uint32_t q_done, int32_t key, bool cut, bool fresh, int warpgroup,
                   bool holes = false) {
    constexpr bool PENDING = DELAYED && PLACE != ALONE;
    const bool held = !(MASKED || GENERAL) || st.held; /* a plain loop has a block before it */
    const work_tile &t = smem.tiles[n % TILE_SLOTS];
    float s[BLOCK_N / 2];

    /* K is there, and what its scores need besides. */
    const uint64_t k = k_descriptor(a, smem, kv.stage);
    mbarrier_wait(smem_address(&smem.k_full[kv.stage]), kv.parity);
    /* Q has zeros there; where K has no finite numbers for them, the tile is voted down. */
    if (SLICES && HOW == WATCH && uniform(t.watch))
        clear_other_heads<BLOCK_N, 1>(a, t, smem.k[kv.stage], warpgroup);
#if VARIANT_GENERAL
    constexpr enum changes CHANGES = (enum changes)ONLY;
    /* Before the branch that shrinks O, P is rounded beside the last exponentials: float masks gain
     * by that, nothing else does (kernels/README.md). */
    constexpr bool ROUNDS_FIRST = CHANGES == TILES;
    const int32_t row = first_row(t, warpgroup);
    const bool drops = CHANGES == ANY ? a.scores.drops : CHANGES == DROPS;
    mask_tile tile = mask_tile_of(smem, kv, warpgroup);
    row_mask seen = {};
    if (MASKED && cut && a.scores.mask == BITS) seen = bool_row_mask(a, t, row, key, warpgroup);
    /* Whoever has the turn has 500 clocks: what takes longer comes before. */
    if (CHANGES == ANY)
        begin_mask_tile(a.scores, t.score, tile, row - threadIdx.x % 32 / 4, key, a.sq, a.sk);
#else
    constexpr bool ROUNDS_FIRST = false;
#endif

    /* In its turn: Q K^T, and P V of the block before behind it. */
    if (PENDING) mbarrier_wait(smem_address(&smem.v_full[st.v.stage]), st.v.parity);
    take_turn(warpgroup);
    issue_qk(s, q, k);
    if (PENDING) issue_pv(a, st, smem, fresh);

    /* While the tensor cores work: what does not depend on them. */
    epilogue end;
    if (PLACE == NEXT) end = begin_epilogue(a, smem.tiles[(n - 1) % TILE_SLOTS], st, warpgroup);
#if VARIANT_GENERAL
    if (MASKED && cut && a.scores.mask != BITS) seen = row_mask_of(t, row, key, warpgroup);
    if (CHANGES == TILES || (CHANGES == ANY && a.scores.mask > BITS))
        open_mask_tile(a.scores, tile, CHANGES == TILES);
    if (CHANGES == TILES) work_out(tile.row);
#else
    row_mask seen;
    if (MASKED && cut) seen = row_mask_of(t, first_row(t, warpgroup), key, warpgroup);
#endif

    /* Q K^T has ended: the turn, K and, behind the tile's last block, Q are handed on. */
    wgmma_wait_group<PENDING>();
    pass_turn(warpgroup);
    wgmma_accumulators(s);
    release(smem_address(&smem.k_empty[kv.stage]));
    if (q_done) release(q_done);
    if (!DELAYED) settle(st, smem, held);
    pin_turn<HOW>(a);

    /* Scores as the definition has them, -inf where a key is hidden. */
#if VARIANT_GENERAL
    const float scale = fabsf(a.scores.scale);
    bool done = false;
    if (CHANGES == CAPS) done = cap_exp(a.scores, st.softmax, s);
    if (CHANGES == ALIBI)
        done = alibi_exp(st.softmax, s, a.scores.unit * scale, t.score.slope * scale,
                         fa_row_position(t.lengths, t.row + 64 * warpgroup),
                         row - t.row - 64 * warpgroup, key);
    if (!done) final_scores<CHANGES>(a, t, s, tile, key, warpgroup);
#else
    constexpr bool done = false;
    float scale = a.scale;
    if ((HOW == WATCH || MASKED) && scale < 0.f) { /* the greatest score must give the greatest P */
#pragma unroll
        for (int i = 0; i < BLOCK_N / 2; ++i) s[i] = -s[i];
        scale = -scale;
    }
#endif
    if (MASKED && cut) mask_scores(seen, s);

    /* The offset, raised where a score needs it. */
    float2 minus = make_float2(st.softmax.minus[0], st.softmax.minus[1]), factor;
    bool raised = false; /* O must shrink, when P V of the block before has ended */
    if (HOW == WATCH) {
        if (PENDING && PLACE == BEHIND && !SHRINKS_LATE) {
            wgmma_wait_group<0>();
            settle(st, smem, held);
        }
        /* The first block of a tile gives offsets to the rows that see a key of it; where they are
         * kept, a later one does so for those that have none yet. */
        if (PLACE == NEXT || (PLACE == ALONE && OFFSET == KEEP && !t.watch)) {
            softmax_raise<true>(st.softmax, s, scale, a.slack);
            minus = softmax_center(st.softmax, s);
        } else if (!done && __any_sync(~0u, softmax_exceeds(st.softmax, s, a.slack) |
                                                softmax_is_coarse(st.softmax))) {
            factor = softmax_raise<false>(st.softmax, s, scale, a.slack);
            raised = true;
            minus = softmax_center(st.softmax, s);
        }
        if (!SHRINKS_LATE && raised) softmax_shrink(st.o, factor);
    } else if (MASKED) {
        /* Rows that see their first key here: a row of few is exact only with its own offset. */
        if (__any_sync(~0u, fminf(st.softmax.top[0], st.softmax.top[1]) == -INFINITY)) {
            softmax_raise<true>(st.softmax, s, scale, a.slack);
            minus = make_float2(st.softmax.minus[0], st.softmax.minus[1]);
        }
    }

    /* P, and its product with V: behind the next block's Q K^T, or here. */
    if (DELAYED) {
        if (!done) softmax_exp<!ONES>(st.softmax, s, scale, minus);
        if (HOW == FOLLOW) raised = softmax_follow(st.softmax, s, fabsf(scale), factor);
        if (PENDING && (PLACE == NEXT || HOW != WATCH || SHRINKS_LATE)) {
            wgmma_wait_group<0>();
            settle(st, smem, held);
        }
        if (ROUNDS_FIRST) softmax_pack(s, &st.p[0][0]);
        if ((SHRINKS_LATE || HOW == FOLLOW) && raised) softmax_shrink(st.o, factor);
        if (!ROUNDS_FIRST) softmax_pack(s, &st.p[0][0]);
        if (PLACE == NEXT) end_epilogue(a, smem, n - 1, st, end, warpgroup);
#if VARIANT_GENERAL
        if (drops) drop_scores(a.scores, t.score, &st.p[0][0], t.h, row, key);
#endif
        /* Not sooner: this V may be waiting for the stage of the one that has just been settled. */
        if (MASKED && cut) mbarrier_wait(smem_address(&smem.v_full[kv.stage]), kv.parity);
#if VARIANT_GENERAL
        if (!MASKED || CHANGES == WORDS) {
        } else if (holes && a.scores.bits.mask_only)
            clear_holes_of_both(a, t, smem, smem.v[kv.stage], key, warpgroup);
        else if (holes)
            clear_holes(a.scores, t.score, smem.v[kv.stage], t.row, key, warpgroup);
        else if (cut && a.scores.mask != BITS)
            clear_hidden_v(t, smem.v[kv.stage], key, warpgroup);
#else
        if (MASKED && cut) clear_hidden_v(t, smem.v[kv.stage], key, warpgroup);
#endif
    } else {
        mbarrier_wait(smem_address(&smem.v_full[kv.stage]), kv.parity);
        if (MASKED && cut) clear_hidden_v(t, smem.v[kv.stage], key, warpgroup);
        issue_pv_in_pieces(a, st, smem, s, scale, minus, kv.stage, fresh);
    }
    st.v = kv;
    st.held = true;
    advance(kv);
}

/* Ends the open tile where no block does so in passing. */
DEVICE void finish_tile(const kernel_args &a, smem_layout &smem, int32_t n, rows_state &st,
                        int warpgroup) {
    finish_pv(a, st, smem);
    epilogue end = begin_epilogue(a, smem.tiles[n % TILE_SLOTS], st, warpgroup);
    end_epilogue(a, smem, n, st, end, warpgroup);
}

/* A block that this warpgroup has no use for: it must still be handed back, once it is there. The
 * warps stay together, or one could miss two phases of a barrier. */
DEVICE void skip_block(smem_layout &smem, cursor &kv, uint32_t q_done, int warpgroup) {
    take_turn(warpgroup);
    pass_turn(warpgroup);
    mbarrier_wait(smem_address(&smem.k_full[kv.stage]), kv.parity);
    mbarrier_wait(smem_address(&smem.v_full[kv.stage]), kv.parity);
    sync_warpgroup(warpgroup);
    release(smem_address(&smem.k_empty[kv.stage]));
    release(smem_address(&smem.v_empty[kv.stage]));
    if (q_done) release(q_done);
    advance(kv);
}

#endif
