/* bwd_tile.cuh - the tiles of the backward: of query rows, as the forward's, and of keys; and how
 * their rows and the panels that pass by are loaded.
 */
#ifndef FASTATTN_SM80_BWD_TILE_CUH
#define FASTATTN_SM80_BWD_TILE_CUH

#include "sm80/bwd_args.cuh"
#include "sm80/load.cuh"
#include "sm80/tile.cuh"

/* Of a tile of keys `row`, `rows` count keys of the sequence, `begin` to `end` blocks of query
 * rows, `whole` and `visible` query rows; `h` is the key head. */
DEVICE tile find_key_tile(const bwd_args &a) {
    tile t;
    const int32_t head = blockIdx.x / a.n_blocks, number = blockIdx.x - head * a.n_blocks;
    t.begin = t.end = 0;
    t.visible = t.whole = fa_interval{0, 0};
    t.h = head % a.hk;
    if (a.varlen.cu_k) {
        const fa_packed_block block = fa_packed_find(a.varlen.cu_k, a.varlen.cu_k_stride, a.b,
                                                     a.varlen.total_k, BLOCK_M, number);
        t.b = block.b, t.batch = 0;
        t.row = block.row, t.rows = block.end - block.first;
        t.k = block.first, t.q = 0;
        t.lengths = fa_lengths{0, 0, 0, 0, 0, 0};
        if (t.b == a.b) return t;
        const fa_sequence s = fa_find_sequence(&a.varlen, &a.masks, t.b, a.sq, a.sk);
        t.q = s.q, t.lengths = s.lengths;
    } else {
        t.b = t.batch = head / a.hk;
        t.row = number * BLOCK_M, t.rows = a.sk;
        t.q = t.k = 0;
        t.lengths = fa_sequence_lengths(&a.masks, t.b, a.sq, a.sk);
    }
    if (t.row >= t.lengths.sk) return t;
    const fa_row_range all = fa_rows_seeing_some(t.lengths, fa_interval{0, t.lengths.sk});
    const fa_interval keys = {t.row, t.row + BLOCK_M};
    const fa_row_range some = fa_rows_seeing_some(t.lengths, keys);
    const fa_row_range whole = fa_rows_seeing_all(t.lengths, keys);
    t.visible = fa_interval{all.begin, all.end};
    t.whole = fa_interval{whole.begin, whole.end};
    if (some.begin >= some.end) return t;
    t.begin = some.begin / BLOCK_N;
    t.end = (some.end + BLOCK_N - 1) / BLOCK_N;
    return t;
}

/* Query rows that see no key have no terms; what they hold must not be multiplied by 0. */
struct query_filter {
    int32_t begin, end;
    bool holes;
    const row_terms *terms; /* of the first row */
};
DEVICE bool has_row(const request_args &, const tile &, const query_filter &f, int32_t row) {
    return row >= f.begin && row < f.end && !(f.holes && f.terms[row].x[0] == INFINITY);
}

/* A panel: of which block, of which query head, and its place in the order in which they pass by.
 */
struct bwd_cursor {
    int32_t h, block, panel;
};

/* Where a panel has whole rows and there is shared memory for it, both arrays' panels of a block
 * come at once, and stay until its last product. */
static constexpr bool PAIRED = PANELS == 1 && STAGES == 4;

/* What comes one after the other of a block: panels of S, of dP, of dQ, or of S, of dP, of dV, of
 * dK; of the gradient of a mask those of S and dP alone. */
template <int PRODUCTS>
constexpr int BLOCK_PANELS = PAIRED ? 1 : PRODUCTS * PANELS;

DEVICE void advance(const tile &t, bwd_cursor &at, int32_t panels) {
    if (++at.panel < panels) return;
    at.panel = 0;
    if (++at.block < t.end) return;
    at.block = t.begin, ++at.h;
}

/* The address of a row of an array, of a head: of the sequence's. */
DEVICE const char *row_at(const array_args &x, int32_t batch, int32_t h, int64_t row) {
    return x.data + batch * x.stride[0] + h * x.stride[1] + row * x.stride[2];
}

DEVICE void load_tile_rows(const bwd_args &a, const tile &t, uint32_t to, const array_args &x,
                           int32_t h, int32_t first, fa_interval rows) {
    const row_filter filter = {rows.begin - t.row, min(rows.end, t.rows) - t.row, false, 0};
    load_rows<BLOCK_M, Q_ROW>(a, t, to, x, row_at(x, t.batch, h, first + t.row),
                              threadIdx.x % (Q_ROW / 16) * CHUNK, filter);
}

template <bool BY_KEYS>
DEVICE void load_panel(const bwd_args &a, const tile &t, const bwd_cursor &at, uint32_t to) {
    const int32_t phase = at.panel / PANELS, first = at.block * BLOCK_N;
    const bool of_gradient = PAIRED || phase >= 2;
    const int32_t column = panel_column(at.panel % PANELS, of_gradient);
    if (BY_KEYS) {
        const array_args &x = phase == 1 || phase == 2 ? a.dout : a.q;
        const int64_t row = t.q + first;
        const query_filter filter = {
            t.visible.begin - first, t.visible.end - first, GENERAL != 0,
            a.terms + ((int64_t)t.batch * a.hq + at.h) * a.terms_rows + row};
        load_rows<BLOCK_N, PANEL_ROW>(a, t, to, x, row_at(x, t.batch, at.h, row), column, filter);
    } else {
        const array_args &x = phase == 1 ? a.v : a.k;
        row_filter filter = {t.visible.begin - first, t.visible.end - first, false, first};
#if VARIANT_GENERAL
        filter.holes = of_gradient && phase != 1 && a.scores.map;
#endif
        const int32_t h = fa_divide(at.h, a.by_group);
        load_rows<BLOCK_N, PANEL_ROW>(a, t, to, x, row_at(x, t.batch, h, t.k + first), column,
                                      filter);
    }
}

#endif
