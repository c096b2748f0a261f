/* bwd_scores.cuh - from the products S and dP to the weights of the gradients: P z and dS.
 *
 * A tile has query rows, and columns are keys, or, BY_KEYS, the other way round. Row i of this lane
 * is row_of(t, i) of the tile's, fragment n has its columns 8 n and the next from the first on.
 */
#ifndef FASTATTN_SM80_BWD_SCORES_CUH
#define FASTATTN_SM80_BWD_SCORES_CUH

#include "philox.h"
#include "sm80/bwd_tile.cuh"
#include "sm80/fragments.cuh"
#include "sm80/softcap.cuh"

static constexpr int ROWS = 2 * STRIPS; /* of a lane */

DEVICE float exp_of(float x) { return ex2_approx(x * 1.4426950408889634f); }
DEVICE double exp_of(double x) { return exp(x); }

DEVICE int32_t row_of(const tile &t, int i) {
    const int32_t warp = threadIdx.x / 32 / COLUMN_WARPS;
    return t.row + warp * WARP_ROWS + 8 * i + threadIdx.x % 32 / 4;
}

/* lse and delta of a query row of the sequence; past its end P is 0. */
DEVICE row_terms terms_of(const bwd_args &a, const tile &t, int32_t h, int32_t row) {
    if (row >= t.lengths.sq) return row_terms{{INFINITY, 0}};
    return a.terms[((int64_t)t.batch * a.hq + h) * a.terms_rows + t.q + row];
}

/* The columns that a row of the tile meets. */
template <bool BY_KEYS>
DEVICE fa_interval columns_of(const tile &t, int32_t row) {
    if (!BY_KEYS) return fa_row_interval(t.lengths, row);
    const fa_row_range rows = fa_rows_seeing_some(t.lengths, fa_interval{row, row + 1});
    return fa_interval{rows.begin, rows.end};
}

#if VARIANT_GENERAL
DEVICE real mask_value(const score_args &a, const tile &t, int32_t query, int32_t key) {
    const char *at = t.mask + min(query, t.lengths.sq - 1) * a.mask_stride[2] +
                     min(key, t.lengths.sk - 1) * a.mask_stride[3];
    if (a.mask_dtype == FA_BF16) return element<FA_BF16>::widen(*(const uint16_t *)at);
    if (a.mask_dtype == FA_F16) return element<FA_F16>::widen(*(const uint16_t *)at);
    if (a.mask_dtype == FA_F64) return (real) * (const double *)at;
    return *(const float *)at;
}

DEVICE bool mask_shows(const score_args &a, const tile &t, int32_t query, int32_t key) {
    const int64_t at = fa_bits_at(&a.bits, t.plane, key / FA_BITS_KEYS, query);
    return a.words[4 * at + key % 8 / 2] >> (key % FA_BITS_KEYS / 8 * 2 + key % 2) & 1;
}

/* The final score of a product, and its slope. */
DEVICE void change_score(const bwd_args &a, const tile &t, real &x, real &slope, int32_t query,
                         int32_t key) {
    if (a.scores.cap != 0) {
        const real y = tanh_of(x * a.scores.cap_scale);
        x = a.scores.cap * y, slope = 1 - y * y;
    } else {
        x *= a.scale;
    }
    if (a.scores.mask) x += mask_value(a.scores, t, query, key);
    if (a.scores.slopes) x -= (real)t.slope * fabs((real)(fa_row_position(t.lengths, query) - key));
}

/* What dropout multiplies P by. */
DEVICE real gain_of(const bwd_args &a, const tile &t, int32_t h, int32_t query, int32_t key) {
    const fa_random bits = fa_dropout_bits(t.seed, a.scores.first_b + t.b, h, query, key / 8);
    return fa_dropout_keeps(a.scores.threshold, bits, key) ? a.gain : (real)0;
}
#endif

/* P z in place of products, and dS in place of dP, times the score's slope but for what is added to
 * scores, OF_MASK. `h`: the query head. */
template <bool BY_KEYS, bool OF_MASK = false>
DEVICE void weigh(const bwd_args &a, const tile &t, row_scores &s, row_scores &dp, int32_t h,
                  int32_t block) {
    const int32_t first = block * BLOCK_N + threadIdx.x % 4 * 2;
    const bool cut = is_cut(t, block);
    row_terms terms[BY_KEYS ? 2 * SCORES : ROWS];
#pragma unroll
    for (int i = 0; i < (BY_KEYS ? 2 * SCORES : ROWS); ++i)
        terms[i] = terms_of(a, t, h, BY_KEYS ? first + i / 2 * 8 + i % 2 : row_of(t, i));
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        const int32_t row = row_of(t, i);
        const fa_interval columns = columns_of<BY_KEYS>(t, row);
#pragma unroll
        for (int n = 0; n < SCORES; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int32_t column = first + 8 * n + e;
                const row_terms &of = terms[BY_KEYS ? 2 * n + e : i];
                real &x = s[i / 2][n][i % 2 * 2 + e], &y = dp[i / 2][n][i % 2 * 2 + e];
                bool seen = !cut || (column >= columns.begin && column < columns.end);
                seen &= of.x[0] < INFINITY; /* else the row sees nothing, and dP may be NaN */
                real slope = 1, gain = 1;
#if VARIANT_GENERAL
                const int32_t query = BY_KEYS ? column : row, key = BY_KEYS ? row : column;
                if (a.scores.natural) {
                    change_score(a, t, x, slope, query, key);
                    x -= of.x[0];
                } else {
                    x = fma(x, a.scale, -of.x[0]);
                }
                if (a.scores.map && seen) seen = mask_shows(a.scores, t, query, key);
                if (a.scores.drops) gain = gain_of(a, t, h, query, key);
#else
                x = fma(x, a.scale, -of.x[0]);
#endif
                const real p = seen ? exp_of(x) : (real)0;
                if (OF_MASK) slope = 1;
                y = seen ? p * (gain == 0 ? -of.x[1] : y * gain - of.x[1]) * slope : (real)0;
                x = p * gain;
            }
    }
}

#endif
