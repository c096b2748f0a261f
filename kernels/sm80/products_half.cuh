/* products_half.cuh - a warp's two products, of 16 bits: S += Q K^T of a panel of K, O += P V
 * of a panel of V. */
#ifndef FASTATTN_SM80_PRODUCTS_HALF_CUH
#define FASTATTN_SM80_PRODUCTS_HALF_CUH

#include "sm80/fragments.cuh"
#include "sm80/ptx.cuh"

/* P, as A. */
struct weights {
    uint32_t p[STRIPS][BLOCK_N / 16][4];
};

/* q: this warp's rows, from the panel's column on. */
template <bool GUARDED>
DEVICE void add_scores(row_scores &s, uint32_t q, uint32_t k) {
    const lane_address from = address_of_a(q, Q_ROW), keys = address_of_b(k, PANEL_ROW);
#pragma unroll
    for (int i = 0; i < PANEL / 16; ++i) {
        uint32_t a[STRIPS][4];
#pragma unroll
        for (int m = 0; m < STRIPS; ++m) ldmatrix_x4(a[m], at_32(from, i) + m * 16 * Q_ROW);
#pragma unroll
        for (int n = 0; n < SCORES; n += 2) {
            uint32_t b[4];
            ldmatrix_x4(b, at_32(keys, i) + n * 8 * PANEL_ROW);
#pragma unroll
            for (int m = 0; m < STRIPS; ++m) {
                mma_m16n8k16<DTYPE>(s[m][n], a[m], b[0], b[1]);
                mma_m16n8k16<DTYPE>(s[m][n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

DEVICE void make_weights(weights &w, const row_scores &s) {
#pragma unroll
    for (int m = 0; m < STRIPS; ++m)
#pragma unroll
        for (int n = 0; n < SCORES; ++n) {
            w.p[m][n / 2][n % 2 * 2] = cvt_pack<DTYPE>(s[m][n][0], s[m][n][1]);
            w.p[m][n / 2][n % 2 * 2 + 1] = cvt_pack<DTYPE>(s[m][n][2], s[m][n][3]);
        }
}

/* The panel has the fragments of this warp's columns from `first` on. */
template <bool GUARDED>
DEVICE void add_values(row_values &o, int first, const weights &w, const row_scores &, uint32_t v) {
    v += threadIdx.x / 32 % COLUMN_WARPS * OWN_PANEL * SIZE;
    const lane_address from = address_of_a(v, PANEL_ROW);
#pragma unroll
    for (int j = 0; j < BLOCK_N / 16; ++j)
#pragma unroll
        for (int n = 0; n < OWN_PANEL / 8; n += 2) {
            uint32_t b[4];
            ldmatrix_x4_trans(b, at_32(from, n / 2) + j * 16 * PANEL_ROW);
#pragma unroll
            for (int m = 0; m < STRIPS; ++m) {
                mma_m16n8k16<DTYPE>(o[m][first + n], w.p[m][j], b[0], b[1]);
                mma_m16n8k16<DTYPE>(o[m][first + n + 1], w.p[m][j], b[2], b[3]);
            }
        }
}

#endif
