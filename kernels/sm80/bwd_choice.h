/* bwd_choice.h - which variant of bwd.def runs a backward request, and its workspace: pure
 * functions. Plain C, no CUDA.
 */
#ifndef FASTATTN_SM80_BWD_CHOICE_H
#define FASTATTN_SM80_BWD_CHOICE_H

#include "backward.h"
#include "common/empty.h"
#include "common/general.h"
#include "common/mask_bits.h"
#include "sm80/columns.h"

static const fa_sm80_variant fa_sm80_bwd_variants[] = {
#define FA_VARIANT(name_, ...) {.name = #name_, __VA_ARGS__},
#include "sm80/bwd.def"
#undef FA_VARIANT
    {.name = 0},
};

enum { FA_SM80_BWD_VARIANTS = sizeof fa_sm80_bwd_variants / sizeof fa_sm80_bwd_variants[0] - 1 };

/* As fa_sm80_choose(). */
static inline int32_t fa_sm80_choose_bwd(const fa_backward *r, int32_t smem_bytes) {
    const fa_what *w = &r->forward.what;
    const int32_t d = w->d > w->dv ? w->d : w->dv, general = fa_needs_general(&r->forward);
    int32_t best = -1;
    for (int32_t i = 0; i < FA_SM80_BWD_VARIANTS; ++i) {
        const fa_sm80_variant *v = &fa_sm80_bwd_variants[i];
        const fa_sm80_variant *b = best < 0 ? 0 : &fa_sm80_bwd_variants[best];
        if (v->dtype != w->dtype || v->d < d || v->general < general) continue;
        if (fa_sm80_smem_bytes(v, 2) > smem_bytes) continue;
        if (!b || v->d < b->d || (v->d == b->d && v->general < b->general)) best = i;
    }
    return best;
}

/* Bytes from the workspace's start. */
typedef struct fa_sm80_bwd_workspace {
    int64_t rows;  /* of all heads: lse and delta of each are two numbers, at 0 */
    int64_t mask;  /* of a bool mask, its bits */
    int64_t bytes; /* all in all; 0: none */
} fa_sm80_bwd_workspace;

static inline fa_sm80_bwd_workspace fa_sm80_lay_out_bwd(const fa_params *p) {
    const fa_what *w = &p->what;
    const fa_tensor *mask = &p->scores.mask;
    fa_sm80_bwd_workspace n = {0, 0, 0};
    if (fa_is_empty(w)) return n;
    n.rows = w->q.shape[0] * w->hq * w->q.shape[2];
    n.mask = n.bytes = (n.rows * (w->dtype == FA_F64 ? 16 : 8) + 255) / 256 * 256;
    if (mask->data && p->scores.mask_dtype == FA_BOOL)
        n.bytes += fa_mask_bits_make(w, &p->masks, &p->varlen, mask).bytes;
    return n;
}

#endif
