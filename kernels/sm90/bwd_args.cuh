/* bwd_args.cuh - the arguments of the backward's three kernels. */
#ifndef FASTATTN_SM90_BWD_ARGS_CUH
#define FASTATTN_SM90_BWD_ARGS_CUH

#include <cuda.h> /* types only */
#include <stdint.h>

#include "common/packed.h"
#include "common/stream.cuh"
#include "forward.h"
#include "sm90/scores_args.cuh"
#include "sm90/variant.h"

#if VARIANT_STRIDED
typedef fa_tensor array; /* q, k, v and dout as they lie */
#else
typedef CUtensorMap array; /* {columns, rows, heads, batches} */
#endif

/* Rows of lse, delta and dq are counted in whole blocks: m_blocks * BLOCK_M of a query head, all of
 * packed sequences among them (fa_packed_block). */
struct bwd_args {
    array q, k, v, dout;
    int32_t moves[4][2]; /* of q, k, v, dout, heads and batches: 0 where the stride is, else 1 */
    fa_tensor dk, dv;
    fa_masks masks;
    fa_varlen varlen;
    int32_t b, sq, sk, hq, hk, group;
    int32_t m_blocks, n_blocks; /* of a query head's rows, of a key head's keys */
    int32_t tiles, heads;       /* heads: of keys, in all */
    int32_t section;            /* so many of them have their tiles side by side */
    int32_t *taken;             /* tiles, but for the first ones, */
    int32_t begun;              /* that blocks begin with */
    float scale, scale_log2;    /* of the scores; times log2(e) */
    const float *lse;           /* times log2(e); +inf: the row has no weights */
    const float *delta;         /* dout . out - dlse */
    float *dq;                  /* sums, a block of rows after another; NULL: not wanted */
    int32_t *turns;             /* bwd_turns.cuh; NULL: sums are added in any order */
#if VARIANT_GENERAL
    score_args scores;
#endif
};

/* Before it: lse, delta, zeros in dq and `taken`, and whose turn it is first. */
struct bwd_rows_args {
    fa_tensor out, dout, lse, dlse; /* dlse.data, dout.data NULL: zeros */
    fa_varlen varlen;
    int32_t b, hq, sq, dv, rows; /* rows: m_blocks * BLOCK_M */
    float *scaled_lse, *delta;
    float4 *dq;             /* NULL: not wanted */
    int32_t *taken, *turns; /* turns: or NULL */
    fa_masks masks;
    int32_t sk;
    int32_t wide; /* columns of out and dout lie side by side, rows on 16 bytes */
#if VARIANT_GENERAL
    fa_mask_bits bits;     /* of a bool mask, */
    const uint32_t *words; /* where rows that it hides have an lse all the same; or NULL */
#endif
};

/* Behind it: dq of the sums. */
struct bwd_dq_args {
    fa_tensor dq;
    const float *sums;
    fa_varlen varlen;
    int32_t b, hq, sq, m_blocks, wide; /* wide: as above, of dq */
    float scale;
};

/* Where block m of a head's rows in the workspace lies: its first row in the arrays, how many there
 * are from it on, all of one sequence, and which of which this is (of no packed ones 0). */
struct row_block {
    int32_t first, count, row, b;
};

DEVICE row_block find_rows(const fa_varlen &v, int32_t b, int32_t sq, int32_t size, int32_t m) {
    if (!v.cu_q) return row_block{m * size, sq - m * size, m * size, 0};
    const fa_packed_block found = fa_packed_find(v.cu_q, v.cu_q_stride, b, v.total_q, size, m);
    const int32_t first = found.first + found.row;
    return row_block{first, found.end - first, found.row, found.b};
}

#endif
