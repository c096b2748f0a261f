/* fwd_scores.cuh - from products to scores: the keys that a row may not see, and, in general
 * variants, softcap, masks, ALiBi and dropout, by branches on the arguments.
 */
#ifndef FASTATTN_SM80_FWD_SCORES_CUH
#define FASTATTN_SM80_FWD_SCORES_CUH

#include "common/element.cuh"
#include "common/quads.cuh"
#include "philox.h"
#include "sm80/fwd_args.cuh"
#include "sm80/fwd_softmax.cuh"
#include "sm80/softcap.cuh"
#include "sm80/tile.cuh"

/* Row i of this lane, of the sequence's. */
DEVICE int32_t row_of(const tile &t, int i) {
    const int32_t warp = threadIdx.x / 32 / COLUMN_WARPS;
    return t.row + warp * WARP_ROWS + 8 * i + threadIdx.x % 32 / 4;
}
/* The first of this lane's keys of a block; fragment n has this + 8 n and the next. */
DEVICE int32_t first_key(int32_t block) { return block * BLOCK_N + threadIdx.x % 4 * 2; }

/* Hides the keys outside of the rows' intervals. */
DEVICE void mask_scores(const tile &t, row_scores &s, int32_t block) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        const fa_interval seen = fa_row_interval(t.lengths, row_of(t, i));
        const uint32_t keys = seen.end - seen.begin, first = first_key(block) - seen.begin;
#pragma unroll
        for (int n = 0; n < SCORES; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e)
                if (first + 8 * n + e >= keys) s[i / 2][n][i % 2 * 2 + e] = -INFINITY;
    }
}

#if VARIANT_GENERAL

DEVICE void cap_scores(const score_args &a, row_scores &s) {
#pragma unroll
    for (int m = 0; m < STRIPS; ++m)
#pragma unroll
        for (int n = 0; n < SCORES; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) s[m][n][i] = a.cap * tanh_of(s[m][n][i] * a.cap_scale);
}

/* Adds a float mask. Rows and keys past the ends are the last one's: the interval hides them. */
template <fa_dtype M>
DEVICE void add_mask(const score_args &a, const tile &t, row_scores &s, int32_t block) {
    typedef typename element<M>::stored stored_mask;
    const int32_t key = first_key(block), last = t.lengths.sk - 1;
    const bool pairs = a.mask_pairs && (block + 1) * BLOCK_N <= t.lengths.sk;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        const char *from = t.mask + min(row_of(t, i), t.lengths.sq - 1) * a.mask_stride[2];
        pair_of<stored_mask> x[SCORES];
#pragma unroll
        for (int n = 0; n < SCORES; ++n) {
            if (pairs) {
                x[n] = *(const pair_of<stored_mask> *)(from + (key + 8 * n) * a.mask_stride[3]);
            } else {
#pragma unroll
                for (int e = 0; e < 2; ++e)
                    x[n].x[e] = *(const stored_mask *)(from + min(key + 8 * n + e, last) *
                                                                  a.mask_stride[3]);
            }
        }
#pragma unroll
        for (int n = 0; n < SCORES; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e)
                s[i / 2][n][i % 2 * 2 + e] += (real)element<M>::widen(x[n].x[e]);
    }
}

/* Hides what a bool mask does. */
DEVICE void mask_bits(const score_args &a, const tile &t, row_scores &s, int32_t block) {
    const int32_t key = block * BLOCK_N;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        const int64_t at = fa_bits_at(&a.bits, t.plane, key / FA_BITS_KEYS, row_of(t, i));
        const uint32_t bits = a.words[4 * at + threadIdx.x % 4] >> key % FA_BITS_KEYS / 4;
#pragma unroll
        for (int n = 0; n < SCORES; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e)
                if (!(bits >> (2 * n + e) & 1)) s[i / 2][n][i % 2 * 2 + e] = -INFINITY;
    }
}

DEVICE void add_alibi(const tile &t, row_scores &s, int32_t block) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        const real x = (real)(fa_row_position(t.lengths, row_of(t, i)) - first_key(block));
#pragma unroll
        for (int n = 0; n < SCORES; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                real &y = s[i / 2][n][i % 2 * 2 + e];
                y = fma(-(real)t.slope, fabs(x - (real)(8 * n + e)), y);
            }
    }
}

/* Scores as the definition has them, but for what hides keys. */
DEVICE void change_scores(const kernel_args &a, const tile &t, row_scores &s, int32_t block) {
    if (a.scores.cap != 0)
        cap_scores(a.scores, s);
    else
#pragma unroll
        for (int m = 0; m < STRIPS; ++m)
#pragma unroll
            for (int n = 0; n < SCORES; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) s[m][n][i] *= a.scale;
    if (a.scores.mask) {
        if (a.scores.mask_dtype == FA_BF16)
            add_mask<FA_BF16>(a.scores, t, s, block);
        else if (a.scores.mask_dtype == FA_F16)
            add_mask<FA_F16>(a.scores, t, s, block);
#if IS_F64
        else if (a.scores.mask_dtype == FA_F64)
            add_mask<FA_F64>(a.scores, t, s, block);
#endif
        else
            add_mask<FA_F32>(a.scores, t, s, block);
    }
    if (a.scores.slopes) add_alibi(t, s, block);
}

/* Zeros among P, its sum taken: a lane of a quad asks Philox for one of four neighbouring groups of
 * 8 keys, and the quad exchanges the words. */
DEVICE void drop_scores(const score_args &a, const tile &t, row_scores &p, int32_t block) {
    const uint32_t high = a.threshold << 16; /* 65,536, all of it: `gain` is 0 */
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
        for (int n = 0; n < SCORES; n += 4) {
            fa_random bits = fa_dropout_bits(t.seed, a.first_b + t.b, t.h, row_of(t, i),
                                             block * SCORES + n + threadIdx.x % 4);
            transpose_quad(bits.word);
#pragma unroll
            for (int j = 0; j < 4 && n + j < SCORES; ++j) {
                real *pair = &p[i / 2][n + j][i % 2 * 2];
                if (bits.word[j] << 16 < high) pair[0] = 0;
                if (bits.word[j] < high) pair[1] = 0;
            }
        }
}

#endif

DEVICE void negate(row_scores &s) {
#pragma unroll
    for (int m = 0; m < STRIPS; ++m)
#pragma unroll
        for (int n = 0; n < SCORES; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) s[m][n][i] = -s[m][n][i];
}

/* P of a block of keys in place of products, dropout included. */
DEVICE void softmax(const kernel_args &a, const tile &t, rows_state &st, row_scores &s,
                    const key_block &block) {
    const int32_t number = block.number;
    bool cut = is_cut(t, number);
#if VARIANT_GENERAL
    if (a.scores.natural) change_scores(a, t, s, number);
#endif
    if (a.negative) negate(s);
#if VARIANT_GENERAL
    if (a.scores.map && !block.map.whole) {
        mask_bits(a.scores, t, s, number);
        cut = cut && a.scores.bits.mask_only; /* elsewhere the bits have the intervals in them */
    }
#endif
    if (cut) mask_scores(t, s, number);
    weigh(st, s, a.units);
#if VARIANT_GENERAL
    if (a.scores.drops) drop_scores(a.scores, t, s, number);
#endif
}

#endif
