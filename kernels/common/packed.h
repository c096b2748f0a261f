/* packed.h - the tiles of packed sequences: which there are, and in what order they come.
 *
 * Plain C, compiled by gcc and nvcc alike and tested on the host. How long the sequences are, only
 * the device knows. A small kernel (packed.cuh) writes a list into the workspace, one entry per
 * tile of one head, sequence by sequence, those with the most keys first; the forward kernel's
 * blocks claim the tiles of all heads by number, in that order.
 *
 * The hq * m_blocks tiles of a sequence have neighbouring numbers, so that what reads the same K
 * and V runs at the same time. That is why whole sequences are sorted and not tiles: 128 rows that
 * read K and V alone ask for 1.6 times what the memory gives.
 */
#ifndef FASTATTN_PACKED_H
#define FASTATTN_PACKED_H

#include "common/schedule.h"

/* Both written by packed.cuh; `claimed` then grows as blocks take tiles. */
typedef struct fa_packed_counts {
    int32_t entries, claimed;
} fa_packed_counts;

typedef struct fa_packed_entry {
    int32_t sequence; /* b: the rows that belong to no sequence */
    int32_t first;    /* the first of the sequence's entries */
} fa_packed_entry;

typedef struct fa_packed {
    fa_packed_counts *counts; /* in the workspace; NULL: the request is not packed */
    fa_packed_entry *entries; /* (capacity,) */
    int32_t capacity;
    int32_t block_m, b, hq, group;
    int32_t section_keys; /* keys that the L2 keeps, of one head; 0: tiles are equally long */
} fa_packed;

enum {
    FA_PACKED_COUNTS_BYTES = 16, /* the entries' place in the workspace */
    FA_PACKED_CLASSES = 32,      /* of lengths, for the sorting */
};

/* Blocks of `size` rows, at most: each of b sequences, and the rows of none, may have one ragged.
 */
FA_INLINE int64_t fa_packed_blocks(int32_t total, int32_t b, int32_t size) {
    return (int64_t)total / size + b + 1;
}

/* Tiles of one head, at most. */
FA_INLINE int64_t fa_packed_capacity(const fa_varlen *v, int32_t b, int32_t block_m) {
    return fa_packed_blocks(v->total_q, b, block_m);
}

/* Of the workspace; a bool mask is packed behind them (mask_bits.h). None if nothing is packed. */
FA_INLINE int64_t fa_packed_bytes(const fa_varlen *v, int32_t b, int32_t block_m) {
    if (!v->cu_q) return 0;
    int64_t entries = fa_packed_capacity(v, b, block_m);
    return (FA_PACKED_COUNTS_BYTES + entries * (int64_t)sizeof(fa_packed_entry) + 255) / 256 * 256;
}

FA_INLINE fa_packed fa_packed_make(const fa_what *w, const fa_masks *m, const fa_varlen *v,
                                   int32_t block_m, void *workspace) {
    fa_packed p = {(fa_packed_counts *)workspace,
                   (fa_packed_entry *)((char *)workspace + FA_PACKED_COUNTS_BYTES),
                   (int32_t)fa_packed_capacity(v, w->b, block_m),
                   block_m,
                   w->b,
                   w->hq,
                   w->hq / w->hk,
                   0};
    if (m->flags & FA_HAS_RIGHT && !(m->flags & FA_HAS_LEFT))
        p.section_keys = FA_SECTION_BYTES / ((w->d + w->dv) * 2);
    return p;
}

/* Sequence b of the list: as in fa_find_sequence; the one past the last is the rows of none. */
FA_INLINE fa_sequence fa_packed_sequence(const fa_packed *p, const fa_varlen *v, const fa_masks *m,
                                         int32_t b, int32_t sq, int32_t sk) {
    if (b < p->b) return fa_find_sequence(v, m, b, sq, sk);
    fa_sequence rest = {{0, 0, 0, 0, 0, 0}, 0, v->total_q, 0};
    rest.q = fa_first_row(v->cu_q, v->cu_q_stride, p->b, v->total_q);
    return rest;
}

/* The same where the keys are a cache's. */
FA_INLINE fa_sequence fa_packed_cached(const fa_packed *p, const fa_varlen *v, const fa_masks *m,
                                       int32_t b, int32_t sq, int32_t sk) {
    return b < p->b ? fa_find_cached(v, m, b, sq, sk) : fa_packed_sequence(p, v, m, b, sq, sk);
}

/* The last of b >= 1 sequences that starts at this row of q or before: it has it, if any has. */
FA_INLINE int32_t fa_packed_at(const fa_varlen *v, int32_t b, int32_t row) {
    int32_t first = 0;
    for (int32_t end = b; end - first > 1;) {
        int32_t middle = first + (end - first) / 2;
        if (fa_first_row(v->cu_q, v->cu_q_stride, middle, v->total_q) <= row)
            first = middle;
        else
            end = middle;
    }
    return first;
}

FA_INLINE int32_t fa_packed_m_blocks(const fa_packed *p, fa_sequence s) {
    return (s.q_end - s.q + p->block_m - 1) / p->block_m;
}

/* Classes of lengths, the longest first, two to a factor of two: a tile's work is known no better
 * before its mask is, and one that starts in time need not be the longest. */
FA_INLINE int32_t fa_packed_class(int32_t sk) {
    int32_t last = FA_PACKED_CLASSES - 1;
    for (; sk >= 128 && last > 3; sk >>= 1) last -= 2;
    return sk >= 96 ? last - 2 : sk >= 64 ? last - 1 : last;
}

/* A block of rows among fa_packed_blocks(), where each sequence has whole blocks of its own. Those
 * of sequence n are from cu[n] / size + n on: rounded down, for n more than all before it need. */
typedef struct fa_packed_block {
    int32_t b;          /* its sequence; the number of them: the rows of none */
    int32_t first, end; /* the sequence's rows */
    int32_t row;        /* of the sequence, the block's first; there may be none from it on */
} fa_packed_block;

FA_INLINE int32_t fa_packed_first(const int32_t *cu, int64_t stride, int32_t n, int32_t total,
                                  int32_t size) {
    return fa_first_row(cu, stride, n, total) / size + n;
}

FA_INLINE fa_packed_block fa_packed_find(const int32_t *cu, int64_t stride, int32_t b,
                                         int32_t total, int32_t size, int32_t block) {
    int32_t n = 0;
    for (int32_t end = b + 1; end - n > 1;) {
        const int32_t middle = n + (end - n) / 2;
        if (fa_packed_first(cu, stride, middle, total, size) <= block)
            n = middle;
        else
            end = middle;
    }
    fa_packed_block found = {n, fa_first_row(cu, stride, n, total), total, 0};
    if (n < b) found.end = fa_clamp(cu[(n + 1) * stride], found.first, total);
    found.row = (block - found.first / size - n) * size;
    return found;
}

/* Sums of tiles of offsets that make no sense may run over: they stay at the list's end. */
FA_INLINE int32_t fa_packed_add(int32_t a, int32_t b, int32_t capacity) {
    return b < capacity - a ? a + b : capacity;
}

/* The tile of this number among those of one sequence with m_blocks >= 1. Under a causal mask the
 * longest tiles of a section of heads come first, side by side; elsewhere one head after another.
 */
FA_INLINE fa_tile fa_packed_tile(const fa_packed *p, int32_t number, int32_t m_blocks, int32_t sk) {
    int32_t section = 1;
    if (p->section_keys) {
        int32_t heads = p->section_keys / (sk > 1 ? sk : 1); /* of K and V */
        section = fa_clamp(heads, 1, p->hq / p->group) * p->group;
    }
    int32_t first = number / (section * m_blocks) * section;
    int32_t heads = p->hq - first < section ? p->hq - first : section;
    int32_t place = number - first * m_blocks;
    fa_tile t = {first + place % heads, m_blocks - 1 - place / heads};
    return t;
}

#endif
