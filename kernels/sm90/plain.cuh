/* plain.cuh - what a plain variant does about a block's scores: it hides keys, and no more.
 *
 * general.cuh has the same functions for variants that change scores; attend.cuh calls either's.
 */
#ifndef FASTATTN_SM90_PLAIN_CUH
#define FASTATTN_SM90_PLAIN_CUH

#include "sm90/args.cuh"
#include "sm90/smem.h"
#include "sm90/softmax.cuh"
#include "sm90/visibility.cuh"

/* What is known of a block's scores. */
struct block_scores {
    row_mask seen;
    float scale; /* of the scores; not negative where an offset may be raised */
};

/* Before the warpgroup has the turn. */
template <bool MASKED, enum changes>
DEVICE block_scores open_scores(const kernel_args &, smem_layout &, const work_tile &,
                                const cursor &, int32_t, bool, int) {
    return {};
}

/* While the tensor cores work. */
template <bool MASKED, enum changes>
DEVICE void prepare_scores(const kernel_args &, const work_tile &t, block_scores &b, int32_t key,
                           bool cut, int warpgroup) {
    if (MASKED && cut) b.seen = row_mask_of(t, first_row(t, warpgroup), key, warpgroup);
}

/* Q K^T is there; returns whether P is, and its sums. */
template <bool MASKED, enum offset HOW, enum changes>
DEVICE bool change_block(const kernel_args &a, const work_tile &, softmax_rows &, block_scores &b,
                         float (&s)[BLOCK_N / 2], int32_t, int) {
    b.scale = a.scale;
    if ((HOW == WATCH || MASKED) && b.scale < 0.f) { /* the greatest score gives the greatest P */
#pragma unroll
        for (int i = 0; i < BLOCK_N / 2; ++i) s[i] = -s[i];
        b.scale = -b.scale;
    }
    return false;
}

/* Whether P is rounded before the branch that shrinks O. */
template <enum changes>
static constexpr bool ROUNDS_FIRST = false;

/* P is rounded. */
template <enum changes>
DEVICE void drop_block(const kernel_args &, const work_tile &, const block_scores &, uint32_t *,
                       int32_t) {}

/* V is there: zeros in its rows that nobody sees, for 0 * NaN is NaN. */
template <bool MASKED, enum changes>
DEVICE void clear_block(const kernel_args &, smem_layout &, const work_tile &t, uint8_t *v,
                        int32_t key, bool cut, bool holes, int warpgroup) {
    if (MASKED && cut) clear_hidden_v(t, v, key, warpgroup);
}

#endif
