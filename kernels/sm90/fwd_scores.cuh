/* fwd_scores.cuh - what changes scores: softcap, float masks, ALiBi, dropout. General variants
 * only.
 *
 * All branches are the same for the whole block: they are on the arguments.
 *
 * Scores come as q.k and leave so that `scale` times a score is in units of log2: every step folds
 * the factor of what came before it into its own FFMA.
 *
 * One change alone has a loop of its own over the blocks that need nothing else; branches on all
 * that there might be take as long as the change (kernels/README.md).
 */
#ifndef FASTATTN_SM90_FWD_SCORES_CUH
#define FASTATTN_SM90_FWD_SCORES_CUH

#include "common/compiler.cuh"
#include "common/quads.cuh"
#include "philox.h"
#include "sm90/fwd_args.cuh"
#include "sm90/fwd_mask_tiles.cuh"
#include "sm90/fwd_smem.h"
#include "sm90/fwd_visibility.cuh"
#include "sm90/ptx.cuh"
#include "sm90/softcap.cuh"
#include "sm90/softmax.cuh"

DEVICE void describe_scores(const score_args &a, score_tile &t, int32_t b, int32_t h) {
    t.mask = a.mask_data + b * a.mask_stride[0] + h * a.mask_stride[1];
    t.plane = fa_bits_plane(&a.bits, b, h);
    t.seed = a.seed_data ? *a.seed_data : a.seed;
    t.b = a.first_b + b;
    t.slope = a.slopes ? a.slopes[b * a.slope_stride[0] + h * a.slope_stride[1]] : 0.f;
}

/* The greatest score of each of a thread's two rows, or 0. */
DEVICE void tops_of(const float (&s)[BLOCK_N / 2], float (&top)[2]) {
    int32_t x[2] = {0, 0};
    softmax_tops(s, x);
    top[0] = __int_as_float(x[0]), top[1] = __int_as_float(x[1]);
}

/* Whether tanh may be a polynomial, of this score: it is not far from 0, above or below; `top` is
 * the greatest above. As unsigned integers the least float is the greatest, NaN above it. */
DEVICE bool caps_near(const score_args &a, const float (&s)[BLOCK_N / 2], float top) {
    uint32_t bottom = 0;
#pragma unroll
    for (int i = 0; i < BLOCK_N / 2; i += 2)
        bottom = __vimax3_u32(bottom, __float_as_uint(s[i]), __float_as_uint(s[i + 1]));
    return max(__float_as_uint(top), bottom & 0x7fffffff) <= a.cap_near;
}

/* The polynomial of all scores, if all are near 0; else the other way, whose error is too much of a
 * small score where c is large: there each score has its own. (NaN in padding is not near.) */
DEVICE void cap_scores(const score_args &a, float (&s)[BLOCK_N / 2]) {
    float top[2];
    tops_of(s, top);
    if (__all_sync(~0u, caps_near(a, s, fmaxf(top[0], top[1])))) {
#pragma unroll
        for (int i = 0; i < BLOCK_N / 2; ++i) s[i] = cap_near(a.cap_series, s[i], 0.f);
    } else if (!a.cap_wide) {
#pragma unroll
        for (int i = 0; i < BLOCK_N / 2; ++i) s[i] = cap_far(a.cap_scale, s[i]);
    } else {
#pragma unroll
        for (int i = 0; i < BLOCK_N / 2; ++i) {
            if ((__float_as_uint(s[i]) & 0x7fffffff) <= a.cap_near) {
                s[i] = cap_near(a.cap_series, s[i], 0.f);
            } else {
                not_a_select(s[i]);
                s[i] = cap_far(a.cap_scale, s[i]);
            }
        }
    }
}

/* P of scores that are capped alone, and its sums, in one go, if all are near 0, all rows have
 * their tops, and no exponent passes what those allow: tanh grows with the scores, so that a row's
 * greatest says so before there are exponents. */
DEVICE bool cap_exp(const score_args &a, softmax_rows &rows, float (&s)[BLOCK_N / 2]) {
    float top[2];
    tops_of(s, top);
    bool safe = softmax_is_settled(rows) & caps_near(a, s, fmaxf(top[0], top[1]));
#pragma unroll
    for (int r = 0; r < 2; ++r)
        safe &= cap_near(a.cap_exponents, top[r], rows.minus[r]) <= SOFTMAX_SLACK;
    if (!__all_sync(~0u, safe)) return false;
#pragma unroll
    for (int i = 0; i < BLOCK_N / 2; ++i) {
        s[i] = ex2_approx(cap_near(a.cap_exponents, s[i], rows.minus[i / 2 & 1]));
        rows.l[i / 2 & 1] += s[i];
    }
    return true;
}

/* s * unit - slope * |i' - j|. `position`: i' of the warpgroup's first row, `row` the first of this
 * thread's two among its 64. Left or right of the diagonal |i' - j| is linear in j. */
DEVICE void add_alibi(float (&s)[BLOCK_N / 2], float unit, float slope, int32_t position,
                      int32_t row, int32_t key) {
    bool left = key + BLOCK_N - 1 <= position, right = key >= position + 63;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float x = (float)(position + row + 8 * r - key - 2 * (int32_t)(threadIdx.x % 4));
        if (left || right) {
            const float k = left ? slope : -slope, first = -k * x;
#pragma unroll
            for (int i = 0; i < BLOCK_N / 4; ++i) {
                float &y = s[i / 2 * 4 + 2 * r + i % 2];
                y = fmaf(y, unit, fmaf(k, (float)(i / 2 * 8 + i % 2), first));
            }
        } else {
#pragma unroll
            for (int i = 0; i < BLOCK_N / 4; ++i) {
                float &y = s[i / 2 * 4 + 2 * r + i % 2];
                y = fmaf(y, unit, -slope * fabsf(x - (float)(i / 2 * 8 + i % 2)));
            }
        }
    }
}

/* The same with ALiBi: a row's greatest score and its least distance say how great an exponent can
 * be. Left or right of the diagonal only. */
DEVICE bool alibi_exp(softmax_rows &rows, float (&s)[BLOCK_N / 2], float unit, float slope,
                      int32_t position, int32_t row, int32_t key) {
    const bool left = key + BLOCK_N - 1 <= position, right = key >= position + 63;
    const float k = left ? slope : -slope, near = fmaxf(k * (float)(BLOCK_N - 7), 0.f);
    float top[2], first[2];
    tops_of(s, top);
    bool safe = (left | right) & softmax_is_settled(rows);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float x = (float)(position + row + 8 * r - key - 2 * (int32_t)(threadIdx.x % 4));
        first[r] = fmaf(-k, x, rows.minus[r]);
        safe &= fmaf(top[r], unit, first[r] + near) <= SOFTMAX_SLACK;
    }
    if (!__all_sync(~0u, safe)) return false;
#pragma unroll
    for (int i = 0; i < BLOCK_N / 2; ++i) {
        const float bias = fmaf(k, (float)(i / 4 * 8 + i % 2), first[i / 2 & 1]);
        s[i] = ex2_approx(fmaf(s[i], unit, bias));
        rows.l[i / 2 & 1] += s[i];
    }
    return true;
}

/* Everything that changes scores, in the order of the definition, but what hides keys. */
template <enum changes ONLY>
DEVICE void change_scores(const score_args &a, const score_tile &t, float (&s)[BLOCK_N / 2],
                          const mask_tile &tile, int32_t row, int32_t key, int32_t sq, int32_t sk,
                          int32_t position, int32_t row_of_64) {
    float unit = a.unit;
    if (ONLY == ANY ? a.caps : ONLY == CAPS) cap_scores(a, s);
    if (ONLY == ANY ? a.mask > BITS : ONLY == TILES) {
        if (a.mask == ADD_BF16)
            add_mask_tile<true>(a, s, tile, unit);
        else if (a.mask == ADD_F16)
            add_mask_tile<false>(a, s, tile, unit);
        else if (ONLY == ANY)
            add_float_mask(a, t, s, tile, row - threadIdx.x % 32 / 4, key, sq, sk, unit);
        unit = 1.f;
    }
    if (ONLY == ANY ? a.slopes != NULL : ONLY == ALIBI)
        add_alibi(s, unit, t.slope, position, row_of_64, key);
}

/* Zeros among P, rounded and packed, its sum taken: a lane of a quad asks Philox for one of four
 * neighbouring groups of 8 keys, and the quad exchanges the words. All groups go through the rounds
 * together: keys, and what two rows or four groups have in common, are worked out once. */
DEVICE void drop_scores(const score_args &a, const score_tile &t, uint32_t *p, int32_t h,
                        int32_t row, int32_t key) {
    constexpr int GROUPS = BLOCK_N / 32;
    const uint32_t high = a.threshold << 16; /* 65,536, all of it: `gain` is 0 */
    fa_random bits[2 * GROUPS];
#pragma unroll
    for (int i = 0; i < 2 * GROUPS; ++i)
        bits[i] = fa_dropout_counter(t.b, h, row + 8 * (i / GROUPS),
                                     key / 8 + 4 * (i % GROUPS) + threadIdx.x % 4);
    fa_philox(bits, 2 * GROUPS, (uint32_t)t.seed, (uint32_t)((uint64_t)t.seed >> 32));
#pragma unroll
    for (int i = 0; i < 2 * GROUPS; ++i) {
        transpose_quad(bits[i].word);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            uint32_t &pair = p[2 * (4 * (i % GROUPS) + j) + i / GROUPS];
            if (bits[i].word[j] << 16 < high) pair &= 0xffff0000;
            if (bits[i].word[j] < high) pair &= 0x0000ffff;
        }
    }
}

/* Scores as the definition has them, of the sign that `scale` would have. */
template <enum changes ONLY>
DEVICE void final_scores(const kernel_args &a, const work_tile &t, float (&s)[BLOCK_N / 2],
                         const mask_tile &tile, int32_t key, int warpgroup) {
    const int32_t row = first_row(t, warpgroup), top = t.row + 64 * warpgroup;
    change_scores<ONLY>(a.scores, t.score, s, tile, row, key, a.sq, a.sk,
                        fa_row_position(t.lengths, top), row - top);
    if (ONLY == ANY && a.scores.scale < 0.f)
#pragma unroll
        for (int i = 0; i < BLOCK_N / 2; ++i) s[i] = -s[i];
}

#endif
