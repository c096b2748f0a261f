/* backward.h - the gradients of attention: one fa_backward is one request.
 *
 * Of a loss L, a function of out and lse, with p the softmax, z what dropout multiplies it by and s
 * the final score:
 *
 *     dp = z (dout . v)        delta = dout . out - dlse        ds = p (dp - delta)
 *
 * dv is the sum of p z dout, dq and dk are the sums of ds times the score's slope, dmask is ds
 * itself, dsink minus the sum of exp(sink - lse) delta. What no row sees, and rows that see
 * nothing, have gradients of exactly 0.
 */
#ifndef FASTATTN_BACKWARD_H
#define FASTATTN_BACKWARD_H

#include "forward.h"

/* dq, dk, dv, dmask and dsink are written whole, never overlap another array, and are not wanted
 * where their data is NULL. What is not wanted is not computed. */
typedef struct fa_backward {
    /* The forward's request, with the out and the lse that it gave: all that the pass reads. */
    fa_params forward;
    fa_tensor dout; /* (b, hq, sq, dv) like out; data NULL: zeros */
    fa_tensor dlse; /* (b, hq, sq, 1) like lse; data NULL: zeros */
    fa_tensor dq;   /* like q */
    fa_tensor dk;   /* like k */
    fa_tensor dv;   /* like v */
    /* Like the mask, which adds to the scores; an axis of 1 is summed over what it broadcasts to.
     */
    fa_tensor dmask;
    float *dsink; /* (hq,) on the device */
    int64_t dsink_stride;
    int32_t deterministic; /* 1: the same bits in every run */
} fa_backward;

FA_OPERATION(backward, fa_backward);

#endif
