/* products_f32.cuh - a warp's two products, of float32: S += Q K^T of a panel of K, O += P V of
 * a panel of V.
 *
 * Each number is the sum of two of TF32, and of a product's four parts the greatest three are
 * taken, with V a fourth. Tensor cores truncate when they add: sums begin at 0 every few steps,
 * those of lower parts apart, and are added up by ordinary additions. That is right of finite
 * numbers; a tile that has others is computed again, GUARDED.
 */
#ifndef FASTATTN_SM80_PRODUCTS_F32_CUH
#define FASTATTN_SM80_PRODUCTS_F32_CUH

#include "sm80/fragments.cuh"
#include "sm80/ptx.cuh"

/* Steps, of 8 columns or keys, that are summed by themselves. */
static constexpr int FRESH = 2, FRESH_KEYS = 2;

/* N registers of an operand: the nearest numbers of TF32, and what is left, whose lowest bit the
 * tensor cores do not see. */
template <int N>
struct operand {
    uint32_t high[N], low[N];
};

/* P, as A. */
struct weights {
    operand<4> p[SCORES];
};

DEVICE bool is_finite(uint32_t bits) { return (bits & 0x7fffffff) < 0x7f800000; }
DEVICE uint32_t difference(uint32_t a, uint32_t b) {
    return __float_as_uint(__uint_as_float(a) - __uint_as_float(b));
}

template <bool GUARDED, int N>
DEVICE void set(operand<N> &a, int i, uint32_t bits) {
    a.high[i] = (bits + 0x1000) & 0xffffe000;
    a.low[i] = difference(bits, a.high[i]);
    if (GUARDED && !is_finite(a.high[i])) a.high[i] = bits, a.low[i] = 0;
}

/* GUARDED: what is not finite meets no lower part, whose product with it would be another. */
template <bool GUARDED, int N>
DEVICE void guard(uint32_t (&x)[N], const uint32_t (&high)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = GUARDED && !is_finite(high[i]) ? 0 : high[i];
}

struct sums {
    fragment high = {}, low = {};
};

DEVICE void add_to(fragment &d, const sums &s) {
#pragma unroll
    for (int i = 0; i < 4; ++i) d[i] += s.high[i] + s.low[i];
}

/* Of a block of keys, before they are added to what all blocks before it gave: that is large, and
 * rounds. The lower parts go on. */
DEVICE void add_high(fragment &d, sums &s) {
#pragma unroll
    for (int i = 0; i < 4; ++i) d[i] += s.high[i], s.high[i] = 0;
}

template <bool GUARDED>
DEVICE void multiply(sums &d, const operand<4> &a, const operand<2> &b) {
    uint32_t x[4], y[2];
    guard<GUARDED>(x, a.high);
    guard<GUARDED>(y, b.high);
    mma_m16n8k8_tf32(d.low, a.low, y[0], y[1]);
    mma_m16n8k8_tf32(d.low, x, b.low[0], b.low[1]);
    mma_m16n8k8_tf32(d.high, a.high, b.high[0], b.high[1]);
}
/* And the lowest bit of B: a weight of 1 leaves a value as it is. */
template <bool GUARDED>
DEVICE void multiply_whole(sums &d, const operand<4> &a, const operand<2> &b) {
    uint32_t x[4];
    guard<GUARDED>(x, a.high);
    mma_m16n8k8_tf32(d.low, x, difference(b.low[0], b.low[0] & 0xffffe000),
                     difference(b.low[1], b.low[1] & 0xffffe000));
    multiply<GUARDED>(d, a, b);
}

/* q: this warp's rows, from the panel's column on. */
template <bool GUARDED>
DEVICE void add_scores(row_scores &s, uint32_t q, uint32_t k) {
    const lane_address from = address_of_a(q, Q_ROW), keys = address_of_b(k, PANEL_ROW);
    uint32_t x[4];
#pragma unroll
    for (int first = 0; first < PANEL / 8; first += FRESH) {
        operand<4> a[FRESH];
#pragma unroll
        for (int i = 0; i < FRESH; ++i) {
            ldmatrix_x4(x, at_32(from, first + i));
#pragma unroll
            for (int j = 0; j < 4; ++j) set<GUARDED>(a[i], j, x[j]);
        }
#pragma unroll
        for (int n = 0; n < SCORES; n += 2) {
            sums sum[2];
#pragma unroll
            for (int i = 0; i < FRESH; ++i) {
                operand<2> b[2];
                ldmatrix_x4(x, at_32(keys, first + i) + n * 8 * PANEL_ROW);
#pragma unroll
                for (int j = 0; j < 4; ++j) set<GUARDED>(b[j / 2], j % 2, x[j]);
#pragma unroll
                for (int j = 0; j < 2; ++j) multiply<GUARDED>(sum[j], a[i], b[j]);
            }
#pragma unroll
            for (int j = 0; j < 2; ++j) add_to(s[0][n + j], sum[j]);
        }
    }
}

/* The keys of a product are taken in the order 0, 2, 4, 6, 1, 3, 5, 7: so a lane has its scores,
 * and V's rows lie in different banks. */
DEVICE void make_weights(weights &w, const row_scores &s) {
#pragma unroll
    for (int n = 0; n < SCORES; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            set<false>(w.p[n], i, __float_as_uint(s[0][n][i % 2 * 2 + i / 2]));
}

/* The panel has the fragments of this warp's columns from `first` on. Two of them side by side, for
 * one's products wait for each other. */
template <bool GUARDED>
DEVICE void add_values(row_values &o, int first, const weights &w, const row_scores &, uint32_t v) {
    const int32_t r = threadIdx.x % 32 / 4, c = threadIdx.x % 4, beside = r / 4;
    v += threadIdx.x / 32 % COLUMN_WARPS * OWN_PANEL * SIZE + 2 * c * PANEL_ROW + r % 4 * 4;
#pragma unroll
    for (int n = 0; n < OWN_PANEL / 8; n += 2) {
        sums sum[2];
        fragment block[2] = {};
        uint32_t row[2][2]; /* of an even key and of the one behind */
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int column = n + i / 2;
            row[i / 2][i % 2] = v + column / 4 * 128 + i % 2 * PANEL_ROW +
                                ((beside ^ (2 * c + i % 2) ^ column % 4 * 2) << 4);
        }
#pragma unroll
        for (int j = 0; j < SCORES; ++j)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                operand<2> b;
#pragma unroll
                for (int e = 0; e < 2; ++e)
                    set<GUARDED>(b, e, ld_shared(row[i][e] + j * 8 * PANEL_ROW));
                multiply_whole<GUARDED>(sum[i], w.p[j], b);
                if (j % FRESH_KEYS == FRESH_KEYS - 1) add_high(block[i], sum[i]);
            }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            add_to(block[i], sum[i]);
#pragma unroll
            for (int e = 0; e < 4; ++e) o[0][first + n + i][e] += block[i][e];
        }
    }
}

#endif
