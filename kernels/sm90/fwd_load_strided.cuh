/* fwd_load_strided.cuh - rows of K, V or Q that no copy engine takes, brought by the lanes of a
 * warp.
 */
#ifndef FASTATTN_SM90_FWD_LOAD_STRIDED_CUH
#define FASTATTN_SM90_FWD_LOAD_STRIDED_CUH

#include "sm90/fwd_args.cuh"
#include "sm90/fwd_smem.h"
#include "sm90/ptx.cuh"

DEVICE uint16_t *element_at(const fa_tensor &t, int32_t b, int32_t h, int32_t row, int32_t column) {
    return (uint16_t *)t.data + b * t.stride[0] + h * t.stride[1] + row * t.stride[2] +
           column * t.stride[3];
}

/* `units` of BYTES of a panel's rows, side by side, and 0 below the last of `rows`: neighbouring
 * lanes copy what lies side by side, as many rows at a time as a warp has lanes for. `stride`:
 * bytes. */
template <int ROWS, int BYTES>
DEVICE void copy_units(uint32_t smem, const char *from, int32_t stride, int32_t rows,
                       int32_t units) {
    constexpr int LANES = 128 / BYTES, STEP = 32 / LANES; /* to a row; rows at a time */
    const int32_t lane = threadIdx.x % 32, top = lane / LANES, byte = lane % LANES * BYTES;
    if (byte >= units * BYTES) return;
    from += (int64_t)top * stride + byte;
    uint32_t to = smem + top * 128 + ((byte / 16 ^ top) << 4) + byte % 16;
    int32_t row = 0;
#pragma unroll 1
    for (; row + 32 <= rows; row += 32, to += 32 * 128, from += 32 * (int64_t)stride)
#pragma unroll
        for (int i = 0; i < 32; i += STEP)
            cp_async<BYTES>((to ^ i % 8 << 4) + i * 128, from + (int64_t)i * stride);
#pragma unroll 1
    for (; row < ROWS; row += 8, to += 8 * 128)
#pragma unroll
        for (int i = 0; i < 8; i += STEP, from += STEP * (int64_t)stride) {
            if (row + i + top < rows)
                cp_async<BYTES>((to ^ i << 4) + i * 128, from);
            else
                for (int j = 0; j < BYTES; j += 4) st_shared((to ^ i << 4) + i * 128 + j, 0);
        }
}

/* `width` elements of a panel's rows from column `first`, an even one, on, and 0 below: where they
 * are few, or rows do not begin with a word. */
template <int ROWS>
DEVICE void load_elements(uint32_t smem, const char *from, int32_t stride, int32_t rows,
                          int32_t first, int32_t width) {
    /* Rows in flight at once. */
    constexpr int BATCH = PRODUCER_REGISTERS < 56 ? 4 : PRODUCER_REGISTERS < 80 ? 8 : 16;
    int32_t lanes = 32; /* to a row */
    while (lanes > 1 && lanes >= width) lanes /= 2;
    const int32_t pair = threadIdx.x % 32 % lanes, step = 32 / lanes, place = first / 2 + pair;
    if (2 * pair >= width) return;
    const bool both = 2 * pair + 1 < width;
    const int32_t pace = step * stride;
    int32_t row = threadIdx.x % 32 / lanes;
    from += (int64_t)row * stride + 4 * pair;
#pragma unroll 1
    for (; row < ROWS; row += BATCH * step, from += BATCH * (int64_t)pace) {
        uint32_t low[BATCH], high[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const uint16_t *two = (const uint16_t *)(from + (int64_t)i * pace);
            const bool there = row + i * step < rows;
            low[i] = there ? two[0] : 0;
            high[i] = there && both ? two[1] : 0;
        }
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const int32_t r = row + i * step;
            if (r < ROWS)
                st_shared(smem + r * 128 + ((place / 4 ^ r % 8) << 4) + place % 4 * 4,
                          low[i] | high[i] << 16);
        }
    }
}

/* By a warp, as the copy engine does it: to swizzled places, zeros below the last row. Columns past
 * the head size are 0 from the start. */
template <int ROWS, int COLUMNS, int>
DEVICE void load(const kernel_args &, uint32_t smem, const fa_tensor &from, int32_t first,
                 int32_t h, int32_t b, const int32_t (&)[2], uint32_t barrier, uint64_t) {
    const int32_t rows = min((int32_t)from.shape[2] - first, ROWS), d = from.shape[3];
    const char *source = (const char *)element_at(from, b, h, first, 0);
    const int64_t stride = 2 * from.stride[2];
    if (from.stride[3] == 1 && stride >> 26 == stride >> 63) { /* 32 rows are within 2^31 bytes */
        const uint32_t unit = (uint32_t)(uintptr_t)source | (uint32_t)stride;
#pragma unroll 1
        for (int c = 0; c < COLUMNS && c < d; c += 64, source += 128) {
            const int32_t width = min(d - c, 64);
            const uint32_t to = smem + c * 2 * ROWS;
            int32_t copied = 0;
            const bool few = width <= 8;
            if (unit % 16 == 0 && !few) {
                copied = width / 8 * 8;
                copy_units<ROWS, 16>(to, source, stride, rows, copied / 8);
            } else if (unit % 8 == 0 && !few) {
                copied = width / 4 * 4;
                copy_units<ROWS, 8>(to, source, stride, rows, copied / 4);
            } else if (unit % 4 == 0 && !few) {
                copied = width / 2 * 2;
                copy_units<ROWS, 4>(to, source, stride, rows, copied / 2);
            }
            if (copied < width)
                load_elements<ROWS>(to, source + 2 * copied, stride, rows, copied, width - copied);
        }
        cp_async_wait();
    } else {
#pragma unroll 4
        for (int i = threadIdx.x % 32; i < ROWS * panels<COLUMNS> * 8; i += 32) {
            int32_t row = i / 8 % ROWS, column = i / 8 / ROWS * 64 + i % 8 * 8;
            const uint16_t *chunk = element_at(from, b, h, first + row, column);
            int32_t there = row < rows ? d - column : 0;
            uint32_t x[8];
#pragma unroll
            for (int j = 0; j < 8; ++j) x[j] = j < there ? chunk[j * from.stride[3]] : 0;
            st_shared_v4(smem + i / 8 * 128 + ((i % 8 ^ row % 8) << 4), x[0] | x[1] << 16,
                         x[2] | x[3] << 16, x[4] | x[5] << 16, x[6] | x[7] << 16);
        }
    }
    fence_proxy_async();
    mbarrier_arrive(barrier);
}

#endif
