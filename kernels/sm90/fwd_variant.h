/* fwd_variant.h - the forward variant that is compiled: its columns, and what follows from them
 * alone. Everybody else asks the constants here.
 *
 * C++ without CUDA: tests/gpu_host/test_layout.py compiles it for every line of the table.
 */
#ifndef FASTATTN_SM90_FWD_VARIANT_H
#define FASTATTN_SM90_FWD_VARIANT_H

#include "sm90/fwd_columns.h"
#include "sm90/variant.h"

/* The loads, which the preprocessor must know. */
#define LOADS_FA_BOXES 0
#define LOADS_FA_STRIDED 1
#define LOADS_FA_SLICES 2
#define LOADS_FA_RAW 3
#define IS_RAW (PASTE(LOADS_, VARIANT_LOADS) == 3)
#define IS_STRIDED (PASTE(LOADS_, VARIANT_LOADS) == 1 || IS_RAW)
#define HAS_SLICES (PASTE(LOADS_, VARIANT_LOADS) == 2)

#define IS_PAGED VARIANT_PAGED

/* ---- the columns ------------------------------------------------------------------------------*/

static constexpr bool ONES = VARIANT_ONES, STRIDED = IS_STRIDED, SLICES = HAS_SLICES;
static constexpr enum offset OFFSET = VARIANT_OFFSET;
static constexpr int D = VARIANT_D, DV = VARIANT_DV, WARPGROUPS = VARIANT_WARPGROUPS,
                     BLOCK_N = VARIANT_BLOCK_N, STAGES = VARIANT_STAGES, Q_SLOTS = VARIANT_Q_SLOTS,
                     BLOCKS_PER_SM = VARIANT_BLOCKS_PER_SM;
static constexpr bool STAGED = VARIANT_STAGED; /* O leaves through shared memory */

static_assert(D % 16 == 0 && BLOCK_N % 16 == 0, "wgmma takes k by 16");
static_assert(DV % (STAGED ? 16 : 32) == 0, "fwd_out.cuh stores 16 or 32 columns at a time");
static_assert(BLOCK_N <= 128, "a thread's scores of a row fit the 32 bits of a row mask");
static_assert(
    !GENERAL || (OFFSET == WATCH && !ONES && (BLOCK_N == 64 || BLOCK_N == 128)),
    "fwd_scores.cuh: a mask's blocks are 128 keys, and l is the sum of what is not rounded");
static_assert(!ONES || DV == 64, "the block of ones is the second panel of V");

/* ---- how its loop goes ------------------------------------------------------------------------*/

static constexpr int BLOCK_M = 64 * WARPGROUPS;
static constexpr int TILE_SLOTS = 4; /* work tiles that the scheduler may be ahead */

/* There may be tiles whose offsets did not hold: they are computed again. */
static constexpr bool REDOES = OFFSET != WATCH;

/* P V of a block is issued behind Q K^T of the next (DELAYED), or, where registers are too few to
 * keep P beside S, or calls are short, 16 keys at a time as soon as their exponentials are there, P
 * a ring of two: other blocks of the SM have work for the tensor cores meanwhile, and the code,
 * which a short call waits for, is half as long. */
static constexpr bool DELAYED = WARPGROUPS < 4 && (BLOCKS_PER_SM == 1 || OFFSET != WATCH);
static constexpr int P_PIECES = DELAYED ? BLOCK_N / 16 : 2;
/* Where a score raises its row's offset, O shrinks once P V of the block before has ended, and the
 * exponentials need not wait for that. The factors take registers, which not all have. */
static constexpr bool SHRINKS_LATE =
    DELAYED && OFFSET != KEEP && (WARPGROUPS == 2 ? DV <= 192 : BLOCK_N <= 80);
/* Q of a tile can arrive while another is computed: its release may wait for the end of a loop. */
[[maybe_unused]] static constexpr bool Q_AHEAD = DELAYED && Q_SLOTS >= 2 * WARPGROUPS;
/* Two or three warpgroups take turns at Q K^T; four find their rhythm alone. */
static constexpr bool TURNS = WARPGROUPS == 2 || WARPGROUPS == 3;
/* Loops for one change of scores alone, where registers and the time to compile them allow. */
[[maybe_unused]] static constexpr bool SPECIAL = GENERAL && !STRIDED && DV <= 128;

/* ---- threads and registers --------------------------------------------------------------------*/

/* The launch gives all threads the same number of registers, the warpgroups then exchange them; the
 * pool is the number of threads times what the launch gave. (256 threads cannot hold all registers
 * of an SM: those leave half of them.) */
static constexpr int THREADS = 128 * (WARPGROUPS + 1);
static constexpr int SHARES = WARPGROUPS == 1 && BLOCKS_PER_SM == 1 ? 2 : BLOCKS_PER_SM;
static constexpr int POOL = 65536 / SHARES / THREADS / 8 * 8 * (WARPGROUPS + 1);
static constexpr int MMA_REGISTERS = VARIANT_MMA_REGISTERS;
static constexpr int PRODUCER_REGISTERS = POOL - WARPGROUPS * MMA_REGISTERS;
static_assert(PRODUCER_REGISTERS >= 24, "the pool is too small");

static constexpr int LOADERS = STRIDED ? 32 : 1; /* threads that bring Q, K, V, each */
/* Lanes that bring K, V: a page each, where boxes are pages; the first speaks for them. */
static constexpr int LANES = IS_PAGED ? 32 : LOADERS;
/* Threads of a warpgroup that hand back what was loaded: one, where wgmma alone has read it; where
 * threads have too, or where a stage's tag soon has a successor, each speaks for itself. */
static constexpr int RELEASERS = STRIDED || SLICES || (GENERAL && DV > 128) ? 128 : 1;
/* Threads that read a work tile: the warpgroups', and the loaders of K and V. */
static constexpr int READERS = 128 * WARPGROUPS + 2 * LANES;

#endif
