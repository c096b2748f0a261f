/* sparse_bwd_smem.h - the shared memory of a block that computes gradients over lists of keys. C++
 * without CUDA. */
#ifndef FASTATTN_SM90_SPARSE_BWD_SMEM_H
#define FASTATTN_SM90_SPARSE_BWD_SMEM_H

#include "sm90/sparse_variant.h"

struct sparse_bwd_smem {
    union {
        struct {
            uint8_t k[STAGES][KEY_BYTES], v[STAGES][KEY_BYTES], q[ROW_BYTES], dout[ROW_BYTES];
        };
        float sums[O_BYTES / 4]; /* at the end: KEY_WARPS x ROWS rows of dQ */
    };
    uint8_t p[Q_PANEL], ds[Q_PANEL]; /* ROWS x BLOCK_N, 16 bits */
    listed_entries kept;
    step_columns columns[STAGES];
    float gates[ROW_WARPS][BLOCK_N]; /* what a step's keys give their gates */
};
static_assert(BLOCK_N <= 64, "P is one panel");
static constexpr int SMEM_BYTES = sizeof(sparse_bwd_smem);

#endif
