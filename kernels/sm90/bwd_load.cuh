/* bwd_load.cuh - a block of rows of Q, K, V or dO on its way to shared memory: by the copy engine,
 * or by the producer's threads.
 */
#ifndef FASTATTN_SM90_BWD_LOAD_CUH
#define FASTATTN_SM90_BWD_LOAD_CUH

#include <stddef.h>

#include "sm90/bwd_args.cuh"
#include "sm90/bwd_smem.h"
#include "sm90/ptx.cuh"
#if VARIANT_STRIDED
#include "sm90/bwd_load_strided.cuh"
#endif

/* BYTES / 128 rows from `row` on and, if any, a number of each. */
template <int PANELS, int BYTES>
DEVICE void bring(const array &from, const int32_t (&moves)[2], uint8_t (&to)[PANELS][BYTES],
                  int32_t row, int32_t h, int32_t b, const float *numbers, float *beside,
                  uint64_t &full, uint64_t policy) {
    const uint32_t barrier = smem_address(&full), bytes = numbers ? BYTES / 128 * 4 : 0;
#if VARIANT_STRIDED
    load(from, to, row, h, b);
    if (threadIdx.x != MMA_THREADS) {
        mbarrier_arrive(barrier);
        return;
    }
    mbarrier_arrive_expect_tx(barrier, bytes);
#else
    mbarrier_arrive_expect_tx(barrier, sizeof to + bytes);
#pragma unroll
    for (int i = 0; i < PANELS; ++i)
        cp_async_bulk_tensor_load(smem_address(to[i]), &from, 64 * i, row, h * moves[0],
                                  b * moves[1], barrier, policy);
#endif
    if (numbers) cp_async_bulk_load(smem_address(beside), numbers, bytes, barrier);
}

#endif
