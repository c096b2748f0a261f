/* schedule.h - which tile a block works on next: stop 6 of 6, the part without CUDA.
 *
 * Plain C, compiled by gcc and nvcc alike and tested on the host: over all rounds and blocks every
 * tile comes exactly once. A tile is BLOCK_M query rows of one head; there are m_blocks of them per
 * head and `heads` = b * hq heads, numbered b * hq + h.
 *
 * Blocks take tiles in rounds, one each. Where all tiles are equally long, a head's tiles are
 * neighbours: they run together and read K and V from the L2. Under a causal mask the heads come in
 * sections that keep their K and V in the L2; in a section the longest tiles come first, and every
 * second round runs backwards, so that a block that had the longest tile of one round gets the
 * shortest of the next. A section starts with a fresh round: its rounds must pair up (a round that
 * two sections share costs up to 27 % by simulation; this, 1 to 3 %).
 */
#ifndef FASTATTN_SCHEDULE_H
#define FASTATTN_SCHEDULE_H

#include <stdint.h>

#include "../csrc/mask.h"

/* Division of 0 .. 2^31 - 1 by a number known beforehand, in 3 instructions in place of some 35:
 * what a block decides between two tiles must not push what it computes out of the instruction
 * cache. (Granlund and Montgomery, 1994: 2^(31 + shift) / by, rounded up, is off by less than that
 * takes.) */
typedef struct fa_divisor {
    uint32_t factor;
    int32_t shift;
} fa_divisor;

FA_INLINE fa_divisor fa_divisor_make(int32_t by) {
    fa_divisor d = {0, 0};
    while ((int64_t)1 << d.shift < by) ++d.shift;
    d.factor = (uint32_t)((((uint64_t)1 << (31 + d.shift)) + (uint32_t)by - 1) / (uint32_t)by);
    return d;
}
FA_INLINE int32_t fa_divide(int32_t x, fa_divisor by) {
    return (int32_t)((uint64_t)(uint32_t)x * by.factor >> (31 + by.shift));
}

typedef struct fa_schedule {
    int32_t tiles, m_blocks, heads;
    int32_t section; /* heads per section; all heads in one where tiles are equally long */
    int32_t rest;    /* heads of the last section */
    int32_t rounds;  /* of a section */
    int32_t causal;  /* tiles grow with their number: longest first, every second round backwards */
    fa_divisor by_m_blocks, by_section, by_rest, by_rounds, by_tiles; /* by_tiles: of a section */
} fa_schedule;

typedef struct fa_tile {
    int32_t head, m_block;
} fa_tile;

/* About half of an L2 of 50 or 60 MB: its two sides both keep what all SMs read. */
enum { FA_SECTION_BYTES = 32 << 20, FA_FEW_TILES = 8 };

/* Rounds of `blocks` tiles, if each section of `heads` heads starts with a fresh one. */
FA_INLINE int64_t fa_schedule_rounds(const fa_schedule *s, int64_t heads, int32_t blocks,
                                     int32_t even) {
    int64_t of_all = heads * s->m_blocks, of_rest = s->heads % heads * s->m_blocks;
    int64_t step = even ? 2 * (int64_t)blocks : blocks;
    return (s->heads / heads * ((of_all + step - 1) / step) + (of_rest + step - 1) / step) *
           (even ? 2 : 1);
}

/* The heads of a section: `heads` is what the L2 keeps.
 *
 * Where heads have few tiles, K and V are read from memory about as fast as they can be, and it
 * matters that this goes on evenly: as few heads at a time as lose no round, so that long and short
 * tiles run side by side, and the first tiles of a head wait for the same K and V. Elsewhere: the
 * least section of `heads` or more whose rounds are nearly all full, and even, for an odd last one
 * would find nobody to make up for it; all heads if there is none. */
FA_INLINE int32_t fa_schedule_section(const fa_schedule *s, int64_t heads, int32_t blocks) {
    int64_t least = ((int64_t)s->tiles + blocks - 1) / blocks;
    if (s->m_blocks <= FA_FEW_TILES)
        for (int64_t few = 1; few <= heads && few < s->heads; ++few)
            if (fa_schedule_rounds(s, few, blocks, 0) == least) return (int32_t)few;
    for (int64_t end = heads + 64; heads < s->heads && heads < end; ++heads)
        if (100 * fa_schedule_rounds(s, heads, blocks, 1) * blocks <= 104 * (int64_t)s->tiles)
            return (int32_t)heads;
    return s->heads;
}

FA_INLINE fa_schedule fa_schedule_make(const fa_what *w, const fa_masks *m, int32_t block_m,
                                       int32_t blocks) {
    fa_schedule s;
    s.m_blocks = (w->sq + block_m - 1) / block_m;
    s.heads = s.section = w->b * w->hq;
    s.tiles = s.m_blocks * s.heads;
    s.causal = m->flags & FA_HAS_RIGHT && !(m->flags & FA_HAS_LEFT) && s.m_blocks > 1;
    if (s.causal) {
        int64_t bytes = (int64_t)w->sk * (w->d + w->dv) * 2; /* of one K/V head */
        int64_t heads = bytes ? FA_SECTION_BYTES / bytes * (w->hq / w->hk) : s.heads;
        s.section = fa_schedule_section(&s, heads < 1 ? 1 : heads, blocks);
    }
    s.rounds = (int32_t)(((int64_t)s.section * s.m_blocks + blocks - 1) / blocks);
    s.rest = (s.heads - 1) % s.section + 1;
    s.by_m_blocks = fa_divisor_make(s.m_blocks);
    s.by_section = fa_divisor_make(s.section);
    s.by_rest = fa_divisor_make(s.rest);
    s.by_rounds = fa_divisor_make(s.rounds);
    s.by_tiles = fa_divisor_make(s.section * s.m_blocks);
    return s;
}

/* The tile of the first of a block's rounds from *round on that has one for it; moves *round past
 * it. One past the last tile: the block is done. */
FA_INLINE int32_t fa_schedule_next(const fa_schedule *s, int32_t blocks, int32_t block,
                                   int32_t *round) {
    for (;;) {
        int32_t r = (*round)++, n = fa_divide(r, s->by_rounds); /* the n-th section */
        int32_t first = n * s->section;
        if (first >= s->heads) return s->tiles;
        int32_t heads = s->heads - first < s->section ? s->rest : s->section;
        int32_t place = s->causal && r & 1 ? blocks - 1 - block : block;
        int64_t tile = (int64_t)(r - n * s->rounds) * blocks + place;
        if (tile < (int64_t)heads * s->m_blocks) return first * s->m_blocks + (int32_t)tile;
    }
}

FA_INLINE fa_tile fa_schedule_tile(const fa_schedule *s, int32_t tile) {
    fa_tile t;
    if (!s->causal) {
        t.head = fa_divide(tile, s->by_m_blocks);
        t.m_block = tile - t.head * s->m_blocks;
        return t;
    }
    int32_t first = fa_divide(tile, s->by_tiles) * s->section;
    int32_t whole = s->heads - first >= s->section, heads = whole ? s->section : s->rest;
    int32_t place = tile - first * s->m_blocks;
    int32_t row = fa_divide(place, whole ? s->by_section : s->by_rest);
    t.head = first + place - row * heads;
    t.m_block = s->m_blocks - 1 - row;
    return t;
}

#endif
