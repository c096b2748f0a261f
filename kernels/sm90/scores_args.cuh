/* scores_args.cuh - what changes scores, as kernels find it among their arguments.
 *
 * scores_launch.cuh fills it in, of general variants.
 */
#ifndef FASTATTN_SM90_SCORES_ARGS_CUH
#define FASTATTN_SM90_SCORES_ARGS_CUH

#include <cuda.h> /* types only */
#include <stdint.h>

#include "common/mask_bits.h"

enum mask_kind { NO_MASK, BITS, ADD_BF16, ADD_F16, ADD_F32 };

/* What a loop is compiled for: one change alone, or whatever the arguments say. */
enum changes { ANY, CAPS, WORDS, TILES, ALIBI, DROPS };

struct score_args {
    enum changes only; /* the one change that there is; ANY: several, or one without a loop */
    float unit;        /* what a score counts before masks and ALiBi: `scale`, or softcap's c */
    float scale;       /* what it counts in the end, times log2(e) */
    int32_t caps;
    int32_t cap_wide;  /* c is so large that 2e-7 of it is too much */
    float cap_scale;   /* scale / c */
    uint32_t cap_near; /* bits of a float: scores up to here take a polynomial in their squares, */
    float cap_series[3], cap_exponents[3]; /* constant first; times `scale` */
    CUtensorMap mask_map;
    int32_t mask;          /* enum mask_kind */
    int32_t tiles;         /* a float mask comes by the copy engine: so many tiles a block; or 0 */
    int32_t tile_rows;     /* 0: its rows are all the same one */
    int32_t mask_moves[2]; /* as kernel_args' moves */
    int32_t b_first;       /* tiles of one head and all batches are neighbours: they share a mask */
    const char *mask_data;
    int64_t mask_stride[4]; /* bytes */
    fa_mask_bits bits;      /* a bool mask, packed: */
    const uint4 *map, *columns;
    const uint32_t *words;
    const float *slopes;
    int64_t slope_stride[2];
    int32_t drops, first_b;
    uint32_t threshold;
    float gain;
    const int64_t *seed_data;
    int64_t seed;
};

#endif
