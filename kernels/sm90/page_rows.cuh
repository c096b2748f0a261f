/* page_rows.cuh - where a cache's keys lie, and how a warp copies rows of any strides: each lane 8
 * columns at a time, by `width` bytes.
 */
#ifndef FASTATTN_SM90_PAGE_ROWS_CUH
#define FASTATTN_SM90_PAGE_ROWS_CUH

#include "common/schedule.h"
#include "common/stream.cuh"
#include "sm90/ptx.cuh"

/* A key's place, a page or a sequence, and its row there. */
struct key_place {
    int32_t place, row;
};

/* `by_size`: keys in a page. */
DEVICE key_place find_key(const fa_pages &pages, fa_divisor by_size, int32_t b, int32_t key) {
    if (!pages.table) return {b, key};
    const int32_t column = fa_divide(key, by_size);
    const int32_t page = pages.table[b * pages.stride[0] + column * pages.stride[1]];
    return {fa_clamp(page, 0, pages.count - 1), key - column * pages.size};
}

DEVICE int64_t shuffle(int64_t x, int32_t lane) {
    const uint32_t low = __shfl_sync(~0u, (uint32_t)x, lane);
    const uint32_t high = __shfl_sync(~0u, (uint32_t)(x >> 32), lane);
    return (int64_t)((uint64_t)high << 32 | low);
}

/* Eight columns of a row, of which `columns` exist, by copies of BYTES. */
template <int BYTES>
DEVICE void copy_chunk(uint32_t to, const char *from, int32_t columns) {
#pragma unroll
    for (int i = 0; i < 16; i += BYTES) {
        const int32_t bytes = max(0, min(BYTES, 2 * columns - i));
        cp_async_or_zero<BYTES>(to + i, bytes ? from + i : from, bytes);
    }
}

DEVICE void copy_elements(uint32_t to, const char *from, int64_t step, int32_t columns) {
#pragma unroll 1
    for (int i = 0; i < 8; ++i)
        st_shared_b16(to + 2 * i, i < columns ? load_u16(from + i * step) : 0);
}

/* `width`: bytes that are copied at a time, 16, 8, 4; 2: element by element, which lie `step` bytes
 * apart. */
DEVICE void copy_columns(uint32_t to, const char *from, int32_t width, int64_t step,
                         int32_t columns) {
    if (width == 16)
        copy_chunk<16>(to, from, columns);
    else if (width == 8)
        copy_chunk<8>(to, from, columns);
    else if (width == 4)
        copy_chunk<4>(to, from, columns);
    else
        copy_elements(to, from, step, columns);
}

#endif
