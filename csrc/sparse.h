/* sparse.h - attention to the keys that lists name, and its gradients: a fa_sparse, or a
 * fa_sparse_backward, is one request.
 *
 * For row i of a block of queries, g_j the gate of the entry that names key j, 1 in the window:
 *
 *     s_j = softcap(scale q_i . k_j, times g_j with key_gate)     lse = log(exp(sink) + sum
 * exp(s_j)) p_j = exp(s_j - lse)                                        o_i = sum of p_j g_j v_j
 *
 *     ds_j = p_j (g_j dout . v_j - dout . out + dlse)             dv_j = sum of p_j g_j dout
 *     dg   = sum of p_j dout . v_j, with key_gate and ds_j's slope times scale q_i . k_j
 *
 * The rest is attention's. A gate of 0 hides nothing: its key stays in the sum.
 */
#ifndef FASTATTN_SPARSE_H
#define FASTATTN_SPARSE_H

#include "backward.h"

/* Which keys a block of queries has, beside what attention's masks leave of them. */
typedef struct fa_lists {
    /* (b, hk, q blocks, L) int32, stride 0 where it is broadcast; numbers of key blocks, of which
     * one outside the sequence's is nothing. Of packed sequences (1, hk, q blocks, L): sequence n's
     * first block comes after those of the sequences before it, rounded up each. */
    fa_tensor entries;
    fa_tensor
        counts;      /* (b, hk, q blocks, 1) int32, the entries that count, clamped; data NULL: L */
    fa_tensor gate;  /* like entries, float32, or float64 where dtype is; data NULL: 1 */
    int32_t q_block; /* rows: 1, 64 or 128 */
    int32_t k_block; /* keys, from the sequence's key 0 on: 1, 16, 32, 64 or 128 */
    int32_t key_gate; /* 1: the gate multiplies the key too */
    int32_t has_window;
    fa_masks window; /* has_window: these keys are seen, too, listed or not, with a gate of 1; of
                      * attention's masks but its window */
} fa_lists;

typedef struct fa_sparse {
    fa_params forward; /* no mask, no slopes, no dropout, no pages */
    fa_lists lists;
    fa_tensor mass; /* float32, of the entries' own shape: the sum of p over an entry's keys and
                     * rows and the group's heads; data NULL: not wanted */
} fa_sparse;

typedef struct fa_sparse_backward {
    fa_backward attention; /* dmask is not wanted */
    fa_lists lists;
    fa_tensor dgate; /* of the gate's own shape, in its dtype; data NULL: not wanted */
} fa_sparse_backward;

/* Of the gate and its gradient. */
FA_INLINE fa_dtype fa_gate_dtype(fa_dtype dtype) { return dtype == FA_F64 ? FA_F64 : FA_F32; }

/* Blocks of queries of so many rows. */
FA_INLINE int32_t fa_q_blocks(const fa_lists *l, int32_t rows) {
    return rows / l->q_block + (rows % l->q_block > 0);
}

FA_OPERATION(sparse, fa_sparse);
FA_OPERATION(sparse_backward, fa_sparse_backward);

#endif
