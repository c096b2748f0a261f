/* args.cuh - what kernels of every operation find among their arguments. request.cuh fills it in.
 */
#ifndef FASTATTN_SM80_ARGS_CUH
#define FASTATTN_SM80_ARGS_CUH

#include <stdint.h>

#include "common/mask_bits.h"
#include "common/packed.h"
#include "common/schedule.h"
#include "sm80/variant.h"

struct array_args {
    char *data;
    int64_t stride[4]; /* bytes */
    int32_t columns;
    int32_t width; /* bytes that can be moved at once, 16, 8 or 4; 0: an element */
};

#if VARIANT_GENERAL
/* What changes scores. */
struct score_args {
    int32_t natural;     /* scores are multiplied by `scale` and changed before they are weighed */
    real cap, cap_scale; /* c, and scale / c; 0: no softcap */
    fa_dtype mask_dtype; /* of a float mask, */
    const char *mask;    /* or NULL */
    int64_t mask_stride[4]; /* bytes */
    int32_t mask_pairs;     /* two neighbours can be read at once */
    const float *slopes;    /* ALiBi's, or NULL */
    int64_t slope_stride[2];
    const uint4 *map; /* of a bool mask (mask_bits.h), or NULL; and */
    const uint32_t *columns, *words;
    fa_mask_bits bits;
    int32_t drops, first_b;
    uint32_t threshold;
    const int64_t *seed_data;
    int64_t seed;
};
#endif

struct request_args {
    array_args q, k, v;
    fa_masks masks;
    fa_varlen varlen;     /* of packed sequences, */
    int32_t m_blocks;     /* blocks of rows of a head (packed.h) */
    fa_schedule schedule; /* or of all others */
    int32_t b, hq, sq, sk;
    fa_divisor by_hq, by_group;
    int32_t negative; /* scores change their sign: the scale is below 0, and not natural */
    real scale;       /* of natural ones */
    real units;       /* what a score counts in the end, times log2(e) */
    real gain;        /* of dropout */
#if VARIANT_GENERAL
    score_args scores;
#endif
};

#endif
