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
 * shortest of the next. A section starts with a fresh round.
 */
#ifndef FASTATTN_SCHEDULE_H
#define FASTATTN_SCHEDULE_H

#include <stdint.h>

#include "mask.h"

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

/* What a block computes of a section of so many heads, whose first round runs forwards or
 * backwards: twice a tile's blocks on the diagonal, and one for its start and end. */
FA_INLINE int64_t fa_section_work(int32_t m_blocks, int32_t heads, int32_t blocks, int32_t block,
                                  int32_t backwards) {
    const int32_t tiles = heads * m_blocks;
    int64_t work = 0;
    for (int32_t first = 0; first < tiles; first += blocks, backwards ^= 1) {
        int32_t tile = first + (backwards ? blocks - 1 - block : block);
        if (tile < tiles) work += 2 * (m_blocks - tile / heads) + 1;
    }
    return work;
}

/* How much more than the mean the busiest block computes, of 16 that are asked. */
FA_INLINE double fa_section_excess(const fa_schedule *s, int32_t heads, int32_t blocks) {
    const int32_t rounds = (heads * s->m_blocks + blocks - 1) / blocks;
    const int32_t sections = s->heads / heads, rest = s->heads % heads;
    const int32_t odd = rounds % 2 ? sections / 2 : 0; /* sections that start backwards */
    int64_t most = 0;
    for (int32_t i = 0; i < 16; ++i) {
        int32_t block = i * (blocks - 1) / 15;
        int64_t work = (sections - odd) * fa_section_work(s->m_blocks, heads, blocks, block, 0);
        if (odd) work += odd * fa_section_work(s->m_blocks, heads, blocks, block, 1);
        if (rest) work += fa_section_work(s->m_blocks, rest, blocks, block, rounds * sections % 2);
        most = work > most ? work : most;
    }
    return (double)most * blocks / ((double)s->tiles * (s->m_blocks + 2)) - 1;
}

/* Heads of a section: as many as fit 1 to 4 rounds, or all, whichever loses least. What is lost is
 * the time that blocks wait for the busiest one, and that of reading K and V once more where a
 * section's do not stay in the L2: the more, the fewer tiles of a head run at a time (measured: 400
 * heads of 12 tiles in one section take 1.9 times as long, 32 of 32 tiles 10 % longer, 8 of 128 no
 * longer). Short tiles wait for memory, which should be asked evenly; long ones share what was
 * read. `bytes`: K and V of a query head; `share`: key heads to a query head. */
FA_INLINE int32_t fa_schedule_section(const fa_schedule *s, double bytes, double share,
                                      int32_t block_m, int32_t blocks) {
    int32_t best = s->heads;
    double least = 1e9;
    for (int32_t rounds = s->tiles > blocks ? 4 : 0; rounds >= 0; --rounds) {
        const int32_t heads = rounds ? rounds * blocks / s->m_blocks : s->heads;
        if (heads < 1 || (rounds && heads >= s->heads)) continue;
        const int32_t many = !rounds && s->tiles / blocks >= 16; /* rounds, that even out */
        const double size = heads * bytes / FA_SECTION_BYTES;
        const double at_once = heads * share * 128 / ((double)blocks * block_m);
        double cost = many ? 0.01 : fa_section_excess(s, heads, blocks);
        cost += (s->m_blocks <= FA_FEW_TILES ? 0.04 : -0.01) * (size < 1 ? size : 1);
        if (at_once > 0.03 && size > 1)
            cost += 0.4 * (at_once - 0.03) * (size < 1.25 ? 4 * (size - 1) : 1);
        if (cost < least) best = heads, least = cost;
    }
    return best;
}

FA_INLINE fa_schedule fa_schedule_make(const fa_what *w, const fa_masks *m, int32_t block_m,
                                       int32_t blocks) {
    fa_schedule s;
    s.m_blocks = (w->sq + block_m - 1) / block_m;
    s.heads = s.section = w->b * w->hq;
    s.tiles = s.m_blocks * s.heads;
    s.causal = m->flags & FA_HAS_RIGHT && !(m->flags & FA_HAS_LEFT) && s.m_blocks > 1;
    if (s.causal) {
        const double share = (double)w->hk / w->hq, bytes = share * w->sk * (w->d + w->dv) * 2;
        s.section = fa_schedule_section(&s, bytes, share, block_m, blocks);
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
