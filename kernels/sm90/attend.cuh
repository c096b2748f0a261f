/* attend.cuh - what a warpgroup does with a block of keys, and how it ends a tile.
 *
 * A part of fwd.cu, which includes it behind the item, the arguments and the servers.
 */
#ifndef FASTATTN_SM90_ATTEND_CUH
#define FASTATTN_SM90_ATTEND_CUH

/* wgmma's descriptor of what lies `offset` + 16 * `step` bytes into shared memory. Linear in
 * `step`, so that one instruction finds a stage; the upper half is an argument, for of a constant
 * the compiler makes moves at each use. General rows have no uniform register left for it. */
DEVICE uint64_t operand(const kernel_args &a, smem_layout &smem, uint32_t offset, uint32_t panel,
                        uint32_t step) {
    const uint32_t base = smem_address(&smem);
    if (GENERAL) return wgmma_descriptor(base + offset + 16 * step, panel);
    return (uint64_t)a.descriptor_high << 32 | (base / 16 + offset / 16 + (panel << 16) + step);
}
DEVICE uint64_t q_descriptor(const kernel_args &a, smem_layout &smem, int slot) {
    return operand(a, smem, offsetof(smem_layout, q), 1, slot * (Q_BYTES / 16));
}
DEVICE uint64_t k_descriptor(const kernel_args &a, smem_layout &smem, int stage) {
    return operand(a, smem, offsetof(smem_layout, k), 1, stage * (K_BYTES / 16));
}
DEVICE uint64_t v_descriptor(const kernel_args &a, smem_layout &smem, int stage) {
    constexpr uint32_t V = offsetof(smem_layout, v), STEP = V_BYTES / 16;
    if (!ONES) return operand(a, smem, V, PANEL_N / 16, stage * STEP);
    /* The next panel is the block of ones, nearer by a stage. */
    return operand(a, smem, V, (offsetof(smem_layout, ones) - V) / 16,
                   stage * (STEP - (STEP << 16)));
}

/* What a warpgroup keeps over the key blocks of a tile, and into the first block of the next. */
struct rows_state {
    float o[(DV + 8 * ONES) / 2];
    uint32_t p[P_PIECES][4];
    softmax_rows softmax;
    cursor v;   /* the stage of V that P V reads, or will */
    bool held;  /* it has not been handed back */
    bool open;  /* these rows are an item's, while one begins the last one's; else l is 0 */
    bool fresh; /* O holds nothing: the first P V writes it */
};

DEVICE void release(uint32_t barrier) {
    if (RELEASERS == 128 || threadIdx.x % 128 == 0) mbarrier_arrive(barrier);
}

/* All of this warpgroup's P V have ended: hands back the V that the last ones read. `held`: what
 * st.held is, where the compiler cannot know. */
DEVICE void settle(rows_state &st, smem_layout &smem, bool held) {
    wgmma_accumulators(st.o);
    if (held) release(smem_address(&smem.v_empty[st.v.stage]));
    st.held = false;
}

/* While one warpgroup has the tensor cores for Q K^T, the others are at their exponentials and P V;
 * without turns they fall into step, and the tensor cores idle. */
DEVICE void take_turn(int warpgroup) {
    if (TURNS) bar_sync(8 + warpgroup, 256);
}
DEVICE void pass_turn(int warpgroup) {
    if (TURNS) bar_arrive(8 + (warpgroup + 1) % WARPGROUPS, 256);
}

/* O += P V of the block whose P is in registers. */
DEVICE void issue_pv(const kernel_args &a, rows_state &st, smem_layout &smem, bool fresh) {
    const uint64_t v = v_descriptor(a, smem, st.v.stage);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < BLOCK_N / 16; ++i)
        wgmma_rs<DV + 8 * ONES>(st.o, st.p[i % P_PIECES], v + i * 128, i > 0 || !fresh);
    wgmma_commit_group();
    st.fresh = false;
}

#if VARIANT_GENERAL
#include "blocks.cuh"
#endif
#include "out.cuh"

/* What comes before a block: nothing (ALONE), the block before it in its tile (BEHIND), or the last
 * block of the tile before (NEXT). If DELAYED, the P V of those two is issued behind Q K^T. */
enum place { ALONE, BEHIND, NEXT };

/* One key block: S = Q K^T, P = 2^(S scale - offset), O += P V. On return P V may still run, or, if
 * DELAYED, has not begun. NEXT ends the tile before in passing, so that the tensor cores have work
 * while its rows are divided and stored. MASKED: rows see the block in part; HOW: the offset.
 * `q_done`: the barrier to tell that Q was read for the last time, or 0. `fresh`: the P V issued
 * here is its tile's first. ONLY: enum changes, of general rows. */
template <place PLACE, bool MASKED, enum offset HOW, int ONLY = 0>
DEVICE void attend(const kernel_args &a, smem_layout &smem, int32_t n, rows_state &st, cursor &kv,
                   uint64_t q, uint32_t q_done, int32_t key, bool cut, bool fresh, int warpgroup,
                   bool holes = false) {
    constexpr bool PENDING = DELAYED && PLACE != ALONE;
    const bool held = !(MASKED || GENERAL) || st.held; /* before a plain row's loops was a block */
    const work_tile &t = smem.tiles[n % TILE_SLOTS];
    float s[BLOCK_N / 2];
    const uint64_t k = k_descriptor(a, smem, kv.stage);
    mbarrier_wait(smem_address(&smem.k_full[kv.stage]), kv.parity);
#if HAS_SLICES
    /* Q has zeros there; where K has no finite numbers for them, the tile is voted down. */
    if (HOW == WATCH && uniform(t.watch)) {
        const int32_t begin = t.h * a.moves[0][0] % FA_SLICE; /* as Q's */
        clear_columns<BLOCK_N>(smem.k[kv.stage], begin, begin + a.d, a.columns[1], warpgroup);
    }
#endif
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
    if (PENDING) mbarrier_wait(smem_address(&smem.v_full[st.v.stage]), st.v.parity);
    take_turn(warpgroup);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < D / 16; ++i)
        wgmma_ss<BLOCK_N>(s, q + i / 4 * (PANEL_Q / 16) + i % 4 * 2,
                          k + i / 4 * (PANEL_N / 16) + i % 4 * 2, i > 0);
    wgmma_commit_group();
    if (PENDING) issue_pv(a, st, smem, fresh);
    /* While the tensor cores work: what does not depend on them. */
    epilogue end;
    if (PLACE == NEXT) end = begin_epilogue(a, smem.tiles[(n - 1) % TILE_SLOTS], st, warpgroup);
#if VARIANT_GENERAL
    if (MASKED && cut && a.scores.mask != BITS) seen = row_mask_of(a, t, row, key, warpgroup);
    if (CHANGES == TILES || (CHANGES == ANY && a.scores.mask > BITS))
        open_mask_tile(a.scores, tile, CHANGES == TILES);
    if (CHANGES == TILES) work_out(tile.row);
#else
    row_mask seen;
    if (MASKED && cut) seen = row_mask_of(a, t, first_row(t, warpgroup), key, warpgroup);
#endif
    wgmma_wait_group<PENDING>();
    pass_turn(warpgroup);
    wgmma_accumulators(s);
    release(smem_address(&smem.k_empty[kv.stage]));
    if (q_done) release(q_done);
    if (!DELAYED) settle(st, smem, held);
    /* Never taken. Without a branch the compiler passes the turn when P is there, 300 clocks late.
     */
    if (HOW == FOLLOW && a.descriptor_high == 0) __trap();

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
    float2 minus = make_float2(st.softmax.minus[0], st.softmax.minus[1]), factor;
    bool raised = false; /* O must shrink, when P V of the block before has ended */
    if (HOW == WATCH) {
        if (PENDING && PLACE == BEHIND && !SHRINKS_LATE) {
            wgmma_wait_group<0>();
            settle(st, smem, held);
        }
        /* The first block of a tile gives tops to the rows that see a key of it; where they are
         * kept, a later one does so for those that have none yet. */
        if (PLACE == NEXT || (PLACE == ALONE && OFFSET == KEEP && !t.watch)) {
            softmax_raise<range, true>(st.softmax, s, scale, a.slack);
            minus = softmax_center<range>(st.softmax, s);
        } else if (!done && __any_sync(~0u, softmax_exceeds(st.softmax, s, a.slack) |
                                                softmax_is_coarse(st.softmax))) {
            factor = softmax_raise<range, false>(st.softmax, s, scale, a.slack);
            raised = true;
            minus = softmax_center<range>(st.softmax, s);
        }
        if (!SHRINKS_LATE && raised) softmax_shrink(st.o, factor);
    } else if (MASKED) {
        /* Rows that see their first key here: a row of few is exact only with a top of its own. */
        if (__any_sync(~0u, fminf(st.softmax.top[0], st.softmax.top[1]) == -INFINITY)) {
            softmax_raise<range, true>(st.softmax, s, scale, a.slack);
            minus = make_float2(st.softmax.minus[0], st.softmax.minus[1]);
        }
    }
    if (DELAYED) {
        if (!done) softmax_exp<!ONES>(st.softmax, s, scale, minus);
        if (HOW == FOLLOW) raised = softmax_follow<range>(st.softmax, s, fabsf(scale), factor);
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
        const uint64_t v = v_descriptor(a, smem, kv.stage);
#pragma unroll
        for (int i = 0; i < BLOCK_N / 16; ++i) {
            if (i >= P_PIECES) wgmma_wait_group<P_PIECES - 1>();
            float (&piece)[8] = *(float (*)[8])(s + 8 * i);
            softmax_exp<!ONES>(st.softmax, piece, scale, minus);
            softmax_pack(piece, st.p[i % P_PIECES]);
            wgmma_fence();
            wgmma_rs<DV + 8 * ONES>(st.o, st.p[i % P_PIECES], v + i * 128, i > 0 || !fresh);
            if (P_PIECES < BLOCK_N / 16 || i == BLOCK_N / 16 - 1) wgmma_commit_group();
        }
        st.fresh = false;
    }
    st.v = kv;
    st.held = true;
    advance(kv);
}

#if VARIANT_GENERAL
#include "runs.cuh"
#endif

/* Ends P V of the last block. */
DEVICE void finish_pv(const kernel_args &a, rows_state &st, smem_layout &smem) {
    if (DELAYED && !st.held) return;
    if (DELAYED) {
        mbarrier_wait(smem_address(&smem.v_full[st.v.stage]), st.v.parity);
        issue_pv(a, st, smem, st.fresh);
    }
    wgmma_wait_group<0>();
    settle(st, smem, st.held);
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
DEVICE void pass(smem_layout &smem, cursor &kv, uint32_t q_done, int warpgroup) {
    take_turn(warpgroup);
    pass_turn(warpgroup);
    mbarrier_wait(smem_address(&smem.k_full[kv.stage]), kv.parity);
    mbarrier_wait(smem_address(&smem.v_full[kv.stage]), kv.parity);
    bar_sync(1 + warpgroup, 128);
    release(smem_address(&smem.k_empty[kv.stage]));
    release(smem_address(&smem.v_empty[kv.stage]));
    if (q_done) release(q_done);
    advance(kv);
}

#endif
