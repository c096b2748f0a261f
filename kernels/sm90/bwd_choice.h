/* bwd_choice.h - which variant of bwd.def runs a backward request, and its workspace. Plain C. */
#ifndef FASTATTN_SM90_BWD_CHOICE_H
#define FASTATTN_SM90_BWD_CHOICE_H

#include "backward.h"
#include "common/empty.h"
#include "common/general.h"
#include "common/mask_bits.h"
#include "common/packed.h"
#include "common/schedule.h"
#include "sm90/loads.h"

typedef struct fa_bwd_variant {
    const char *name;
    fa_dtype dtype;
    int32_t d, dv;   /* the largest head sizes it takes; smaller ones are zero-padded */
    int32_t block_m; /* query rows per step of the loop */
    int32_t block_n; /* keys of a tile: 64 for each warpgroup, or the same 64 for all */
    int32_t warpgroups;
    int32_t stages;        /* of Q and dO in shared memory */
    int32_t mma_registers; /* of a thread of an MMA warpgroup */
    int32_t general;       /* 1: it changes scores */
    int32_t strided;       /* 1: arrays that the copy engine does not take, by threads */
    int32_t cluster;       /* 2: blocks of neighbouring keys in pairs (bwd_pair.cuh) */
} fa_bwd_variant;

static const fa_bwd_variant fa_bwd_variants[] = {
#define FA_VARIANT(name_, ...) {.name = #name_, __VA_ARGS__},
#include "sm90/bwd.def"
#undef FA_VARIANT
    {.name = 0},
};

enum { FA_BWD_VARIANTS = sizeof fa_bwd_variants / sizeof fa_bwd_variants[0] - 1 };

/* Whether the copy engine takes all that is loaded. (There may be no dout: zeros.) */
static inline int32_t fa_bwd_has_boxes(const fa_backward *r) {
    const fa_what *w = &r->forward.what;
    return fa_tma_takes(&w->q, 2) && fa_tma_takes(&w->k, 2) && fa_tma_takes(&w->v, 2) &&
           r->dout.data && fa_tma_takes(&r->dout, 2);
}

/* Whether a bool mask is packed before. */
static inline int32_t fa_bwd_packs(const fa_params *p) {
    return p->scores.mask.data && p->scores.mask_dtype == FA_BOOL;
}

/* Whether pairs of blocks are faster, where there are any: half as many sums of dQ, but tiles of
 * twice as many keys, of which few leave more idle. */
static inline int32_t fa_bwd_pairs(const fa_backward *r) {
    const fa_params *p = &r->forward;
    if (r->deterministic || !r->dq.data || p->varlen.cu_q) return 0;
    return !(p->masks.flags & FA_HAS_LEFT) && p->what.sk >= 1024;
}

/* The first of the least padding, or -1. */
static inline int32_t fa_choose_bwd_variant(const fa_backward *r) {
    const fa_what *w = &r->forward.what;
    const int32_t strided = !fa_bwd_has_boxes(r), general = fa_needs_general(&r->forward);
    const int32_t pairs = fa_bwd_pairs(r);
    int32_t best = -1;
    for (int32_t i = 0; i < FA_BWD_VARIANTS; ++i) {
        const fa_bwd_variant *v = &fa_bwd_variants[i];
        if (v->dtype != w->dtype || v->d < w->d || v->dv < w->dv) continue;
        if (v->strided != strided || v->general != general || (v->cluster && !pairs)) continue;
        if (best < 0 || v->d + v->dv < fa_bwd_variants[best].d + fa_bwd_variants[best].dv) best = i;
    }
    return best;
}

/* Columns of a row of dQ's sums: where warpgroups share them out, whole panels for each. */
static inline int32_t fa_bwd_sum_columns(const fa_bwd_variant *v) {
    const int32_t panels = 64 * v->warpgroups;
    return v->block_m == panels ? v->d : (v->d + panels - 1) / panels * panels;
}

/* Whether blocks of keys take turns at dQ's sums (bwd_turns.cuh). */
static inline int32_t fa_bwd_takes_turns(const fa_backward *r) {
    return r->deterministic && r->dq.data;
}

/* Whether tiles of the first keys have the most rows, and how much more pays (measured: 2 to 8 %
 * from 2,048 keys on, a loss of 1 to 5 % at 512). */
static inline int32_t fa_bwd_longest_first(const fa_backward *r) {
    const uint32_t bounds = r->forward.masks.flags & (FA_HAS_LEFT | FA_HAS_RIGHT);
    return bounds == FA_HAS_RIGHT && r->forward.what.sk >= 2048 && !r->forward.varlen.cu_k;
}

/* Key heads whose tiles lie side by side, blocks of keys after blocks of keys: where they wait for
 * each other (bwd_turns.cuh), for the more heads there are, the fewer tiles of each are at work,
 * and begin one after the other; where the longest are to begin first. But their rows of q, dout
 * and dQ's sums are to stay in the L2. */
static inline int32_t fa_bwd_section(const fa_backward *r, int32_t heads, int32_t sum_columns) {
    const fa_what *w = &r->forward.what;
    const double rows = (double)w->sq * (w->hq / w->hk);
    const double fit = FA_SECTION_BYTES / (rows * (2 * (w->d + w->dv) + 4 * sum_columns));
    if (!fa_bwd_takes_turns(r) && !fa_bwd_longest_first(r)) return 1;
    return fit < 1 ? 1 : fit < heads ? (int32_t)fit : heads;
}

/* Where everything lies in the workspace, in floats from its start: lse, delta, dQ's sums, the
 * number of tiles that are taken (4 bytes of 16), turns (4 bytes for each block of rows), and a
 * packed bool mask (mask_bits.h), on 256 bytes of it. */
typedef struct fa_backward_workspace {
    int64_t head; /* rows of a query head, whole blocks; of all packed sequences */
    int64_t delta, sums, taken, turns, mask, floats;
} fa_backward_workspace;

static inline fa_backward_workspace fa_lay_out_backward(const fa_params *p, int32_t block_m,
                                                        int32_t sum_columns) {
    const fa_what *w = &p->what;
    const fa_varlen *v = &p->varlen;
    fa_backward_workspace n = {0, 0, 0, 0, 0, 0, 0};
    if (fa_is_empty(w)) return n;
    n.head = v->cu_q ? fa_packed_blocks(v->total_q, w->b, block_m) * block_m
                     : ((int64_t)w->sq + block_m - 1) / block_m * block_m;
    n.delta = (v->cu_q ? 1 : w->b) * w->hq * n.head;
    n.sums = 2 * n.delta;
    n.taken = n.sums + n.delta * sum_columns;
    n.turns = n.taken + 4;
    n.mask = n.floats = n.turns + (n.delta / block_m + 3) / 4 * 4;
    if (fa_bwd_packs(p)) {
        n.mask = (n.floats + 63) / 64 * 64;
        n.floats = n.mask + fa_mask_bits_make(w, &p->masks, v, &p->scores.mask).bytes / 4;
    }
    return n;
}

#endif
