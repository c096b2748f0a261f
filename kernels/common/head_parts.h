/* head_parts.h - a request whose k and v have different numbers of heads, as several that have one
 * each. Plain C, compiled by gcc and nvcc alike and tested on the host.
 */
#ifndef FASTATTN_HEAD_PARTS_H
#define FASTATTN_HEAD_PARTS_H

#include "forward.h"

/* Where k and v have different numbers of heads, a request is this many: in each one key head meets
 * one value head. */
static inline int32_t fa_head_parts(const fa_what *w) {
    int32_t parts = w->hk;
    while (parts % w->hv) parts += w->hk;
    return w->hk == w->hv ? 1 : parts;
}

/* From its head on. */
static inline fa_tensor fa_heads_of(const fa_tensor *t, int64_t first, int32_t heads,
                                    int64_t size) {
    fa_tensor part = *t;
    if (part.data) part.data = (char *)part.data + first * t->stride[1] * size;
    part.shape[1] = heads;
    return part;
}

/* Part i of fa_head_parts(); the request itself, if it is one. Random bits count heads, so that
 * there is no dropout. */
static inline const fa_params *fa_head_part(const fa_params *p, int32_t i, fa_params *part) {
    const fa_what *w = &p->what;
    const int32_t parts = fa_head_parts(w), heads = w->hq / parts;
    const int64_t first = (int64_t)i * heads, mask_size = fa_dtype_size(p->scores.mask_dtype);
    const int64_t size = fa_dtype_size(w->dtype);
    if (parts == 1) return p;
    *part = *p;
    part->what.q = fa_heads_of(&w->q, first, heads, size);
    part->what.k = fa_heads_of(&w->k, i / (parts / w->hk), 1, size);
    part->what.v = fa_heads_of(&w->v, i / (parts / w->hv), 1, size);
    part->what.out = fa_heads_of(&w->out, first, heads, size);
    part->what.lse = fa_heads_of(&w->lse, first, heads, w->dtype == FA_F64 ? 8 : 4);
    part->scores.mask = fa_heads_of(&p->scores.mask, first, heads, mask_size);
    if (part->scores.alibi_slopes)
        part->scores.alibi_slopes += first * part->scores.alibi_stride[1];
    if (part->scores.sink) part->scores.sink += first * part->scores.sink_stride;
    part->what.hq = heads, part->what.hk = part->what.hv = 1;
    return part;
}

#endif
