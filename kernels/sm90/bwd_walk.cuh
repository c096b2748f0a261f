/* bwd_walk.cuh - the blocks of rows that a work tile walks over: where they lie in the workspace
 * and, of general variants, which of those that the intervals leave a bool mask does not hide.
 *
 * There the producer's warps find them in the packed mask's map, 32 blocks at a time, a lane each,
 * and say in each stage which block it holds; the MMA warpgroups follow.
 */
#ifndef FASTATTN_SM90_BWD_WALK_CUH
#define FASTATTN_SM90_BWD_WALK_CUH

#include "common/compiler.cuh"
#include "sm90/bwd_args.cuh"
#include "sm90/bwd_smem.h"
#include "sm90/ptx.cuh"

/* This block's place in its cluster, and where a cluster's keys begin, of a tile's own. */
DEVICE int32_t pair_rank() { return PAIRED ? blockIdx.x % 2 : 0; }
DEVICE int32_t pair_key(const work_tile &t) { return t.key - pair_rank() * BLOCK_N; }
/* The other block's first key. */
DEVICE int32_t other_key(const work_tile &t) { return t.key + (pair_rank() ? -BLOCK_N : BLOCK_N); }

/* Tile i, once it is known; place: i % 2. */
DEVICE const work_tile &next_tile(smem_layout &smem, uint32_t i, uint32_t place) {
    if (STAYS) mbarrier_wait(smem_address(&smem.tile_full[place]), i / 2 % 2);
    return smem.tile[place];
}

/* Which rows see a tile's keys: of its sequence's lengths. */
DEVICE void find_seen(work_tile &t) {
    const fa_interval keys = {t.key, t.key + BLOCK_N};
    t.some = fa_rows_seeing_some(t.lengths, fa_interval{pair_key(t), pair_key(t) + TILE_N});
    t.all = fa_rows_seeing_all(t.lengths, keys);
    t.rows = fa_rows_seeing_some(t.lengths, fa_interval{0, t.lengths.sk});
    t.keys.begin = t.keys.end = 0;
    if (t.rows.begin < t.rows.end) {
        t.keys.begin = fa_row_interval(t.lengths, t.rows.begin).begin;
        t.keys.end = fa_row_interval(t.lengths, t.rows.end - 1).end;
    }
    t.begin = t.some.begin / BLOCK_M;
    t.end = t.some.begin < t.some.end ? (t.some.end + BLOCK_M - 1) / BLOCK_M : t.begin;
    t.first = t.begin;
}

/* Where rows of a query head are in the workspace. */
DEVICE int32_t first_row_of(const bwd_args &a, const work_tile &t, int32_t h) {
    return ((t.batch * a.hq + h) * a.m_blocks + t.first_block) * BLOCK_M;
}

/* The number of its block among dQ's sums. */
DEVICE int32_t sums_of(const bwd_args &a, const work_tile &t, const walk_step &at) {
    return uniform((t.batch * a.hq + at.h) * a.m_blocks + t.first_block + at.m);
}

/* How much further on dQ's sums of block m lie than those of the block before, where none is
 * passed by. */
DEVICE int32_t next_sums(const bwd_args &a, int32_t m, int32_t begin, int32_t end, int32_t first) {
    return 1 + (m == first ? a.m_blocks : 0) - (m == begin ? end - begin : 0);
}

#if VARIANT_GENERAL
/* Of 32 blocks of rows a bit each: whether some scores of it are seen, whether all are. */
struct seen_blocks {
    uint32_t some, all;
};

/* Blocks from m on. Where keys of a block of the map are shared out to several tiles, a block of
 * rows may be visited for another tile's keys; where tiles take turns, all are. By whole warps. */
DEVICE seen_blocks blocks_seen(const bwd_args &a, const work_tile &t, int32_t h, int32_t m) {
    const score_args &c = a.scores;
    if (c.mask != BITS) return seen_blocks{~0u, ~0u};
    constexpr int GROUPS = BLOCK_M / FA_BITS_ROWS;
    const int64_t plane = fa_bits_plane(&c.bits, t.b, h);
    const int32_t own = m + threadIdx.x % 32, block = t.key / FA_BITS_KEYS;
    uint32_t some = 0, all = ~0u;
#pragma unroll
    for (int i = 0; i < GROUPS; ++i) {
        const int32_t group = min(GROUPS * own + i, c.bits.groups - 1);
        const uint32_t *words = (const uint32_t *)(c.map + fa_map_at(&c.bits, plane, block / 32,
                                                                     own < t.end ? group : 0));
        some |= load_u32(words), all &= load_u32(words + 1);
    }
    const uint32_t bit = 1u << block % 32;
    return seen_blocks{__ballot_sync(~0u, (some & bit) != 0 || a.turns),
                       __ballot_sync(~0u, (all & bit) != 0)};
}

/* The producer's next stage holds this block; m < 0: there are no more. */
DEVICE void say_step(smem_layout &smem, uint32_t stage, int32_t h, int32_t m, bool whole) {
    if (threadIdx.x == MMA_THREADS) smem.steps[stage] = walk_step{h, m, whole};
}

/* What the stage holds, once it is full. */
DEVICE walk_step next_step(smem_layout &smem, uint32_t stage, uint32_t parity) {
    mbarrier_wait(smem_address(&smem.q_full[stage]), parity);
    const walk_step &s = smem.steps[stage];
    return walk_step{uniform(s.h), uniform(s.m), uniform(s.whole)};
}
#endif

#endif
