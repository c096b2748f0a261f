/* decode_args.cuh - the arguments of a decode kernel, and the work of one block.
 *
 * decode_launch.cuh fills them in; the kernel finds them in the constant bank.
 */
#ifndef FASTATTN_SM90_DECODE_ARGS_CUH
#define FASTATTN_SM90_DECODE_ARGS_CUH

#include <cuda.h> /* types only */
#include <stdint.h>

#include "common/schedule.h"
#include "common/stream.cuh"
#include "sm90/decode_variant.h"

/* K or V: a place is a sequence or, of paged ones, a page. */
struct decode_array {
#if IS_STRIDED
    fa_tensor tensor;
    int32_t width; /* bytes that are copied at a time: 16, 8, 4; 2: element by element */
#else
    CUtensorMap map;  /* {columns, rows, heads, places} */
    int32_t moves[2]; /* heads and places: 0 where the stride is, else 1 */
#endif
};

struct decode_args {
    decode_array k, v;
    fa_tensor q;
    fa_tensor out;    /* of the variant's dtype, or float32: the first part */
    int64_t out_step; /* elements from part to part */
    float *lse;       /* NULL: not wanted */
    int64_t lse_stride[3], lse_step;
    fa_masks masks;
    fa_varlen varlen; /* cu_q NULL: queries are not packed */
    fa_pages pages;   /* table NULL: a place for each sequence */
    fa_divisor by_size, by_group, by_tiles, by_parts, by_heads;
    int32_t b, sq, sk, heads, group, tiles, parts, part_blocks; /* heads: of k and v */
    int32_t cluster; /* blocks that add up their parts before they are stored */
    int32_t box_rows;
    int32_t is_part;          /* out is float32: there are several such sums */
    int32_t q_wide, out_wide; /* rows are loaded, stored 16 bytes at a time */
    float scale;              /* of q.k, in exponents */
    float cap, by_cap;        /* softcap in exponents; what of q.k tanh is taken of. 0: none */
    const float *slopes;      /* of ALiBi, or NULL */
    int64_t slope_stride[2];
    const float *sink; /* or NULL */
    int64_t sink_stride;
};

struct decode_tile {
    int32_t b, head, part; /* head: of k and v */
    int32_t batch, q;      /* where the sequence's rows of q, out and lse begin */
    int32_t row, rows;     /* of the group: the first, and how many; none: there is no such tile */
    int32_t first, last;   /* blocks of keys */
    fa_interval some, all; /* keys that some row sees, and that every row does */
    fa_lengths n;
};

/* Row i of q that a row of the group is of. */
DEVICE int32_t query_row(const decode_args &a, int32_t row) { return fa_divide(row, a.by_group); }

/* The sequence of packed ones that has a tile, which of its rows, and how many: each lane counts
 * the tiles of a sequence. */
DEVICE void find_packed(const decode_args &a, int32_t tile, decode_tile &t) {
    const int32_t lane = threadIdx.x % 32;
    int32_t before = 0;
    t.batch = 0, t.rows = 0;
#pragma unroll 1
    for (int32_t first = 0; first < a.b; first += 32) {
        int32_t count = 0;
        if (first + lane < a.b) {
            const fa_sequence s = fa_find_cached(&a.varlen, &a.masks, first + lane, a.sq, a.sk);
            count = (s.lengths.sq * a.group + ROWS - 1) / ROWS;
        }
        int32_t sum = count;
        for (int32_t i = 1; i < 32; i *= 2) {
            const int32_t left = __shfl_up_sync(~0u, sum, i);
            if (lane >= i) sum += left;
        }
        const uint32_t past = __ballot_sync(~0u, before + sum > tile);
        const int32_t found = past ? __ffs(past) - 1 : 31;
        before += __shfl_sync(~0u, past ? sum - count : sum, found);
        if (!past) continue;
        t.b = first + found;
        const fa_sequence s = fa_find_cached(&a.varlen, &a.masks, t.b, a.sq, a.sk);
        t.n = s.lengths, t.q = s.q;
        t.row = (tile - before) * ROWS;
        t.rows = min(t.n.sq * a.group - t.row, ROWS);
        return;
    }
}

/* Splits are neighbours in the grid, then the tiles of a group: they read the same keys. */
DEVICE decode_tile find_tile(const decode_args &a, int32_t block) {
    decode_tile t;
    const int32_t rest = fa_divide(block, a.by_parts);
    t.part = block - rest * a.parts;
    const int32_t group = fa_divide(rest, a.by_tiles);
    if (a.varlen.cu_q) {
        t.head = group;
        find_packed(a, rest - group * a.tiles, t);
        if (t.rows <= 0) return t;
    } else {
        t.row = (rest - group * a.tiles) * ROWS;
        t.rows = min(a.sq * a.group - t.row, ROWS);
        t.b = t.batch = fa_divide(group, a.by_heads), t.q = 0;
        t.head = group - t.b * a.heads;
        t.n = fa_sequence_lengths(&a.masks, t.b, a.sq, a.sk);
    }
    const int32_t top = query_row(a, t.row), bottom = query_row(a, t.row + t.rows - 1);
    const fa_interval upper = fa_row_interval(t.n, top);
    const fa_interval lower = fa_row_interval(t.n, bottom < t.n.sq ? bottom : t.n.sq - 1);
    t.some = {upper.begin, lower.end};
    t.all = {lower.begin, upper.end};
    if (bottom >= t.n.sq) t.all.end = 0;
    if (top >= t.n.sq) t.some.end = 0;
    int32_t first = t.some.begin / BLOCK_N, last = (t.some.end + BLOCK_N - 1) / BLOCK_N;
    if (t.some.begin >= t.some.end) last = first;
    const int32_t count = last - first;
    if (a.part_blocks) {
        t.first = max(first, t.part * a.part_blocks);
        t.last = min(last, (t.part + 1) * a.part_blocks);
    } else {
        t.first = first + fa_divide(count, a.by_parts) * t.part +
                  min(t.part, count - fa_divide(count, a.by_parts) * a.parts);
        t.last = t.first + fa_divide(count, a.by_parts) +
                 (t.part < count - fa_divide(count, a.by_parts) * a.parts);
    }
    return t;
}

/* Where a key lies: its place and row. */
struct key_place {
    int32_t place, row;
};

DEVICE key_place find_key(const decode_args &a, int32_t b, int32_t key) {
    if (!a.pages.table) return {b, key};
    const int32_t column = fa_divide(key, a.by_size);
    const int32_t page = a.pages.table[b * a.pages.stride[0] + column * a.pages.stride[1]];
    return {fa_clamp(page, 0, a.pages.count - 1), key - column * a.pages.size};
}

#endif
