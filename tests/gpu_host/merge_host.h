/* merge_host.h - kernels/common/merge.cuh on the host: what its elements are there, and a launch.
 */
#ifndef FASTATTN_TESTS_MERGE_HOST_H
#define FASTATTN_TESTS_MERGE_HOST_H

#define FIBERS 256
#include <math.h>

#include "fibers.h"

#define DEVICE static inline
#define __fdividef(a, b) ((a) / (b))

#include "fastattn.h"

template <fa_dtype T>
struct element;

template <>
struct element<FA_F32> {
    typedef float stored;
    static float widen(float x) { return x; }
    static float narrow(float x) { return x; }
    static void unpack(float (&x)[1], uint32_t bits) { memcpy(x, &bits, 4); }
};

template <>
struct element<FA_BF16> {
    typedef uint16_t stored;
    static float widen(uint16_t x) {
        uint32_t bits = (uint32_t)x << 16;
        float y;
        memcpy(&y, &bits, 4);
        return y;
    }
    static uint16_t narrow(float x) {
        uint32_t bits;
        memcpy(&bits, &x, 4);
        if (x != x) return 0x7FFF;
        return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
    }
    static void unpack(float (&x)[2], uint32_t bits) {
        x[0] = widen((uint16_t)bits);
        x[1] = widen((uint16_t)(bits >> 16));
    }
};

/* An address that a GPU would refuse ends the test. */
template <int WORDS>
static void load_once(uint32_t (&x)[WORDS], const void *from) {
    if ((uintptr_t)from % sizeof x) abort();
    memcpy(x, from, sizeof x);
}

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
