/* bwd_store.cuh - gradients to memory: two neighbouring columns of a row at a time, of any strides.
 */
#ifndef FASTATTN_SM90_BWD_STORE_CUH
#define FASTATTN_SM90_BWD_STORE_CUH

#include "common/stream.cuh"
#include "forward.h"
#include "sm90/ptx.cuh"
#include "sm90/wgmma.cuh"

/* Whether all its pairs of columns are words. */
DEVICE bool has_words(const fa_tensor &t) {
    const int64_t odd =
        (int64_t)((uintptr_t)t.data / 2) | t.stride[0] | t.stride[1] | t.stride[2] | t.shape[3];
    return t.stride[3] == 1 && odd % 2 == 0;
}

/* Whether all its eights of columns lie side by side, on 16 bytes. */
DEVICE bool has_eights(const fa_tensor &t) {
    const int64_t odd =
        (int64_t)((uintptr_t)t.data / 2) | t.stride[0] | t.stride[1] | t.stride[2] | t.shape[3];
    return t.stride[3] == 1 && odd % 8 == 0;
}

/* x and y to `column`, an even one, and the next; `row` is column 0. What is past the last column
 * is left out. */
DEVICE void store_pair(const fa_tensor &to, uint16_t *row, int32_t column, float x, float y,
                       bool words) {
    const uint32_t both = cvt_pack(x, y);
    if (column >= to.shape[3]) return;
    if (words) {
        *(uint32_t *)(row + column) = both;
        return;
    }
    row[column * to.stride[3]] = (uint16_t)both;
    if (column + 1 < to.shape[3]) row[(column + 1) * to.stride[3]] = (uint16_t)(both >> 16);
}

#endif
