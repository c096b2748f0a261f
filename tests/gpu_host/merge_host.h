/* merge_host.h - kernels/common/merge.cuh on the host: what its elements are there, and a launch.
 */
#ifndef FASTATTN_TESTS_MERGE_HOST_H
#define FASTATTN_TESTS_MERGE_HOST_H

#define FIBERS 256
#include <math.h>

#include "fibers.h"

#define DEVICE static inline
#define __fdividef(a, b) ((a) / (b))

#include "element.h"

#include "common/merge.cuh"

static merge_list_args list_now;
template <int PARTS>
static merge_args<PARTS> merge_now;

/* All blocks of a launch, one after the other; the last one first. */
static void launch_blocks(void (*body)(), int blocks) {
    gridDim.x = blocks;
    for (blockIdx.x = blocks - 1; blockIdx.x >= 0; --blockIdx.x) run_block(body);
}

template <fa_dtype IN, fa_dtype OUT, int BYTES, int PARTS>
static void run_few(const fa_merge *m, const fa_merge_plan *p, int blocks) {
    merge_now<PARTS> = make_merge_args<PARTS>(m, p, NULL);
    launch_blocks([] { merge_few<IN, OUT, PARTS, BYTES>(merge_now<PARTS>); }, blocks);
}

template <fa_dtype IN, fa_dtype OUT, int BYTES>
static void run_many(const fa_merge *m, const fa_merge_plan *p, void *workspace, int blocks) {
    for (int first = 0; p->bytes && first < m->n; first += FA_MERGE_LISTED) {
        list_now = make_list_args(m, p, first, workspace);
        launch_blocks([] { merge_list(list_now); }, 1);
    }
    merge_now<8> = make_merge_args<8>(m, p, workspace);
    launch_blocks([] { merge_many<IN, OUT, BYTES>(merge_now<8>); }, blocks);
}

template <fa_dtype IN, fa_dtype OUT, int BYTES>
static void run_width(const fa_merge *m, const fa_merge_plan *p, void *workspace, int blocks) {
    if (p->is_many)
        run_many<IN, OUT, BYTES>(m, p, workspace, blocks);
    else if (p->batch == 2)
        run_few<IN, OUT, BYTES, 2>(m, p, blocks);
    else if (p->batch == 4)
        run_few<IN, OUT, BYTES, 4>(m, p, blocks);
    else
        run_few<IN, OUT, BYTES, 8>(m, p, blocks);
}

template <fa_dtype IN, fa_dtype OUT>
static void run_merge(const fa_merge *m, const fa_merge_plan *p, void *workspace, int blocks) {
    if (p->width == 16)
        run_width<IN, OUT, 16>(m, p, workspace, blocks);
    else if (p->width == 8)
        run_width<IN, OUT, 8>(m, p, workspace, blocks);
    else if (p->width == 4)
        run_width<IN, OUT, 4>(m, p, workspace, blocks);
    else
        run_many<IN, OUT, 0>(m, p, workspace, blocks);
}

#endif
