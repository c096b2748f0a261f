/* fwd_scheduler.cuh - the thread that decides what comes next: it describes work tiles to the
 * others.
 *
 * It runs ahead by up to TILE_SLOTS tiles, divisions and all, and reads the votes of the tiles that
 * are done: a tile whose offsets did not hold for some warpgroup comes again, for that warpgroup.
 */
#ifndef FASTATTN_SM90_FWD_SCHEDULER_CUH
#define FASTATTN_SM90_FWD_SCHEDULER_CUH

#include "common/stream.cuh"
#include "sm90/fwd_args.cuh"
#include "sm90/fwd_pipeline.cuh"
#include "sm90/fwd_smem.h"
#include "sm90/fwd_visibility.cuh"
#if VARIANT_GENERAL
#include "sm90/fwd_scores.cuh"
#endif

/* Where the tile of this number lies. */
DEVICE void locate(const kernel_args &a, work_tile &t, int32_t number) {
    fa_tile tile;
    if (a.packed.counts) {
        fa_packed_entry entry = a.packed.entries[fa_divide(number, a.by_hq)];
#if IS_PAGED
        fa_sequence s =
            fa_packed_cached(&a.packed, &a.varlen, &a.masks, entry.sequence, a.sq, a.sk);
#else
        fa_sequence s =
            fa_packed_sequence(&a.packed, &a.varlen, &a.masks, entry.sequence, a.sq, a.sk);
#endif
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
#if IS_PAGED
    t.keys = INT32_MAX; /* a block's rows past the last key are other keys */
#endif
    t.row = tile.m_block * BLOCK_M;
}

/* `some` of a warpgroup whose rows see nothing, or are not computed: see_interval() says NONE. */
static constexpr fa_interval NO_KEYS = {0, 0};

/* How many blocks of the tile a warpgroup skips, and how many it takes one by one before its loop.
 * What a bool mask hides is not known here: general variants ask for each block. */
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

/* How the warpgroups voted on the n-th tile, once all have left it. */
DEVICE uint32_t read_vote(smem_layout &smem, int32_t n) {
    wait_tile_left(smem, n);
    volatile uint32_t &votes = smem.votes[n % TILE_SLOTS];
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
 * Only who computes a tile depends on that, never its bits. `n`: the place among
 * this block's tiles that it is for. */
DEVICE int32_t next_tile(const kernel_args &a, smem_layout &smem, int32_t n, int32_t *round) {
    int32_t *claimed = claims(a);
    if (!claimed) return fa_schedule_next(&a.schedule, gridDim.x, blockIdx.x, round);
    if (n == 0) return blockIdx.x; /* the first gridDim.x are taken, and claims begin behind them */
    int32_t left = n - a.ahead;    /* the tile that must be done with */
    if (left >= 0)
        mbarrier_wait(smem_address(&smem.tile_empty[left % TILE_SLOTS]), left / TILE_SLOTS & 1);
    return gridDim.x + atomicAdd(claimed, 1);
}

DEVICE int32_t number_of_tiles(const kernel_args &a) {
    return a.packed.counts ? a.packed.counts->entries * a.hq : a.schedule.tiles;
}

/* The first tile, before there are barriers, and in most calls before the stream's last kernel has
 * ended: no load starts without it. */
DEVICE int32_t first_tile(const kernel_args &a, smem_layout &smem, int32_t *round) {
    int32_t tile = next_tile(a, smem, 0, round);
    if (tile < number_of_tiles(a)) describe(a, smem.tiles[0], tile);
    return tile;
}

/* Decides what comes next; runs ahead of the others, divisions and all. A tile ends when the
 * warpgroups meet the one behind it, so the last votes need one, of no rows, to be read. `tile`,
 * `round`: what first_tile() said. */
DEVICE void schedule(const kernel_args &a, smem_layout &smem, int32_t tile, int32_t round) {
    int32_t read = 0;                /* tiles whose votes have been */
    int32_t flush = REDOES ? 0 : -1; /* the tile of no rows; 0: not yet */
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

#endif
