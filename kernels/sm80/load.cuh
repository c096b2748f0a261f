/* load.cuh - how rows come into shared memory: 16 bytes a thread, by cp.async where the
 * array's alignment allows that or 8 or 4, element by element elsewhere.
 *
 * A row's chunk of 16 bytes i lies at i ^ row % 8 of its 128 bytes, so that neither these stores
 * nor the loads of fragments meet in a bank. Columns past the array's, keys that no row of the
 * sequence sees, and V of keys that a bool mask hides from all rows of the tile are 0.
 */
#ifndef FASTATTN_SM80_LOAD_CUH
#define FASTATTN_SM80_LOAD_CUH

#include "common/element.cuh"
#include "sm80/tile.cuh"
#include "sm80/ptx.cuh"

typedef element<DTYPE>::stored stored;

/* Which rows of what is loaded exist, those of a block of K or V or the tile's of Q: begin .. end
 * - 1; of V where a bool mask may hide keys from all rows of the tile, those that are seen. */
struct row_filter {
    int32_t begin, end;
    bool holes;
    int32_t key; /* the block's first */
};

#if VARIANT_GENERAL
/* Whether some row of the tile sees this key. Of packed sequences the mask alone is packed, for
 * rows that a shorter sequence does not have, too: where not all of a group see it, each is asked.
 */
DEVICE bool is_seen(const score_args &a, const tile &t, int32_t key) {
    const fa_mask_bits &bits = a.bits;
    const int32_t block = key / FA_BITS_KEYS, of_128 = key % FA_BITS_KEYS, word = key % 8 / 2;
    const int32_t bit = of_128 / 8 * 2 + key % 2;
    const uint32_t *columns =
        a.columns + 4 * fa_columns_at(&bits, t.plane, block, t.row / FA_BITS_ROWS) + word;
    if (!((columns[0] | (BLOCK_M > FA_BITS_ROWS ? columns[4] : 0)) >> bit & 1)) return false;
    if (!bits.mask_only) return true;
    const fa_row_range rows = fa_rows_seeing_some(t.lengths, fa_interval{key, key + 1});
    const int32_t end = min(rows.end, t.row + BLOCK_M);
    for (int32_t row = max(rows.begin, t.row); row < end;) {
        const bool whole = row % FA_BITS_ROWS == 0 && row + FA_BITS_ROWS <= end;
        const uint32_t seen = whole ? columns[4 * (row / FA_BITS_ROWS - t.row / FA_BITS_ROWS)]
                                    : a.words[4 * fa_bits_at(&bits, t.plane, block, row) + word];
        if (seen >> bit & 1) return true;
        row += whole ? FA_BITS_ROWS : 1;
    }
    return false;
}
#endif

DEVICE bool has_row(const request_args &a, const tile &t, const row_filter &f, int32_t row) {
    if (row < f.begin || row >= f.end) return false;
#if VARIANT_GENERAL
    if (f.holes) return is_seen(a.scores, t, f.key + row);
#endif
    return true;
}

/* 16 bytes, of which `bytes` exist, by copies of BYTES. */
template <int BYTES>
DEVICE void copy_chunk(uint32_t to, const char *from, int32_t bytes) {
#pragma unroll
    for (int i = 0; i < 16; i += BYTES)
        cp_async_or_zero<BYTES>(to + i, bytes > i ? from + i : from, min(max(bytes - i, 0), BYTES));
}
DEVICE void copy_elements(uint32_t to, const char *from, int64_t step, int32_t bytes) {
#pragma unroll 1
    for (int i = 0; i < 16; i += SIZE, from += step)
        st_shared(to + i, i < bytes ? *(const stored *)from : (stored)0);
}

/* This thread's chunks of ROWS rows of ROW bytes: the one from `column` on of every STEP-th row, by
 * copies of BYTES, or, 0, element by element. */
template <int ROWS, int ROW, int BYTES, typename FILTER>
DEVICE void load_chunks(const request_args &a, const tile &t, uint32_t to, const array_args &x,
                        const char *from, int32_t column, const FILTER &filter) {
    constexpr int CHUNKS = ROW / 16, STEP = THREADS / CHUNKS;
    static_assert(THREADS % CHUNKS == 0 && ROWS % STEP == 0, "");
    const int32_t chunk = threadIdx.x % CHUNKS, first = threadIdx.x / CHUNKS;
    const int32_t bytes = min(max((x.columns - column) * SIZE, 0), 16);
    from += first * x.stride[2] + (bytes ? column * x.stride[3] : 0);
    if (BYTES == 16 && x.columns == D && filter.begin <= 0 && filter.end >= ROWS &&
        !filter.holes) { /* as nearly always */
#pragma unroll
        for (int i = 0; i < ROWS; i += STEP, from += STEP * x.stride[2])
            cp_async_16(to + (first + i) * ROW + ((chunk ^ (first + i) % 8) << 4), from);
        return;
    }
#pragma unroll 1
    for (int i = 0; i < ROWS; i += STEP, from += STEP * x.stride[2]) {
        const int32_t row = first + i, there = has_row(a, t, filter, row) ? bytes : 0;
        const uint32_t place = to + row * ROW + ((chunk ^ row % 8) << 4);
        const char *source = there ? from : x.data; /* no address is past an array */
        if (BYTES)
            copy_chunk<BYTES ? BYTES : 16>(place, source, there);
        else
            copy_elements(place, source, x.stride[3], there);
    }
}

template <int ROWS, int ROW, typename FILTER>
DEVICE void load_rows(const request_args &a, const tile &t, uint32_t to, const array_args &x,
                      const char *from, int32_t column, const FILTER &filter) {
    if (x.width == 16)
        load_chunks<ROWS, ROW, 16>(a, t, to, x, from, column, filter);
    else if (x.width == 8)
        load_chunks<ROWS, ROW, 8>(a, t, to, x, from, column, filter);
    else if (SIZE <= 4 && x.width == 4)
        load_chunks<ROWS, ROW, 4>(a, t, to, x, from, column, filter);
    else
        load_chunks<ROWS, ROW, 0>(a, t, to, x, from, column, filter);
}

/* The first column of this thread's chunk of a panel. One that is multiplied by P or dS has columns
 * of each of the warps that share them out. */
DEVICE int32_t panel_column(int32_t panel, bool is_shared) {
    const int32_t column = threadIdx.x % (PANEL_ROW / 16) * CHUNK;
    if (!is_shared) return panel * PANEL + column;
    return column / OWN_PANEL * OWN + panel * OWN_PANEL + column % OWN_PANEL;
}

#endif
