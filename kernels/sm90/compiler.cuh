/* compiler.cuh - what persuades the compiler: instructions that do nothing, branches never taken,
 * stores that never happen; each with what was lost without it (H100, kernels/JOURNAL.md).
 *
 * What else the machine code hangs on stands where it is used: `#pragma unroll 1` around what is
 * run once a tile, which must not push the loops out of the instruction cache (producers.cuh), and
 * the launch's share of the registers (SHARES, variant.h).
 */
#ifndef FASTATTN_SM90_COMPILER_CUH
#define FASTATTN_SM90_COMPILER_CUH

#include <stdint.h>

#include "sm90/args.cuh"
#include "sm90/ptx.cuh"
#include "sm90/smem.h"
#include "sm90/wgmma.cuh"

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
 * shrinks O (ROUNDS_FIRST in attend.cuh): float masks 4 to 6 % at d 128, 7 to 9 % at d 256. */
DEVICE void work_out(uint32_t x) {
    asm volatile(
        "{\n.reg .pred never;\nsetp.eq.u32 never, %0, 0;\n"
        "@never st.shared.u32 [%0], %0;\n}" ::"r"(x)
        : "memory");
}

/* A branch that is never taken, behind the barrier that passes the turn: it stays there. Without,
 * where P is looked at: the turn is passed when P is there, 300 clocks late, and all is 30 %
 * slower. (A second wait for K's barrier does the same and is wrong: thread 0 may have handed K
 * back, and a slower warp waits for a phase that is over.) */
template <enum offset HOW>
DEVICE void pin_turn(const kernel_args &a) {
    if (HOW == FOLLOW && a.descriptor_high == 0) __trap();
}

/* Between this and the other side of an `if` there is a branch, not a select. Without: both sides
 * live at once, 143 stores and 132 loads of local memory in the loop (bf16, d 128, softcap). */
DEVICE void not_a_select(float &x) { asm volatile("" : "+f"(x)); }

/* wgmma's descriptor of what lies `offset` + 16 * `step` bytes into shared memory. Linear in
 * `step`, so that one instruction finds a stage; the upper half is an argument. Without: of a
 * constant the compiler makes three moves a product. General variants have no uniform register left
 * for it. */
DEVICE uint64_t operand(const kernel_args &a, smem_layout &smem, uint32_t offset, uint32_t panel,
                        uint32_t step) {
    const uint32_t base = smem_address(&smem);
    if (GENERAL) return wgmma_descriptor(base + offset + 16 * step, panel);
    return (uint64_t)a.descriptor_high << 32 | (base / 16 + offset / 16 + (panel << 16) + step);
}

/* Two rows of O, divided by l and rounded: pair 2 * j + r holds columns 8j + 2 * (lane % 4) and the
 * next of row r. */
typedef uint32_t output_rows[DV / 4];

/* Between tiles O holds nothing, for the first P V of a tile writes it (setting it to 0 took 128
 * instructions a tile). Where registers are few the compiler must hear that, or it keeps what O
 * held: O is said to hold the rows on their way out, which are in half of its registers, or zeros.
 * Which variants need what was found by trial. */
static constexpr bool LEAVES_ZEROS = STRIDED || SLICES || (WARPGROUPS == 3 && OFFSET != KEEP),
                      LEAVES_OUT = DV > 128 || (WARPGROUPS == 3 && BLOCK_N > 64 && OFFSET == KEEP);
template <int N>
DEVICE void forget_output(float (&o)[N], const output_rows &out) {
#pragma unroll
    for (int j = 0; j < DV / 2; ++j) {
        if (LEAVES_ZEROS)
            o[j] = 0.f;
        else if (LEAVES_OUT && j % 2 == 0)
            o[j] = __uint_as_float(out[j / 2]);
    }
    wgmma_accumulators(o);
}

#endif
