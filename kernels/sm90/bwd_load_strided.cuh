/* bwd_load_strided.cuh - rows of Q, K, V or dO that no copy engine takes, brought by the threads of
 * the producer's warpgroup.
 */
#ifndef FASTATTN_SM90_BWD_LOAD_STRIDED_CUH
#define FASTATTN_SM90_BWD_LOAD_STRIDED_CUH

#include "sm90/bwd_args.cuh"
#include "sm90/bwd_smem.h"
#include "sm90/ptx.cuh"

/* As the copy engine does it: to swizzled places, zeros past the last row and column. Eight columns
 * at a time, in one go where they lie so. An array without data is zeros. */
template <int PANELS, int BYTES>
DEVICE void load(const fa_tensor &from, uint8_t (&to)[PANELS][BYTES], int32_t first, int32_t h,
                 int32_t b) {
    const int32_t rows = from.data ? (int32_t)from.shape[2] - first : 0, d = (int32_t)from.shape[3];
    const uint16_t *source = (const uint16_t *)from.data + b * from.stride[0] + h * from.stride[1] +
                             first * from.stride[2];
    const bool whole = from.stride[3] == 1 &&
                       ((uint32_t)(uintptr_t)source | (uint32_t)from.stride[2] * 2) % 16 == 0;
#pragma unroll 2
    for (int32_t i = threadIdx.x % 128; i < PANELS * BYTES / 16; i += 128) {
        const int32_t row = i / (8 * PANELS), chunk = i % (8 * PANELS);
        const int32_t there = row < rows ? d - 8 * chunk : 0;
        const uint16_t *at = source + row * from.stride[2] + 8 * chunk * from.stride[3];
        uint4 x = make_uint4(0, 0, 0, 0);
        if (whole && there >= 8) {
            x = *(const uint4 *)at;
        } else if (there > 0) {
            uint32_t y[8];
#pragma unroll
            for (int j = 0; j < 8; ++j) y[j] = j < there ? at[j * from.stride[3]] : 0;
            x = make_uint4(y[0] | y[1] << 16, y[2] | y[3] << 16, y[4] | y[5] << 16,
                           y[6] | y[7] << 16);
        }
        st_shared_v4(smem_address(to[chunk / 8]) + row * 128 + ((chunk % 8 ^ row % 8) << 4), x.x,
                     x.y, x.z, x.w);
    }
    fence_proxy_async();
}

#endif
