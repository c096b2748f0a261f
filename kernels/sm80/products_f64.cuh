/* products_f64.cuh - a warp's two products, of float64: by ordinary instructions, each lane its
 * own part of the same fragments as tensor cores have. */
#ifndef FASTATTN_SM80_PRODUCTS_F64_CUH
#define FASTATTN_SM80_PRODUCTS_F64_CUH

#include "sm80/fragments.cuh"
#include "sm80/ptx.cuh"

/* Two numbers of a row of a tile, from an even column on. */
DEVICE double2 two_of(uint32_t tile, int row_bytes, int32_t row, int32_t column) {
    return ld_shared_f64x2(tile + row * row_bytes + ((column / 2 ^ row % 8) << 4));
}

struct weights {};

template <bool GUARDED>
DEVICE void add_scores(row_scores &s, uint32_t q, uint32_t k) {
    const int32_t r = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll 4
    for (int column = 0; column < PANEL; column += 2) {
        const double2 q0 = two_of(q, Q_ROW, r, column), q1 = two_of(q, Q_ROW, r + 8, column);
#pragma unroll
        for (int n = 0; n < SCORES; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const double2 x = two_of(k, PANEL_ROW, 8 * n + 2 * c + e, column);
                s[0][n][e] = fma(q0.y, x.y, fma(q0.x, x.x, s[0][n][e]));
                s[0][n][2 + e] = fma(q1.y, x.y, fma(q1.x, x.x, s[0][n][2 + e]));
            }
    }
}

DEVICE void make_weights(weights &, const row_scores &) {}

template <bool GUARDED>
DEVICE void add_values(row_values &o, int first, const weights &, const row_scores &s, uint32_t v) {
    const int32_t lane = threadIdx.x % 32, c = lane % 4;
    const int32_t column = threadIdx.x / 32 % COLUMN_WARPS * OWN_PANEL;
#pragma unroll
    for (int j = 0; j < BLOCK_N; ++j) {
        const int32_t from = lane / 4 * 4 + j % 8 / 2;
        const double p0 = __shfl_sync(~0u, s[0][j / 8][j % 2], from);
        const double p1 = __shfl_sync(~0u, s[0][j / 8][2 + j % 2], from);
#pragma unroll
        for (int n = 0; n < OWN_PANEL / 8; ++n) {
            const double2 x = two_of(v, PANEL_ROW, j, column + 8 * n + 2 * c);
            o[0][first + n][0] = fma(p0, x.x, o[0][first + n][0]),
                         o[0][first + n][1] = fma(p0, x.y, o[0][first + n][1]);
            o[0][first + n][2] = fma(p1, x.x, o[0][first + n][2]),
                         o[0][first + n][3] = fma(p1, x.y, o[0][first + n][3]);
        }
    }
}

#endif
