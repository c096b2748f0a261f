/* sparsek_attention.h - attention to the keys that SparseK keeps and to a window, and its
 * gradients: a fa_sparsek_attention, or a fa_sparsek_attention_backward, is one request.
 *
 * Row i, at position i' on the key axis, has the candidates 0 .. i' - window. tau and the gates
 * p_j = clip(u_j - tau, 0, 1) are sparsek.h's of their scores u; kept are the greatest, k of them
 * rounded up, or all whose gate is not 0. With g_j = p_j for them, and 1 for the keys from
 * i' - window + 1 to i', the rest is sparse.h's:
 *
 *     s_j = softcap(scale q_i . k_j, times g_j with key_gate)   lse = log(exp(sink) + sum exp(s_j))
 *     p_j = exp(s_j - lse)                                      o_i = sum of p_j g_j v_j
 *
 * As prefixes grow tau never falls, so the rows that keep a key are a run: from the first of which
 * it is a candidate up to its `end`. Of all lists nothing else is stored.
 *
 * du: with I the row's candidates of 0 < p < 1, by the bits of its tau, kept or not, and dg the
 * gradient of a gate, of kept keys alone and over the group's heads:
 *
 *     du_j = sum over the rows with j in I of (dg_j - mean of dg over I)
 */
#ifndef FASTATTN_SPARSEK_ATTENTION_H
#define FASTATTN_SPARSEK_ATTENTION_H

#include "backward.h"

typedef struct fa_sparsek_attention {
    fa_params forward;     /* causal; no window, mask, slopes, dropout or pages */
    fa_tensor scores;      /* (b, hk, sk, 1), of packed sequences (1, hk, total_k, 1) */
    fa_dtype scores_dtype; /* FA_F64 where dtype is, else FA_F32 or dtype */
    double k;              /* finite */
    int32_t kept;          /* keys of a row at most: k rounded up, 0 where that is negative */
    int32_t keep_all;      /* 1: all whose gate is not 0, however many */
    int32_t key_gate;      /* 1: the gate multiplies the key too */
    int32_t window;        /* 0 .. FA_MAX_SHIFT */
    /* Written whole, but by the backward pass, which reads them. */
    fa_tensor tau;  /* (b, hk, sq, 1), of packed (1, hk, total_q, 1); float32, or float64 */
    fa_tensor ends; /* like scores, int32: the row after the last that keeps a key; 0: none does */
} fa_sparsek_attention;

typedef struct fa_sparsek_attention_backward {
    fa_backward attention;          /* dmask is not wanted */
    fa_sparsek_attention selection; /* with tau and ends; its `forward` is attention's */
    fa_tensor dscores;              /* like scores, in their dtype; data NULL: not wanted */
} fa_sparsek_attention_backward;

/* Of the forward's masks: those of the candidates, and of the window, which is at least 1. */
FA_INLINE fa_masks fa_candidate_masks(const fa_masks *forward, int32_t window) {
    fa_masks m = *forward;
    m.right = -window;
    return m;
}

FA_INLINE fa_masks fa_window_masks(const fa_masks *forward, int32_t window) {
    fa_masks m = *forward;
    m.flags |= FA_HAS_LEFT;
    m.left = window - 1;
    return m;
}

FA_OPERATION(sparsek_attention, fa_sparsek_attention);
FA_OPERATION(sparsek_attention_backward, fa_sparsek_attention_backward);

#endif
