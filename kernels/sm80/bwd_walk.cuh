/* bwd_walk.cuh - what the backward's kernels have in common: the ring of panels, and the products S
 * and dP of a tile's rows with a block of what passes by.
 */
#ifndef FASTATTN_SM80_BWD_WALK_CUH
#define FASTATTN_SM80_BWD_WALK_CUH

#include "common/stream.cuh"
#include "sm80/bwd_tile.cuh"
#if IS_F64
#include "sm80/products_f64.cuh"
#elif IS_F32
#include "sm80/products_f32.cuh"
#else
#include "sm80/products_half.cuh"
#endif

struct bwd_ring {
    bwd_cursor next;
    int32_t stage, heads; /* the head past the last */
    int32_t panels;       /* of a block */
};

template <bool BY_KEYS>
DEVICE void load_next(const bwd_args &a, const tile &t, bwd_ring &r, uint32_t to) {
    if (r.next.h < r.heads) {
        load_panel<BY_KEYS>(a, t, r.next, to);
        advance(t, r.next, r.panels);
    }
    cp_async_commit_group();
}

/* As the forward's. */
template <bool BY_KEYS>
DEVICE uint32_t take_panel(const bwd_args &a, const tile &t, bwd_ring &r, uint32_t panels) {
    cp_async_wait_group<STAGES - 2>();
    __syncthreads();
    const int32_t stage = r.stage;
    load_next<BY_KEYS>(a, t, r, panels + (stage ^ 1) * PANEL_BYTES);
    r.stage = stage ^ 1;
    return panels + stage * PANEL_BYTES;
}

/* Q and dO of a tile of query rows. */
DEVICE void load_query_rows(const bwd_args &a, const tile &t, uint32_t smem) {
    const fa_interval queries = {0, t.lengths.sq};
    load_tile_rows(a, t, smem, a.q, t.h, t.q, queries);
    load_tile_rows(a, t, smem + Q_BYTES, a.dout, t.h, t.q, queries);
}

template <bool BY_KEYS, bool GUARDED>
DEVICE void multiply_rows(const bwd_args &a, const tile &t, bwd_ring &r, row_scores &s,
                          row_scores &dp, uint32_t smem) {
    const uint32_t panels = smem + 2 * Q_BYTES;
    const uint32_t rows = smem + threadIdx.x / 32 / COLUMN_WARPS * WARP_ROWS * Q_ROW;
#pragma unroll 1
    for (int i = 0; i < PANELS; ++i)
        add_scores<GUARDED>(s, rows + i * PANEL_ROW, take_panel<BY_KEYS>(a, t, r, panels));
#pragma unroll 1
    for (int i = 0; i < PANELS; ++i)
        add_scores<GUARDED>(dp, rows + Q_BYTES + i * PANEL_ROW,
                            take_panel<BY_KEYS>(a, t, r, panels));
}

#if IS_F32
template <int N>
DEVICE bool all_finite(const fragment (&x)[STRIPS][N]) {
    real probe = 0;
#pragma unroll
    for (int m = 0; m < STRIPS; ++m)
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) probe = fma(x[m][n][i], (real)0, probe);
    return probe == 0;
}
#endif

#endif
