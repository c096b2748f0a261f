/* fwd_columns.h - what the columns of fwd.def say. Plain C: the host's choice and the kernel read
 * it.
 */
#ifndef FASTATTN_SM90_FWD_COLUMNS_H
#define FASTATTN_SM90_FWD_COLUMNS_H

#include "sm90/loads.h"

/* What a loop does about the tops of its rows (softmax.cuh), which a tile's first blocks give:
 * nothing; it looks at P, when it is there; or at the scores, before. To look at P costs next to
 * nothing, for MUFU takes eight clocks an exponential, but where it has overflowed, a float that
 * is, the scores are gone: fwd.cu does such tiles again. */
enum offset { KEEP, FOLLOW, WATCH };

typedef struct fa_variant {
    const char *name;
    fa_dtype dtype;        /* of q, k, v and out */
    int32_t d, dv;         /* the largest head sizes it takes; smaller ones are zero-padded */
    int32_t warpgroups;    /* of 64 query rows each, one tile */
    int32_t block_n;       /* keys per step of the loop */
    int32_t stages;        /* of K and V in shared memory */
    int32_t q_slots;       /* of 64 query rows each: Q of this tile and, as far as there is room, of
                            * the next */
    int32_t blocks_per_sm; /* that share an SM; those of more than one that WATCH are for short
                            * calls (DELAYED in fwd_variant.h) */
    int32_t mma_registers; /* of a thread of an MMA warpgroup; the producers get the pool's rest */
    enum offset offset;
    enum fa_loads loads;
    int32_t ones;    /* 1: the row sum is one more column of V, so that of the rounded P: no lse */
    int32_t staged;  /* 1: O leaves through shared memory, by the copy engine */
    int32_t general; /* 1: it changes scores: softcap, masks, ALiBi, dropout (fwd_scores.cuh) */
    int32_t paged;   /* 1: keys are a cache's, in pages; FA_STRIDED: row by row */
} fa_variant;

static inline int32_t fa_block_m(const fa_variant *v) { return 64 * v->warpgroups; }

#endif
