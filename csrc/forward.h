/* forward.h - attention: one fa_params is one request.
 *
 * Letters: b batch, sq/sk query/key length, hq/hk query/key heads, d head size of q and k, dv of v.
 * Absent means a NULL pointer or a clear flag bit, never a magic value.
 */
#ifndef FASTATTN_FORWARD_H
#define FASTATTN_FORWARD_H

#include "mask_fields.h"

enum { FA_MAX_LENGTH = (1 << 30) - 1 }; /* sq, sk: any sum of two row numbers fits an int32 */

/* What is computed: softmax(scale * q k^T) v. Always valid. Of packed sequences (fa_varlen) the
 * shapes of q, k, v, out and lse are (1, h, total, ...) instead; b counts the sequences, and sq and
 * sk are the longest that they may be. */
typedef struct fa_what {
    fa_tensor q;    /* (b, hq, sq, d)  dtype */
    fa_tensor k;    /* (b, hk, sk, d)  dtype */
    fa_tensor v;    /* (b, hv, sk, dv) dtype */
    fa_tensor out;  /* (b, hq, sq, dv) dtype, written whole; never overlaps an input */
    fa_tensor lse;  /* (b, hq, sq, 1) natural logarithm, float32, or float64 where dtype is;
                     * data NULL: not wanted */
    fa_dtype dtype; /* of q, k, v and out: FA_F64, FA_F32, FA_F16 or FA_BF16 */
    /* b, hq, sq, sk, d and dv may be 0; hq is a multiple of hk and of hv, which mostly are equal
     * and never 0 (where hq is, k and v may have no heads). */
    int32_t b, hq, hk, hv, sq, sk, d, dv;
    double scale;            /* multiplies q.k; any finite value, 0 and negative included */
    int32_t batch_invariant; /* 1: the bits of a sequence do not depend on the others */
} fa_what;

/* What changes the scores. */
typedef struct fa_scores {
    double softcap;            /* c of c * tanh(s / c); 0 = off (by definition of the argument) */
    fa_dtype mask_dtype;       /* FA_BOOL (1 = attend), or FA_F32, FA_F16, FA_BF16, FA_F64: added */
    fa_tensor mask;            /* (b, hq, sq, sk), broadcast by stride 0; data NULL: none */
    const float *alibi_slopes; /* (b, hq) on the device, or NULL */
    int64_t alibi_stride[2];   /* elements, for b and hq; 0 for b where the slopes are (hq,) */
    const float *sink;         /* (hq,) on the device, an extra logit per head, or NULL */
    int64_t sink_stride;       /* elements */
} fa_scores;

/* Sequences packed end to end along one axis: sequence n of q is the rows cu_q[n] .. cu_q[n + 1]
 * - 1. fa_find_sequence() and fa_find_cached() in mask.h read them, and clamp. fa_masks' lengths,
 * the mask and every other position count within a sequence. */
typedef struct fa_varlen {
    /* (b + 1,) on the device; both NULL: not packed; cu_k NULL: queries alone are, and k and v have
     * a batch or pages */
    const int32_t *cu_q, *cu_k;
    int64_t cu_q_stride, cu_k_stride; /* elements */
    int32_t total_q, total_k;         /* rows of q and of k */
} fa_varlen;

/* Keys and values that lie in pages: k and v are (count, h, size, d), and key j of sequence b is
 * row j % size of the page that column j / size of the table names. A cache with one place for each
 * sequence is a table of one column. fa_find_page() in mask.h reads it, and clamps. */
typedef struct fa_pages {
    const int32_t *table; /* (b, columns) on the device, columns * size >= sk; NULL: no pages */
    int64_t stride[2];    /* elements */
    int32_t size, count;  /* keys in a page, >= 1; pages, 0 only where b or sk is */
} fa_pages;

/* Elements of P are dropped after the row's sum; fa_dropout_bits() in philox.h says which. */
typedef struct fa_dropout {
    double p;    /* 0 .. 1; 0 = off (by definition of the argument) */
    double gain; /* of what is kept: 1 / (1 - p); 0 where nothing is */
    /* Kept are 16 bits >= it: p * 65,536, rounded; all of it: nothing is kept. */
    uint32_t threshold;
    int32_t first_b;          /* number of the request's first sequence, from which b counts */
    const int64_t *seed_data; /* one number on the device, or NULL: `seed` */
    int64_t seed;
} fa_dropout;

typedef struct fa_params {
    fa_what what;
    fa_masks masks;
    fa_scores scores;
    fa_varlen varlen;
    fa_pages pages; /* never with cu_k */
    fa_dropout dropout;
    fa_where where;
} fa_params;

FA_OPERATION(forward, fa_params);

#endif
