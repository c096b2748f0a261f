/* fwd_launch.cuh - the launcher of a portable variant: arguments, the launch. */
#ifndef FASTATTN_SM80_FWD_LAUNCH_CUH
#define FASTATTN_SM80_FWD_LAUNCH_CUH

#include <math.h>

#include "common/launch.cuh"
#include "common/scale.h"
#include "sm80/fwd_args.cuh"

__global__ void VARIANT_NAME(const __grid_constant__ kernel_args a);

/* The most bytes that can be moved at once wherever a row begins, at most 16; 0: elements lie
 * apart. */
static array_args describe_array(const fa_tensor *t) {
    array_args x = {(char *)t->data, {}, (int32_t)t->shape[3], 16};
    int64_t together = (int64_t)(uintptr_t)t->data;
    for (int i = 0; i < 4; ++i) {
        x.stride[i] = t->stride[i] * SIZE;
        if (i < 3 && t->shape[i] > 1) together |= x.stride[i];
    }
    while (x.width && together % x.width) x.width /= 2;
    if (x.width < SIZE || x.width < 4 || (t->shape[3] > 1 && t->stride[3] != 1)) x.width = 0;
    return x;
}

#if VARIANT_GENERAL
static score_args make_scores(const fa_params *p, const char *packed) {
    const fa_scores *s = &p->scores;
    const fa_dropout *d = &p->dropout;
    score_args a = {};
    /* A cap changes a score by a third of (s / c)^2 of itself: one so large changes none that a
     * float can tell from its neighbours. */
    if (s->softcap != 0 && (IS_F64 || s->softcap < 0x1p40)) {
        const double cap = fmax(s->softcap, 1e-30);
        a.cap = (real)cap;
        a.cap_scale = (real)fmax(-1e30, fmin(usable_scale(p->what.scale) / cap, 1e30));
    }
    a.slopes = s->alibi_slopes;
    for (int i = 0; i < 2; ++i) a.slope_stride[i] = s->alibi_stride[i];
    a.drops = d->p > 0;
    a.first_b = d->first_b;
    a.threshold = d->threshold;
    a.seed_data = d->seed_data;
    a.seed = d->seed;
    a.natural = a.cap != 0 || a.slopes || (s->mask.data && s->mask_dtype != FA_BOOL);
    if (!s->mask.data) return a;
    if (s->mask_dtype == FA_BOOL) {
        a.bits = fa_mask_bits_make(&p->what, &p->masks, &p->varlen, &s->mask);
        a.map = (const uint4 *)packed;
        a.columns = (const uint32_t *)(packed + a.bits.columns);
        a.words = (const uint32_t *)(packed + a.bits.bits);
        return a;
    }
    const int64_t size = fa_dtype_size(s->mask_dtype);
    int64_t together = (int64_t)(uintptr_t)s->mask.data;
    a.mask_dtype = s->mask_dtype;
    a.mask = (const char *)s->mask.data;
    for (int i = 0; i < 4; ++i) {
        a.mask_stride[i] = s->mask.stride[i] * size;
        if (i < 3) together |= a.mask_stride[i];
    }
    a.mask_pairs = s->mask.stride[3] == 1 && together % (2 * size) == 0;
    return a;
}
#endif

extern "C" fa_status PASTE(fa_launch_, VARIANT_NAME)(const fa_params *p, const fa_device *device,
                                                     void *workspace, fa_error *error) {
    const fa_what *w = &p->what;
    const fa_masks *m = &p->masks;
    const bool packed = p->varlen.cu_q != NULL;
    const int64_t m_blocks = packed ? fa_packed_blocks(p->varlen.total_q, w->b, BLOCK_M)
                                    : (w->sq + BLOCK_M - 1) / BLOCK_M;
    const int64_t tiles = m_blocks * w->hq * (packed ? 1 : w->b);
    if (tiles > INT32_MAX)
        return fa_fail(error, FA_UNSUPPORTED, "sm80 takes at most 2^31 tiles of %d rows", BLOCK_M);
    const double scale = usable_scale(w->scale), log2_e = 1.4426950408889634;
    kernel_args a = {};
    a.q = describe_array(&w->q);
    a.k = describe_array(&w->k);
    a.v = describe_array(&w->v);
    a.out = describe_array(&w->out);
    /* It is stored 16 bytes at a time or two elements, whole ones. */
    const int32_t whole = IS_HALF ? 16 : 2 * SIZE;
    if (a.out.width < whole || w->dv * SIZE % whole) a.out.width = 0;
    a.masks = *m;
    a.varlen = p->varlen;
    a.m_blocks = (int32_t)m_blocks;
    if (!packed) a.schedule = fa_schedule_make(w, m, BLOCK_M, 2 * device->sms);
    a.b = w->b, a.hq = w->hq, a.sq = w->sq, a.sk = w->sk;
    a.by_hq = fa_divisor_make(a.hq);
    a.by_group = fa_divisor_make(w->hq / w->hk);
    a.gain = (real)(p->dropout.p > 0 ? p->dropout.gain : 1);
    a.lse = (real *)w->lse.data;
    for (int i = 0; i < 3; ++i) a.lse_stride[i] = w->lse.stride[i];
    a.sink = p->scores.sink;
    a.sink_stride = p->scores.sink_stride;
    bool natural = false;
#if VARIANT_GENERAL
    a.scores = make_scores(p, (const char *)workspace);
    natural = a.scores.natural;
#else
    (void)workspace;
#endif
    a.negative = scale < 0 && !natural;
    a.scale = (real)scale;
    a.units = (real)(natural ? log2_e : fabs(scale) * log2_e);
    static uint64_t allowed;
    const fa_status status =
        fa_allow_smem(&allowed, device, (const void *)VARIANT_NAME, SMEM_BYTES, error);
    if (status != FA_OK) return status;
    return fa_launch_kernel((const void *)VARIANT_NAME, (int32_t)tiles, THREADS, SMEM_BYTES,
                            p->where.stream, device->early, &a, error);
}

#endif
