/* scores.cuh - what changes scores: softcap, masks, ALiBi, dropout. General rows only.
 *
 * A part of fwd.cu, which includes it behind the row's constants. All branches are the same
 * for the whole block: they are on the arguments.
 *
 * Scores come as q.k and leave so that `scale` times a score is in units of log2: every step folds
 * the factor of what came before it into its own FFMA. A float mask comes by the copy engine, as K
 * does, into a tile of each warpgroup's own. A bool mask was packed by the launch before
 * (mask_bits.h): one word for a thread's scores of a row.
 *
 * One change alone has a loop of its own over the blocks that need nothing else; branches on all
 * that there might be take as long as the change (kernels/README.md).
 */
#ifndef FASTATTN_SM90_SCORES_CUH
#define FASTATTN_SM90_SCORES_CUH

#include "philox.h"
#include "common/mask_bits.h"
#include "softmax.cuh"

enum mask_kind { NO_MASK, BITS, ADD_BF16, ADD_F16, ADD_F32 };

/* What a loop is compiled for: one change alone, or whatever the arguments say. */
enum changes { ANY, CAPS, WORDS, TILES, ALIBI, DROPS };

static constexpr int MASK_BYTES = 64 * BLOCK_N * 2; /* of a tile of a float mask */

struct score_args {
    enum changes only; /* the one change that there is; ANY: several, or one without a loop */
    float unit;        /* what a score counts before masks and ALiBi: `scale`, or softcap's c */
    float scale;       /* what it counts in the end, times log2(e) */
    int32_t caps;
    int32_t cap_wide;  /* c is so large that 2e-7 of it is too much */
    float cap_scale;   /* scale / c */
    uint32_t cap_near; /* bits of a float: scores up to here take a polynomial in their squares, */
    float cap_series[3], cap_exponents[3]; /* constant first; times `scale` */
    CUtensorMap mask_map;
    int32_t mask;          /* enum mask_kind */
    int32_t tiles;         /* a float mask comes by the copy engine: so many tiles a block; or 0 */
    int32_t tile_rows;     /* 0: its rows are all the same one */
    int32_t mask_moves[2]; /* as kernel_args' moves */
    int32_t b_first;       /* tiles of one head and all batches are neighbours: they share a mask */
    const char *mask_data;
    int64_t mask_stride[4]; /* bytes */
    fa_mask_bits bits;      /* a bool mask, packed: */
    const uint4 *map, *columns;
    const uint32_t *words;
    const float *slopes;
    int64_t slope_stride[2];
    int32_t drops, first_b;
    uint32_t threshold;
    float gain;
    const int64_t *seed_data;
    int64_t seed;
};

/* What an item says about scores. */
struct score_tile {
    const char *mask; /* element (0, 0) of its head */
    int64_t plane, seed;
    int32_t b;     /* as dropout counts */
    int32_t split; /* the block to the left of which the order begins */
    float slope;
};

DEVICE void describe_scores(const score_args &a, score_tile &t, int32_t b, int32_t h) {
    t.mask = a.mask_data + b * a.mask_stride[0] + h * a.mask_stride[1];
    t.plane = fa_bits_plane(&a.bits, b, h);
    t.seed = a.seed_data ? *a.seed_data : a.seed;
    t.b = a.first_b + b;
    t.slope = a.slopes ? a.slopes[b * a.slope_stride[0] + h * a.slope_stride[1]] : 0.f;
}

/* ---- which blocks: the loaders walk, and tell the warpgroups what they found -----------------*/

/* A block's tag: its number from bit 8 on, LAST of its item, HOLES (keys that no row of the tile
 * sees), and two bits for each warpgroup: how much of it its rows see, as enum seen counts. */
enum { TAG_LAST = 128, TAG_HOLES = 64, TAG_BLOCK = 8 };

/* A walk over the blocks of an item that a bool mask does not hide, from right to left. */
struct block_walk {
    uint32_t end;                               /* blocks before this one are to come */
    uint32_t word;                              /* of the map, 32 * 128 keys; bits of its blocks: */
    uint32_t some[WARPGROUPS], all[WARPGROUPS]; /* a warpgroup's rows see a key, all keys */
    uint32_t columns[WARPGROUPS];               /* each key is seen by some row */
};

DEVICE uint32_t map_bit(uint32_t block) { return block / (FA_BITS_KEYS / BLOCK_N); }

/* The next block, not before `begin`, that some row of the tile sees, or -1. */
DEVICE int32_t next_block(const score_args &a, const score_tile &t, block_walk &c, uint32_t row,
                          uint32_t begin) {
    constexpr uint32_t BLOCKS = FA_BITS_KEYS / BLOCK_N; /* of a bit */
    while (c.end > begin) {
        uint32_t bit = map_bit(c.end - 1), word = bit / 32;
        if (word != c.word) {
            c.word = word;
#pragma unroll
            for (int w = 0; w < WARPGROUPS; ++w) {
                uint4 map = a.map[fa_map_at(&a.bits, t.plane, word, row / FA_BITS_ROWS + w)];
                c.some[w] = map.x, c.all[w] = map.y, c.columns[w] = map.z;
            }
        }
        uint32_t left = 0;
#pragma unroll
        for (int w = 0; w < WARPGROUPS; ++w) left |= c.some[w];
        left &= ~0u >> (31 - bit % 32);
        uint32_t last = (32 * word + 32 - __clz(left)) * BLOCKS - 1; /* of the bit found */
        c.end = left ? min(c.end - 1, last) : 32 * word * BLOCKS;
        if (left) return c.end >= begin ? (int32_t)c.end : -1;
    }
    return -1;
}

#include "mask_tiles.cuh"

/* ---- the bits of a bool mask ----------------------------------------------------------------*/

/* Which scores of a block this thread's two rows see, a bit each. */
DEVICE void load_row_mask(const score_args &a, const score_tile &t, uint32_t (&seen)[2],
                          int32_t row, int32_t key) {
    const uint32_t *words =
        a.words + 4 * fa_bits_at(&a.bits, t.plane, key / FA_BITS_KEYS, row) + threadIdx.x % 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) seen[r] = load_u32(words + 32 * r) >> key % FA_BITS_KEYS / 4;
}

/* Writes zeros over the rows of V whose bit in `seen`, as words of the packed mask, is clear. */
DEVICE void clear_unseen(const uint32_t (&seen)[4], uint8_t *v, int32_t key, int warpgroup) {
    for (int i = thread_here() % 128; i < V_BYTES / 16; i += 128) {
        int32_t n = i / 8 % BLOCK_N + key % FA_BITS_KEYS, c = n / 2 % 4;
        uint32_t word = c == 0 ? seen[0] : c == 1 ? seen[1] : c == 2 ? seen[2] : seen[3];
        if (!(word >> (n / 8 * 2 + n % 2) & 1)) ((uint4 *)v)[i] = make_uint4(0, 0, 0, 0);
    }
    fence_proxy_async();
    bar_sync(1 + warpgroup, 128);
}

/* Writes zeros over the rows of V that no row of the tile sees: 0 * NaN is NaN. As clear_hidden_v
 * in sight.cuh; both warpgroups write the same. */
DEVICE void clear_holes(const score_args &a, const score_tile &t, uint8_t *v, int32_t row,
                        int32_t key, int warpgroup) {
    uint32_t seen[4] = {0, 0, 0, 0};
#pragma unroll
    for (int w = 0; w < WARPGROUPS; ++w) {
        uint4 x = load_v4(a.columns + fa_columns_at(&a.bits, t.plane, key / FA_BITS_KEYS,
                                                    row / FA_BITS_ROWS + w));
        seen[0] |= x.x, seen[1] |= x.y, seen[2] |= x.z, seen[3] |= x.w;
    }
    clear_unseen(seen, v, key, warpgroup);
}

/* ---- the scores ------------------------------------------------------------------------------*/

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

/* tanh of a score times its scale, plus `minus`, by a polynomial in its square, to 1.2e-6 of itself
 * and without MUFU. */
DEVICE float cap_near(const float (&series)[3], float s, float minus) {
    const float u = s * s;
    return fmaf(s, fmaf(fmaf(series[2], u, series[1]), u, series[0]), minus);
}

/* tanh of a score times its scale as 1 - 2 / (1 + e^2y), to 2e-7. */
DEVICE float cap_far(float scale, float s) {
    return fmaf(-2.f, rcp_approx(1.f + ex2_approx(2.885390081777927f * scale * s)), 1.f);
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
                asm volatile("" : "+f"(s[i])); /* a branch: both at once do not fit the registers */
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
        safe &= cap_near(a.cap_exponents, top[r], rows.minus[r]) <= range::SLACK;
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
        safe &= fmaf(top[r], unit, first[r] + near) <= range::SLACK;
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

/* ---- the launcher's part ---------------------------------------------------------------------*/

/* `packed`: where the mask is packed, of a bool one. */
static score_args make_scores(const fa_params *p, const char *packed) {
    const fa_scores *s = &p->scores;
    const fa_dropout *d = &p->dropout;
    const double scale = usable_scale(p->what.scale), cap = fmax(s->softcap, 1e-30);
    score_args a = {};
    /* Bits may not depend on other sequences, whose rows may share a warp and its votes. */
    const bool alone = p->what.batch_invariant && p->varlen.cu_q;
    /* A cap changes a score by a third of (s / c)^2 of itself: one so large changes none that a
     * float can tell from its neighbours. */
    a.caps = s->softcap != 0 && s->softcap < 0x1p40;
    if (a.caps) {
        /* The least maximum of relative errors up to 0.3, 1.2e-6: of a score of 40, 5e-5. */
        const double series[3] = {0.99999884, -0.33310022, 0.12633946};
        const double y = fmax(-1e30, fmin(scale / cap, 1e30));
        a.cap_wide = cap >= 256;
        const float near = (float)fmin((a.cap_wide ? 0.3 : fmin(0.3, 40. / cap)) / fabs(y), 1e38);
        /* Where a float would not hold y^5, only 0 is near, and stays 0. Where bits may not depend
         * on other sequences, whose rows may share a warp and its vote, it is each score's own. */
        if (near > 1e-4f && (a.cap_wide || (near < 1e4f && !alone))) {
            double power = y;
            for (int i = 0; i < 3; ++i, power *= y * y)
                a.cap_series[i] = (float)(series[i] * power);
            memcpy(&a.cap_near, &near, sizeof near);
        }
        a.cap_scale = (float)y;
    }
    a.unit = (float)(a.caps ? cap : scale);
    a.slopes = s->alibi_slopes;
    for (int i = 0; i < 2; ++i) a.slope_stride[i] = s->alibi_stride[i];
    a.drops = d->p > 0;
    a.first_b = d->first_b;
    a.threshold = d->threshold;
    a.gain = a.drops ? (float)d->gain : 1.f;
    a.seed_data = d->seed_data;
    a.seed = d->seed;
    int32_t size = 1;
    if (s->mask.data) {
        a.mask = s->mask_dtype == FA_BOOL   ? BITS
                 : s->mask_dtype == FA_BF16 ? ADD_BF16
                 : s->mask_dtype == FA_F16  ? ADD_F16
                                            : ADD_F32;
        a.mask_data = (const char *)s->mask.data;
        size = a.mask == BITS ? 1 : a.mask == ADD_F32 ? 4 : 2;
        for (int i = 0; i < 4; ++i) a.mask_stride[i] = s->mask.stride[i] * size;
        if (a.mask != BITS) {
            fa_tensor mask = s->mask;
            a.tile_rows = mask.shape[2] > 1 && mask.stride[2] != 0;
            if (!a.tile_rows) mask.shape[2] = 1;
            a.tiles = !fa_tma_takes(&mask, size) ? 0 : a.mask == ADD_F32 ? 2 : 1;
            a.tile_rows |= !a.tiles; /* as the warps write it */
        }
        a.b_first = s->mask.stride[0] == 0 && s->mask.stride[1] != 0;
    }
    if (a.mask == BITS) {
        a.bits = fa_mask_bits_make(&p->what, &p->masks, &p->varlen, &s->mask);
        a.map = (const uint4 *)packed;
        a.columns = (const uint4 *)(packed + a.bits.columns);
        a.words = (const uint32_t *)(packed + a.bits.bits);
    }
    const bool natural = a.mask > BITS || a.slopes;
    if (p->what.scale > 0 && a.caps + (a.mask != NO_MASK) + (a.slopes != NULL) + a.drops == 1)
        /* CAPS takes no offset that is coarse, and votes. */
        a.only = a.caps           ? (cap < 4096 && !(alone && a.cap_wide) ? CAPS : ANY)
                 : a.slopes       ? (alone ? ANY : ALIBI)
                 : a.drops        ? DROPS
                 : a.mask == BITS ? WORDS
                 : a.tiles == 1   ? TILES
                                  : ANY;
    a.scale = (float)((natural ? 1 : a.caps ? cap : scale) * 1.4426950408889634);
    for (int i = 0; i < 3; ++i) a.cap_exponents[i] = a.cap_series[i] * a.scale;
    return a;
}

#endif
