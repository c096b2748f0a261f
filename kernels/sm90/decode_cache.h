/* decode_cache.h - attention to a cache as the kernels run it: the new keys are in the cache then,
 * q is rotated, and lengths count all keys; what of this lies in the workspace, before that of
 * attention. Pure functions of the request. Plain C, compiled by gcc and nvcc alike.
 */
#ifndef FASTATTN_SM90_DECODE_CACHE_H
#define FASTATTN_SM90_DECODE_CACHE_H

#include "kvcache.h"
#include "sm90/decode_choice.h"

typedef struct fa_kvcache_layout {
    int64_t lengths_bytes, q_bytes, lse_bytes; /* one after the other; 0: not needed */
    int64_t bytes;
} fa_kvcache_layout;

static inline int64_t fa_kvcache_round(int64_t bytes) { return (bytes + 255) / 256 * 256; }

static inline fa_kvcache_layout fa_kvcache_lay_out(const fa_kvcache *c) {
    const fa_what *w = &c->forward.what;
    const int64_t rows = w->q.shape[0] * w->q.shape[1] * w->q.shape[2];
    fa_kvcache_layout at = {0, 0, 0, 0};
    if (c->forward.masks.k_lengths && c->s_new)
        at.lengths_bytes = fa_kvcache_round(4 * (int64_t)w->b);
    if (c->rotary.cos.data) at.q_bytes = fa_kvcache_round(rows * w->d * fa_dtype_size(w->dtype));
    if (c->mass.data && !w->lse.data) at.lse_bytes = fa_kvcache_round(4 * rows);
    at.bytes = at.lengths_bytes + at.q_bytes + at.lse_bytes;
    return at;
}

/* Whether it runs on the decode kernels: many rows do not, if the forward kernel takes them. */
static inline int32_t fa_kvcache_decodes(const fa_params *p) {
    const fa_what *w = &p->what;
    const int32_t many = (int64_t)w->sq * fa_decode_group(w) > FA_DECODE_ROWS;
    return fa_is_cached(p) ? !fa_is_prefill(p) : !many;
}

/* What attention runs on. Of a workspace that is to come, but aligned like it, the choice of a
 * kernel is the same. */
static inline fa_params fa_kvcache_params(const fa_kvcache *c, void *workspace) {
    const fa_kvcache_layout at = fa_kvcache_lay_out(c);
    fa_params p = c->forward;
    fa_what *w = &p.what;
    const int64_t b = w->q.shape[0], h = w->q.shape[1], s = w->q.shape[2], d = w->q.shape[3];
    const int64_t apart = p.varlen.cu_q ? 0 : h * s; /* rows of sequences that are not packed */
    char *memory = (char *)workspace;
    if (at.lengths_bytes) p.masks.k_lengths = (const int32_t *)memory, p.masks.k_lengths_stride = 1;
    memory += at.lengths_bytes;
    if (at.q_bytes) {
        const fa_tensor q = {memory, {b, h, s, d}, {apart * d, s * d, d, 1}};
        w->q = q;
    }
    memory += at.q_bytes;
    if (at.lse_bytes) {
        const fa_tensor lse = {memory, {b, h, s, 1}, {apart, s, 1, 1}};
        w->lse = lse;
    }
    if (!fa_is_cached(&p) && !fa_kvcache_decodes(&p))
        w->k.shape[2] = w->v.shape[2] = w->sk; /* what lies behind is not */
    return p;
}

#endif
