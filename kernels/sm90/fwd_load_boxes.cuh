/* fwd_load_boxes.cuh - rows of Q, K and V by the copy engine, in boxes of its tensor maps.
 */
#ifndef FASTATTN_SM90_FWD_LOAD_BOXES_CUH
#define FASTATTN_SM90_FWD_LOAD_BOXES_CUH

#include "sm90/fwd_args.cuh"
#include "sm90/loads.h"
#include "sm90/ptx.cuh"

/* ROWS rows of q, k or v (WHICH) as panels of 64 columns; the last may have fewer: what a box
 * brings that the array does not have is filled with zeros, slower than columns are loaded. */
template <int ROWS, int COLUMNS, int WHICH>
DEVICE void load(const kernel_args &a, uint32_t smem, const CUtensorMap &from, int32_t first,
                 int32_t h, int32_t b, const int32_t (&moves)[2], uint32_t barrier,
                 uint64_t policy) {
    const int32_t columns = a.columns[WHICH];
    mbarrier_arrive_expect_tx(barrier, ROWS * 2 * columns);
#pragma unroll
    for (int c = 0; c < COLUMNS; c += 64)
        if (c == 0 || c < columns)
            cp_async_bulk_tensor_load(smem + c * 2 * ROWS,
                                      c + 64 <= columns ? &from : &a.tails[WHICH],
                                      c + (SLICES ? h * moves[0] & -FA_SLICE : 0), first,
                                      SLICES ? 0 : h * moves[0], b * moves[1], barrier, policy);
}

#endif
