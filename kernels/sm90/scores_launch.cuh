/* scores_launch.cuh - the launcher's part of what changes scores: a request's arguments.
 * General variants only; host code.
 */
#ifndef FASTATTN_SM90_SCORES_LAUNCH_CUH
#define FASTATTN_SM90_SCORES_LAUNCH_CUH

#include <math.h>
#include <string.h>

#include "common/mask_bits.h"
#include "common/scale.h"
#include "sm90/loads.h"
#include "sm90/scores_args.cuh"

/* How c tanh(s / c) is computed; `alone` as in make_scores(). */
static void set_caps(score_args &a, double softcap, double cap, double scale, bool alone) {
    /* A cap changes a score by a third of (s / c)^2 of itself: one so large changes none that a
     * float can tell from its neighbours. */
    a.caps = softcap != 0 && softcap < 0x1p40;
    if (!a.caps) return;
    /* The least maximum of relative errors up to 0.3, 1.2e-6: of a score of 40, 5e-5. */
    const double series[3] = {0.99999884, -0.33310022, 0.12633946};
    const double y = fmax(-1e30, fmin(scale / cap, 1e30));
    a.cap_wide = cap >= 256;
    const float near = (float)fmin((a.cap_wide ? 0.3 : fmin(0.3, 40. / cap)) / fabs(y), 1e38);
    /* Where a float would not hold y^5, only 0 is near, and stays 0. Where bits may not depend
     * on other sequences, whose rows may share a warp and its vote, it is each score's own. */
    if (near > 1e-4f && (a.cap_wide || (near < 1e4f && !alone))) {
        double power = y;
        for (int i = 0; i < 3; ++i, power *= y * y) a.cap_series[i] = (float)(series[i] * power);
        memcpy(&a.cap_near, &near, sizeof near);
    }
    a.cap_scale = (float)y;
}

/* `packed`: where the mask is packed, of a bool one. */
static score_args make_scores(const fa_params *p, const char *packed) {
    const fa_scores *s = &p->scores;
    const fa_dropout *d = &p->dropout;
    const double scale = usable_scale(p->what.scale), cap = fmax(s->softcap, 1e-30);
    score_args a = {};
    /* Bits may not depend on other sequences, whose rows may share a warp and its votes. */
    const bool alone = p->what.batch_invariant && p->varlen.cu_q;
    set_caps(a, s->softcap, cap, scale, alone);
    a.unit = (float)(a.caps ? cap : scale);
    a.slopes = s->alibi_slopes;
    for (int i = 0; i < 2; ++i) a.slope_stride[i] = s->alibi_stride[i];
    a.drops = d->p > 0;
    a.first_b = d->first_b;
    a.threshold = d->threshold;
    a.gain = a.drops ? (float)d->gain : 1.f;
    a.seed_data = d->seed_data;
    a.seed = d->seed;
    int32_t size = 1;
    if (s->mask.data) {
        a.mask = s->mask_dtype == FA_BOOL   ? BITS
                 : s->mask_dtype == FA_BF16 ? ADD_BF16
                 : s->mask_dtype == FA_F16  ? ADD_F16
                                            : ADD_F32;
        a.mask_data = (const char *)s->mask.data;
        size = a.mask == BITS ? 1 : a.mask == ADD_F32 ? 4 : 2;
        for (int i = 0; i < 4; ++i) a.mask_stride[i] = s->mask.stride[i] * size;
        if (a.mask != BITS) {
            fa_tensor mask = s->mask;
            a.tile_rows = mask.shape[2] > 1 && mask.stride[2] != 0;
            if (!a.tile_rows) mask.shape[2] = 1;
            a.tiles = !fa_tma_takes(&mask, size) ? 0 : a.mask == ADD_F32 ? 2 : 1;
            a.tile_rows |= !a.tiles; /* as the warps write it */
        }
        a.b_first = s->mask.stride[0] == 0 && s->mask.stride[1] != 0;
    }
    if (a.mask == BITS) {
        a.bits = fa_mask_bits_make(&p->what, &p->masks, &p->varlen, &s->mask);
        a.map = (const uint4 *)packed;
        a.columns = (const uint4 *)(packed + a.bits.columns);
        a.words = (const uint32_t *)(packed + a.bits.bits);
    }
    const bool natural = a.mask > BITS || a.slopes;
    if (p->what.scale > 0 && a.caps + (a.mask != NO_MASK) + (a.slopes != NULL) + a.drops == 1)
        /* CAPS takes no offset that is coarse, and votes. */
        a.only = a.caps           ? (cap < 4096 && !(alone && a.cap_wide) ? CAPS : ANY)
                 : a.slopes       ? (alone ? ANY : ALIBI)
                 : a.drops        ? DROPS
                 : a.mask == BITS ? WORDS
                 : a.tiles == 1   ? TILES
                                  : ANY;
    a.scale = (float)((natural ? 1 : a.caps ? cap : scale) * 1.4426950408889634);
    for (int i = 0; i < 3; ++i) a.cap_exponents[i] = a.cap_series[i] * a.scale;
    return a;
}

#endif
