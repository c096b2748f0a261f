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
#include "sm90/page_rows.cuh"

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

/* Where rows go. */
struct decode_rows {
    fa_tensor out; /* of the variant's dtype, or float32: the first part */
    float *lse;    /* NULL: not wanted */
    int64_t lse_stride[3];
    int32_t is_part; /* there are several such sums */
    int32_t wide;    /* rows are stored 16 bytes at a time */
};

struct decode_args {
    decode_array k, v;
    fa_tensor q;
    decode_rows to, single;     /* single: of dealt parts, one that is all of its row */
    int64_t out_step, lse_step; /* elements from part to part */
    fa_masks masks;
    fa_varlen varlen; /* cu_q NULL: queries are not packed */
    fa_pages pages;   /* table NULL: a place for each sequence */
    fa_divisor by_size, by_group, by_tiles, by_parts, by_heads;
    int32_t b, sq, sk, heads, group, tiles, parts, part_blocks; /* heads: of k and v */
    int32_t deal;    /* units that sequences share by their lengths; 0: each has `parts` */
    int32_t few;     /* rows of packed sequences, longer ones are others'; 0: none is */
    int32_t cluster; /* blocks that add up their parts before they are stored */
    int32_t box_rows;
    int32_t q_wide;      /* rows of q are loaded 16 bytes at a time */
    float scale;         /* of q.k, in exponents */
    float cap, by_cap;   /* softcap in exponents; what of q.k tanh is taken of. 0: none */
    const float *slopes; /* of ALiBi, or NULL */
    int64_t slope_stride[2];
    const float *sink; /* or NULL */
    int64_t sink_stride;
};

struct decode_tile {
    int32_t b, head;     /* of k and v */
    int32_t part, parts; /* of the sequence's keys */
    int32_t batch, q;    /* where the sequence's rows of q, out and lse begin */
    int32_t row, rows;   /* of the group: the first, and how many; none: there is no such tile */
    int32_t first, last; /* blocks of keys: the first and every `step`th before the last */
    int32_t step;
    fa_interval some, all; /* keys that some row sees, and that every row does */
    fa_lengths n;
};

/* Row i of q that a row of the group is of. */
DEVICE int32_t query_row(const decode_args &a, int32_t row) { return fa_divide(row, a.by_group); }

/* Of items that a warp's lanes have, so many each, `before` of them counted already: the lane that
 * has item `at`; -1: none, and all are counted. */
DEVICE int32_t find_lane(int32_t count, int32_t at, int32_t &before) {
    int32_t sum = count;
    for (int32_t i = 1; i < 32; i *= 2) {
        const int32_t left = __shfl_up_sync(~0u, sum, i);
        if ((int)threadIdx.x % 32 >= i) sum += left;
    }
    const uint32_t past = __ballot_sync(~0u, before + sum > at);
    const int32_t found = past ? __ffs(past) - 1 : 31;
    before += __shfl_sync(~0u, past ? sum - count : sum, found);
    return past ? found : -1;
}

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
            const bool here = !a.few || fa_is_short(s, a.few);
            count = here ? (s.lengths.sq * a.group + ROWS - 1) / ROWS : 0;
        }
        const int32_t found = find_lane(count, tile, before);
        if (found < 0) continue;
        t.b = first + found;
        const fa_sequence s = fa_find_cached(&a.varlen, &a.masks, t.b, a.sq, a.sk);
        t.n = s.lengths, t.q = s.q;
        t.row = (tile - before) * ROWS;
        t.rows = min(t.n.sq * a.group - t.row, ROWS);
        return;
    }
}

/* Blocks of keys that some row of a sequence sees. */
DEVICE int32_t count_blocks(const decode_args &a, int32_t b) {
    if (b >= a.b) return 0;
    const fa_lengths n = fa_sequence_lengths(&a.masks, b, a.sq, a.sk);
    const int32_t begin = fa_row_interval(n, 0).begin, end = fa_row_interval(n, n.sq - 1).end;
    return end > begin ? (end + BLOCK_N - 1) / BLOCK_N - begin / BLOCK_N : 0;
}

/* The sequence that has a unit, a part of its keys of all heads, and which; false: there is none.
 * Parts are about as long in all sequences, so that `deal` of them and one more a sequence are
 * enough, and none has more than `parts`. */
DEVICE bool find_dealt(const decode_args &a, int32_t unit, decode_tile &t) {
    const int32_t lane = threadIdx.x % 32;
    int64_t total = 0;
    int32_t most = 0, before = 0;
#pragma unroll 1
    for (int32_t first = 0; first < a.b; first += 32) {
        const int32_t count = count_blocks(a, first + lane);
        total += count, most = max(most, count);
    }
    for (int32_t i = 1; i < 32; i *= 2) {
        total += __shfl_xor_sync(~0u, total, i);
        most = max(most, __shfl_xor_sync(~0u, most, i));
    }
    const int32_t fair = (int32_t)((total + a.deal - 1) / a.deal);
    const int32_t share = max(1, max(fair, (most + a.parts - 1) / a.parts));
#pragma unroll 1
    for (int32_t first = 0; first < a.b; first += 32) {
        const int32_t count = count_blocks(a, first + lane);
        const int32_t parts = first + lane < a.b ? max(1, (count + share - 1) / share) : 0;
        const int32_t found = find_lane(parts, unit, before);
        if (found < 0) continue;
        t.b = first + found, t.part = unit - before;
        t.parts = __shfl_sync(~0u, parts, found);
        return true;
    }
    return false;
}

/* Splits are neighbours in the grid, then the tiles of a group: they read the same keys. Of those
 * that are dealt, the heads are neighbours. */
DEVICE decode_tile find_tile(const decode_args &a, int32_t block) {
    decode_tile t;
    int32_t head, tile; /* head: of all sequences, or of one unit, or of packed ones */
    const int32_t rest = a.deal ? block : fa_divide(block, a.by_parts);
    t.part = block - rest * a.parts, t.parts = a.parts, t.q = 0;
    head = fa_divide(rest, a.by_tiles), tile = rest - head * a.tiles;
    if (a.varlen.cu_q) {
        t.head = head;
        find_packed(a, tile, t);
        if (t.rows <= 0) return t;
    } else {
        const int32_t unit = fa_divide(head, a.by_heads);
        t.head = head - unit * a.heads, t.b = unit;
        t.row = tile * ROWS;
        t.rows = min(a.sq * a.group - t.row, ROWS);
        if (a.deal && !find_dealt(a, unit, t)) {
            t.rows = 0;
            return t;
        }
        t.batch = t.b;
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
    /* Parts take turns: blocks that are read at a time are neighbours in memory. */
    t.first = first + t.part, t.last = last, t.step = t.parts;
    if (a.part_blocks) {
        t.first = max(first, t.part * a.part_blocks);
        t.last = min(last, (t.part + 1) * a.part_blocks);
        t.step = 1;
    }
    return t;
}

DEVICE key_place find_key(const decode_args &a, int32_t b, int32_t key) {
    return find_key(a.pages, a.by_size, b, key);
}

#endif
