/* fwd.cu - the portable forward kernel: stop 6 of 6.
 *
 * One object per line of fwd.def: setup.py passes its columns as VARIANT_<COLUMN> (variant.h),
 * and the object exports one function, fa_launch_<name> (fwd_launch.cuh).
 *
 * A block computes one tile, BLOCK_M query rows of one head. Each warp has some of the rows, and
 * keeps S, P and O in registers; where O of wide heads has no room there, several warps have the
 * same rows, all of the scores, and some columns of O each (variant.h). K and V pass by in
 * panels, BLOCK_N keys by PANEL columns, through a ring of stages in shared memory: one barrier a
 * panel says that it has come and that the one before has been read (take_panel()).
 */
#include "common/stream.cuh"
#include "sm80/fwd_args.cuh"
#include "sm80/fwd_launch.cuh"
#include "sm80/fwd_load.cuh"
#include "sm80/fwd_out.cuh"
#include "sm80/fwd_scores.cuh"
#include "sm80/fwd_softmax.cuh"
#include "sm80/tile.cuh"
#if IS_F64
#include "sm80/products_f64.cuh"
#elif IS_F32
#include "sm80/products_f32.cuh"
#else
#include "sm80/products_half.cuh"
#endif

/* The panels' ring: what is loaded next, and the stage that is read next. */
struct ring {
    cursor next;
    int32_t stage;
};

DEVICE void load_next(const kernel_args &a, const tile &t, ring &r, uint32_t to) {
    if (r.next.block.number >= t.begin) {
        load_panel(a, t, r.next, to);
        advance(a, t, r.next);
    }
    cp_async_commit_group(); /* an empty one at the end: groups are counted */
}

/* The next panel, once it has come; the one before has been read by all warps, and its stage is
 * filled again. */
DEVICE uint32_t take_panel(const kernel_args &a, const tile &t, ring &r, uint32_t panels) {
    cp_async_wait_group<STAGES - 2>();
    __syncthreads();
    const int32_t stage = r.stage, last = stage == 0 ? STAGES - 1 : stage - 1;
    load_next(a, t, r, panels + last * PANEL_BYTES);
    r.stage = stage == STAGES - 1 ? 0 : stage + 1;
    return panels + stage * PANEL_BYTES;
}

template <bool GUARDED>
DEVICE void attend(const kernel_args &a, const tile &t, rows_state &st, uint32_t q) {
    const uint32_t panels = q + Q_BYTES;
    const uint32_t rows = q + threadIdx.x / 32 / COLUMN_WARPS * WARP_ROWS * Q_ROW;
    static_assert(STAGES == 2, "at a block's start the ring's next panel is of this block");
    ring r = {{next_block(a, t, t.end), 0}, 0};
    load_q(a, t, q);
    load_next(a, t, r, panels);
#pragma unroll 1
    while (r.next.block.number >= t.begin) {
        const key_block block = r.next.block;
        row_scores s = {};
#pragma unroll 1
        for (int i = 0; i < PANELS; ++i)
            add_scores<GUARDED>(s, rows + i * PANEL_ROW, take_panel(a, t, r, panels));
        softmax(a, t, st, s, block);
        weights w;
        make_weights(w, s);
#pragma unroll
        for (int i = 0; i < PANELS; ++i)
            add_values<GUARDED>(st.o, i * (OWN_PANEL / 8), w, s, take_panel(a, t, r, panels));
    }
}

__global__ void __launch_bounds__(THREADS) VARIANT_NAME(const __grid_constant__ kernel_args a) {
    extern __shared__ __align__(128) uint8_t raw[];
    wait_for_stream();
    let_next_start();
    const tile t = find_tile(a);
    if (t.row >= t.rows) return;
    rows_state st;
    start_rows(st);
    if (t.begin < t.end) attend<false>(a, t, st, smem_address(raw));
#if IS_F32
    /* All warps share the panels, and so the vote. */
    if (__syncthreads_or(!is_finite(st))) {
        start_rows(st);
        attend<true>(a, t, st, smem_address(raw));
    }
#endif
    store_rows(a, t, st);
}
