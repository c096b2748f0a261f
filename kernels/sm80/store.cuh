/* store.cuh - how rows of a warp's fragments leave. */
#ifndef FASTATTN_SM80_STORE_CUH
#define FASTATTN_SM80_STORE_CUH

#include "common/element.cuh"
#include "common/quads.cuh"
#include "sm80/args.cuh"
#include "sm80/fragments.cuh"
#include "sm80/ptx.cuh"

/* Two neighbouring columns of a row. */
DEVICE void store_two(const array_args &x, char *row, int32_t column, real first, real second) {
    typedef element<DTYPE>::stored stored;
    if (column < x.columns) *(stored *)(row + column * x.stride[3]) = element<DTYPE>::narrow(first);
    if (column + 1 < x.columns)
        *(stored *)(row + (column + 1) * x.stride[3]) = element<DTYPE>::narrow(second);
}

/* This lane's columns of a row; where the array lets it, 16 bytes of 16-bit elements after an
 * exchange with its quad, and two of wider ones. */
DEVICE void store_row(const array_args &x, const row_values &o, char *row, bool exists, int i) {
    const int32_t lane = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < OWN / 8; ++n) {
        const real *pair = &o[i / 2][n][i % 2 * 2];
        const int32_t column = threadIdx.x / 32 % COLUMN_WARPS * OWN + 8 * n + 2 * lane;
        if (!x.width) {
            if (exists) store_two(x, row, column, pair[0], pair[1]);
            continue;
        }
        if constexpr (IS_HALF) {
            if (n % 4) continue;
            uint32_t packed[4];
#pragma unroll
            for (int j = 0; j < 4; ++j)
                packed[j] = cvt_pack<DTYPE>(o[i / 2][(n + j) % (OWN / 8)][i % 2 * 2],
                                            o[i / 2][(n + j) % (OWN / 8)][i % 2 * 2 + 1]);
            transpose_quad(packed);
            const int32_t first = column + 6 * lane;
            if (exists && first < x.columns)
                *(uint4 *)(row + 2 * first) =
                    make_uint4(packed[0], packed[1], packed[2], packed[3]);
        } else if (exists && column < x.columns) {
            *(pair_of<real> *)(row + column * SIZE) = pair_of<real>{{pair[0], pair[1]}};
        }
    }
}

#endif
