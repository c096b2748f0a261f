/* rows.h - which row of fwd.def runs a request: a pure function of the shape.
 *
 * Plain C, no CUDA: kernels/sm90/backend.cu dispatches with it, tests/gpu_host/ compiles it
 * with gcc and asks it about thousands of shapes.
 */
#ifndef FASTATTN_ROWS_H
#define FASTATTN_ROWS_H

#include <stdint.h>

#include "forward.h"

enum { FA_MAX_HEAD_SIZE = 256 }; /* d and dv that some variant takes, as support.c says */

/* How Q, K and V come: boxes of the copy engine; by a warp, element by element if need be, whatever
 * their strides; boxes again, where a head begins anywhere in a row; or by a warp, but K and V as
 * they lie in memory by the copy engine, and from there to their places. */
enum fa_loads { FA_BOXES, FA_STRIDED, FA_SLICES, FA_RAW };

typedef struct fa_row {
    const char *name;
    fa_dtype dtype;
    int32_t d, dv;            /* the largest head sizes it takes; smaller ones are zero-padded */
    int32_t block_m, block_n; /* query rows and keys of a tile */
    int32_t blocks_per_sm;
    int32_t ones;    /* its row sum is that of the rounded P: no lse */
    int32_t loads;   /* enum fa_loads */
    int32_t general; /* it changes scores */
} fa_row;

/* Or a copy of the table with some of its rows, where setup.py was asked for those alone. */
#ifdef FA_VARIANTS
#define FA_OF_SOME " among those that FASTATTN_VARIANTS chose"
#else
#define FA_VARIANTS "fwd.def"
#define FA_OF_SOME ""
#endif

static const fa_row fa_variants[] = {
#define FA_VARIANT(name, source, arch, dtype, d, dv, warpgroups, block_n, stages, q_slots, offset, \
                   ones, blocks_per_sm, loads, staged, general, ...)                               \
    {#name, dtype, d, dv, 64 * (warpgroups), block_n, blocks_per_sm, ones, loads, general},
#include FA_VARIANTS
#undef FA_VARIANT
};

enum { FA_ROWS = sizeof fa_variants / sizeof fa_variants[0] };

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

/* Whether something changes scores. Which keys a row may see, and a sink, which joins at the end of
 * a tile, is every row's business. */
static inline int32_t fa_needs_general(const fa_params *p) {
    const fa_scores *s = &p->scores;
    return s->mask.data || s->softcap != 0 || s->alibi_slopes || p->dropout.p > 0;
}

static inline int64_t fa_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline double fa_greater(double a, double b) { return a > b ? a : b; }

/* What a score costs, in percent of the 128 x 128 tile's cost (of head size 64: of 4x64's, which is
 * 108), measured: where each SM has as many tiles as it has room for, and where it has one, so that
 * a tile of 64 rows leaves it half idle. */
typedef struct fa_weight {
    int32_t together, alone;
} fa_weight;

static inline fa_weight fa_row_weight(const fa_row *row, int32_t causal, int32_t sk) {
    const int32_t small = row->d <= 64, wide = row->block_n > 64;
    if (row->block_m == 64 && small) return wide ? (fa_weight){112, 190} : (fa_weight){165, 243};
    if (row->block_m == 64) return wide ? (fa_weight){160, 151} : (fa_weight){125, 177};
    /* More rows share a load of K and V, but waste more at the diagonal, which matters less the
     * longer the rows are. */
    const int32_t tall = (causal && sk <= 8192 ? 103 : 95) + (row->block_n == 96 ? 3 : 0);
    if (row->block_m == 192) return (fa_weight){tall, tall};
    if (row->block_m == 256) return (fa_weight){108, 108};
    /* Fewer keys mean more turns of the loop; fp16's watches every score. */
    if (!wide && small) return (fa_weight){138, 140};
    if (!wide && row->dtype == FA_F16) return (fa_weight){115, 115};
    if (!wide) return (fa_weight){causal ? 104 : 107, 98};
    return row->d < 128 ? (fa_weight){115, 115} : (fa_weight){100, 100}; /* more of it is softmax */
}

/* The time of a request on one row, in units of one query row times one key on one SM. A tile is
 * as long as its keys, in blocks, plus a prologue and an epilogue that weigh about as much as one
 * block, two if it has 192 rows, and one more where the diagonal cuts blocks askew; the code of the
 * wide tiles of 64 rows is fetched anew for few keys. The SMs work through the tiles in rounds, of
 * which the last may be ragged, as many at a time as there are blocks on an SM; the first block of
 * all is waited for. Under a causal mask a tile has half of the keys in the mean; the longest takes
 * its time, and may have others that are as long on its SM. */
static inline double fa_row_cost(const fa_row *row, const fa_what *w, const fa_masks *m,
                                 int32_t sms) {
    const int32_t causal = (m->flags & FA_HAS_RIGHT) != 0,
                  window = causal && m->flags & FA_HAS_LEFT;
    int32_t sk = w->sk;
    if (window) { /* of the tile's rows, through a window; a causal one may be empty */
        const int64_t width = (int64_t)m->left + m->right + row->block_m;
        if (sk > width) sk = width > 0 ? (int32_t)width : 0;
    }
    const int32_t askew = causal && row->block_m > row->block_n && row->block_m % row->block_n;
    const double more =
        1 + (row->block_m == 192) + askew + (row->block_m == 64 && row->block_n > 64 ? 1.5 : 0);
    const double longest = (double)fa_ceil_div(sk, row->block_n) + more;
    double mean = longest;
    if (causal && !window) {
        double keys = (w->sq < sk ? sk - w->sq / 2 : sk / 2) + row->block_m / 2;
        if (keys < sk) mean = keys / row->block_n + more;
    }
    fa_weight weight = fa_row_weight(row, causal, sk);
    /* Where K and V come slowly and are read for few rows, they are waited for. */
    const int32_t slowly = !fa_is_of_bytes(&w->k, 32) || !fa_is_of_bytes(&w->v, 32);
    if (slowly && row->block_m < 192 && !w->batch_invariant) {
        const int32_t percent = row->block_m == 64 ? 140 : row->d > 64 ? 110 : 100;
        weight.together = weight.together * percent / 100;
        weight.alone = weight.alone * percent / 100;
    }
    const double area = row->block_m * row->block_n;
    const int64_t tiles = fa_ceil_div(w->sq, row->block_m), together = row->blocks_per_sm;
    /* A batch-invariant choice sees one sequence only: as if every SM were always busy. */
    if (w->batch_invariant) return (double)tiles * mean * area * weight.together;
    const int64_t rounds = fa_ceil_div(tiles * w->b * w->hq, sms);
    const int64_t long_ones = rounds < together ? rounds : together;
    const double work = (double)rounds * mean, crowd = (double)long_ones * (longest - mean);
    const double shared = together > 1 ? work + crowd : fa_greater(work, longest);
    const double lone = fa_greater((double)fa_ceil_div(rounds, together) * mean, longest);
    double cost = lone * weight.alone;
    if (rounds > 1) cost = fa_greater(cost, shared * weight.together);
    return area * (cost + weight.together);
}

static inline int32_t fa_row_takes(const fa_row *row, const fa_what *w, enum fa_loads loads,
                                   int32_t general) {
    const int32_t d = w->d + (loads == FA_SLICES ? fa_slack_of(&w->q) : 0);
    const int32_t dv = w->dv + (loads == FA_SLICES ? fa_slack_of(&w->v) : 0);
    return row->dtype == w->dtype && row->d >= d && row->dv >= dv && row->loads == (int32_t)loads &&
           row->general == general && !(row->ones && w->lse.data);
}

/* The shape that a row is chosen for. Of packed sequences only the longest and the mean are known;
 * most of the work is in sequences longer than that: it is taken twice. Where a sequence's bits may
 * not depend on the others, not even that: then the row is that of 1,024 rows and keys. */
static inline fa_what fa_typical_shape(const fa_params *p) {
    fa_what w = p->what;
    if (!p->varlen.cu_q) return w;
    int64_t sq = 1024, sk = 1024;
    if (!w.batch_invariant && w.b > 0) {
        sq = 2 * fa_ceil_div(p->varlen.total_q, w.b), sk = 2 * fa_ceil_div(p->varlen.total_k, w.b);
        sq = sq < w.sq ? sq : w.sq, sk = sk < w.sk ? sk : w.sk;
    }
    w.sq = (int32_t)sq, w.sk = (int32_t)sk;
    return w;
}

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
    if (parts == 1) return p;
    *part = *p;
    part->what.q = fa_heads_of(&w->q, first, heads, 2);
    part->what.k = fa_heads_of(&w->k, i / (parts / w->hk), 1, 2);
    part->what.v = fa_heads_of(&w->v, i / (parts / w->hv), 1, 2);
    part->what.out = fa_heads_of(&w->out, first, heads, 2);
    part->what.lse = fa_heads_of(&w->lse, first, heads, 4);
    part->scores.mask = fa_heads_of(&p->scores.mask, first, heads, mask_size);
    if (part->scores.alibi_slopes)
        part->scores.alibi_slopes += first * part->scores.alibi_stride[1];
    if (part->scores.sink) part->scores.sink += first * part->scores.sink_stride;
    part->what.hq = heads, part->what.hk = part->what.hv = 1;
    return part;
}

/* The row's index in fa_variants, or -1: no row takes the request. Least padding first, then least
 * time, then the order of the table. */
static inline int32_t fa_choose_row(const fa_params *p, int32_t sms) {
    const fa_what shape = fa_typical_shape(p), *w = &shape;
    const fa_masks *m = &p->masks;
    int32_t best = -1, least = 0, general = fa_needs_general(p);
    enum fa_loads loads = fa_loads_of(w, general);
    double cost = -1; /* of the best row so far, where it was needed */
    for (int32_t i = 0; i < FA_ROWS; ++i) {
        const fa_row *row = &fa_variants[i];
        int32_t size = row->d + row->dv;
        if (!fa_row_takes(row, w, loads, general) || (best >= 0 && size > least)) continue;
        if (best >= 0 && size == least) {
            double other = fa_row_cost(row, w, m, sms);
            if (cost < 0) cost = fa_row_cost(&fa_variants[best], w, m, sms);
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
