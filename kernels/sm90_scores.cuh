/* sm90_scores.cuh - what changes scores: softcap, masks, ALiBi, dropout. General rows only.
 *
 * A part of sm90_fwd.cu, which includes it behind the row's constants. All branches are the same
 * for the whole block: they are on the arguments.
 *
 * Scores come as q.k and leave so that `scale` times a score is in units of log2: every step folds
 * the factor of what came before it into its own FFMA. A float mask is fetched into registers
 * before Q K^T and is there when that has ended: 32 of them, for 16-bit masks a whole block in
 * rows of 16 bytes a thread, which the four lanes of a quad exchange. A bool mask was packed by the
 * launch before (mask_bits.h): one word for a thread's scores of a row.
 */
#ifndef FASTATTN_SM90_SCORES_CUH
#define FASTATTN_SM90_SCORES_CUH

#include "../csrc/philox.h"
#include "mask_bits.h"
#include "softmax.cuh"

enum mask_kind { NO_MASK, BITS, ADD_BF16, ADD_F16, ADD_F32 };

struct score_args {
    float unit;  /* what a score counts before masks and ALiBi: `scale`, or softcap's c */
    float scale; /* what it counts in the end, times log2(e) */
    int32_t caps;
    float cap_scale; /* scale / c */
    int32_t mask;    /* enum mask_kind */
    int32_t vectors; /* rows of a float mask can be read by 16 bytes a thread (float32: by 8) */
    int32_t b_first; /* tiles of one head and all batches are neighbours: they share a mask */
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
struct score_item {
    const char *mask; /* element (0, 0) of its head */
    int64_t plane, seed;
    int32_t b;   /* as dropout counts */
    int32_t mid; /* the block to the left of which the walk begins */
    float slope;
};

PTX void describe_scores(const score_args &a, score_item &t, int32_t b, int32_t h) {
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

/* A walk over the blocks of an item, from right to left: those before `mid`, then the others. With
 * ALiBi `mid` is behind the diagonal, where the highest scores are: offsets are raised least. */
struct map_cursor {
    int32_t low, high, rest; /* to come: low .. high - 1, then mid .. rest - 1 */
    int32_t word;            /* the map's words for 32 * 128 keys, of every warpgroup's rows: */
    uint4 map[WARPGROUPS];
};

PTX map_cursor start_walk(const score_item &t, int32_t begin, int32_t end) {
    map_cursor c;
    c.low = begin;
    c.high = t.mid;
    c.rest = end;
    c.word = -1;
    return c;
}

PTX int32_t map_bit(int32_t block) { return block * BLOCK_N / FA_BITS_KEYS; }

PTX void read_map(const score_args &a, const score_item &t, map_cursor &c, int32_t row,
                  int32_t word) {
    if (c.word == word) return;
    c.word = word;
#pragma unroll
    for (int w = 0; w < WARPGROUPS; ++w)
        c.map[w] = a.map[fa_map_at(&a.bits, t.plane, word, row / FA_BITS_ROWS + w)];
}

/* The last block before `end` that some row of the tile sees, or -1: there is none from `begin`
 * on. Without a bool mask every one counts, and a bare one may leave some that no row sees. */
PTX int32_t last_block(const score_args &a, const score_item &t, map_cursor &c, int32_t row,
                       int32_t begin, int32_t end) {
    if (a.mask != BITS) return end > begin ? end - 1 : -1;
    while (end > begin) {
        int32_t bit = map_bit(end - 1), word = bit / 32;
        read_map(a, t, c, row, word);
        uint32_t any = 0;
#pragma unroll
        for (int w = 0; w < WARPGROUPS; ++w) any |= c.map[w].x;
        any &= ~0u >> (31 - bit % 32);
        if (any >> bit % 32 & 1) return end - 1;
        int32_t found = any ? 32 * word + 32 - __clz(any) : 32 * word; /* one past it */
        end = found * (FA_BITS_KEYS / BLOCK_N);
    }
    return -1;
}

PTX int32_t next_block(const score_args &a, const score_item &t, map_cursor &c, int32_t row) {
    for (;;) {
        int32_t block = last_block(a, t, c, row, c.low, c.high);
        if (block >= 0) {
            c.high = block;
            return block;
        }
        if (c.rest <= t.mid) return -1;
        c.low = t.mid;
        c.high = c.rest;
        c.rest = t.mid;
    }
}

/* ---- a float mask or a bool mask's bits, in registers ----------------------------------------*/

typedef uint32_t mask_words[BLOCK_N / 4];

PTX uint4 load_v4(const void *from) {
    uint4 x;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(from));
    return x;
}
PTX uint2 load_v2(const void *from) {
    uint2 x;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
                 : "=r"(x.x), "=r"(x.y)
                 : "l"(from));
    return x;
}
PTX uint32_t load_u32(const void *from) {
    uint32_t x;
    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(x) : "l"(from));
    return x;
}
PTX uint32_t load_u16(const void *from) {
    uint16_t x;
    asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(x) : "l"(from));
    return x;
}

/* Starts the loads of a block's mask for rows `row` and 8 below. Keys and rows past the ends read
 * the last one's: the interval hides them. Word r * N/8 + j of a 16-bit mask is columns 8j + 2c and
 * the next of row r (VECTORS: transposed among the quad). A float32 mask comes in two HALFs. */
template <int HALF>
PTX void fetch_mask(const score_args &a, const score_item &t, mask_words &m, int32_t row,
                    int32_t key, int32_t sq, int32_t sk, bool part) {
    const int32_t c = threadIdx.x % 4;
    if (HALF == 0 && a.mask <= BITS) {
        /* Or the registers would count as in use all around the loop, for ptxas does not see that
         * nobody reads them. */
#pragma unroll
        for (int i = 0; i < BLOCK_N / 4; ++i) m[i] = 0;
        if (!part) return;
        const uint32_t *words =
            a.words + 4 * fa_bits_at(&a.bits, t.plane, key / FA_BITS_KEYS, row) + c;
#pragma unroll
        for (int r = 0; r < 2; ++r) m[r] = load_u32(words + 32 * r) >> key % FA_BITS_KEYS / 4;
        return;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const char *from = t.mask + min(row + 8 * r, sq - 1) * a.mask_stride[2];
        if (a.mask == ADD_F32) {
#pragma unroll
            for (int i = 0; i < BLOCK_N / 16; ++i) {
                int32_t at = key + 8 * (HALF * (BLOCK_N / 16) + i) + 2 * c;
                uint32_t (&pair)[2] = *(uint32_t (*)[2])(m + 2 * (r * (BLOCK_N / 16) + i));
                if (a.vectors) {
                    uint2 x = load_v2(from + 4 * (int64_t)min(at, sk - 2));
                    pair[0] = x.x, pair[1] = x.y;
                } else {
                    for (int e = 0; e < 2; ++e)
                        pair[e] = load_u32(from + min(at + e, sk - 1) * a.mask_stride[3]);
                }
            }
        } else if (a.vectors) {
#pragma unroll
            for (int i = 0; i < BLOCK_N / 32; ++i) {
                uint4 x = load_v4(from + 2 * (int64_t)min(key + 32 * i + 8 * c, sk - 8));
                uint32_t *to = m + 4 * (r * (BLOCK_N / 32) + i);
                to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
            }
        } else {
#pragma unroll
            for (int j = 0; j < BLOCK_N / 8; ++j) {
                int32_t at = key + 8 * j + 2 * c;
                m[r * (BLOCK_N / 8) + j] = load_u16(from + min(at, sk - 1) * a.mask_stride[3]) |
                                           load_u16(from + min(at + 1, sk - 1) * a.mask_stride[3])
                                               << 16;
            }
        }
    }
}

/* The two halves of a 16-bit mask's word. */
template <bool IS_BF16_MASK>
PTX float2 widen(uint32_t x) {
    if (IS_BF16_MASK) return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000));
    float2 y;
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\n"
        "cvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}"
        : "=f"(y.x), "=f"(y.y)
        : "r"(x));
    return y;
}

template <bool IS_BF16_MASK>
PTX void add_words(float (&s)[BLOCK_N / 2], const mask_words &m, float unit) {
#pragma unroll
    for (int i = 0; i < BLOCK_N / 4; ++i) {
        float2 x = widen<IS_BF16_MASK>(m[i]);
        int at = i % (BLOCK_N / 8) * 4 + i / (BLOCK_N / 8) * 2;
        s[at] = fmaf(s[at], unit, x.x);
        s[at + 1] = fmaf(s[at + 1], unit, x.y);
    }
}

template <int HALF>
PTX void add_floats(float (&s)[BLOCK_N / 2], const mask_words &m, float unit) {
#pragma unroll
    for (int i = 0; i < BLOCK_N / 8; ++i) {
        int at = (HALF * (BLOCK_N / 16) + i % (BLOCK_N / 16)) * 4 + i / (BLOCK_N / 16) * 2;
        s[at] = fmaf(s[at], unit, __uint_as_float(m[2 * i]));
        s[at + 1] = fmaf(s[at + 1], unit, __uint_as_float(m[2 * i + 1]));
    }
}

/* -inf where a row's bit is clear. */
PTX void hide_scores(float (&s)[BLOCK_N / 2], const mask_words &m) {
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int i = 0; i < BLOCK_N / 4; ++i)
            if (!(m[r] >> i & 1)) s[i / 2 * 4 + 2 * r + i % 2] = -INFINITY;
}

/* Writes zeros over the rows of V whose bit in `seen`, as words of the packed mask, is clear. */
PTX void clear_unseen(const uint32_t (&seen)[4], uint8_t *v, int32_t key, int warpgroup) {
    for (int i = threadIdx.x % 128; i < V_BYTES / 16; i += 128) {
        int32_t n = i / 8 % BLOCK_N + key % FA_BITS_KEYS, c = n / 2 % 4;
        uint32_t word = c == 0 ? seen[0] : c == 1 ? seen[1] : c == 2 ? seen[2] : seen[3];
        if (!(word >> (n / 8 * 2 + n % 2) & 1)) ((uint4 *)v)[i] = make_uint4(0, 0, 0, 0);
    }
    fence_proxy_async();
    bar_sync(1 + warpgroup, 128);
}

/* Writes zeros over the rows of V that no row of the tile sees: 0 * NaN is NaN. As clear_hidden_v
 * in sm90_fwd.cu; both warpgroups write the same. */
PTX void clear_holes(const score_args &a, const score_item &t, uint8_t *v, int32_t row, int32_t key,
                     int warpgroup) {
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

/* tanh(s * scale), to 3e-8 of itself where all of a warp's are below a half: y + y^3 p(y^2) with p
 * of least error there, no MUFU. Else 1 - 2 / (1 + e^2y), to 2e-7, which is little beside them.
 * `far`: whether it is the latter; -1: as the scores say. */
PTX void cap_scores(float (&s)[BLOCK_N / 2], float scale, int32_t far) {
    float top = 0.f;
#pragma unroll
    for (int i = 0; i < BLOCK_N / 2; ++i) {
        s[i] *= scale;
        top = fmaxf(top, fabsf(s[i]));
    }
    if (far < 0 ? __any_sync(~0u, top > 0.5f) : far) {
#pragma unroll
        for (int i = 0; i < BLOCK_N / 2; ++i)
            s[i] = fmaf(-2.f, rcp_approx(1.f + ex2_approx(2.885390081777927f * s[i])), 1.f);
    } else {
#pragma unroll
        for (int i = 0; i < BLOCK_N / 2; ++i) {
            float y = s[i], u = y * y;
            float p =
                fmaf(fmaf(fmaf(0.01725699f, u, -0.05305295f), u, 0.13325988f), u, -0.3333315f);
            s[i] = fmaf(y, u * p, y);
        }
    }
}

/* `position`: that of the warpgroup's first row, `row` the first of this thread's two among its
 * 64. Left or right of the diagonal |i' - j| is linear in j. */
PTX void add_alibi(float (&s)[BLOCK_N / 2], float unit, float slope, int32_t position, int32_t row,
                   int32_t key) {
    bool left = key + BLOCK_N - 1 <= position, right = key >= position + 63;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float x = (float)(position + row + 8 * r - key - 2 * (int32_t)(threadIdx.x % 4));
        if (left || right) {
            float k = left ? slope : -slope, first = -k * x;
#pragma unroll
            for (int i = 0; i < BLOCK_N / 4; ++i) {
                float &y = s[i / 2 * 4 + 2 * r + i % 2];
                y = fmaf(k, (float)(i / 2 * 8 + i % 2), fmaf(y, unit, first));
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

/* Everything that changes scores, in the order of the definition, but what hides keys. All P V must
 * have ended: a float32 mask's second half takes the place of its first. */
PTX void change_scores(const score_args &a, const score_item &t, float (&s)[BLOCK_N / 2],
                       mask_words &m, int32_t row, int32_t key, int32_t sq, int32_t sk,
                       int32_t position, int32_t row_of_64, int32_t far) {
    float unit = a.unit;
    if (a.caps) cap_scores(s, a.cap_scale, far);
    if (a.mask == ADD_F32) {
        add_floats<0>(s, m, unit);
        fetch_mask<1>(a, t, m, row, key, sq, sk, false);
        add_floats<1>(s, m, unit);
        unit = 1.f;
    } else if (a.mask > BITS) {
        if (a.vectors)
#pragma unroll
            for (int i = 0; i < BLOCK_N / 4; i += 4) transpose_quad(*(uint32_t (*)[4])(m + i));
        if (a.mask == ADD_BF16)
            add_words<true>(s, m, unit);
        else
            add_words<false>(s, m, unit);
        unit = 1.f;
    }
    if (a.slopes) add_alibi(s, unit, t.slope, position, row_of_64, key);
}

/* Zeros among P, rounded and packed: a lane of a quad asks Philox for one of four neighbouring
 * groups of 8 keys, and the quad exchanges the words. */
PTX void drop_scores(const score_args &a, const score_item &t, uint32_t *p, int32_t h, int32_t row,
                     int32_t key) {
    const int64_t seed = t.seed;
    const uint32_t high = a.threshold << 16; /* 65,536, all of it: `gain` is 0 */
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int i = 0; i < BLOCK_N / 32; ++i) {
            int32_t group = key / 8 + 4 * i + threadIdx.x % 4;
            fa_random bits = fa_dropout_bits(seed, t.b, h, row + 8 * r, group);
            transpose_quad(bits.word);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                uint32_t &pair = p[2 * (4 * i + j) + r];
                if (bits.word[j] << 16 < high) pair &= 0xffff0000;
                if (bits.word[j] < high) pair &= 0x0000ffff;
            }
        }
}

/* ---- the launcher's part ---------------------------------------------------------------------*/

/* `packed`: where the mask is packed, of a bool one. */
static score_args make_scores(const fa_params *p, const char *packed) {
    const fa_scores *s = &p->scores;
    const fa_dropout *d = &p->dropout;
    const double scale = p->what.scale;
    score_args a = {};
    a.caps = s->softcap != 0;
    a.cap_scale = a.caps ? (float)(scale / s->softcap) : 0.f;
    a.unit = a.caps ? s->softcap : (float)scale;
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
        int64_t together = (int64_t)(uintptr_t)a.mask_data;
        for (int i = 0; i < 4; ++i) {
            a.mask_stride[i] = s->mask.stride[i] * size;
            if (i < 3) together |= a.mask_stride[i];
        }
        const int32_t chunk = a.mask == ADD_F32 ? 8 : 16; /* bytes */
        a.vectors =
            s->mask.stride[3] == 1 && together % chunk == 0 && p->what.sk % (chunk / size) == 0;
        a.b_first = s->mask.stride[0] == 0 && s->mask.stride[1] != 0;
    }
    if (a.mask == BITS) {
        a.bits = fa_mask_bits_make(&p->what, &p->masks, &p->varlen, &s->mask);
        a.map = (const uint4 *)packed;
        a.columns = (const uint4 *)(packed + a.bits.columns);
        a.words = (const uint32_t *)(packed + a.bits.bits);
    }
    const bool natural = a.mask > BITS || a.slopes;
    /* A scale of 0 must not meet the -inf of a hidden score: 1e-37 of any score is 0 too. */
    const double end = natural ? 1 : a.caps ? (double)s->softcap : scale == 0 ? 1e-37 : scale;
    a.scale = (float)(end * 1.4426950408889634);
    return a;
}

#endif
