/* fwd_products.cuh - the two matrix products of a block of keys, and what a warpgroup keeps of
 * them.
 */
#ifndef FASTATTN_SM90_FWD_PRODUCTS_CUH
#define FASTATTN_SM90_FWD_PRODUCTS_CUH

#include <stddef.h>

#include "common/compiler.cuh"
#include "sm90/fwd_args.cuh"
#include "sm90/fwd_compiler.cuh"
#include "sm90/fwd_pipeline.cuh"
#include "sm90/fwd_smem.h"
#include "sm90/ptx.cuh"
#include "sm90/softmax.cuh"
#include "sm90/wgmma.cuh"

DEVICE uint64_t q_descriptor(const kernel_args &a, smem_layout &smem, int slot) {
    return operand(a, smem, offsetof(smem_layout, q), 1, slot * (Q_BYTES / 16));
}
DEVICE uint64_t k_descriptor(const kernel_args &a, smem_layout &smem, int stage) {
    return operand(a, smem, offsetof(smem_layout, k), 1, stage * (K_BYTES / 16));
}
DEVICE uint64_t v_descriptor(const kernel_args &a, smem_layout &smem, int stage) {
    constexpr uint32_t V = offsetof(smem_layout, v), STEP = V_BYTES / 16;
    if (!ONES) return operand(a, smem, V, PANEL_N / 16, stage * STEP);
    /* The next panel is the block of ones, nearer by a stage. */
    return operand(a, smem, V, (offsetof(smem_layout, ones) - V) / 16,
                   stage * (STEP - (STEP << 16)));
}

/* What a warpgroup keeps over the key blocks of a tile, and into the first block of the next. */
struct rows_state {
    float o[(DV + 8 * ONES) / 2];
    uint32_t p[P_PIECES][4];
    softmax_rows softmax;
    cursor v;   /* the stage of V that P V reads, or will */
    bool held;  /* it has not been handed back */
    bool open;  /* these rows are a tile's, while a block begins its last one; else l is 0 */
    bool fresh; /* O holds nothing: the first P V writes it */
};

/* All of this warpgroup's P V have ended: hands back the V that the last ones read. `held`: what
 * st.held is, where the compiler cannot know. */
DEVICE void settle(rows_state &st, smem_layout &smem, bool held) {
    wgmma_accumulators(st.o);
    if (held) release(smem_address(&smem.v_empty[st.v.stage]));
    st.held = false;
}

/* S = Q K^T. */
DEVICE void issue_qk(float (&s)[BLOCK_N / 2], uint64_t q, uint64_t k) {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < D / 16; ++i)
        wgmma_ss<BLOCK_N>(s, q + i / 4 * (PANEL_Q / 16) + i % 4 * 2,
                          k + i / 4 * (PANEL_N / 16) + i % 4 * 2, i > 0);
    wgmma_commit_group();
}

/* O += P V of the block whose P is in registers. `fresh`: it is its tile's first. */
DEVICE void issue_pv(const kernel_args &a, rows_state &st, smem_layout &smem, bool fresh) {
    const uint64_t v = v_descriptor(a, smem, st.v.stage);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < BLOCK_N / 16; ++i)
        wgmma_rs<DV + 8 * ONES>(st.o, st.p[i % P_PIECES], v + i * 128, i > 0 || !fresh);
    wgmma_commit_group();
    st.fresh = false;
}

/* P of 16 keys at a time, from scores on, and O += P V of each piece as soon as it is there. */
DEVICE void issue_pv_in_pieces(const kernel_args &a, rows_state &st, smem_layout &smem,
                               float (&s)[BLOCK_N / 2], float scale, float2 minus, int stage,
                               bool fresh) {
    const uint64_t v = v_descriptor(a, smem, stage);
#pragma unroll
    for (int i = 0; i < BLOCK_N / 16; ++i) {
        if (i >= P_PIECES) wgmma_wait_group<P_PIECES - 1>();
        float (&piece)[8] = *(float (*)[8])(s + 8 * i);
        softmax_exp<!ONES>(st.softmax, piece, scale, minus);
        softmax_pack(piece, st.p[i % P_PIECES]);
        wgmma_fence();
        wgmma_rs<DV + 8 * ONES>(st.o, st.p[i % P_PIECES], v + i * 128, i > 0 || !fresh);
        if (P_PIECES < BLOCK_N / 16 || i == BLOCK_N / 16 - 1) wgmma_commit_group();
    }
    st.fresh = false;
}

/* Ends P V of the last block. */
DEVICE void finish_pv(const kernel_args &a, rows_state &st, smem_layout &smem) {
    if (DELAYED && !st.held) return;
    if (DELAYED) {
        mbarrier_wait(smem_address(&smem.v_full[st.v.stage]), st.v.parity);
        issue_pv(a, st, smem, st.fresh);
    }
    wgmma_wait_group<0>();
    settle(st, smem, st.held);
}

#endif
