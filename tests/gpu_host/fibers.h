/* fibers.h - one block of a CUDA kernel on the host: each thread a fiber, each warp in step where
 * the kernel says so. Enough of CUDA for kernels/common/packed.cuh and merge.cuh, and slow; C++,
 * g++ or clang. FIBERS: the threads of a block. */
#ifndef FASTATTN_TESTS_FIBERS_H
#define FASTATTN_TESTS_FIBERS_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static

/* One block, alone in its stream: in place of common/stream.cuh. */
#define FASTATTN_STREAM_CUH
#define DEVICE static inline
static inline void wait_for_stream() {}
static inline void let_next_start() {}

#ifndef FIBERS
#define FIBERS 1024
#endif
enum { STACK = 32 << 10 };

struct fiber {
    ucontext_t context;
    int64_t steps; /* of its warp that it has taken part in */
    int64_t syncs; /* of the block */
    bool done;
};
static fiber one_block[FIBERS], *fibers = one_block;
static ucontext_t outside;
static int current;
static struct {
    int64_t steps[2]; /* arrivals at even and odd steps */
    uint64_t values[2][32];
} warps[FIBERS / 32];
static int64_t block_arrivals, block_threads = FIBERS; /* of them, those that a kernel has */

struct thread_index {
    struct {
        operator int() const { return current; }
    } x;
};
static thread_index threadIdx;
struct grid_index {
    int64_t x;
};
inline grid_index blockIdx, gridDim = {1}, blockDim = {FIBERS};

static void yield() { swapcontext(&fibers[current].context, &outside); }

/* All lanes give a value; returns those of all lanes. */
static const uint64_t *exchange(uint64_t value) {
    auto &warp = warps[current / 32];
    int64_t step = fibers[current].steps++;
    warp.values[step % 2][current % 32] = value;
    ++warp.steps[step % 2];
    while (warp.steps[step % 2] < (step / 2 + 1) * 32) yield();
    return warp.values[step % 2];
}
template <typename T>
static T exchange(T x, int lane) {
    uint64_t bits = 0;
    memcpy(&bits, &x, sizeof x);
    memcpy(&x, &exchange(bits)[lane], sizeof x);
    return x;
}
static void __syncwarp() { exchange(0); }
template <typename T>
static T __shfl_sync(uint32_t, T x, int lane, int width = 32) {
    return exchange(x, current % 32 / width * width + lane);
}
template <typename T>
static T __shfl_xor_sync(uint32_t, T x, int bits) {
    return exchange(x, current % 32 ^ bits);
}
template <typename T>
static T __shfl_up_sync(uint32_t, T x, int by) {
    int lane = current % 32;
    return exchange(x, lane < by ? lane : lane - by);
}
static uint32_t __ballot_sync(uint32_t, bool yes) {
    const uint64_t *all = exchange(yes);
    uint32_t bits = 0;
    for (int i = 0; i < 32; ++i) bits |= (uint32_t)(all[i] != 0) << i;
    return bits;
}
static int __popc(uint32_t x) { return __builtin_popcount(x); }
static int __ffs(uint32_t x) { return __builtin_ffs((int)x); }
static void __syncthreads() {
    int64_t sync = ++fibers[current].syncs;
    ++block_arrivals;
    while (block_arrivals < sync * block_threads) yield();
}

/* Runs `body` once as each thread of a block. */
static void (*fiber_body)();
static void fiber_main() {
    fiber_body();
    fibers[current].done = true;
    yield();
}
static void start_fibers(void (*body)(), char *stacks) {
    fiber_body = body;
    block_arrivals = 0;
    for (auto &warp : warps) warp = {};
    for (int i = 0; i < FIBERS; ++i) {
        fibers[i].steps = fibers[i].syncs = 0;
        fibers[i].done = false;
        getcontext(&fibers[i].context);
        fibers[i].context.uc_stack.ss_sp = stacks + (size_t)i * STACK;
        fibers[i].context.uc_stack.ss_size = STACK;
        fibers[i].context.uc_link = NULL;
        makecontext(&fibers[i].context, fiber_main, 0);
    }
}
/* Each goes on until it waits; false: all have ended. */
static bool run_fibers() {
    bool running = false;
    for (current = 0; current < FIBERS; ++current)
        if (!fibers[current].done) {
            running = true;
            swapcontext(&outside, &fibers[current].context);
        }
    return running;
}
static void run_block(void (*body)()) {
    static char *stacks = (char *)malloc((size_t)FIBERS * STACK);
    start_fibers(body, stacks);
    while (run_fibers()) {
    }
}

#endif
