/* servers.cuh - the four threads that serve the MMA warpgroups, each in a warp of its own: one
 * decides what comes next, one brings Q, one K, one V.
 *
 * A part of fwd.cu, which includes it behind the row's constants and the shared memory.
 *
 * Items pass through a ring: the scheduler fills a slot (item_full), everybody reads it, and when
 * the warpgroups and the servers of K and V have left it (item_empty) it is filled again.
 */
#ifndef FASTATTN_SM90_SERVERS_CUH
#define FASTATTN_SM90_SERVERS_CUH

/* Where the tile of this number lies. */
DEVICE void locate(const kernel_args &a, work_tile &t, int32_t number) {
    fa_tile tile;
    if (a.packed.counts) {
        fa_packed_entry entry = a.packed.entries[fa_divide(number, a.by_hq)];
        fa_sequence s =
            fa_packed_sequence(&a.packed, &a.varlen, &a.masks, entry.sequence, a.sq, a.sk);
        tile = fa_packed_tile(&a.packed, number - entry.first * a.hq,
                              max(fa_packed_m_blocks(&a.packed, s), 1), s.lengths.sk);
        t.b = entry.sequence;
        t.h = tile.head;
        t.lengths = s.lengths;
        t.q = s.q;
        t.k = s.k;
        t.rows = t.boxed = s.q_end - s.q;
        t.keys = a.varlen.total_k - s.k;
    } else {
        tile = fa_schedule_tile(&a.schedule, number);
        t.b = fa_divide(tile.head, a.by_hq);
        t.h = tile.head - t.b * a.hq;
#if VARIANT_GENERAL
        if (a.scores.b_first) {
            t.b = tile.head % a.b;
            t.h = tile.head / a.b;
        }
#endif
        t.lengths = fa_sequence_lengths(&a.masks, t.b, a.sq, a.sk);
        t.q = t.k = 0;
        t.rows = a.sq;
        t.keys = a.sk;
        t.boxed = INT32_MAX;
    }
    t.row = tile.m_block * BLOCK_M;
}

/* `some` of a warpgroup whose rows see nothing, or are not computed: see_interval() says NONE. */
static constexpr fa_interval NO_KEYS = {0, 0};

/* How many blocks of the item a warpgroup passes by, and how many it takes one by one before its
 * loop. What a bool mask hides nobody knows here: general rows ask for each block. */
DEVICE void count_masked(work_tile &t) {
    const int32_t blocks = t.end - t.begin;
#pragma unroll 1
    for (int w = 0; w < (GENERAL ? 0 : WARPGROUPS); ++w) {
        const int32_t top = (t.whole[w].end - 1) / BLOCK_N; /* where the first row's keys begin */
        int32_t skip = t.some[w].end == 0 ? blocks : 0, masked = t.left + t.right;
        while (skip < blocks && block_visibility(t, key_block(t, skip), w) == NONE) ++skip;
        for (; masked > skip; --masked) {
            const int32_t block = key_block(t, masked - 1);
            if (block == top || block_visibility(t, block, w) != WHOLE) break;
        }
        t.skip[w] = skip;
        t.masked[w] = max(masked, min(skip + 1, blocks));
    }
}

DEVICE void describe(const kernel_args &a, work_tile &t, int32_t number) {
    locate(a, t, number);
    t.h_k = fa_divide(t.h, a.by_group);
    t.sink = a.sink ? a.sink[t.h * a.sink_stride] : -INFINITY;
#if VARIANT_GENERAL
    /* The rows of no sequence, number b, have the last one's: nobody looks, they see no key. */
    describe_scores(a.scores, t.score, min(t.b, a.b - 1), t.h);
    t.score.split = 0; /* where there is no block */
#endif
    t.begin = t.end = t.left = t.right = 0;
    t.warpgroups = (1 << WARPGROUPS) - 1;
    t.watch = a.watch || !REDOES;
#pragma unroll 1
    for (int w = 0; w < WARPGROUPS; ++w) {
        int32_t top = t.row + 64 * w, bottom = min(top + 64, t.lengths.sq) - 1;
        fa_interval first = fa_row_interval(t.lengths, top);
        fa_interval last = fa_row_interval(t.lengths, bottom);
        t.some[w] = fa_interval{first.begin, last.end};
        t.whole[w] = fa_interval{last.begin, first.end};
        if (top > bottom || first.begin >= last.end) t.some[w] = NO_KEYS;
        t.skip[w] = t.masked[w] = 0;
    }
    t.visible.begin = fa_row_interval(t.lengths, 0).begin;
    t.visible.end = fa_row_interval(t.lengths, t.lengths.sq - 1).end;
    if (t.row >= t.lengths.sq) return;
    fa_interval first = fa_row_interval(t.lengths, t.row);
    fa_interval last = fa_row_interval(t.lengths, min(t.row + BLOCK_M, t.lengths.sq) - 1);
    if (last.end <= first.begin) return;
    t.begin = first.begin / BLOCK_N;
    t.end = (last.end + BLOCK_N - 1) / BLOCK_N;
    int32_t seen_begin =
        (last.begin + BLOCK_N - 1) / BLOCK_N;               /* blocks that every row sees whole */
    int32_t seen_end = min(first.end / BLOCK_N, t.end - 1); /* the first block finds the offset */
    seen_begin = fa_clamp(seen_begin, t.begin, t.end);
    seen_end = fa_clamp(seen_end, seen_begin, t.end);
    t.right = t.end - seen_end;
    t.left = seen_begin - t.begin;
    count_masked(t);
#if VARIANT_GENERAL
    int32_t bottom = min(t.row + BLOCK_M, t.lengths.sq) - 1;
    int32_t diagonal = fa_row_position(t.lengths, bottom) / BLOCK_N + 1;
    bool by_distance = a.scores.slopes && a.scores.mask != BITS;
    t.score.split = by_distance ? fa_clamp(diagonal, t.begin, t.end) : t.end;
#endif
}

/* How item n was voted on, once all have left it. */
DEVICE uint32_t read_vote(smem_layout &smem, int32_t n) {
    mbarrier_wait(smem_address(&smem.tile_empty[n % TILE_SLOTS]), n / TILE_SLOTS & 1);
    volatile uint32_t &votes = smem.again[n % TILE_SLOTS];
    uint32_t again = votes;
    votes = 0;
    return again;
}

/* Where blocks claim tiles, or NULL. */
DEVICE int32_t *claims(const kernel_args &a) {
#if VARIANT_GENERAL
    if (a.scores.mask == BITS && !a.packed.counts) return (int32_t *)&a.scores.map[0].w;
#endif
    return a.packed.counts ? &a.packed.counts->claimed : NULL;
}

/* The next tile's number for this block. How long tiles are that a bool mask thins out, and of
 * packed sequences even how many there are, nobody knows on the host: blocks claim them one by one.
 * Only who computes a tile depends on that, never its bits. `n`: the item that it is for. */
DEVICE int32_t next_tile(const kernel_args &a, smem_layout &smem, int32_t n, int32_t *round) {
    int32_t *claimed = claims(a);
    if (!claimed) return fa_schedule_next(&a.schedule, gridDim.x, blockIdx.x, round);
    if (n == 0) return blockIdx.x; /* so that nobody's second tile is another's first */
    int32_t left = n - a.ahead;    /* the item that must be done with */
    if (left >= 0)
        mbarrier_wait(smem_address(&smem.tile_empty[left % TILE_SLOTS]), left / TILE_SLOTS & 1);
    return gridDim.x + atomicAdd(claimed, 1);
}

DEVICE int32_t number_of_tiles(const kernel_args &a) {
    return a.packed.counts ? a.packed.counts->entries * a.hq : a.schedule.tiles;
}

/* The first item, before there are barriers, and in most calls before the stream's last kernel has
 * ended: no load starts without it. */
DEVICE int32_t first_tile(const kernel_args &a, smem_layout &smem, int32_t *round) {
    int32_t tile = next_tile(a, smem, 0, round);
    if (tile < number_of_tiles(a)) describe(a, smem.tiles[0], tile);
    return tile;
}

/* Decides what comes next; runs ahead of the others, divisions and all. A tile ends when the
 * warpgroups meet the item behind it, so the last votes need one, of no rows, to be read. `tile`,
 * `round`: what first_tile() said. */
DEVICE void schedule(const kernel_args &a, smem_layout &smem, int32_t tile, int32_t round) {
    int32_t read = 0;                /* items whose votes have been */
    int32_t flush = REDOES ? 0 : -1; /* the item of no rows; 0: not yet */
    const int32_t tiles = number_of_tiles(a);
    for (int32_t n = 0;; ++n) {
        /* Votes are read where their slot is needed, all of them before the end. */
        uint32_t again = 0;
        while (REDOES && !again && read < n && (read <= n - TILE_SLOTS || read < flush))
            again = read_vote(smem, read++);
        work_tile &t = smem.tiles[n % TILE_SLOTS];
        mbarrier_wait(smem_address(&smem.tile_empty[n % TILE_SLOTS]), n / TILE_SLOTS & 1 ^ 1);
        t.last = 0;
        bool taken = false;
        if (again) {
            t = smem.tiles[(read - 1) % TILE_SLOTS];
            t.warpgroups = again;
            t.watch = 1;
            for (int w = 0; w < WARPGROUPS; ++w)
                if (!(again >> w & 1))
                    t.some[w] = NO_KEYS, t.skip[w] = t.masked[w] = t.end - t.begin;
        } else if (tile < tiles) {
            if (n > 0) describe(a, t, tile);
            taken = true;
        } else {
            t = work_tile{}; /* no blocks, no warpgroups */
            t.last = flush != 0;
            flush = n;
        }
        mbarrier_arrive(smem_address(&smem.tile_full[n % TILE_SLOTS]));
        if (taken)
            tile = next_tile(a, smem, n + 1, &round);
        else if (!again)
            let_next_start();
        if (t.last) return;
    }
}

#if IS_STRIDED
#include "load_strided.cuh"
#if IS_RAW
#include "load_raw.cuh"
#endif
#else
/* ROWS rows of q, k or v (WHICH) as panels of 64 columns; the last may have fewer: what a box
 * brings that the array does not have is filled with zeros, slower than columns are loaded. */
template <int ROWS, int COLUMNS, int WHICH>
DEVICE void load(const kernel_args &a, uint32_t smem, const CUtensorMap &from, int32_t first,
                 int32_t h, int32_t b, const int32_t (&moves)[2], uint32_t barrier,
                 uint64_t policy) {
    const int32_t columns = a.columns[WHICH];
    mbarrier_arrive_expect_tx(barrier, ROWS * 2 * columns);
#pragma unroll
    for (int c = 0; c < COLUMNS; c += 64)
        if (c == 0 || c < columns)
            cp_async_bulk_tensor_load(smem + c * 2 * ROWS,
                                      c + 64 <= columns ? &from : &a.tails[WHICH],
                                      c + (SLICES ? h * moves[0] & -FA_SLICE : 0), first,
                                      SLICES ? 0 : h * moves[0], b * moves[1], barrier, policy);
}
#endif

DEVICE void bring_q(const kernel_args &a, smem_layout &smem) {
    for (int32_t n = 0;; ++n) {
        const work_tile &t = smem.tiles[n % TILE_SLOTS];
        mbarrier_wait(smem_address(&smem.tile_full[n % TILE_SLOTS]), n / TILE_SLOTS & 1);
        if (t.last) return;
#pragma unroll 1
        for (int w = 0; w < WARPGROUPS; ++w) {
            const int32_t place = n * WARPGROUPS + w, slot = place % Q_SLOTS;
            uint32_t full = smem_address(&smem.q_full[slot]);
            mbarrier_wait(smem_address(&smem.q_empty[slot]), place / Q_SLOTS & 1 ^ 1);
            if (t.warpgroups >> w & 1)
                load<64, D, 0>(a, smem_address(smem.q[slot]), a.q, t.q + t.row + 64 * w, t.h, t.b,
                               a.moves[0], full, EVICT_FIRST);
            else
                mbarrier_arrive(full);
        }
    }
}

#if VARIANT_GENERAL
/* A block's tiles of a float mask, for each warpgroup; n of them went before. */
DEVICE void bring_mask(const kernel_args &a, smem_layout &smem, const work_tile &t, int32_t key,
                       uint32_t &n) {
    const score_args &s = a.scores;
    const int columns = s.tiles == 2 ? 32 : 64; /* of a panel */
    for (int i = 0; i < s.tiles; ++i, ++n)
        for (int w = 0; w < WARPGROUPS; ++w) {
            uint32_t full = smem_address(&smem.mask_full[w]), to = smem_address(smem.mask[w]);
            mbarrier_wait(smem_address(&smem.mask_empty[w]), n & 1 ^ 1);
            mbarrier_arrive_expect_tx(full, BLOCK_N / 64 * (s.tile_rows ? PANEL_Q : 128));
            for (int c = 0; c < BLOCK_N / 64; ++c)
                cp_async_bulk_tensor_load(to + c * PANEL_Q, &s.mask_map,
                                          key + (i * (BLOCK_N / 64) + c) * columns,
                                          s.tile_rows ? t.row + 64 * w : 0, t.h * s.mask_moves[0],
                                          t.b * s.mask_moves[1], full, EVICT_NORMAL);
        }
}

/* The tag of the block that was found last; of -1: nothing is seen. */
DEVICE uint32_t block_tag(const score_args &a, const work_tile &t, const block_walk &c,
                          int32_t block) {
    if (block < 0) return 0;
    uint32_t bit = map_bit(block) % 32;
    uint32_t tag = (uint32_t)block << TAG_BLOCK, holes = TAG_HOLES;
#pragma unroll
    for (int w = 0; w < WARPGROUPS; ++w) {
        uint32_t any = c.some[w] >> bit & 1, all = c.all[w] >> bit & 1;
        uint32_t columns = c.columns[w] >> bit & 1;
        if (a.bits.mask_only) { /* the interval's part, and rows that are not the sequence's */
            enum visibility inside = block_visibility(t, block, w);
            any &= inside != NONE;
            all &= inside == WHOLE;
            columns &= inside == WHOLE && (all || t.row + 64 * (w + 1) <= t.lengths.sq);
        }
        if (columns) holes = 0;
        tag |= (any ? 1 + all : 0) << 2 * w;
    }
    return tag | holes;
}
#endif

/* K or V: the same blocks in the same order, into a ring of their own. */
template <bool IS_K, int COLUMNS, int BYTES>
DEVICE void bring(const kernel_args &a, smem_layout &smem, const array &from,
                  const int32_t (&moves)[2], uint8_t (&stages)[STAGES][BYTES],
                  uint64_t (&full)[STAGES], uint64_t (&empty)[STAGES]) {
    cursor kv = {0, 0};
#if IS_RAW
    raw_rows raw = raw_rows_of(from, smem.raw[IS_K], smem.raw_full[IS_K]);
#endif
#if VARIANT_GENERAL
    uint32_t tiles = 0; /* of the mask, so far */
#endif
    for (int32_t n = 0;; ++n) {
        const work_tile &t = smem.tiles[n % TILE_SLOTS];
        mbarrier_wait(smem_address(&smem.tile_full[n % TILE_SLOTS]), n / TILE_SLOTS & 1);
        if (t.last) return;
        const int32_t blocks = t.end - t.begin;
#if IS_RAW
        raw.head = (int64_t)element(from, t.b, t.h_k, t.k, 0);
        const int32_t rows = (int32_t)from.shape[2] - t.k;
#endif
#if VARIANT_GENERAL
        /* A tile with keys has a stage even if its mask hides them all: the warpgroups wait for the
         * tag that says so. */
        const bool bits = a.scores.mask == BITS;
        block_walk walk = {(uint32_t)t.end, ~0u};
        int32_t found = bits ? next_block(a.scores, t.score, walk, t.row, t.begin) : 0;
#endif
        bool more = blocks > 0;
#pragma unroll 1
        for (int32_t i = 0; more; ++i, advance(kv)) {
            int32_t block = key_block(t, i);
            more = i + 1 < blocks;
#if VARIANT_GENERAL
            uint32_t tag = 0;
            if (bits) {
                block = found;
                if (IS_K) tag = block_tag(a.scores, t, walk, block);
                if (block >= 0) found = next_block(a.scores, t.score, walk, t.row, t.begin);
                more = block >= 0 && found >= 0;
            }
#endif
            mbarrier_wait(smem_address(&empty[kv.stage]), kv.parity ^ 1);
#if VARIANT_GENERAL
            if (IS_K && bits && threadIdx.x % 32 == 0)
                *(volatile uint32_t *)&smem.tags[kv.stage] = more ? tag : tag | TAG_LAST;
            if (block < 0) {
                mbarrier_arrive(smem_address(&full[kv.stage]));
                continue;
            }
#endif
#if IS_RAW
            const int32_t first = block * BLOCK_N, next = key_block(t, i + 1) * BLOCK_N;
            load_raw<BLOCK_N>(raw, smem_address(stages[kv.stage]), first, rows - first, next,
                              more ? rows - next : 0, smem_address(&full[kv.stage]));
#else
            load<BLOCK_N, COLUMNS, 2 - IS_K>(a, smem_address(stages[kv.stage]), from,
                                             t.k + block * BLOCK_N, t.h_k, t.b, moves,
                                             smem_address(&full[kv.stage]), KV_POLICY);
#endif
#if VARIANT_GENERAL
            if (IS_K && a.scores.tiles && threadIdx.x % 32 == 0)
                bring_mask(a, smem, t, block * BLOCK_N, tiles);
#endif
        }
        leave_tile(smem, n);
    }
}

DEVICE void bring_k(const kernel_args &a, smem_layout &smem) {
    bring<true, D>(a, smem, a.k, a.moves[1], smem.k, smem.k_full, smem.k_empty);
}

DEVICE void bring_v(const kernel_args &a, smem_layout &smem) {
    bring<false, DV>(a, smem, a.v, a.moves[2], smem.v, smem.v_full, smem.v_empty);
}

#endif
