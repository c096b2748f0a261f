/* fwd_compiler.cuh - what persuades the compiler in the forward kernel alone, as
 * common/compiler.cuh does elsewhere.
 *
 * What else the machine code hangs on stands where it is used: `#pragma unroll 1` around what is
 * run once a tile, which must not push the loops out of the instruction cache (fwd_producers.cuh),
 * and the launch's share of the registers (SHARES, fwd_variant.h).
 */
#ifndef FASTATTN_SM90_FWD_COMPILER_CUH
#define FASTATTN_SM90_FWD_COMPILER_CUH

#include <stdint.h>

#include "common/compiler.cuh"
#include "sm90/fwd_args.cuh"
#include "sm90/fwd_smem.h"
#include "sm90/ptx.cuh"
#include "sm90/wgmma.cuh"

/* A branch that is never taken, behind the barrier that passes the turn: it stays there. Without,
 * where P is looked at: the turn is passed when P is there, 300 clocks late, and all is 30 %
 * slower. (A second wait for K's barrier does the same and is wrong: thread 0 may have handed K
 * back, and a slower warp waits for a phase that is over.) */
template <enum offset HOW>
DEVICE void pin_turn(const kernel_args &a) {
    if (HOW == FOLLOW && a.descriptor_high == 0) __trap();
}

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
