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

/* The panels' ring: what is loaded next, and where what was loaded is read. */
struct bwd_ring {
    bwd_cursor next;
    int32_t heads;  /* the head past the last */
    int32_t panels; /* BLOCK_PANELS */
    int32_t stage;
    uint32_t pair; /* the block's, PAIRED */
};

static constexpr int STAGE_BYTES = (PAIRED ? 2 : 1) * PANEL_BYTES,
                     RING = PAIRED ? STAGES / 2 : STAGES;

template <bool BY_KEYS>
DEVICE void load_next(const bwd_args &a, const tile &t, bwd_ring &r, uint32_t to) {
    if (r.next.h < r.heads) {
        load_panel<BY_KEYS>(a, t, r.next, to);
        if (PAIRED) load_panel<BY_KEYS>(a, t, {r.next.h, r.next.block, 1}, to + PANEL_BYTES);
        advance(t, r.next, r.panels);
    }
    cp_async_commit_group(); /* an empty one at the end: groups are counted */
}

/* A ring of the blocks of `t`, of heads first .. end - 1, whose first loads are under way. */
template <bool BY_KEYS>
DEVICE bwd_ring start_ring(const bwd_args &a, const tile &t, int32_t first, int32_t end,
                           int32_t block_panels, uint32_t panels) {
    bwd_ring r = {{first, t.begin, 0}, end, block_panels, 0, 0};
    for (int i = 0; i < RING - 1; ++i) load_next<BY_KEYS>(a, t, r, panels + i * STAGE_BYTES);
    return r;
}

/* As the forward's. */
template <bool BY_KEYS>
DEVICE uint32_t take_stage(const bwd_args &a, const tile &t, bwd_ring &r, uint32_t panels) {
    cp_async_wait_group<RING - 2>();
    __syncthreads();
    const int32_t stage = r.stage, last = stage == 0 ? RING - 1 : stage - 1;
    load_next<BY_KEYS>(a, t, r, panels + last * STAGE_BYTES);
    r.stage = stage == RING - 1 ? 0 : stage + 1;
    return panels + stage * STAGE_BYTES;
}

/* The next panel, of a block's product of this number: S, dP, and one or two gradients. */
template <bool BY_KEYS>
DEVICE uint32_t take_panel(const bwd_args &a, const tile &t, bwd_ring &r, uint32_t panels,
                           int product) {
    if (!PAIRED) return take_stage<BY_KEYS>(a, t, r, panels);
    if (product == 0) r.pair = take_stage<BY_KEYS>(a, t, r, panels);
    return r.pair + (product == 1 || (BY_KEYS && product == 2) ? PANEL_BYTES : 0);
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
        add_scores<GUARDED>(s, rows + i * PANEL_ROW, take_panel<BY_KEYS>(a, t, r, panels, 0));
#pragma unroll 1
    for (int i = 0; i < PANELS; ++i)
        add_scores<GUARDED>(dp, rows + Q_BYTES + i * PANEL_ROW,
                            take_panel<BY_KEYS>(a, t, r, panels, 1));
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
