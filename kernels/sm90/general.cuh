/* general.cuh - what a general variant does about a block's scores: it changes them, and hides keys
 * by a bool mask as well as by intervals.
 *
 * plain.cuh has the same functions for the other variants, and says when each is called.
 */
#ifndef FASTATTN_SM90_GENERAL_CUH
#define FASTATTN_SM90_GENERAL_CUH

#include "sm90/args.cuh"
#include "sm90/bool_mask.cuh"
#include "sm90/compiler.cuh"
#include "sm90/mask_tiles.cuh"
#include "sm90/scores.cuh"
#include "sm90/smem.h"
#include "sm90/softmax.cuh"
#include "sm90/visibility.cuh"

struct block_scores {
    row_mask seen;
    float scale; /* of the scores; not negative */
    mask_tile tile;
    int32_t row; /* the first of this thread's two */
    bool drops;
};

/* Whoever has the turn has 500 clocks: what takes longer comes before. */
template <bool MASKED, enum changes ONLY>
DEVICE block_scores open_scores(const kernel_args &a, smem_layout &smem, const work_tile &t,
                                const cursor &kv, int32_t key, bool cut, int warpgroup) {
    block_scores b;
    b.row = first_row(t, warpgroup);
    b.drops = ONLY == ANY ? a.scores.drops : ONLY == DROPS;
    b.tile = mask_tile_of(smem, kv, warpgroup);
    b.seen = {};
    if (MASKED && cut && a.scores.mask == BITS) b.seen = bool_row_mask(a, t, b.row, key, warpgroup);
    if (ONLY == ANY)
        begin_mask_tile(a.scores, t.score, b.tile, b.row - threadIdx.x % 32 / 4, key, a.sq, a.sk);
    return b;
}

template <bool MASKED, enum changes ONLY>
DEVICE void prepare_scores(const kernel_args &a, const work_tile &t, block_scores &b, int32_t key,
                           bool cut, int warpgroup) {
    if (MASKED && cut && a.scores.mask != BITS) b.seen = row_mask_of(t, b.row, key, warpgroup);
    if (ONLY == TILES || (ONLY == ANY && a.scores.mask > BITS))
        open_mask_tile(a.scores, b.tile, ONLY == TILES);
    if (ONLY == TILES) work_out(b.tile.row);
}

template <bool MASKED, enum offset HOW, enum changes ONLY>
DEVICE bool change_block(const kernel_args &a, const work_tile &t, softmax_rows &rows,
                         block_scores &b, float (&s)[BLOCK_N / 2], int32_t key, int warpgroup) {
    b.scale = fabsf(a.scores.scale);
    bool done = false;
    if (ONLY == CAPS) done = cap_exp(a.scores, rows, s);
    if (ONLY == ALIBI)
        done = alibi_exp(rows, s, a.scores.unit * b.scale, t.score.slope * b.scale,
                         fa_row_position(t.lengths, t.row + 64 * warpgroup),
                         b.row - t.row - 64 * warpgroup, key);
    if (!done) final_scores<ONLY>(a, t, s, b.tile, key, warpgroup);
    return done;
}

/* In a stretch of code with the exponentials: float masks gain by that, nothing else does. */
template <enum changes ONLY>
static constexpr bool ROUNDS_FIRST = ONLY == TILES;

template <enum changes>
DEVICE void drop_block(const kernel_args &a, const work_tile &t, const block_scores &b, uint32_t *p,
                       int32_t key) {
    if (b.drops) drop_scores(a.scores, t.score, p, t.h, b.row, key);
}

template <bool MASKED, enum changes ONLY>
DEVICE void clear_block(const kernel_args &a, smem_layout &smem, const work_tile &t, uint8_t *v,
                        int32_t key, bool cut, bool holes, int warpgroup) {
    if (!MASKED || ONLY == WORDS) {
    } else if (holes && a.scores.bits.mask_only) {
        clear_holes_of_both(a, t, smem, v, key, warpgroup);
    } else if (holes) {
        clear_holes(a.scores, t.score, v, t.row, key, warpgroup);
    } else if (cut && a.scores.mask != BITS) {
        clear_hidden_v(t, v, key, warpgroup);
    }
}

#endif
