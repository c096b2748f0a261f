/* decode_columns.h - what the columns of decode.def say. Plain C: the host's choice and the kernel
 * read it.
 */
#ifndef FASTATTN_SM90_DECODE_COLUMNS_H
#define FASTATTN_SM90_DECODE_COLUMNS_H

#include "dtype.h"

typedef struct fa_decode_variant {
    const char *name;
    fa_dtype dtype;        /* of q, k, v and out */
    int32_t d, dv;         /* the largest head sizes it takes; smaller ones are zero-padded */
    int32_t rows;          /* of a tile, 16 for each warp that has rows of its own */
    int32_t block_n;       /* keys per step of the loop */
    int32_t stages;        /* of K and V in shared memory */
    int32_t blocks_per_sm; /* that share an SM */
    int32_t strided;       /* 1: warps bring K and V row by row, not the copy engine */
} fa_decode_variant;

#endif
