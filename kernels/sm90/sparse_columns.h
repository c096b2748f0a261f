/* sparse_columns.h - what the columns of sparse.def and sparse_bwd.def say. Plain C: the host's
 * choice and the kernels read it.
 */
#ifndef FASTATTN_SM90_SPARSE_COLUMNS_H
#define FASTATTN_SM90_SPARSE_COLUMNS_H

#include "dtype.h"

typedef struct fa_sparse_variant {
    const char *name;
    fa_dtype dtype;        /* of q, k, v and out */
    int32_t d;             /* the largest head size that it takes; smaller ones are zero-padded */
    int32_t rows;          /* of a tile: 16, of which each warp has all, 64 or 128 */
    int32_t block_n;       /* keys per step of the loop */
    int32_t stages;        /* of K and V in shared memory */
    int32_t blocks_per_sm; /* that share an SM */
} fa_sparse_variant;

#endif
