/* bwd_scores.cuh - what changes scores, in the backward: softcap, masks, ALiBi, dropout. General
 * variants only; the formulas and arguments are the forward's (scores_args.cuh).
 *
 * Scores are transposed: a thread has of 64 rows two keys, 8 apart, and of every 8 rows two. Score
 * 4 j + 2 r + e of it is that of key 8 r and row 8 j + e from its first ones on.
 *
 * All branches are on the arguments, the same for the whole block, and no product is in flight.
 */
#ifndef FASTATTN_SM90_BWD_SCORES_CUH
#define FASTATTN_SM90_BWD_SCORES_CUH

#include "common/compiler.cuh"
#include "common/element.cuh"
#include "common/quads.cuh"
#include "philox.h"
#include "sm90/bwd_args.cuh"
#include "sm90/bwd_block.cuh"
#include "sm90/bwd_smem.h"
#include "sm90/ptx.cuh"
#include "sm90/softcap.cuh"
#include "sm90/wgmma.cuh"

enum { SCORES = 32, FEW = 8 }; /* of a thread, of 64 rows, and of 16 */
/* Of 64 rows the scores that the warpgroup has. */
static constexpr int OWN = ROWS < 64 ? ROWS / 2 : SCORES;

/* tanh of the scores times their scale. Polynomial or not as the forward has it. */
DEVICE void cap_scores(const score_args &a, float (&s)[OWN]) {
    uint32_t top = 0; /* as integers the greatest of |s|, NaN above it */
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
        const uint32_t size = __float_as_uint(s[i]) & 0x7fffffff;
        top = size > top ? size : top;
    }
    if (__all_sync(~0u, top <= a.cap_near)) {
#pragma unroll
        for (int i = 0; i < OWN; ++i) s[i] = cap_near(a.cap_series, s[i], 0.f);
    } else if (!a.cap_wide) {
#pragma unroll
        for (int i = 0; i < OWN; ++i) s[i] = cap_far(a.cap_scale, s[i]);
    } else {
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            if ((__float_as_uint(s[i]) & 0x7fffffff) <= a.cap_near) {
                s[i] = cap_near(a.cap_series, s[i], 0.f);
            } else {
                not_a_select(s[i]);
                s[i] = cap_far(a.cap_scale, s[i]);
            }
        }
    }
}

template <mask_kind KIND>
DEVICE float mask_value(const char *from) {
    if (KIND == ADD_F32) return __uint_as_float(load_u32(from));
    if (KIND == ADD_BF16) return __uint_as_float(load_u16(from) << 16);
    return element<FA_F16>::widen((uint16_t)load_u16(from));
}

/* s * unit + mask. Rows and keys past the ends are the last one's: the interval hides them. */
template <mask_kind KIND>
DEVICE void add_mask(const score_args &a, const char *mask, float (&s)[FEW], float unit,
                     int32_t row, int32_t key, int32_t sq, int32_t sk) {
    const int64_t keys[2] = {min(key, sk - 1) * a.mask_stride[3],
                             min(key + 8, sk - 1) * a.mask_stride[3]};
#pragma unroll
    for (int j = 0; j < FEW / 4; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const char *from = mask + min(row + 8 * j + e, sq - 1) * a.mask_stride[2];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float &x = s[4 * j + 2 * r + e];
                x = fmaf(x, unit, mask_value<KIND>(from + keys[r]));
            }
        }
}

/* s * unit - slope * |i' - j|; `distance`: of the thread's first row's i' from its first key. */
DEVICE void add_alibi(float (&s)[FEW], float unit, float slope, int32_t distance) {
    const float first = (float)distance;
#pragma unroll
    for (int i = 0; i < FEW; ++i) {
        const float x = first + (float)(i / 4 * 8 + i % 2 - i / 2 % 2 * 8);
        s[i] = fmaf(s[i], unit, -slope * fabsf(x));
    }
}

/* Which scores a bool mask lets be seen, a bit each. `row`: the first of 64; `key`: the thread's.
 */
DEVICE uint32_t seen_scores(const score_args &a, int64_t plane, int32_t row, int32_t key) {
    const int32_t n = key % FA_BITS_KEYS, lane = thread_here() % 4;
    const uint32_t *words =
        a.words + 4 * fa_bits_at(&a.bits, plane, key / FA_BITS_KEYS, row) + n % 8 / 2 + 8 * lane;
    uint32_t seen = 0;
#pragma unroll
    for (int j = 0; j < SCORES / 4; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const uint32_t two = load_u32(words + 4 * (8 * j + e)) >> (n / 8 * 2 + n % 2);
            seen |= (two & 1) << (4 * j + e) | (two >> 2 & 1) << (4 * j + 2 + e);
        }
    return seen;
}

/* The first `rows` of 64, in scores that this thread has of a key: 2 of every 8. */
DEVICE int32_t first_scores(int32_t rows) {
    rows = min(max(rows, 0), 64);
    return rows / 8 * 2 + min(rows % 8, 2);
}

/* Which scores are inside their rows' intervals, a bit each, from the thread's first row and key.
 */
DEVICE uint32_t inside_scores(const fa_lengths &lengths, int32_t row, int32_t key) {
    uint32_t inside = 0;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const fa_interval one = {key + 8 * r, key + 8 * r + 1};
        const fa_row_range rows = fa_rows_seeing_some(lengths, one);
        const int32_t begin = first_scores(rows.begin - row);
        uint32_t x = bit_mask(begin, max(first_scores(rows.end - row) - begin, 0));
        x = (x | x << 8) & 0x00ff00ff; /* pairs of bits to every other pair */
        x = (x | x << 4) & 0x0f0f0f0f;
        x = (x | x << 2) & 0x33333333;
        inside |= x << 2 * r;
    }
    return inside;
}

/* Which scores dropout keeps, a bit each. `row`: the first of 64; `key`: the warp's. A Philox call
 * serves the 8 keys of a row that a column of lanes has: each lane makes the calls of the rows with
 * its own j, and they exchange halves of words as a matrix is transposed. */
DEVICE uint32_t kept_scores(const score_args &a, int32_t b, int32_t h, int32_t row, int32_t key) {
    const int64_t seed = a.seed_data ? *a.seed_data : a.seed;
    const int32_t lane = thread_here() % 32, own = row + lane / 4 * 8 + lane % 4 * 2;
    fa_random bits[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
        bits[i] = fa_dropout_counter(a.first_b + b, h, own + i % 2, key / 8 + i / 2);
    fa_philox(bits, 4, (uint32_t)seed, (uint32_t)((uint64_t)seed >> 32));
    uint32_t kept = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        transpose_quad(bits[i].word);
#pragma unroll
        for (int j = 0; j < 4; ++j) bits[i].word[j] = movmatrix_trans(bits[i].word[j]);
        transpose_quad(bits[i].word);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const uint32_t two = bits[i].word[j];
            kept |= (uint32_t)((two & 0xffff) >= a.threshold) << (8 * j + i);
            kept |= (uint32_t)((two >> 16) >= a.threshold) << (8 * j + 4 + i);
        }
    }
    return kept;
}

/* What masks and ALiBi add, to scores of 16 rows from this thread's first row and key on. */
DEVICE void add_biases(const bwd_args &a, const work_tile &t, int32_t h, float (&s)[FEW],
                       int32_t row, int32_t key) {
    const score_args &c = a.scores;
    float unit = c.unit;
    if (c.mask > BITS) {
        const char *mask = c.mask_data + t.b * c.mask_stride[0] + h * c.mask_stride[1];
        if (c.mask == ADD_BF16)
            add_mask<ADD_BF16>(c, mask, s, unit, row, key, a.sq, a.sk);
        else if (c.mask == ADD_F16)
            add_mask<ADD_F16>(c, mask, s, unit, row, key, a.sq, a.sk);
        else
            add_mask<ADD_F32>(c, mask, s, unit, row, key, a.sq, a.sk);
        unit = 1.f;
    }
    if (c.slopes)
        add_alibi(s, unit, c.slopes[t.b * c.slope_stride[0] + h * c.slope_stride[1]],
                  fa_row_position(t.lengths, row) - key);
}

/* Zeros where a bit is clear. */
template <int N>
DEVICE void keep_scores(float (&x)[N], uint32_t bits) {
#pragma unroll
    for (int i = 0; i < N; ++i)
        if (!(bits >> i & 1)) x[i] = 0.f;
}

/* Zeros among rounded pairs of 16 rows. */
DEVICE void drop_pairs(uint32_t (&p)[FEW / 2], uint32_t kept) {
#pragma unroll
    for (int i = 0; i < FEW / 2; ++i) {
        if (!(kept >> 2 * i & 1)) p[i] &= 0xffff0000;
        if (!(kept >> (2 * i + 1) & 1)) p[i] &= 0x0000ffff;
    }
}

/* ---- a block of rows --------------------------------------------------------------------------*/

/* The scores of a block that dropout keeps, and those that are seen, a bit each. */
struct score_bits {
    uint32_t kept[BLOCK_M / 64], seen[BLOCK_M / 64];
    bool some; /* not all may be seen */
};

DEVICE score_bits bits_of(const bwd_args &a, const work_tile &t, const walk_step &at,
                          int32_t warpgroup) {
    const int32_t h = at.h, m = at.m, thread = thread_here() % 128,
                  warp_key = t.key + own_key(warpgroup) + thread / 32 * 16;
    const int32_t key = warp_key + thread % 32 / 4;
    const bool ends = m * BLOCK_M < t.all.begin || (m + 1) * BLOCK_M > t.all.end;
    const score_args &c = a.scores;
    const bool masks = c.mask == BITS && !at.whole;
    score_bits bits;
    bits.some = ends || masks;
#pragma unroll
    for (int i = 0; i < BLOCK_M / 64; ++i) {
        const int32_t row = m * BLOCK_M + 64 * i;
        bits.kept[i] = bits.seen[i] = ~0u;
        if (c.drops) bits.kept[i] = kept_scores(c, t.b, h, row, warp_key);
        if (ends) bits.seen[i] = inside_scores(t.lengths, row + thread % 4 * 2, key);
        if (masks) bits.seen[i] &= seen_scores(c, fa_bits_plane(&c.bits, t.b, h), row, key);
        bits.kept[i] >>= own_row(warpgroup) / 2;
        bits.seen[i] >>= own_row(warpgroup) / 2;
    }
    return bits;
}

/* Zeros where a score is not seen. */
DEVICE void hide_scores(float (&x)[ROWS / 2], const score_bits &bits) {
    if (!bits.some) return;
#pragma unroll
    for (int i = 0; i < ROWS / 2; i += OWN)
        keep_scores(*(float (*)[OWN])(x + i), bits.seen[i / OWN]);
}

/* dS^T as slopes() has it, of what dropout keeps, and 0 of what is not seen. Without branches:
 * ptxas spills around them. */
DEVICE void bit_slopes(const score_bits &bits, float gain, const float (&p)[ROWS / 2],
                       float (&dp)[ROWS / 2], const float *delta) {
    const uint32_t from = smem_address(delta) + threadIdx.x % 4 * 8;
#pragma unroll
    for (int j = 0; j < ROWS / 8; ++j) {
        const float2 d = ld_shared_v2(from + 32 * j);
        const uint32_t kept = bits.kept[j / 8] >> 4 * (j % 8),
                       seen = bits.seen[j / 8] >> 4 * (j % 8);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float &x = dp[4 * j + i];
            const float y = (kept >> i & 1 ? x * gain : 0.f) - (i % 2 ? d.y : d.x);
            x = seen >> i & 1 ? p[4 * j + i] * y : 0.f;
        }
    }
}

/* P^T of S^T: rounded, without what is dropped, and in its place, times the scores' slopes where
 * SLOPES says so. 16 rows at a time, for registers are scarce. */
template <bool SLOPES = true>
DEVICE void weigh(const bwd_args &a, const work_tile &t, const walk_step &at, int32_t warpgroup,
                  const float (&lse)[BLOCK_M], const score_bits &bits, float (&s)[ROWS / 2],
                  uint32_t (&p)[ROWS / 16][4]) {
    const int32_t thread = thread_here() % 128;
    const int32_t key = t.key + own_key(warpgroup) + thread / 32 * 16 + thread % 32 / 4;
    const score_args &c = a.scores;
    const bool great = has_great_rows(lse + own_row(warpgroup));
    if (c.caps)
#pragma unroll
        for (int i = 0; i < ROWS / 2; i += OWN) cap_scores(c, *(float (*)[OWN])(s + i));
#pragma unroll
    for (int i = 0; i < ROWS / 16; ++i) {
        const int32_t row = at.m * BLOCK_M + own_row(warpgroup) + 16 * i + thread % 4 * 2;
        float x[FEW];
#pragma unroll
        for (int j = 0; j < FEW; ++j) x[j] = s[FEW * i + j];
        add_biases(a, t, at.h, x, row, key);
        const uint32_t from = smem_address(lse + own_row(warpgroup)) + 64 * i + thread % 4 * 8;
        const float2 l[2] = {ld_shared_v2(from), ld_shared_v2(from + 32)};
#pragma unroll
        for (int j = 0; j < FEW; ++j) x[j] = fmaf(x[j], c.scale, j % 2 ? -l[j / 4].y : -l[j / 4].x);
        if (great)
#pragma unroll
            for (int j = 0; j < FEW; ++j) x[j] = x[j] > 0.f ? 0.f : x[j];
#pragma unroll
        for (int j = 0; j < FEW; ++j) x[j] = ex2_approx(x[j]);
        if (bits.some) keep_scores(x, bits.seen[i / 4] >> i % 4 * FEW);
        p[i][0] = cvt_pack(x[0], x[1]), p[i][1] = cvt_pack(x[2], x[3]);
        p[i][2] = cvt_pack(x[4], x[5]), p[i][3] = cvt_pack(x[6], x[7]);
        if (c.drops) drop_pairs(p[i], bits.kept[i / 4] >> i % 4 * FEW);
#pragma unroll
        for (int j = 0; j < FEW; ++j) {
            float &y = s[FEW * i + j];
            y = x[j] * (SLOPES && c.caps ? fmaf(-y, y, 1.f) : 1.f);
        }
    }
}

/* ---- what no row sees, or no key ------------------------------------------------------------- */

/* Whether a row, of any query head that shares the key, sees it. */
DEVICE bool is_seen(const bwd_args &a, const work_tile &t, int32_t key) {
    const score_args &c = a.scores;
    const fa_row_range rows = fa_rows_seeing_some(t.lengths, fa_interval{key, key + 1});
    const int32_t n = key % FA_BITS_KEYS, block = key / FA_BITS_KEYS, bit = n / 8 * 2 + n % 2;
    for (int32_t g = 0; g < a.group; ++g) {
        const int64_t plane = fa_bits_plane(&c.bits, t.b, t.h_k * a.group + g);
        for (int32_t row = rows.begin; row < rows.end;) {
            const bool whole = row % FA_BITS_ROWS == 0 && row + FA_BITS_ROWS <= rows.end;
            const int64_t at = whole ? fa_columns_at(&c.bits, plane, block, row / FA_BITS_ROWS)
                                     : fa_bits_at(&c.bits, plane, block, row);
            const uint32_t *words = whole ? (const uint32_t *)c.columns : c.words;
            if (load_u32(words + 4 * at + n % 8 / 2) >> bit & 1) return true;
            row += whole ? FA_BITS_ROWS : 1;
        }
    }
    return false;
}

/* Whether a row of a block has no weights: all warps find the same. */
DEVICE bool has_empty_rows(const float (&lse)[BLOCK_M]) {
    bool some = false;
#pragma unroll
    for (int i = 0; i < BLOCK_M; i += 32) some |= lse[i + threadIdx.x % 32] == INFINITY;
    return __any_sync(~0u, some);
}

/* Whether a bool mask leaves a row any key: of LANES threads side by side, which all ask. */
template <int LANES>
DEVICE bool sees_some(const bwd_rows_args &a, const fa_lengths &lengths, int32_t b, int32_t h,
                      int32_t row) {
    const int64_t plane = fa_bits_plane(&a.bits, b, h);
    const fa_interval keys = fa_row_interval(lengths, row);
    bool some = false;
    for (int32_t key = keys.begin + threadIdx.x % LANES; key < keys.end && !some; key += LANES) {
        const int32_t n = key % FA_BITS_KEYS;
        const int64_t at = fa_bits_at(&a.bits, plane, key / FA_BITS_KEYS, row);
        some = load_u32(a.words + 4 * at + n % 8 / 2) >> (n / 8 * 2 + n % 2) & 1;
    }
#pragma unroll
    for (int i = LANES / 2; i; i /= 2) some |= __shfl_xor_sync(~0u, (int32_t)some, i);
    return some;
}

#endif
