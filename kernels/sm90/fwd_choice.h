/* fwd_choice.h - which variant of fwd.def runs a request: a pure function of the shape.
 *
 * Plain C, no CUDA: backend.cu dispatches with it, the tests compile it with gcc and ask it about
 * thousands of shapes.
 */
#ifndef FASTATTN_SM90_FWD_CHOICE_H
#define FASTATTN_SM90_FWD_CHOICE_H

#include "common/general.h"
#include "sm90/fwd_cost.h"
#include "sm90/loads.h"

/* Where setup.py was asked for some of them alone, a copy of the table comes first on the path. */
static const fa_variant fa_variants[] = {
#define FA_VARIANT(name_, ...) {.name = #name_, __VA_ARGS__},
#include "sm90/fwd.def"
#undef FA_VARIANT
    {.name = 0}, /* the end: of some, there may be none */
};

enum { FA_VARIANTS = sizeof fa_variants / sizeof fa_variants[0] - 1 };

static inline int32_t fa_variant_takes(const fa_variant *v, const fa_what *w, enum fa_loads loads,
                                       int32_t general, int32_t paged) {
    const int32_t d = w->d + (loads == FA_SLICES ? fa_slack_of(&w->q) : 0);
    const int32_t dv = w->dv + (loads == FA_SLICES ? fa_slack_of(&w->v) : 0);
    return v->dtype == w->dtype && v->d >= d && v->dv >= dv && v->loads == loads &&
           v->general == general && v->paged == paged && !(v->ones && w->lse.data);
}

/* The shape that a variant is chosen for. Of packed sequences only the longest and the mean are
 * known; most of the work is in sequences longer than that: it is taken twice. Where a sequence's
 * bits may not depend on the others, not even that: then it is that of 1,024 rows and keys. */
static inline fa_what fa_typical_shape(const fa_params *p) {
    fa_what w = p->what;
    if (!p->varlen.cu_q || fa_is_cached(p)) return w;
    int64_t sq = 1024, sk = 1024;
    if (!w.batch_invariant && w.b > 0) {
        sq = 2 * fa_ceil_div(p->varlen.total_q, w.b), sk = 2 * fa_ceil_div(p->varlen.total_k, w.b);
        sq = sq < w.sq ? sq : w.sq, sk = sk < w.sk ? sk : w.sk;
    }
    w.sq = (int32_t)sq, w.sk = (int32_t)sk;
    return w;
}

/* The variant's index in fa_variants, or -1: none takes the request. Least padding first, then
 * least time, then the order of the table. */
static inline int32_t fa_choose_variant(const fa_params *p, int32_t sms) {
    const fa_what shape = fa_typical_shape(p), *w = &shape;
    const fa_masks *m = &p->masks;
    int32_t best = -1, least = 0, general = fa_needs_general(p);
    const int32_t paged = fa_is_cached(p);
    enum fa_loads loads = fa_loads_of(w, general);
    double cost = -1; /* of the best so far, where it was needed */
    for (int32_t i = 0; i < FA_VARIANTS; ++i) {
        const fa_variant *v = &fa_variants[i];
        int32_t size = v->d + v->dv;
        if (paged) loads = fa_loads_of_pages(p, v->block_n);
        if (!fa_variant_takes(v, w, loads, general, paged) || (best >= 0 && size > least)) continue;
        if (best >= 0 && size == least) {
            double other = fa_variant_cost(v, w, m, sms);
            if (cost < 0) cost = fa_variant_cost(&fa_variants[best], w, m, sms);
            if (other >= cost) continue;
            cost = other;
        } else {
            cost = -1;
        }
        best = i, least = size;
    }
    return best;
}

#endif
