/* sparse_args.cuh - the arguments of a kernel over lists of keys, and the tile of one block.
 *
 * A tile is rows of a block of queries, of all query heads that share the list: row i of head h of
 * the group is i * group + h. sparse_launch.cuh fills the arguments in.
 */
#ifndef FASTATTN_SM90_SPARSE_ARGS_CUH
#define FASTATTN_SM90_SPARSE_ARGS_CUH

#include "common/packed.h"
#include "common/schedule.h"
#include "common/stream.cuh"
#include "sparse.h"

/* What all kernels over lists know of a request. */
struct sparse_args {
    fa_tensor q, k, v, out, lse; /* lse.data NULL: not wanted */
    fa_masks masks;
    fa_varlen varlen;
    fa_lists lists;
    fa_divisor by_group, by_tiles, by_blocks, by_heads;
    int32_t b, sq, sk, heads, group; /* heads: of k and v */
    int32_t blocks;                  /* of queries, of a head: of one sequence, or of all packed */
    int32_t tiles;                   /* of a block */
    int32_t shift;                   /* a key block has 1 << shift keys */
    int32_t k_width, v_width;        /* bytes that are copied at a time: 16, 8, 4; 2: by elements */
    int32_t q_wide, out_wide;        /* rows are loaded, stored 16 bytes at a time */
    float scale;                     /* of q.k, in exponents */
    float cap, by_cap; /* softcap in exponents; what of q.k tanh is taken of. 0: none */
    const float *sink; /* or NULL */
    int64_t sink_stride;
};

/* A block of queries of one sequence. */
struct query_block {
    int32_t b, batch;    /* batch: of the arrays, where packed sequences have one */
    int32_t block;       /* among all that have lists */
    int32_t q, k;        /* where the sequence's rows begin */
    int32_t first, rows; /* of the sequence; none: there is no such block */
    fa_lengths n, window;
};

/* Row i of q that a row of the group is of. */
DEVICE int32_t query_row(const sparse_args &a, int32_t row) { return fa_divide(row, a.by_group); }

DEVICE int32_t add_blocks(int32_t x, int32_t y) { return fa_packed_add(x, y, INT32_MAX); }

/* The sequence that has a block of packed ones, and how many come before it: each lane counts the
 * blocks of a sequence. a.b: none has it. */
DEVICE int32_t find_packed(const sparse_args &a, int32_t block, int32_t &before) {
    const int32_t lane = threadIdx.x % 32;
    before = 0;
#pragma unroll 1
    for (int32_t first = 0; first < a.b; first += 32) {
        int32_t count = 0;
        if (first + lane < a.b) {
            const fa_sequence s = fa_find_sequence(&a.varlen, &a.masks, first + lane, a.sq, a.sk);
            count = fa_q_blocks(&a.lists, s.q_end - s.q);
        }
        int32_t sum = count;
        for (int32_t i = 1; i < 32; i *= 2) {
            const int32_t left = __shfl_up_sync(~0u, sum, i);
            if (lane >= i) sum = add_blocks(sum, left);
        }
        sum = add_blocks(before, sum);
        const uint32_t past = __ballot_sync(~0u, sum > block);
        if (past) {
            const int32_t found = __ffs(past) - 1;
            const int32_t earlier = __shfl_sync(~0u, sum, found ? found - 1 : 0);
            if (found) before = earlier;
            return first + found;
        }
        before = __shfl_sync(~0u, sum, 31);
    }
    return a.b;
}

/* Block `block` of sequence b, or of all packed ones. Called by whole warps. */
DEVICE query_block find_block(const sparse_args &a, int32_t b, int32_t block) {
    query_block t;
    int32_t before = 0;
    t.b = a.varlen.cu_q ? find_packed(a, block, before) : b;
    t.batch = a.varlen.cu_q ? 0 : b;
    t.block = block;
    t.rows = 0;
    if (t.b >= a.b) return t;
    const fa_sequence s = fa_find_sequence(&a.varlen, &a.masks, t.b, a.sq, a.sk);
    t.n = t.window = s.lengths;
    if (a.lists.has_window)
        t.window = fa_find_sequence(&a.varlen, &a.lists.window, t.b, a.sq, a.sk).lengths;
    t.q = s.q, t.k = s.k;
    t.first = (block - before) * a.lists.q_block;
    t.rows = min(a.lists.q_block, s.q_end - s.q - t.first);
    return t;
}

struct sparse_tile {
    query_block at;
    int32_t head;                        /* of k and v */
    int32_t row, rows;                   /* of the group: the first, and how many */
    fa_interval some, all;               /* keys that a list may show some row, and every row */
    fa_interval some_window, all_window; /* that some row has in its window, and every row */
    int32_t length;                      /* of the list */
};

/* Keys that some of the rows first .. last see, and that all of them do. */
DEVICE void find_keys(fa_lengths n, int32_t first, int32_t last, fa_interval &some,
                      fa_interval &all) {
    some = all = fa_interval{0, 0};
    if (first >= n.sq) return;
    const fa_interval top = fa_row_interval(n, first);
    const fa_interval bottom = fa_row_interval(n, min(last, n.sq - 1));
    some = fa_interval{top.begin, bottom.end};
    if (last < n.sq) all = fa_interval{bottom.begin, top.end};
}

/* Where a list's entry, its gate or its count lies. */
DEVICE int64_t list_at(const fa_tensor &t, int32_t batch, int32_t head, int32_t block) {
    return batch * t.stride[0] + head * t.stride[1] + block * t.stride[2];
}

/* Of a block that has none, as the caller gave too few: 0. */
DEVICE int32_t list_length(const fa_lists &l, int32_t batch, int32_t head, int32_t block) {
    const int32_t length = (int32_t)l.entries.shape[3];
    if (block >= l.entries.shape[2]) return 0;
    if (!l.counts.data || block >= l.counts.shape[2]) return length;
    return fa_clamp(((const int32_t *)l.counts.data)[list_at(l.counts, batch, head, block)], 0,
                    length);
}

/* Tiles of a block are neighbours in the grid, then the blocks of a head: they read the same keys.
 */
DEVICE sparse_tile find_tile(const sparse_args &a, int32_t number, int32_t size) {
    sparse_tile t;
    const int32_t block = fa_divide(number, a.by_tiles), first = (number - block * a.tiles) * size;
    const int32_t pair = fa_divide(block, a.by_blocks), b = fa_divide(pair, a.by_heads);
    t.head = pair - b * a.heads;
    t.at = find_block(a, b, block - pair * a.blocks);
    t.row = t.at.first * a.group + first;
    t.rows = min(t.at.rows * a.group - first, size);
    if (t.rows <= 0) return t;
    const int32_t top = query_row(a, t.row), bottom = query_row(a, t.row + t.rows - 1);
    find_keys(t.at.n, top, bottom, t.some, t.all);
    t.some_window = t.all_window = fa_interval{0, 0};
    if (a.lists.has_window) find_keys(t.at.window, top, bottom, t.some_window, t.all_window);
    t.length = list_length(a.lists, t.at.batch, t.head, t.at.block);
    return t;
}

DEVICE bool is_in(fa_interval keys, int32_t key) { return key >= keys.begin && key < keys.end; }

#endif
