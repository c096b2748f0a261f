/* fwd_products.cuh - a warp's two products: S += Q K^T of a panel of K, O += P V of a panel of V.
 *
 * Lane 4 r + c of a warp has of each 8 columns the 2c-th and the next, of rows r and r + 8.
 *
 * 16 bits: m16n8k16. float32: each number is the sum of two of TF32, and of a product's four parts
 * the greatest three are taken. Tensor cores truncate when they add, so that what is summed over
 * many steps begins at 0 every few of them, and is added to the rest by ordinary additions. That is
 * right of finite numbers; a tile that has others is computed again, GUARDED.
 */
#ifndef FASTATTN_SM80_FWD_PRODUCTS_CUH
#define FASTATTN_SM80_FWD_PRODUCTS_CUH

#include "common/stream.cuh"
#include "sm80/fwd_args.cuh"
#include "sm80/ptx.cuh"

typedef real fragment[4];

/* Two matrices of 8 rows lie behind each other, and two beside: where the lane's row of an
 * ldmatrix_x4 begins in a tile of rows of ROW bytes; `beside` 1: its second 16 bytes. */
struct lane_address {
    uint32_t row, chunk;
};
DEVICE lane_address address_of(uint32_t tile, int row_bytes, int32_t row, int32_t beside) {
    return {tile + row * row_bytes, (uint32_t)((beside ^ row % 8) << 4)};
}
/* Its 32 bytes of number `i`. */
DEVICE uint32_t at_32(const lane_address &a, int i) {
    return a.row + i / 4 * 128 + (a.chunk ^ i % 4 * 32);
}
/* Rows 0 to 15 in the order of A's registers, and of those of B that is transposed; */
DEVICE lane_address address_of_a(uint32_t tile, int row_bytes) {
    const int32_t lane = threadIdx.x % 32;
    return address_of(tile, row_bytes, lane % 16, lane / 16);
}
/* in that of B's, of 8 rows and of the 8 behind. */
DEVICE lane_address address_of_b(uint32_t tile, int row_bytes) {
    const int32_t lane = threadIdx.x % 32;
    return address_of(tile, row_bytes, lane / 16 * 8 + lane % 8, lane / 8 % 2);
}

/* N registers of an operand, as the tensor cores take them. */
template <int N, bool SPLIT>
struct operand {
    uint32_t x[N];
};
template <int N>
struct operand<N, true> {
    uint32_t high[N], low[N];
};

template <bool GUARDED, int N>
DEVICE void set(operand<N, false> &a, int i, uint32_t bits) {
    a.x[i] = bits;
}
DEVICE bool is_finite(uint32_t bits) { return (bits & 0x7fffffff) < 0x7f800000; }

/* The nearest number of TF32, and what is left. */
template <bool GUARDED, int N>
DEVICE void set(operand<N, true> &a, int i, uint32_t bits) {
    a.high[i] = (bits + 0x1000) & 0xffffe000;
    a.low[i] = __float_as_uint(__uint_as_float(bits) - __uint_as_float(a.high[i]));
    if (GUARDED && !is_finite(a.high[i])) a.high[i] = bits, a.low[i] = 0;
}

template <bool GUARDED>
DEVICE void multiply(float (&d)[4], const operand<4, false> &a, const operand<2, false> &b) {
    mma_m16n8k16<DTYPE>(d, a.x, b.x[0], b.x[1]);
}
/* GUARDED: what is not finite meets no lower part, whose product with it would be another. */
template <bool GUARDED>
DEVICE void multiply(float (&d)[4], const operand<4, true> &a, const operand<2, true> &b) {
    operand<4, true> x = a;
    operand<2, true> y = b;
    if (GUARDED) {
#pragma unroll
        for (int i = 0; i < 4; ++i) x.high[i] = is_finite(a.high[i]) ? a.high[i] : 0;
#pragma unroll
        for (int i = 0; i < 2; ++i) y.high[i] = is_finite(b.high[i]) ? b.high[i] : 0;
    }
    mma_m16n8k8_tf32(d, a.low, y.high[0], y.high[1]);
    mma_m16n8k8_tf32(d, x.high, b.low[0], b.low[1]);
    mma_m16n8k8_tf32(d, a.high, b.high[0], b.high[1]);
}

template <bool GUARDED, bool SPLIT>
DEVICE void load_operand(operand<4, SPLIT> &a, uint32_t at) {
    uint32_t x[4];
    ldmatrix_x4(x, at);
#pragma unroll
    for (int i = 0; i < 4; ++i) set<GUARDED>(a, i, x[i]);
}
template <bool GUARDED, bool SPLIT>
DEVICE void load_operands(operand<2, SPLIT> (&b)[2], uint32_t at, bool transposed) {
    uint32_t x[4];
    if (transposed)
        ldmatrix_x4_trans(x, at);
    else
        ldmatrix_x4(x, at);
#pragma unroll
    for (int i = 0; i < 4; ++i) set<GUARDED>(b[i / 2], i % 2, x[i]);
}

static constexpr int STEPS = PANEL_ROW / 32; /* of 32 bytes of a row of Q and K */
static constexpr int FRESH = IS_F32 ? 4 : 1; /* steps that are summed by themselves */
static constexpr int KEYS = IS_F32 ? 8 : 16; /* to a product with V */

/* P, as A. */
struct weights {
    operand<4, IS_F32> p[STRIPS][BLOCK_N / KEYS];
};

/* q: this warp's rows, from the panel's column on. */
template <bool GUARDED>
DEVICE void add_scores(fragment (&s)[STRIPS][SCORES], uint32_t q, uint32_t k) {
    const lane_address from = address_of_a(q, Q_ROW), keys = address_of_b(k, PANEL_ROW);
#pragma unroll
    for (int first = 0; first < STEPS; first += FRESH) {
        operand<4, IS_F32> a[STRIPS][FRESH];
#pragma unroll
        for (int m = 0; m < STRIPS; ++m)
#pragma unroll
            for (int i = 0; i < FRESH; ++i)
                load_operand<GUARDED>(a[m][i], at_32(from, first + i) + m * 16 * Q_ROW);
#pragma unroll
        for (int n = 0; n < SCORES; n += 2) {
            fragment sum[STRIPS][2] = {};
#pragma unroll
            for (int i = 0; i < FRESH; ++i) {
                operand<2, IS_F32> b[2];
                load_operands<GUARDED>(b, at_32(keys, first + i) + n * 8 * PANEL_ROW, false);
#pragma unroll
                for (int m = 0; m < STRIPS; ++m)
#pragma unroll
                    for (int j = 0; j < 2; ++j)
                        multiply<GUARDED>(IS_F32 ? sum[m][j] : s[m][n + j], a[m][i], b[j]);
            }
            if (IS_F32)
#pragma unroll
                for (int m = 0; m < STRIPS; ++m)
#pragma unroll
                    for (int j = 0; j < 8; ++j) s[m][n + j / 4][j % 4] += sum[m][j / 4][j % 4];
        }
    }
}

/* Of float32 the keys of a product are taken in the order 0, 2, 4, 6, 1, 3, 5, 7: so a lane
 * has its scores, and V's rows lie in different banks. */
DEVICE void make_weights(weights &w, const fragment (&s)[STRIPS][SCORES]) {
#pragma unroll
    for (int m = 0; m < STRIPS; ++m)
#pragma unroll
        for (int n = 0; n < BLOCK_N / KEYS; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if constexpr (IS_F32)
                    set<false>(w.p[m][n], i, __float_as_uint((float)s[m][n][i % 2 * 2 + i / 2]));
                else
                    set<false>(w.p[m][n], i,
                               cvt_pack<DTYPE>((float)s[m][2 * n + i / 2][i % 2 * 2],
                                               (float)s[m][2 * n + i / 2][i % 2 * 2 + 1]));
}

/* The panel has the fragments of this warp's columns from `first` on. */
template <bool GUARDED>
DEVICE void add_values(fragment (&o)[STRIPS][OWN / 8], int first, const weights &w,
                       const fragment (&)[STRIPS][SCORES], uint32_t v) {
    v += threadIdx.x / 32 % COLUMN_WARPS * OWN_PANEL * SIZE;
    if constexpr (IS_F32) {
        const int32_t r = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
        const uint32_t row = v + 2 * c * PANEL_ROW + r % 4 * 4, beside = r / 4;
#pragma unroll
        for (int n = 0; n < OWN_PANEL / 8; ++n) {
            fragment sum = {};
            const uint32_t even = row + n / 4 * 128 + ((beside ^ 2 * c ^ n % 4 * 2) << 4);
            const uint32_t odd =
                row + n / 4 * 128 + PANEL_ROW + ((beside ^ (2 * c + 1) ^ n % 4 * 2) << 4);
#pragma unroll
            for (int j = 0; j < SCORES; ++j) {
                operand<2, IS_F32> b;
                set<GUARDED>(b, 0, ld_shared(even + j * 8 * PANEL_ROW));
                set<GUARDED>(b, 1, ld_shared(odd + j * 8 * PANEL_ROW));
                multiply<GUARDED>(sum, w.p[0][j], b);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) o[0][first + n][i] += sum[i];
        }
    } else {
        const lane_address from = address_of_a(v, PANEL_ROW);
#pragma unroll
        for (int j = 0; j < BLOCK_N / KEYS; ++j)
#pragma unroll
            for (int n = 0; n < OWN_PANEL / 8; n += 2) {
                operand<2, IS_F32> b[2];
                load_operands<GUARDED>(b, at_32(from, n / 2) + j * 16 * PANEL_ROW, true);
#pragma unroll
                for (int m = 0; m < STRIPS; ++m)
#pragma unroll
                    for (int i = 0; i < 2; ++i)
                        multiply<GUARDED>(o[m][first + n + i], w.p[m][j], b[i]);
            }
    }
}

#endif
