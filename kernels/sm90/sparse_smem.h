/* sparse_smem.h - the shared memory of a block over lists of keys. C++ without CUDA. */
#ifndef FASTATTN_SM90_SPARSE_SMEM_H
#define FASTATTN_SM90_SPARSE_SMEM_H

#include "sm90/sparse_variant.h"

struct sparse_smem {
    union {
        struct {
            uint8_t k[STAGES][KEY_BYTES], v[STAGES][KEY_BYTES], q[ROW_BYTES];
        };
        float o[O_BYTES / 4]; /* at the end: KEY_WARPS x ROWS rows */
    };
    float top[KEY_WARPS][ROWS], sum[KEY_WARPS][ROWS]; /* of each warp's keys, at the end */
    listed_entries kept;
    step_columns columns[STAGES];
};
static constexpr int SMEM_BYTES = sizeof(sparse_smem);

#endif
