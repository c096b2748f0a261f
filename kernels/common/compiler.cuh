/* compiler.cuh - what persuades the compiler: instructions that do nothing, branches never taken,
 * stores that never happen; each with what was lost without it (H100, kernels/JOURNAL.md).
 *
 * sm90/fwd_compiler.cuh has what only the forward kernel needs.
 */
#ifndef FASTATTN_COMPILER_CUH
#define FASTATTN_COMPILER_CUH

#include <stdint.h>

#include "common/stream.cuh"

/* All lanes have this x, as the compiler cannot know of what came from shared memory: addresses and
 * branches that depend on it stay in uniform registers. Without: 75 to 87 R2UR an iteration at
 * d 256, and spills. */
DEVICE int32_t uniform(int32_t x) { return __shfl_sync(~0u, x, 0); }

/* threadIdx.x, read where it is asked for: what is computed from it is not kept around a loop.
 * Without: registers that the loop needs; no figure of this alone was kept. */
DEVICE int32_t thread_here() {
    int32_t x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return x;
}

/* Uses of the accumulators do not move across the wait before this. Without: it may read registers
 * that wgmma has not written yet. */
template <int N>
DEVICE void wgmma_accumulators(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

/* For an x that is never 0: a store that never happens. What x is made of is worked out before it;
 * else ptxas does so where registers are fewest, behind the wait that was to hide it. (A branch
 * there would cost wgmma its pipeline.) Without, and without rounding P before the branch that
 * shrinks O (ROUNDS_FIRST in fwd_attend.cuh): float masks 4 to 6 % at d 128, 7 to 9 % at d 256. */
DEVICE void work_out(uint32_t x) {
    asm volatile(
        "{\n.reg .pred never;\nsetp.eq.u32 never, %0, 0;\n"
        "@never st.shared.u32 [%0], %0;\n}" ::"r"(x)
        : "memory");
}

/* Between this and the other side of an `if` there is a branch, not a select. Without: both sides
 * live at once, 143 stores and 132 loads of local memory in the loop (bf16, d 128, softcap). */
DEVICE void not_a_select(float &x) { asm volatile("" : "+f"(x)); }

/* Whether a count is negative, which none is: a branch that is never taken, behind loads that are
 * all to be on their way before the first is waited for. Without, in merging: ptxas waits for lse
 * before the last of the fragments' loads; no figure of this alone was kept. */
DEVICE bool never(int32_t count) { return count < 0; }

#endif
