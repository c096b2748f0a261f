/* sparse_choice.h - which variant runs attention to lists of keys, and its grid: pure functions of
 * the request.
 *
 * Plain C, no CUDA: backend.cu dispatches with it, the tests compile it with gcc.
 */
#ifndef FASTATTN_SM90_SPARSE_CHOICE_H
#define FASTATTN_SM90_SPARSE_CHOICE_H

#include "mask.h"
#include "sm90/sparse_columns.h"
#include "sparse.h"

/* Where setup.py was asked for some of them alone, a copy of the table comes first on the path. */
static const fa_sparse_variant fa_sparse_variants[] = {
#define FA_VARIANT(name_, ...) {.name = #name_, __VA_ARGS__},
#include "sm90/sparse.def"
#undef FA_VARIANT
    {.name = 0}, /* the end */
};

enum { FA_SPARSE_VARIANTS = sizeof fa_sparse_variants / sizeof fa_sparse_variants[0] - 1 };

static inline int32_t fa_sparse_group(const fa_what *w) { return w->hk ? w->hq / w->hk : 1; }

/* The variant's index in a table, or -1: the least head size, and of its tiles, which come by size,
 * the first that holds a block's rows, or the last. */
static inline int32_t fa_choose_listed(const fa_sparse_variant *table, int32_t count,
                                       const fa_what *w, const fa_lists *l) {
    const int64_t rows = (int64_t)l->q_block * fa_sparse_group(w);
    int32_t best = -1;
    for (int32_t i = 0; i < count; ++i) {
        const fa_sparse_variant *v = &table[i], *b = &table[best < 0 ? 0 : best];
        if (v->dtype != w->dtype || v->d < w->d || v->d < w->dv) continue;
        if (best < 0 || (v->d == b->d && v->rows > b->rows && rows > b->rows)) best = i;
    }
    return best;
}

static inline int32_t fa_choose_sparse_variant(const fa_sparse *s) {
    return fa_choose_listed(fa_sparse_variants, FA_SPARSE_VARIANTS, &s->forward.what, &s->lists);
}

/* Blocks of queries of a head. Of packed sequences those that there may be, whether or not the
 * caller has lists for as many: who has none sees no list. */
static inline int64_t fa_sparse_blocks(const fa_params *p, const fa_lists *l) {
    if (!p->varlen.cu_q) return fa_q_blocks(l, p->what.sq);
    return (int64_t)p->varlen.total_q / l->q_block + p->what.b;
}

/* Tiles of a block. */
static inline int32_t fa_sparse_tiles(const fa_what *w, const fa_lists *l, int32_t rows) {
    return (int32_t)(((int64_t)l->q_block * fa_sparse_group(w) + rows - 1) / rows);
}

/* Blocks of the grid. */
static inline int64_t fa_sparse_grid(const fa_params *p, const fa_lists *l, int32_t rows) {
    const int64_t b = p->varlen.cu_q ? 1 : p->what.b;
    return b * p->what.hk * fa_sparse_blocks(p, l) * fa_sparse_tiles(&p->what, l, rows);
}

#endif
