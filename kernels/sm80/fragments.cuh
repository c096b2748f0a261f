/* fragments.cuh - where the fragments of a warp's products lie, in shared memory and in
 * registers: lane 4 r + c has of each 8 columns the 2c-th and the next, of rows r and r + 8.
 */
#ifndef FASTATTN_SM80_FRAGMENTS_CUH
#define FASTATTN_SM80_FRAGMENTS_CUH

#include <stdint.h>

#include "common/stream.cuh"
#include "sm80/variant.h"

typedef real fragment[4];
typedef fragment row_scores[STRIPS][SCORES]; /* of a warp's rows and a block of keys */
typedef fragment row_values[STRIPS][OWN / 8];

/* Two matrices of 8 rows lie behind each other, and two beside: where the lane's row of an
 * ldmatrix_x4 begins in a tile of rows of ROW bytes; `beside` 1: its second 16 bytes. */
struct lane_address {
    uint32_t row, chunk;
};
DEVICE lane_address address_of(uint32_t tile, int row_bytes, int32_t row, int32_t beside) {
    return {tile + row * row_bytes, (uint32_t)((beside ^ row % 8) << 4)};
}
/* Its 32 bytes of number `i`. */
DEVICE uint32_t at_32(const lane_address &a, int i) {
    return a.row + i / 4 * 128 + (a.chunk ^ i % 4 * 32);
}
/* Rows 0 to 15 in the order of A's registers, and of those of B that is transposed; */
DEVICE lane_address address_of_a(uint32_t tile, int row_bytes) {
    const int32_t lane = threadIdx.x % 32;
    return address_of(tile, row_bytes, lane % 16, lane / 16);
}
/* in that of B's, of 8 rows and of the 8 behind. */
DEVICE lane_address address_of_b(uint32_t tile, int row_bytes) {
    const int32_t lane = threadIdx.x % 32;
    return address_of(tile, row_bytes, lane / 16 * 8 + lane % 8, lane / 8 % 2);
}

#endif
