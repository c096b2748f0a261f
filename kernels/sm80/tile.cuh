/* tile.cuh - which tile a block computes, which keys its rows see, and in which order it takes
 * the blocks of keys: from the right to the left, those that a bool mask hides from all rows left
 * out.
 */
#ifndef FASTATTN_SM80_TILE_CUH
#define FASTATTN_SM80_TILE_CUH

#include "common/stream.cuh"
#include "mask.h"
#include "sm80/args.cuh"

struct tile {
    int32_t b, h;        /* sequence, query head */
    int32_t row, rows;   /* its first row of the sequence, and how many rows that has */
    int32_t q, k;        /* the sequence's first rows in the arrays, */
    int32_t batch;       /* and where these have it */
    fa_lengths lengths;  /* of the sequence */
    fa_interval visible; /* keys that some row of the sequence sees, */
    fa_interval whole;   /* and those that every row of the tile does */
    int32_t begin, end;  /* blocks of keys that some row of the tile sees */
#if VARIANT_GENERAL
    int64_t plane;    /* of a bool mask */
    const char *mask; /* of a float mask, the sequence's and head's */
    int64_t seed;
    float slope;
#endif
};

#if VARIANT_GENERAL
DEVICE void find_scores(const score_args &a, tile &t, int32_t sequences) {
    const int32_t b = min(t.b, sequences - 1); /* rows of no sequence see no key: nobody looks */
    t.plane = fa_bits_plane(&a.bits, b, t.h);
    t.mask = a.mask + b * a.mask_stride[0] + t.h * a.mask_stride[1];
    t.seed = a.seed_data ? *a.seed_data : a.seed;
    t.slope = a.slopes ? a.slopes[b * a.slope_stride[0] + t.h * a.slope_stride[1]] : 0.f;
}
#endif

/* Where the block's tile lies. */
DEVICE void locate(const request_args &a, tile &t) {
    const int32_t number = blockIdx.x;
    if (a.varlen.cu_q) {
        /* Head after head; in a head the last rows first, which see most under a causal mask. */
        t.h = number / a.m_blocks;
        const fa_packed_block block =
            fa_packed_find(a.varlen.cu_q, a.varlen.cu_q_stride, a.b, a.varlen.total_q, BLOCK_M,
                           a.m_blocks - 1 - (number - t.h * a.m_blocks));
        t.b = block.b, t.batch = 0;
        t.row = block.row, t.rows = block.end - block.first;
        t.q = block.first, t.k = 0;
        t.lengths = fa_lengths{0, 0, 0, 0, 0, 0}; /* of the rows of no sequence */
        if (t.b == a.b) return;
        const fa_sequence s = fa_find_sequence(&a.varlen, &a.masks, t.b, a.sq, a.sk);
        t.k = s.k, t.lengths = s.lengths;
    } else {
        const fa_tile found = fa_schedule_tile(&a.schedule, number);
        t.b = t.batch = fa_divide(found.head, a.by_hq);
        t.h = found.head - t.b * a.hq;
        t.row = found.m_block * BLOCK_M, t.rows = a.sq;
        t.q = t.k = 0;
        t.lengths = fa_sequence_lengths(&a.masks, t.b, a.sq, a.sk);
    }
}

/* Of a tile that is located: what its rows see. */
DEVICE void find_visible(tile &t) {
    t.begin = t.end = 0;
    t.visible = t.whole = fa_interval{0, 0};
    if (t.row >= t.lengths.sq) return;
    const fa_interval first = fa_row_interval(t.lengths, t.row);
    const fa_interval last = fa_row_interval(t.lengths, min(t.row + BLOCK_M, t.lengths.sq) - 1);
    t.visible.begin = fa_row_interval(t.lengths, 0).begin;
    t.visible.end = fa_row_interval(t.lengths, t.lengths.sq - 1).end;
    if (last.end <= first.begin) return;
    t.whole = fa_interval{last.begin, first.end};
    t.begin = first.begin / BLOCK_N;
    t.end = (last.end + BLOCK_N - 1) / BLOCK_N;
}

DEVICE tile find_tile(const request_args &a) {
    tile t;
    locate(a, t);
#if VARIANT_GENERAL
    find_scores(a.scores, t, a.b);
#endif
    find_visible(t);
    return t;
}

/* What a row of the tile may be hidden from in a block of keys. */
DEVICE bool is_cut(const tile &t, int32_t block) {
    const int32_t key = block * BLOCK_N;
    return key < t.whole.begin || key + BLOCK_N > t.whole.end;
}

#if VARIANT_GENERAL
/* A bit of a bool mask's map: of what is seen of a block by the rows of the tile, x: whether
 * anything is, y: whether all is, z: whether no key is hidden from all of them. */
struct map_bits {
    bool some, whole, no_holes;
};
DEVICE map_bits read_map(const score_args &a, const tile &t, int32_t block) {
    const int32_t of_128 = block * BLOCK_N / FA_BITS_KEYS, group = t.row / FA_BITS_ROWS;
    uint4 word = a.map[fa_map_at(&a.bits, t.plane, of_128 / 32, group)];
    uint32_t some = word.x, whole = word.y, no_holes = word.z;
    if (BLOCK_M > FA_BITS_ROWS) {
        word = a.map[fa_map_at(&a.bits, t.plane, of_128 / 32, group + 1)];
        some |= word.x, whole &= word.y, no_holes |= word.z;
    }
    const int32_t bit = of_128 % 32;
    return {(some >> bit & 1) != 0, (whole >> bit & 1) != 0, (no_holes >> bit & 1) != 0};
}
#endif

/* A block of keys, and what a bool mask's map says of it. */
struct key_block {
    int32_t number; /* one before the first: none is left */
#if VARIANT_GENERAL
    map_bits map;
#endif
};

/* The one that comes after the block of this number. */
DEVICE key_block next_block(const request_args &a, const tile &t, int32_t number) {
    key_block next;
    next.number = number - 1;
#if VARIANT_GENERAL
    next.map = {true, true, true};
    if (a.scores.map)
        for (; next.number >= t.begin; --next.number) {
            next.map = read_map(a.scores, t, next.number);
            if (next.map.some) break;
        }
#endif
    return next;
}

#endif
