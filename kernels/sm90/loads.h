/* loads.h - how the arrays of a request can be loaded: a pure function of where they lie.
 *
 * Plain C, no CUDA, compiled by gcc and nvcc alike and tested on the host.
 */
#ifndef FASTATTN_SM90_LOADS_H
#define FASTATTN_SM90_LOADS_H

#include <stdint.h>

#include "forward.h"

/* How Q, K and V come: boxes of the copy engine; by a warp, element by element if need be, whatever
 * their strides; boxes again, where a head begins anywhere in a row; or by a warp, but K and V as
 * they lie in memory by the copy engine, and from there to their places. */
enum fa_loads { FA_BOXES, FA_STRIDED, FA_SLICES, FA_RAW };

enum { FA_MAX_HEAD_SIZE = 256 }; /* d and dv that some variant takes, as support.c says */

/* Whether the tensor memory accelerator can address it: base and strides in units of 16 bytes, no
 * stride negative or too long; batches and heads may be repeated by a stride of 0, rows may not. */
static inline int32_t fa_tma_takes(const fa_tensor *t, int32_t element_bytes) {
    if ((uintptr_t)t->data % 16 || (t->shape[3] > 1 && t->stride[3] != 1)) return 0;
    for (int i = 0; i < 3; ++i) {
        int64_t bytes = t->stride[i] * element_bytes;
        if (t->shape[i] > 1 && (bytes < 0 || bytes % 16 || bytes >> 40 || (i == 2 && !bytes)))
            return 0;
    }
    return 1;
}

/* Bytes, 16 to 2, that a row of 16-bit elements can be copied by: as many as all rows begin on. */
static inline int32_t fa_copy_width(const fa_tensor *t) {
    int64_t bits = (int64_t)(uintptr_t)t->data;
    for (int i = 0; i < 3; ++i)
        if (t->shape[i] > 1) bits |= 2 * t->stride[i];
    int32_t width = 16;
    while (width > 2 && bits % width) width /= 2;
    return t->shape[3] == 1 || t->stride[3] == 1 ? width : 2;
}

enum { FA_SLICE = 8 }; /* columns of 16 bytes */

/* Whether it can if all heads' rows are one row. A box begins on 16 bytes of it, at most 7 columns
 * before a head does; those, and what is behind the head's own, are other heads'. */
static inline int32_t fa_tma_takes_slices(const fa_tensor *t) {
    fa_tensor rows = *t;
    int64_t columns = (t->shape[1] - 1) * t->stride[1] + t->shape[3];
    rows.shape[1] = 1;
    return fa_tma_takes(&rows, 2) && (t->shape[1] == 1 || t->stride[1] >= 0) && columns < 1ll << 31;
}

/* Columns before some head's first in its box, at most. */
static inline int32_t fa_slack_of(const fa_tensor *t) {
    return t->shape[1] > 1 && t->stride[1] % FA_SLICE ? FA_SLICE - 1 : 0;
}

/* Whether rows lie side by side, or with at most as much between them. (A stride along one column
 * says nothing, but where an array ends is worked out with it.) */
static inline int32_t fa_is_side_by_side(const fa_tensor *t) {
    return t->stride[3] == 1 && t->stride[0] >= 0 && t->stride[1] >= 0 && t->stride[2] >= 0 &&
           t->stride[2] <= 2 * t->shape[3];
}

/* Whether all rows begin on so many bytes: on 8, a warp copies them well enough; on 32, the copy
 * engine takes them at full speed, at half of it on 16. */
static inline int32_t fa_is_of_bytes(const fa_tensor *t, int32_t bytes) {
    return ((uintptr_t)t->data / 2 | t->stride[0] | t->stride[1] | t->stride[2]) % (bytes / 2) == 0;
}

/* Whether keys are a cache's, in pages or with a place for each sequence of packed queries. */
static inline int32_t fa_is_cached(const fa_params *p) {
    return p->pages.table || (p->varlen.cu_q && !p->varlen.cu_k);
}

enum { FA_EIGHT = 8 }; /* rows that a swizzled panel repeats after */

/* Rows of a box of a cache's keys: a whole block of them, or a page where blocks are whole pages.
 * 0: neither. */
static inline int32_t fa_box_rows(const fa_params *p, int32_t block_n) {
    const fa_pages *pages = &p->pages;
    if (!pages->table || pages->size >= p->what.sk || pages->size % block_n == 0) return block_n;
    return block_n % pages->size == 0 && pages->size % FA_EIGHT == 0 ? pages->size : 0;
}

static inline enum fa_loads fa_loads_of(const fa_what *w, int32_t general) {
    /* The output is stored 16 bytes at a time. */
    if (fa_tma_takes(&w->q, 2) && fa_tma_takes(&w->k, 2) && fa_tma_takes(&w->v, 2) &&
        fa_tma_takes(&w->out, 2) && w->dv % 8 == 0)
        return FA_BOXES;
    /* The columns of Q and of K that are multiplied must lie in the same places. */
    int32_t alike = w->hq == w->hk ? w->hq == 1 || (w->q.stride[1] - w->k.stride[1]) % FA_SLICE == 0
                                   : !fa_slack_of(&w->q) && !fa_slack_of(&w->k);
    int32_t fits = w->d + fa_slack_of(&w->q) <= FA_MAX_HEAD_SIZE &&
                   w->dv + fa_slack_of(&w->v) <= FA_MAX_HEAD_SIZE;
    if (general) return FA_STRIDED;
    if (alike && fits && fa_tma_takes_slices(&w->q) && fa_tma_takes_slices(&w->k) &&
        fa_tma_takes_slices(&w->v))
        return FA_SLICES;
    if (fa_is_side_by_side(&w->k) && fa_is_side_by_side(&w->v) &&
        !(fa_is_of_bytes(&w->k, 8) && fa_is_of_bytes(&w->v, 8)))
        return FA_RAW;
    return FA_STRIDED;
}

/* How a variant that reads pages would load. */
static inline enum fa_loads fa_loads_of_pages(const fa_params *p, int32_t block_n) {
    const enum fa_loads loads = fa_loads_of(&p->what, 0);
    return loads == FA_BOXES && fa_box_rows(p, block_n) ? FA_BOXES : FA_STRIDED;
}

/* Whether the forward kernel has a variant for a cache's keys: row by row up to a head size. */
static inline int32_t fa_forward_reads_pages(const fa_params *p) {
    const fa_what *w = &p->what;
    const int32_t most = w->d > w->dv ? w->d : w->dv, block_n = most > 128 ? 64 : 128;
    return most <= 128 || fa_loads_of_pages(p, block_n) == FA_BOXES;
}

#endif
