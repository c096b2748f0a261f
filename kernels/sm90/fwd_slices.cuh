/* fwd_slices.cuh - heads that begin anywhere in a row (FA_SLICES): the copy engine brings columns
 * of other heads with them, which are cleared. Of other variants the functions do nothing.
 */
#ifndef FASTATTN_SM90_FWD_SLICES_CUH
#define FASTATTN_SM90_FWD_SLICES_CUH

#include "common/compiler.cuh"
#include "sm90/fwd_args.cuh"
#include "sm90/fwd_pipeline.cuh"
#include "sm90/fwd_smem.h"
#include "sm90/loads.h"
#include "sm90/ptx.cuh"

/* Writes zeros over what a block's rows have before column `begin` and from `end` on, other heads'
 * columns: of Q and K, for 0 * NaN is NaN. (Of V they make columns of O that nobody stores.) It
 * reads nothing: another warpgroup may be writing the same zeros. */
template <int ROWS>
DEVICE void clear_columns(uint8_t *block, int32_t begin, int32_t end, int32_t columns,
                          int warpgroup) {
    const int32_t last = end / 8, chunks = columns / 8 - last; /* and the first */
    for (int i = thread_here() % 128; i < ROWS * (chunks + 1); i += 128) {
        const int32_t row = i % ROWS, n = i / ROWS, chunk = n < chunks ? last + n : 0;
        const uint32_t at =
            smem_address(block) + (chunk / 8 * ROWS + row) * 128 + ((chunk % 8 ^ row % 8) << 4);
        if (8 * chunk >= end) {
            st_shared_v4(at, 0, 0, 0, 0);
            continue;
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const int32_t column = 8 * chunk + j;
            if (column < begin || column >= end) st_shared_b16(at + 2 * j, 0);
        }
    }
    fence_proxy_async();
    sync_warpgroup(warpgroup);
}

/* A block of Q (WHICH 0) or K (1); the columns of both that are multiplied lie in Q's places. */
template <int ROWS, int WHICH>
DEVICE void clear_other_heads(const kernel_args &a, const work_tile &t, uint8_t *block,
                              int warpgroup) {
#if HAS_SLICES
    const int32_t begin = t.h * a.moves[0][0] % FA_SLICE;
    clear_columns<ROWS>(block, begin, begin + a.d, a.columns[WHICH], warpgroup);
#endif
}

#endif
