/* merge_plan.h - how partial results are merged on a GPU: a pure function of the request.
 *
 * Host code, compiled by gcc and nvcc alike and tested without a GPU. The kernels are in merge.cuh,
 * merge.cu launches them.
 *
 * A row is the dv outputs of one (b, h, s). 8, 16 or 32 lanes of a warp share it, each with 16
 * bytes of every part (one fragment) at a time, or 8 or 4 where dv or addresses want it. A thread
 * has the fragments of 8 pairs (row, part) in flight: of 4 rows where there are at most 2 parts, of
 * 2 rows with 4, of one row with more. Beyond 8 parts a row takes several steps, and from 17 parts
 * on several groups of lanes. A block takes as many rows as its threads have in flight, and ends.
 */
#ifndef FASTATTN_MERGE_PLAN_H
#define FASTATTN_MERGE_PLAN_H

#include "merge.h"

enum {
    FA_MERGE_THREADS = 256,
    FA_MERGE_PAIRS = 8,   /* (row, part) whose fragments a thread has in flight */
    FA_MERGE_BLOCKS = 3,  /* of one SM, at the registers that this takes */
    FA_MERGE_LISTED = 48, /* parts that one launch's 4 KB of arguments describe */
};

/* One part, or the result. Strides in bytes, of the three axes of the rows in the plan's order. */
typedef struct fa_merge_part {
    char *out, *lse;
    int64_t out_stride[3], lse_stride[3];
    int64_t column; /* bytes from one column of out to the next */
} fa_merge_part;

/* All parts in one array, as a split over the keys leaves them: outs[0] and lses[0] of the request
 * describe the first, and each next one lies a step further. */
typedef struct fa_merge_stack {
    fa_dtype dtype;             /* of the parts: FA_F32, or the output's */
    int64_t out_step, lse_step; /* elements */
} fa_merge_stack;

/* What walking the parts finds. The choice of a kernel carries it, so that they are walked once. */
typedef struct fa_merge_found {
    int32_t is_stacked; /* the parts lie equal steps apart */
    int32_t width;      /* bytes of a fragment: 16, 8 or 4; 0: element by element */
} fa_merge_found;

typedef struct fa_merge_plan {
    int32_t batch;   /* parts that a thread reads at once: 2, 4 or 8 */
    fa_dtype dtype;  /* of the parts */
    int32_t is_many; /* more than 8, or of width 0: the kernel that takes any number of parts */
    int32_t width, is_stacked;  /* as found; parts that are not stacked, if many, are listed */
    int32_t lanes;              /* that share a row */
    int32_t share;              /* groups of lanes that share it, each with some of the parts */
    int32_t axis[3];            /* of b, h and s, the slowest first */
    int64_t tiles;              /* of lanes fragments, that make a row */
    int64_t rows, items;        /* an item: a tile of as many rows as a block takes at once */
    int64_t out_step, lse_step; /* bytes, where is_stacked */
    int64_t bytes;              /* of workspace: the list of parts */
} fa_merge_plan;

/* Elements of one fragment. */
static inline int32_t fa_merge_fragment(const fa_merge_plan *p) {
    return p->width ? p->width / (int32_t)fa_dtype_size(p->dtype) : 4;
}

static inline int64_t fa_merge_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* The axes in the order of memory of the result. */
static inline void fa_merge_order(fa_merge_plan *p, const fa_tensor *out) {
    for (int32_t i = 0; i < 3; ++i) {
        int64_t size = out->stride[i] < 0 ? -out->stride[i] : out->stride[i];
        int32_t at = i;
        for (; at > 0; --at) {
            int64_t before = out->stride[p->axis[at - 1]];
            if ((before < 0 ? -before : before) >= size) break;
            p->axis[at] = p->axis[at - 1];
        }
        p->axis[at] = i;
    }
}

static inline int32_t fa_merge_is_aligned(const fa_tensor *t, int32_t size, int32_t bytes) {
    int64_t bits = (int64_t)(uintptr_t)t->data;
    for (int32_t i = 0; i < 3; ++i) bits |= t->stride[i] * size;
    return bits % bytes == 0 && t->stride[3] == 1;
}

static inline int32_t fa_merge_is_alike(const fa_tensor *a, const fa_tensor *b) {
    for (int32_t i = 0; i < 4; ++i)
        if (a->stride[i] != b->stride[i]) return 0;
    return 1;
}

static inline fa_dtype fa_merge_dtype(const fa_merge *m, const fa_merge_stack *stack) {
    return stack ? stack->dtype : m->dtype;
}

/* From each part to the next, in bytes, where they are stacked. */
static inline int64_t fa_merge_step(const fa_merge *m, const fa_tensor *parts) {
    return m->n > 1 ? (char *)parts[1].data - (char *)parts[0].data : 0;
}

static inline int32_t fa_merge_is_stack(const fa_merge *m, const fa_tensor *parts) {
    const int64_t step = fa_merge_step(m, parts);
    for (int32_t i = 1; i < m->n; ++i)
        if (!fa_merge_is_alike(&parts[i], parts) ||
            (char *)parts[i].data - (char *)parts[i - 1].data != step)
            return 0;
    return 1;
}

/* The widest fragments that all rows consist of, and that lie aligned in each. */
static inline int32_t fa_merge_width(const fa_merge *m, const fa_merge_stack *stack) {
    const int32_t size = (int32_t)fa_dtype_size(fa_merge_dtype(m, stack));
    const int32_t out_size = (int32_t)fa_dtype_size(m->dtype), described = stack ? 1 : m->n;
    for (int32_t width = 16; width >= 4; width /= 2) {
        const int32_t fragment = width / size;
        int32_t fits = m->out.shape[3] % fragment == 0 &&
                       fa_merge_is_aligned(&m->out, out_size, fragment * out_size) &&
                       !(stack && stack->out_step * size % width);
        for (int32_t i = 0; i < described && fits; ++i)
            fits = fa_merge_is_aligned(&m->outs[i], size, width);
        if (fits) return width;
    }
    return 0;
}

/* `stack`: NULL where outs and lses describe every part. Reads all of them, and of the result's
 * address only how it is aligned. */
static inline fa_merge_found fa_merge_walk(const fa_merge *m, const fa_merge_stack *stack) {
    fa_merge_found found;
    found.is_stacked = stack || (fa_merge_is_stack(m, m->outs) && fa_merge_is_stack(m, m->lses));
    found.width = fa_merge_width(m, stack);
    return found;
}

static inline fa_merge_plan fa_merge_make(const fa_merge *m, const fa_merge_stack *stack,
                                          fa_merge_found found) {
    fa_merge_plan p = {0};
    p.dtype = fa_merge_dtype(m, stack);
    p.is_stacked = found.is_stacked;
    p.width = found.width;
    if (stack) {
        p.out_step = stack->out_step * (int32_t)fa_dtype_size(p.dtype);
        p.lse_step = stack->lse_step * 4;
    } else if (p.is_stacked) {
        p.out_step = fa_merge_step(m, m->outs);
        p.lse_step = fa_merge_step(m, m->lses);
    }
    p.is_many = m->n > FA_MERGE_PAIRS || !p.width;
    p.batch = m->n > 4 || p.is_many ? 8 : m->n > 2 ? 4 : 2;
    if (p.is_many && !p.is_stacked)
        p.bytes = fa_merge_ceil_div(m->n * (int64_t)sizeof(fa_merge_part), 256) * 256;

    const int64_t fragments = fa_merge_ceil_div(m->out.shape[3], fa_merge_fragment(&p));
    p.lanes = fragments <= 8 ? 8 : fragments <= 16 ? 16 : 32;
    p.tiles = fragments > p.lanes ? fa_merge_ceil_div(fragments, p.lanes) : 1;
    /* Two steps of a group's own at least: it is a function of n and dv, so that a row's bits do
     * not depend on how many rows there are. */
    const int64_t steps = fa_merge_ceil_div(m->n, FA_MERGE_PAIRS);
    p.share = 1;
    while (p.share * p.lanes < FA_MERGE_THREADS && steps > 2 * p.share) p.share *= 2;

    fa_merge_order(&p, &m->out);
    p.rows = m->out.shape[0] * m->out.shape[1] * m->out.shape[2];
    const int32_t teams = FA_MERGE_THREADS / (p.lanes * p.share);
    p.items = fa_merge_ceil_div(p.rows, teams * (FA_MERGE_PAIRS / p.batch)) * p.tiles;
    return p;
}

/* What the kernels know of one part, or of the result. */
static inline fa_merge_part fa_merge_describe(const fa_merge_plan *p, const fa_tensor *out,
                                              fa_dtype dtype, const fa_tensor *lse) {
    fa_merge_part part;
    part.out = (char *)out->data;
    part.lse = (char *)lse->data;
    for (int32_t i = 0; i < 3; ++i) {
        part.out_stride[i] = out->stride[p->axis[i]] * (int32_t)fa_dtype_size(dtype);
        part.lse_stride[i] = lse->stride[p->axis[i]] * 4;
    }
    part.column = out->stride[3] * (int32_t)fa_dtype_size(dtype);
    return part;
}

/* Part i, of those that the request describes or of a stack. */
static inline fa_merge_part fa_merge_find(const fa_merge_plan *p, const fa_merge *m, int32_t i) {
    const int32_t at = p->is_stacked ? 0 : i;
    fa_merge_part part = fa_merge_describe(p, &m->outs[at], p->dtype, &m->lses[at]);
    if (p->is_stacked) {
        part.out += i * p->out_step;
        part.lse += i * p->lse_step;
    }
    return part;
}

#ifdef __CUDACC__ /* merge.cu; stack as above */
#include "common/device.h"

typedef struct fa_merge_variant {
    const char *name;
    const void *kernel;
    fa_merge_found found; /* of the requests that choose it */
} fa_merge_variant;

extern "C" {
/* The kernel for a request of a dtype that it takes: bfloat16, float16 or float32. */
const fa_merge_variant *fa_merge_choose(const fa_merge *m, const fa_merge_stack *stack);
int64_t fa_merge_bytes(const fa_merge *m, const fa_merge_stack *stack,
                       const fa_merge_variant *variant); /* of workspace */
/* Launches on the request's stream, its device being current. */
fa_status fa_merge_launch(const fa_merge *m, const fa_merge_stack *stack,
                          const fa_merge_variant *variant, const fa_device *device, void *workspace,
                          fa_error *error);
}
#endif

#endif
