/* fwd_tags.cuh - which blocks of keys a general variant's tile has: their order and tags.
 *
 * What a bool mask hides the scheduler does not know. The loaders of K and V walk over its map, and
 * leave out what is hidden from all rows of the tile; K's writes a tag beside each stage, by which
 * the warpgroups know which block came. Without a bool mask everybody works out the same tags.
 */
#ifndef FASTATTN_SM90_FWD_TAGS_CUH
#define FASTATTN_SM90_FWD_TAGS_CUH

#include "common/compiler.cuh"
#include "sm90/fwd_args.cuh"
#include "sm90/fwd_pipeline.cuh"
#include "sm90/fwd_smem.h"
#include "sm90/fwd_visibility.cuh"

/* A block's tag: its number from bit 8 on, LAST of its tile, HOLES (keys that no row of the tile
 * sees), and two bits for each warpgroup: how much of it its rows see, as enum visibility counts.
 */
enum { TAG_LAST = 128, TAG_HOLES = 64, TAG_BLOCK = 8 };

/* A walk over the blocks of a tile that a bool mask does not hide, from right to left. */
struct block_walk {
    uint32_t end;                               /* blocks before this one are to come */
    uint32_t word;                              /* of the map, 32 * 128 keys; bits of its blocks: */
    uint32_t some[WARPGROUPS], all[WARPGROUPS]; /* a warpgroup's rows see a key, all keys */
    uint32_t columns[WARPGROUPS];               /* each key is seen by some row */
};

DEVICE uint32_t map_bit(uint32_t block) { return block / (FA_BITS_KEYS / BLOCK_N); }

/* The next block, not before `begin`, that some row of the tile sees, or -1. */
DEVICE int32_t next_block(const score_args &a, const score_tile &t, block_walk &c, uint32_t row,
                          uint32_t begin) {
    constexpr uint32_t BLOCKS = FA_BITS_KEYS / BLOCK_N; /* of a bit */
    while (c.end > begin) {
        uint32_t bit = map_bit(c.end - 1), word = bit / 32;
        if (word != c.word) {
            c.word = word;
#pragma unroll
            for (int w = 0; w < WARPGROUPS; ++w) {
                uint4 map = a.map[fa_map_at(&a.bits, t.plane, word, row / FA_BITS_ROWS + w)];
                c.some[w] = map.x, c.all[w] = map.y, c.columns[w] = map.z;
            }
        }
        uint32_t left = 0;
#pragma unroll
        for (int w = 0; w < WARPGROUPS; ++w) left |= c.some[w];
        left &= ~0u >> (31 - bit % 32);
        uint32_t last = (32 * word + 32 - __clz(left)) * BLOCKS - 1; /* of the bit found */
        c.end = left ? min(c.end - 1, last) : 32 * word * BLOCKS;
        if (left) return c.end >= begin ? (int32_t)c.end : -1;
    }
    return -1;
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

/* The tag of the i-th block of a tile, as a loader would have written it. */
DEVICE uint32_t interval_tag(const work_tile &t, int32_t i, int warpgroup) {
    int32_t block = key_block(t, i), last = i + 1 == t.end - t.begin;
    uint32_t tag = (uint32_t)block << TAG_BLOCK | (last ? TAG_LAST : 0);
    return (uint32_t)uniform(tag | block_visibility(t, block, warpgroup) << 2 * warpgroup);
}

/* The tag of the block of K in the next stage, once it is there. */
DEVICE uint32_t peek_tag(smem_layout &smem, const cursor &kv) {
    mbarrier_wait(smem_address(&smem.k_full[kv.stage]), kv.parity);
    return (uint32_t)uniform(*(volatile int32_t *)&smem.tags[kv.stage]);
}

/* The tag of the next block: the i-th, unless a bool mask hides some. */
DEVICE uint32_t read_tag(const kernel_args &a, smem_layout &smem, const work_tile &t,
                         const cursor &kv, int32_t i, int warpgroup) {
    return a.scores.mask == BITS ? peek_tag(smem, kv) : interval_tag(t, i, warpgroup);
}

DEVICE enum visibility tag_visibility(uint32_t tag, int warpgroup) {
    return (enum visibility)(tag >> 2 * warpgroup & 3);
}

/* How many blocks, from the i-th on, lie side by side and are seen whole, if that one is. */
DEVICE int32_t whole_blocks(const work_tile &t, int32_t i, int32_t block, int warpgroup) {
    int32_t low = i < t.score.split - t.begin ? t.begin : t.score.split;
    int32_t whole = (t.whole[warpgroup].begin + BLOCK_N - 1) / BLOCK_N;
    return uniform(block - max(low, whole) + 1);
}

#endif
