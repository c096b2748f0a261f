/* fwd_visibility.cuh - which keys the rows of a warpgroup see: blocks of them, and scores of a
 * block.
 *
 * The intervals are csrc/mask.h's; a bool mask says more (fwd_tags.cuh, fwd_bool_mask.cuh).
 */
#ifndef FASTATTN_SM90_FWD_VISIBILITY_CUH
#define FASTATTN_SM90_FWD_VISIBILITY_CUH

#include "common/compiler.cuh"
#include "mask.h"
#include "sm90/fwd_args.cuh"
#include "sm90/fwd_pipeline.cuh"
#include "sm90/fwd_smem.h"
#include "sm90/ptx.cuh"

#if VARIANT_GENERAL
/* The i-th key block of a tile: from right to left those before `split`, then the others. With
 * ALiBi `split` is behind the diagonal, where the highest scores are: offsets are raised least. */
DEVICE int32_t key_block(const work_tile &t, int32_t i) {
    int32_t left = t.score.split - t.begin;
    return i < left ? t.score.split - 1 - i : t.end - 1 - (i - left);
}
#else
/* The i-th key block of a tile: the masked ones first, from the right, then from the left. */
DEVICE int32_t key_block(const work_tile &t, int32_t i) {
    if (i < t.right) return t.end - 1 - i;
    if (i < t.right + t.left) return t.begin + i - t.right;
    return t.end - 1 - (i - t.left);
}
#endif

/* How much of a block of keys a warpgroup's rows see. */
enum visibility { NONE, PART, WHOLE };
DEVICE enum visibility block_visibility(const work_tile &t, int32_t block, int warpgroup) {
    fa_interval some = t.some[warpgroup], whole = t.whole[warpgroup];
    int32_t key = block * BLOCK_N;
    bool none = key >= some.end || key + BLOCK_N <= some.begin;
    bool part = key < whole.begin || key + BLOCK_N > whole.end;
    return none ? NONE : part ? PART : WHOLE;
}

/* The first of this thread's two rows; the other is 8 below. */
DEVICE int32_t first_row(const work_tile &t, int warpgroup) {
    return t.row + 64 * warpgroup + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
}

/* The first `columns` of a block, in scores that this thread has of a row: 2 of every 8. */
DEVICE int32_t first_scores(int32_t columns) {
    columns = min(max(columns, 0), BLOCK_N);
    return columns / 8 * 2 + min(columns % 8, 2);
}

/* Columns `begin` to `end` of a block, as a bit per score that this thread has of a row. */
DEVICE uint32_t scores_of(int32_t begin, int32_t end) {
    begin = first_scores(begin);
    return bit_mask(begin, max(first_scores(end) - begin, 0));
}

DEVICE enum visibility visibility_of(const work_tile &t, int32_t block, int warpgroup) {
    return (enum visibility)uniform(block_visibility(t, block, warpgroup));
}

/* Which scores of a block this thread's two rows see, a bit each. */
struct row_mask {
    uint32_t rows[2];
};
DEVICE row_mask row_mask_of(const work_tile &t, int32_t row, int32_t key, int warpgroup) {
    row_mask see;
    const int32_t column = key + 2 * (threadIdx.x % 4);
    const bool begins = key < t.whole[warpgroup].begin; /* some row does, here or later */
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        fa_interval seen = fa_row_interval(t.lengths, row + 8 * r);
        see.rows[r] = begins ? scores_of(seen.begin - column, seen.end - column)
                             : bit_mask(0, first_scores(seen.end - column));
    }
    return see;
}

/* Hides the others. */
DEVICE void mask_scores(const row_mask &see, float (&s)[BLOCK_N / 2]) {
#pragma unroll
    for (int i = 0; i < BLOCK_N / 2; ++i)
        if (!(see.rows[i / 2 & 1] >> (i / 4 * 2 + i % 2) & 1)) s[i] = -INFINITY;
}

/* Writes zeros over the rows of V that no row of the sequence sees: 0 * NaN is NaN. Every
 * warpgroup does so before it reads the stage; what they all write is the same. */
DEVICE void clear_hidden_v(const work_tile &t, uint8_t *v, int32_t key, int warpgroup) {
    const int32_t begin = t.visible.begin, end = t.visible.end;
    if (key >= begin && min(key + BLOCK_N, t.keys) <= end) return;
    for (int i = thread_here() % 128; i < V_BYTES / 16; i += 128) {
        int32_t row = key + i / 8 % BLOCK_N;
        if (row < begin || row >= end) ((uint4 *)v)[i] = make_uint4(0, 0, 0, 0);
    }
    fence_proxy_async();
    sync_warpgroup(warpgroup);
}

#endif
