/* fwd_args.cuh - the arguments of the forward kernel.
 *
 * fwd_launch.cuh fills them in; the kernel finds them in the constant bank.
 */
#ifndef FASTATTN_SM90_FWD_ARGS_CUH
#define FASTATTN_SM90_FWD_ARGS_CUH

#include <cuda.h> /* types only */
#include <stdint.h>

#include "common/mask_bits.h"
#include "common/packed.h"
#include "common/schedule.h"
#include "sm90/fwd_variant.h"

enum mask_kind { NO_MASK, BITS, ADD_BF16, ADD_F16, ADD_F32 };

/* What a loop is compiled for: one change alone, or whatever the arguments say. */
enum changes { ANY, CAPS, WORDS, TILES, ALIBI, DROPS };

#if VARIANT_GENERAL
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

#if IS_STRIDED
typedef fa_tensor array;
#else
typedef CUtensorMap array; /* {columns, rows, heads, batches} */
#endif

struct kernel_args {
    array q, k, v, out_map;
#if !IS_STRIDED
    array tails[3];     /* of q, k, v: the last panel's columns, where they are fewer than 64 */
    int32_t columns[3]; /* that are loaded, in units of 16 bytes */
#endif
    fa_tensor out;
    fa_schedule schedule;
    fa_packed packed;
    fa_varlen varlen;
    fa_masks masks;
    int32_t sq, sk, hq;
    fa_divisor by_hq, by_group; /* query heads; those that share a key head */
    uint32_t descriptor_high;   /* of wgmma's operands */
    int32_t watch;              /* 1: keep and follow no offset anywhere */
    int32_t reads;              /* the arguments alone do not describe a tile */
    int32_t ahead;              /* tiles that a block may have claimed, at most TILE_SLOTS */
    int32_t moves[4][2]; /* q, k, v, out, heads and batches: 0 where the stride is; else 1, or of
                          * slices' heads the stride itself */
#if HAS_SLICES
    int32_t d; /* of Q and K: columns that are not cleared */
#endif
    float scale; /* times log2(e) */
    float slack; /* softmax_slack of it */
    float *lse;  /* (b, hq, sq), strides in elements; NULL: not wanted */
    int64_t lse_stride[3];
    const float *sink; /* (hq,), or NULL */
    int64_t sink_stride;
#if VARIANT_GENERAL
    int32_t b;
    score_args scores;
#endif
};

#endif
