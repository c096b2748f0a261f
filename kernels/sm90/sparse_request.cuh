/* sparse_request.cuh - what all kernels over lists are told of a request. Host code.
 */
#ifndef FASTATTN_SM90_SPARSE_REQUEST_CUH
#define FASTATTN_SM90_SPARSE_REQUEST_CUH

#include "sm90/loads.h"
#include "common/scale.h"
#include "sm90/sparse_args.cuh"
#include "sm90/sparse_choice.h"

static inline sparse_args fa_sparse_arguments(const fa_params *p, const fa_lists *l, int32_t rows) {
    const double log2_e = 1.4426950408889634, scale = usable_scale(p->what.scale);
    const fa_what *w = &p->what;
    sparse_args a = {};
    a.q = w->q, a.k = w->k, a.v = w->v, a.out = w->out, a.lse = w->lse;
    a.masks = p->masks, a.varlen = p->varlen, a.lists = *l;
    a.b = w->b, a.sq = w->sq, a.sk = w->sk, a.heads = w->hk, a.group = fa_sparse_group(w);
    a.blocks = (int32_t)fa_sparse_blocks(p, l), a.tiles = fa_sparse_tiles(w, l, rows);
    while (1 << a.shift < l->k_block) ++a.shift;
    a.by_group = fa_divisor_make(a.group), a.by_tiles = fa_divisor_make(a.tiles);
    a.by_blocks = fa_divisor_make(a.blocks), a.by_heads = fa_divisor_make(a.heads);
    a.k_width = fa_copy_width(&a.k), a.v_width = fa_copy_width(&a.v);
    a.q_wide = fa_copy_width(&a.q) == 16, a.out_wide = fa_copy_width(&a.out) == 16;
    a.scale = (float)(scale * log2_e);
    if (p->scores.softcap != 0) {
        const double cap = usable_scale(p->scores.softcap);
        a.cap = (float)(cap * log2_e), a.by_cap = (float)usable_scale(scale / cap);
    }
    a.sink = p->scores.sink, a.sink_stride = p->scores.sink_stride;
    return a;
}

#endif
