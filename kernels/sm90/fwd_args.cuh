/* fwd_args.cuh - the arguments of the forward kernel.
 *
 * fwd_launch.cuh fills them in; the kernel finds them in the constant bank.
 */
#ifndef FASTATTN_SM90_FWD_ARGS_CUH
#define FASTATTN_SM90_FWD_ARGS_CUH

#include <cuda.h> /* types only */
#include <stdint.h>

#include "common/packed.h"
#include "common/schedule.h"
#include "sm90/fwd_variant.h"
#include "sm90/scores_args.cuh"

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
#if IS_PAGED
    fa_pages pages; /* table NULL: a place for each sequence */
    fa_divisor by_size;
#if IS_STRIDED
    int32_t widths[2]; /* of k, v: copy_columns() */
#else
    int32_t box_rows; /* of K and V */
#endif
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
