/* decode_choice.h - which requests decode kernels run, on which variant, and into how many parts
 * the keys are split: pure functions of the shape and the number of multiprocessors.
 *
 * Plain C, no CUDA: backend.cu dispatches with it, the tests compile it with gcc. A tile is `rows`
 * of a group: the query heads of one key head, all rows of q, row i of head h being i * group + h.
 */
#ifndef FASTATTN_SM90_DECODE_CHOICE_H
#define FASTATTN_SM90_DECODE_CHOICE_H

#include "common/general.h"
#include "common/packed.h"
#include "sm90/decode_columns.h"
#include "sm90/loads.h"

/* Where setup.py was asked for some of them alone, a copy of the table comes first on the path. */
static const fa_decode_variant fa_decode_variants[] = {
#define FA_VARIANT(name_, ...) {.name = #name_, __VA_ARGS__},
#include "sm90/decode.def"
#undef FA_VARIANT
    {.name = 0}, /* the end */
};

enum {
    FA_DECODE_VARIANTS = sizeof fa_decode_variants / sizeof fa_decode_variants[0] - 1,
    FA_DECODE_ROWS = 64, /* of a group: more are the forward kernel's, which reads K and V less
                          * often for them */
    FA_PART_KEYS = 1024, /* of a part whose bounds depend on nothing but the keys' numbers */
    FA_MOST_SUMS = 32,   /* of clusters, that are merged */
    FA_DEALT_PARTS = 8,  /* of a sequence among many, at least: the longest may be as many times
                          * longer than the mean */
    FA_MOST_CLUSTER = 8, /* blocks; the most that every chip takes */
};

static inline int32_t fa_decode_group(const fa_what *w) { return w->hk ? w->hq / w->hk : 1; }

static inline int32_t fa_decode_is_strided(const fa_params *p, int32_t block_n) {
    return !fa_tma_takes(&p->what.k, 2) || !fa_tma_takes(&p->what.v, 2) || !fa_box_rows(p, block_n);
}

/* Whether the kernels know all that a request asks for. */
static inline int32_t fa_decode_knows(const fa_params *p) {
    return !p->varlen.cu_k && !p->scores.mask.data && !(p->dropout.p > 0) &&
           p->what.hk == p->what.hv;
}

/* The variant's index in fa_decode_variants, or -1. */
static inline int32_t fa_choose_decode(const fa_params *p) {
    const fa_what *w = &p->what;
    /* Whose rows share a call may have other lengths: its bits must not know. */
    const int32_t any = p->varlen.cu_q && w->batch_invariant;
    const int32_t few = !any && (int64_t)w->sq * fa_decode_group(w) <= 16;
    if (!fa_decode_knows(p)) return -1;
    for (int32_t i = 0; i < FA_DECODE_VARIANTS; ++i) {
        const fa_decode_variant *v = &fa_decode_variants[i];
        if (v->dtype == w->dtype && v->d >= w->d && v->dv >= w->dv && (v->rows == 16) == few &&
            v->strided == fa_decode_is_strided(p, v->block_n))
            return i;
    }
    return -1;
}

/* Whether the forward kernel reads a cache's keys for so many rows, in its paged variants. Who has
 * many rows among packed sequences must not change others' bits where those are invariant: then
 * these kernels take all. */
static inline int32_t fa_is_prefill(const fa_params *p) {
    const fa_what *w = &p->what;
    return fa_is_cached(p) && !(p->varlen.cu_q && w->batch_invariant) && w->hk == w->hv &&
           (int64_t)w->sq * fa_decode_group(w) > FA_DECODE_ROWS && !fa_needs_general(p) &&
           fa_forward_reads_pages(p);
}

/* Rows up to which a prefill's packed sequences are nevertheless these kernels': a tile's. 0: none
 * is. Where a token's rows are 16, so are the tile's: most short ones have one token. */
static inline int32_t fa_few_rows(const fa_params *p) {
    const int32_t group = fa_decode_group(&p->what);
    if (!p->varlen.cu_q || group > FA_DECODE_ROWS) return 0;
    return (group <= 16 ? 16 : FA_DECODE_ROWS) / group;
}

/* Whether a forward request has few rows and many keys: then it is bound by memory, and reads each
 * key once here, once a query head there. */
static inline int32_t fa_is_decode(const fa_params *p) {
    const fa_what *w = &p->what;
    const int64_t rows = (int64_t)w->sq * fa_decode_group(w);
    if (fa_is_cached(p)) return fa_decode_knows(p) && !fa_is_prefill(p);
    return fa_decode_knows(p) && w->b && rows && rows <= FA_DECODE_ROWS && w->sk >= 4 * w->sq &&
           w->sk > 0;
}

/* ---- how the work is divided ---- */

typedef struct fa_decode_plan {
    int64_t tiles;       /* of the rows of a key head: of one sequence, or of all packed ones */
    int32_t parts;       /* of a sequence's keys, a block of the grid each */
    int32_t cluster;     /* of these, that become one sum in the kernel; the sums are merged */
    int32_t part_blocks; /* blocks of keys that a part has, counted from key 0; 0: an equal share of
                          * those that the tile sees */
    int64_t deal;        /* parts of about the same length that all sequences share, `parts` one
                          * sequence at most; 0: each has `parts` */
    int32_t few;         /* rows of packed sequences: longer ones are the forward kernel's; 0: none
                          * is */
    int64_t rows;        /* of out */
    int64_t lse, merged; /* bytes from the workspace's start: the parts' lse; where that of the
                          * result goes if nobody wants it */
    int64_t bytes;       /* of workspace */
} fa_decode_plan;

static inline int64_t fa_decode_ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* Blocks of the grid. Where parts are dealt, each sequence may have one that is shorter. */
static inline int64_t fa_decode_grid(const fa_params *p, const fa_decode_plan *plan) {
    const int64_t tiles = p->what.hk * plan->tiles;
    if (plan->deal) return (plan->deal + p->what.b) * tiles;
    return (p->varlen.cu_q ? 1 : p->what.b) * tiles * plan->parts;
}

/* Of packed sequences each may have one ragged tile. */
static inline int64_t fa_decode_tiles(const fa_params *p, int32_t rows) {
    const int64_t group = fa_decode_group(&p->what);
    if (!p->varlen.cu_q) return fa_decode_ceil(p->what.sq * group, rows);
    return p->varlen.total_q * group / rows + p->what.b;
}

/* Whether sequences may differ in length by much: the host does not read how long they are. */
static inline int32_t fa_decode_deals(const fa_params *p) {
    const fa_what *w = &p->what;
    return p->masks.k_lengths && !p->varlen.cu_q && !w->batch_invariant && w->b > 1 &&
           w->sk > FA_PART_KEYS;
}

/* Microseconds that a split into clusters takes, by a model that was fitted to 110 measured ones
 * (H200, bf16, d 128): memory gives RATE bytes a microsecond to all, up to a tenth less where few
 * blocks ask, and no block more than if ALONE of them shared it. Clusters find no room on some of
 * the SMs, and what they share costs more than merging where they are large. */
static inline double fa_decode_cost(const fa_decode_variant *v, const fa_decode_plan *plan,
                                    const fa_params *p, int32_t cluster, int32_t sums,
                                    int32_t sms) {
    const fa_what *w = &p->what;
    const double RATE = 4.5e6, FEWER = 0.1, ALONE = 72, WAVE = 3.6, MERGE = 2.2, SUM = 0.073;
    const double share_of_sms = cluster == 8 ? 0.92 : cluster == 4 ? 0.86 : 1;
    const int32_t parts = cluster * sums;
    const double block_bytes = 2.0 * v->block_n * (w->d + w->dv);
    const double blocks = (double)fa_decode_ceil(fa_decode_ceil(w->sk, v->block_n), parts);
    const int64_t grid = fa_decode_grid(p, plan) * parts;
    const double of_four = 1.1 + 0.012 * (double)grid; /* clusters, of which many find no room */
    const double meeting = cluster == 8 ? 3.2 : cluster == 4 ? of_four : cluster == 2 ? 0.75 : 0;
    const int64_t room = (int64_t)(share_of_sms * sms) * v->blocks_per_sm;
    const int64_t slots = room > cluster ? room : cluster, waves = (grid - 1) / slots;
    const double last = (double)(grid - waves * slots);
    const double sharers = last > ALONE ? last : ALONE;
    const double rate = RATE * (1 - FEWER * (1 - last / (double)slots));
    double cost = (double)waves * (WAVE + blocks * block_bytes * (double)slots / RATE);
    cost += blocks * block_bytes * sharers / rate + meeting;
    if (sums > 1) cost += MERGE + SUM * sums + 8.0 * (double)plan->rows * w->dv * sums / RATE;
    return cost;
}

/* `few`: fa_few_rows() where it is the rest of a request that it is made for, else 0. What the
 * forward kernel wrote is not merged, so that there is one sum. */
static inline fa_decode_plan fa_decode_make(const fa_params *p, const fa_decode_variant *v,
                                            int32_t few, int32_t sms) {
    const fa_what *w = &p->what;
    fa_decode_plan plan = {1, 1, 1, 0, 0, few, 0, 0, 0, 0};
    const int32_t deals = fa_decode_deals(p);
    const int64_t blocks = fa_decode_ceil(w->sk, v->block_n);
    const int32_t most_sums = few ? 1 : FA_MOST_SUMS;
    plan.tiles = few ? w->b : fa_decode_tiles(p, v->rows);
    plan.rows = w->q.shape[0] * w->q.shape[1] * w->q.shape[2];
    if (w->batch_invariant) {
        plan.part_blocks = FA_PART_KEYS / v->block_n;
        plan.parts = (int32_t)fa_decode_ceil(blocks, plan.part_blocks);
    } else {
        const fa_decode_plan whole = plan;
        double least = fa_decode_cost(v, &whole, p, 1, 1, sms);
        for (int32_t cluster = 1; cluster <= (deals ? 1 : FA_MOST_CLUSTER); cluster *= 2)
            for (int32_t sums = 1; sums <= most_sums && sums * cluster <= blocks; sums *= 2) {
                const double cost = fa_decode_cost(v, &whole, p, cluster, sums, sms);
                if (cost < least) plan.parts = cluster * sums, plan.cluster = cluster, least = cost;
            }
    }
    if (deals) {
        const int64_t most = plan.parts < FA_DEALT_PARTS / 2 ? FA_DEALT_PARTS : 2 * plan.parts;
        plan.deal = (int64_t)w->b * plan.parts;
        plan.parts = most < FA_MOST_SUMS ? (int32_t)most : FA_MOST_SUMS;
    }
    const int64_t sums = plan.parts / plan.cluster;
    if (sums < 2) return plan;
    plan.lse = fa_decode_ceil(sums * plan.rows * w->dv * 4, 256) * 256;
    plan.merged = plan.lse + fa_decode_ceil(sums * plan.rows * 4, 256) * 256;
    plan.bytes = plan.merged + (w->lse.data ? 0 : fa_decode_ceil(plan.rows * 4, 256) * 256);
    return plan;
}

#endif
