/* quads.cuh - what the four lanes that share a row of a fragment exchange. */
#ifndef FASTATTN_QUADS_CUH
#define FASTATTN_QUADS_CUH

#include <stdint.h>

#include "common/stream.cuh"

/* Four registers of four lanes are transposed: lane i of a quad has the i-th register of each. */
DEVICE void transpose_quad(uint32_t (&x)[4]) {
    bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        uint32_t got = __shfl_xor_sync(~0u, odd ? x[i] : x[i + 1], 1);
        x[i] = odd ? got : x[i];
        x[i + 1] = odd ? x[i + 1] : got;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        uint32_t got = __shfl_xor_sync(~0u, high ? x[i] : x[i + 2], 2);
        x[i] = high ? got : x[i];
        x[i + 2] = high ? x[i + 2] : got;
    }
}

#endif
