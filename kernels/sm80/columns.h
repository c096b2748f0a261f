/* columns.h - what the columns of fwd.def and bwd.def say. Plain C: the host's choice and the
 * kernel read it.
 */
#ifndef FASTATTN_SM80_COLUMNS_H
#define FASTATTN_SM80_COLUMNS_H

#include "dtype.h"

typedef struct fa_sm80_variant {
    const char *name;
    fa_dtype dtype;    /* of q, k, v and out */
    int32_t d;         /* the largest d and dv that it takes; smaller ones are zero-padded */
    int32_t row_warps; /* that share out the query rows of a tile, */
    int32_t warp_rows; /* so many each: 16 or 32 */
    int32_t
        column_warps; /* that share out the columns of O of the same rows; each has all scores */
    int32_t block_n;  /* keys per step of the loop */
    int32_t panel;    /* columns of K or V that come at once */
    int32_t stages;   /* of panels in shared memory */
    int32_t general;  /* 1: it changes scores: softcap, masks, ALiBi, dropout */
} fa_sm80_variant;

/* Rows of a tile. */
#define FA_SM80_BLOCK_M(row_warps, warp_rows) ((row_warps) * (warp_rows))

/* Bytes of shared memory: a tile's rows of so many arrays (Q; Q and dO; K and V), and the panels.
 */
#define FA_SM80_SMEM(arrays, block_m, d, block_n, panel, stages, size) \
    (((arrays) * (block_m) * (d) + (stages) * (block_n) * (panel)) * (size))

static inline int32_t fa_sm80_block_m(const fa_sm80_variant *v) {
    return FA_SM80_BLOCK_M(v->row_warps, v->warp_rows);
}
static inline int32_t fa_sm80_smem_bytes(const fa_sm80_variant *v, int32_t arrays) {
    return FA_SM80_SMEM(arrays, fa_sm80_block_m(v), v->d, v->block_n, v->panel, v->stages,
                        (int32_t)fa_dtype_size(v->dtype));
}

#endif
