/* fwd_load.cuh - Q, and the panels of K and V, in the order in which they pass by. */
#ifndef FASTATTN_SM80_FWD_LOAD_CUH
#define FASTATTN_SM80_FWD_LOAD_CUH

#include "sm80/fwd_args.cuh"
#include "sm80/load.cuh"

DEVICE void load_q(const kernel_args &a, const tile &t, uint32_t q) {
    const char *from = a.q.data + t.batch * a.q.stride[0] + t.h * a.q.stride[1] +
                       (int64_t)(t.q + t.row) * a.q.stride[2];
    const row_filter filter = {0, min(t.lengths.sq, t.rows) - t.row, false, 0};
    load_rows<BLOCK_M, Q_ROW>(a, t, q, a.q, from, threadIdx.x % (Q_ROW / 16) * CHUNK, filter);
}

/* What comes next: a panel of K, or, from PANELS on, of V, of a block of keys. */
struct cursor {
    key_block block;
    int32_t panel;
};

DEVICE void advance(const kernel_args &a, const tile &t, cursor &at) {
    if (++at.panel < 2 * PANELS) return;
    at.panel = 0;
    at.block = next_block(a, t, at.block.number);
}

DEVICE void load_panel(const kernel_args &a, const tile &t, const cursor &at, uint32_t to) {
    const bool of_v = at.panel >= PANELS;
    const array_args &x = of_v ? a.v : a.k;
    const int32_t key = at.block.number * BLOCK_N, h = fa_divide(t.h, a.by_group);
    const char *from =
        x.data + t.batch * x.stride[0] + h * x.stride[1] + (int64_t)(t.k + key) * x.stride[2];
    row_filter filter = {t.visible.begin - key, t.visible.end - key, false, key};
#if VARIANT_GENERAL
    filter.holes = of_v && a.scores.map && (a.scores.bits.mask_only || !at.block.map.no_holes);
#endif
    load_rows<BLOCK_N, PANEL_ROW>(a, t, to, x, from, panel_column(at.panel % PANELS, of_v), filter);
}

#endif
