/* bwd_products.cuh - the backward's five products, each begun by a function; no waiting. */
#ifndef FASTATTN_SM90_BWD_PRODUCTS_CUH
#define FASTATTN_SM90_BWD_PRODUCTS_CUH

#include "sm90/bwd_smem.h"
#include "sm90/ptx.cuh"
#include "sm90/wgmma.cuh"

/* S^T or dP^T: this warpgroup's 64 keys by ROWS rows. */
template <int PANELS, int COLUMNS>
DEVICE void issue_transposed(float (&s)[ROWS / 2], uint8_t (&keys)[PANELS][PANEL_N],
                             uint8_t (&rows)[PANELS][PANEL_M], int32_t warpgroup) {
    const uint64_t a = wgmma_descriptor(smem_address(keys) + own_key(warpgroup) * 128, 1);
    const uint64_t b = wgmma_descriptor(smem_address(rows) + own_row(warpgroup) * 128, 1);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < COLUMNS / 16; ++i)
        wgmma_ss<ROWS>(s, a + i / 4 * (PANEL_N / 16) + i % 4 * 2,
                       b + i / 4 * (PANEL_M / 16) + i % 4 * 2, i > 0);
    wgmma_commit_group();
}

/* dV or dK: this warpgroup's P^T or dS^T times dO or Q. */
template <int PANELS, int COLUMNS>
DEVICE void issue_sum(float (&sum)[COLUMNS / 2], const uint32_t (&p)[ROWS / 16][4],
                      uint8_t (&rows)[PANELS][PANEL_M], bool fresh) {
    const uint64_t b = wgmma_descriptor(smem_address(rows), PANEL_M / 16);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < ROWS / 16; ++i) wgmma_rs<COLUMNS>(sum, p[i], b + i * 128, i > 0 || !fresh);
    wgmma_commit_group();
}

/* The same of P^T or dS^T in shared memory: where all have the same keys, this warpgroup's columns.
 */
template <int PANELS, int REGISTERS>
DEVICE void issue_shared_sum(float (&sum)[REGISTERS], uint8_t (&p)[BLOCK_M / 64][PANEL_N],
                             uint8_t (&rows)[PANELS][PANEL_M], int32_t warpgroup, bool fresh) {
    constexpr int COLUMNS = 2 * REGISTERS;
    const int32_t left = SHARED_OUT ? warpgroup * (COLUMNS / 64) : 0;
    const uint64_t a = wgmma_descriptor(smem_address(p) + own_key(warpgroup) * 128, 1);
    const uint64_t b = wgmma_descriptor(smem_address(rows) + left * PANEL_M, PANEL_M / 16);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < BLOCK_M / 16; ++i)
        wgmma_st<COLUMNS>(sum, a + i / 4 * (PANEL_N / 16) + i % 4 * 2, b + i * 128,
                          i > 0 || !fresh);
    wgmma_commit_group();
}

/* This warpgroup's share of dQ. */
DEVICE void issue_dq(float (&dq)[DQ_COLUMNS / 2], smem_keys &kv,
                     uint8_t (&ds)[BLOCK_M / 64][PANEL_N], int32_t warpgroup) {
    const uint64_t a = wgmma_descriptor(smem_address(ds[DQ_BY_ROWS ? warpgroup : 0]), 1);
    const uint64_t b = wgmma_descriptor(
        smem_address(kv.k) + (DQ_BY_ROWS ? 0 : warpgroup * (DQ_COLUMNS / 64) * PANEL_N),
        PANEL_N / 16);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < BLOCK_N / 16; ++i)
        wgmma_tt<DQ_COLUMNS>(dq, a + i * 128, b + i * 128, i > 0);
    wgmma_commit_group();
}

#if VARIANT_CLUSTER
/* This warpgroup's share of dQ, of one block's keys: its dS^T and, of K, this panel. */
DEVICE void issue_dq_of_keys(float (&dq)[DQ_COLUMNS / 2], uint8_t (&ds)[PANEL_N],
                             uint8_t (&k)[PANEL_N], bool fresh) {
    const uint64_t a = wgmma_descriptor(smem_address(ds), 1);
    const uint64_t b = wgmma_descriptor(smem_address(k), 1);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < BLOCK_N / 16; ++i)
        wgmma_tt<DQ_COLUMNS>(dq, a + i * 128, b + i * 128, i > 0 || !fresh);
    wgmma_commit_group();
}
#endif

#endif
