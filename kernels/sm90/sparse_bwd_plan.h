/* sparse_bwd_plan.h - which variant computes gradients of attention to lists of keys, and what lies
 * in its workspace: pure functions of the request. Plain C, compiled by gcc and nvcc alike.
 */
#ifndef FASTATTN_SM90_SPARSE_BWD_PLAN_H
#define FASTATTN_SM90_SPARSE_BWD_PLAN_H

#include "sm90/sparse_choice.h"

static const fa_sparse_variant fa_sparse_bwd_variants[] = {
#define FA_VARIANT(name_, ...) {.name = #name_, __VA_ARGS__},
#include "sm90/sparse_bwd.def"
#undef FA_VARIANT
    {.name = 0}, /* the end */
};

enum {
    FA_SPARSE_BWD_VARIANTS = sizeof fa_sparse_bwd_variants / sizeof fa_sparse_bwd_variants[0] - 1,
    FA_SPARSE_BWD_BLOCKS = 264, /* of the grid that deterministic sums are shared among, about: each
                                 * part of a head's tiles has sums of its own */
    FA_SPARSE_BWD_PARTS = 8,    /* of a head, at most */
};

static inline int32_t fa_choose_sparse_bwd_variant(const fa_sparse_backward *r) {
    return fa_choose_listed(fa_sparse_bwd_variants, FA_SPARSE_BWD_VARIANTS,
                            &r->attention.forward.what, &r->lists);
}

/* Offsets and sizes in floats. */
typedef struct fa_sparse_bwd_plan {
    int64_t delta;         /* dout . out - dlse, of each row of lse */
    int64_t dk, dv, gates; /* sums; gates: of each head's own list */
    int64_t of_gates;      /* 0: dgate is as large, and takes the sums itself */
    int64_t of_part;       /* dk and dv of one part */
    int64_t floats;
    int32_t dk_pitch, dv_pitch; /* of a key's row */
    int64_t tiles;              /* of a head */
    int32_t parts;              /* whose tiles have their order: blocks of a head, and sums */
    int32_t sums;               /* 1: all tiles add to the same, in any order */
} fa_sparse_bwd_plan;

static inline int64_t fa_sparse_lines(int64_t floats) { return (floats + 63) / 64 * 64; }

static inline fa_sparse_bwd_plan fa_sparse_bwd_make(const fa_sparse_backward *r, int32_t rows) {
    const fa_params *p = &r->attention.forward;
    const fa_what *w = &p->what;
    const int64_t heads = w->k.shape[0] * w->hk, keys = heads * w->k.shape[2];
    fa_sparse_bwd_plan at = {0};
    at.tiles = fa_sparse_blocks(p, &r->lists) * fa_sparse_tiles(w, &r->lists, rows);
    at.sums = 1;
    if (r->attention.deterministic && heads) {
        int64_t parts = FA_SPARSE_BWD_BLOCKS / heads;
        parts = parts < 1 ? 1 : parts > FA_SPARSE_BWD_PARTS ? FA_SPARSE_BWD_PARTS : parts;
        at.sums = (int32_t)(parts < at.tiles ? parts : at.tiles ? at.tiles : 1);
    }
    at.parts = r->attention.deterministic ? at.sums : (int32_t)at.tiles;
    at.dk_pitch = (w->d + 7) / 8 * 8, at.dv_pitch = (w->dv + 7) / 8 * 8;
    at.floats = fa_sparse_lines(w->q.shape[0] * w->hq * w->q.shape[2]);
    at.dk = at.floats;
    const int64_t of_dk = r->attention.dk.data ? fa_sparse_lines(keys * at.dk_pitch) : 0;
    at.dv = at.dk + of_dk;
    at.of_part = of_dk + (r->attention.dv.data ? fa_sparse_lines(keys * at.dv_pitch) : 0);
    at.floats += at.of_part * at.sums;
    at.gates = at.floats;
    const fa_tensor *g = &r->dgate, *e = &r->lists.entries;
    if (g->data && (g->shape[0] != e->shape[0] || g->shape[1] != e->shape[1]))
        at.of_gates = e->shape[0] * e->shape[1] * e->shape[2] * e->shape[3];
    at.floats += fa_sparse_lines(at.of_gates);
    return at;
}

#endif
