/* variant.h - the variant that is compiled, of whatever operation: what follows from the columns of
 * its line (columns.h), which setup.py passes as VARIANT_<COLUMN>. C++ without CUDA.
 */
#ifndef FASTATTN_SM80_VARIANT_H
#define FASTATTN_SM80_VARIANT_H

#include "sm80/columns.h"

#define PASTE_(a, b) a##b
#define PASTE(a, b) PASTE_(a, b)

/* What the dtype is, for the preprocessor as well: to it names that it does not know are 0. */
#define IS_F64_FA_F64 1
#define IS_F32_FA_F32 1
#if PASTE(IS_F64_, VARIANT_DTYPE)
#define IS_F64 1
#define IS_F32 0
#elif PASTE(IS_F32_, VARIANT_DTYPE)
#define IS_F64 0
#define IS_F32 1
#else
#define IS_F64 0
#define IS_F32 0
#endif
#define IS_HALF (!IS_F64 && !IS_F32)

static constexpr fa_dtype DTYPE = VARIANT_DTYPE;
static constexpr int SIZE = IS_HALF ? 2 : IS_F32 ? 4 : 8; /* bytes of an element */
static constexpr bool GENERAL = VARIANT_GENERAL;          /* it changes scores */

#if IS_F64
typedef double real; /* what all but products is computed in */
#else
typedef float real;
#endif

static constexpr int D = VARIANT_D, BLOCK_N = VARIANT_BLOCK_N, PANEL = VARIANT_PANEL,
                     STAGES = VARIANT_STAGES, ROW_WARPS = VARIANT_ROW_WARPS,
                     WARP_ROWS = VARIANT_WARP_ROWS, COLUMN_WARPS = VARIANT_COLUMN_WARPS;
static constexpr int BLOCK_M = FA_SM80_BLOCK_M(ROW_WARPS, WARP_ROWS),
                     THREADS = 32 * ROW_WARPS * COLUMN_WARPS;
static constexpr int PANELS = D / PANEL; /* of a block of K, and of V */
static constexpr int OWN = D / COLUMN_WARPS, OWN_PANEL = PANEL / COLUMN_WARPS; /* columns of O */
static constexpr int STRIPS = WARP_ROWS / 16; /* of 16 rows, that a warp has */
static constexpr int SCORES = BLOCK_N / 8;    /* fragments of 8 keys, of a strip */
static constexpr int CHUNK = 16 / SIZE;       /* elements of 16 bytes */

/* Bytes: of a row of Q, of a row of a panel, of Q, of a panel, and in all. */
static constexpr int Q_ROW = D * SIZE, PANEL_ROW = PANEL * SIZE, Q_BYTES = BLOCK_M * Q_ROW,
                     PANEL_BYTES = BLOCK_N * PANEL_ROW;
/* ARRAYS: that have rows of the tile. */
template <int ARRAYS>
constexpr int SMEM_BYTES = FA_SM80_SMEM(ARRAYS, BLOCK_M, D, BLOCK_N, PANEL, STAGES, SIZE);

static_assert(SMEM_BYTES<1> == Q_BYTES + STAGES * PANEL_BYTES, "one formula");
static_assert(D % PANEL == 0 && PANEL_ROW % 128 == 0, "rows of whole swizzled lines");
static_assert(BLOCK_N % 16 == 0 && 128 % BLOCK_N == 0, "mask_bits.h has 128 keys to a word");
static_assert(COLUMN_WARPS == 1 || IS_F64 || OWN_PANEL * SIZE % 128 == 0, "lines of their own");
static_assert(WARP_ROWS % 16 == 0 && STAGES >= 2, "");
static_assert(OWN_PANEL % (IS_F64 ? 8 : 16) == 0, "whole fragments of O, two side by side");
static_assert(!IS_F32 || STRIPS == 1, "");

#endif
