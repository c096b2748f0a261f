/* fwd_choice.h - which variant of fwd.def runs a request: a pure function of the request and of how
 * much shared memory the GPU has. Plain C, no CUDA.
 */
#ifndef FASTATTN_SM80_FWD_CHOICE_H
#define FASTATTN_SM80_FWD_CHOICE_H

#include "common/empty.h"
#include "common/general.h"
#include "common/mask_bits.h"
#include "sm80/columns.h"

static const fa_sm80_variant fa_sm80_variants[] = {
#define FA_VARIANT(name_, ...) {.name = #name_, __VA_ARGS__},
#include "sm80/fwd.def"
#undef FA_VARIANT
    {.name = 0}, /* the end: of some, there may be none */
};

enum { FA_SM80_VARIANTS = sizeof fa_sm80_variants / sizeof fa_sm80_variants[0] - 1 };

/* The variant's index, or -1: of those that are wide enough the narrowest, plain ones first where
 * nothing changes scores, then the order of the table. */
static inline int32_t fa_sm80_choose(const fa_params *p, int32_t smem_bytes) {
    const fa_what *w = &p->what;
    const int32_t d = w->d > w->dv ? w->d : w->dv, general = fa_needs_general(p);
    int32_t best = -1;
    for (int32_t i = 0; i < FA_SM80_VARIANTS; ++i) {
        const fa_sm80_variant *v = &fa_sm80_variants[i];
        const fa_sm80_variant *b = best < 0 ? 0 : &fa_sm80_variants[best];
        if (v->dtype != w->dtype || v->d < d || v->general < general) continue;
        if (fa_sm80_smem_bytes(v, 1) > smem_bytes) continue;
        if (!b || v->d < b->d || (v->d == b->d && v->general < b->general)) best = i;
    }
    return best;
}

/* Bytes of workspace: a bool mask is packed. */
static inline int64_t fa_sm80_workspace(const fa_params *p) {
    const fa_tensor *mask = &p->scores.mask;
    if (fa_is_empty(&p->what) || !mask->data || p->scores.mask_dtype != FA_BOOL) return 0;
    return fa_mask_bits_make(&p->what, &p->masks, &p->varlen, mask).bytes;
}

#endif
