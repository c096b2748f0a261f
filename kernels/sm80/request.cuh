/* request.cuh - a request as kernels of every operation find it (args.cuh). Host code. */
#ifndef FASTATTN_SM80_REQUEST_CUH
#define FASTATTN_SM80_REQUEST_CUH

#include <math.h>

#include "common/scale.h"
#include "sm80/args.cuh"

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

/* An array that is written: 16 bytes at a time or two elements, whole ones; or element by element.
 */
static array_args describe_output(const fa_tensor *t) {
    array_args x = describe_array(t);
    const int32_t whole = IS_HALF ? 16 : 2 * SIZE;
    if (x.width < whole || t->shape[3] * SIZE % whole) x.width = 0;
    return x;
}

/* Blocks of BLOCK_M rows, of queries or of keys, of a head. */
static int64_t count_blocks(const fa_params *p, int32_t rows, int32_t total) {
    return p->varlen.cu_q ? fa_packed_blocks(total, p->what.b, BLOCK_M)
                          : (rows + BLOCK_M - 1) / BLOCK_M;
}

/* `packed`: where a bool mask is; slots: blocks that run at a time. */
static void set_request(request_args &a, const fa_params *p, const void *packed, int32_t slots) {
    const fa_what *w = &p->what;
    const double scale = usable_scale(w->scale), log2_e = 1.4426950408889634;
    a.q = describe_array(&w->q);
    a.k = describe_array(&w->k);
    a.v = describe_array(&w->v);
    a.masks = p->masks;
    a.varlen = p->varlen;
    a.m_blocks = (int32_t)count_blocks(p, w->sq, p->varlen.total_q);
    if (!p->varlen.cu_q) a.schedule = fa_schedule_make(w, &p->masks, BLOCK_M, slots);
    a.b = w->b, a.hq = w->hq, a.sq = w->sq, a.sk = w->sk;
    a.by_hq = fa_divisor_make(a.hq);
    a.by_group = fa_divisor_make(w->hq / w->hk);
    a.gain = (real)(p->dropout.p > 0 ? p->dropout.gain : 1);
    bool natural = false;
#if VARIANT_GENERAL
    a.scores = make_scores(p, (const char *)packed);
    natural = a.scores.natural;
#else
    (void)packed;
#endif
    a.negative = scale < 0 && !natural;
    a.scale = (real)scale;
    a.units = (real)(natural ? log2_e : fabs(scale) * log2_e);
}

#endif
