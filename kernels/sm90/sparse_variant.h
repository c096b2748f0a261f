/* sparse_variant.h - the variant that is compiled, from the columns of its line of sparse.def or
 * sparse_bwd.def. C++ without CUDA.
 *
 * Of a tile of 16 rows each of four warps has all rows and a quarter of a step's keys; of 64 or 128
 * rows each of four or eight has 16 and all keys.
 */
#ifndef FASTATTN_SM90_SPARSE_VARIANT_H
#define FASTATTN_SM90_SPARSE_VARIANT_H

#include <stdint.h>

#include "sm90/variant.h"

static constexpr int D = VARIANT_D, ROWS = VARIANT_ROWS, BLOCK_N = VARIANT_BLOCK_N;
static constexpr int STAGES = VARIANT_STAGES, BLOCKS_PER_SM = VARIANT_BLOCKS_PER_SM;

static constexpr int WARPS = ROWS == 128 ? 8 : 4, THREADS = 32 * WARPS;
static constexpr int ROW_WARPS = ROWS / 16, KEY_WARPS = WARPS / ROW_WARPS;
static constexpr int KEYS = BLOCK_N / KEY_WARPS; /* of a step, that a warp computes with */
static_assert(KEYS % 16 == 0 && ROW_WARPS * KEY_WARPS == WARPS, "");

/* Panels of 64 columns, 128 bytes a row, swizzled, each on 1024 bytes. */
static constexpr int PANEL = BLOCK_N * 128, Q_PANEL = ROWS * 128;
static constexpr int KEY_BYTES = D / 64 * PANEL, ROW_BYTES = D / 64 * Q_PANEL;

/* Sums of rows on their way out: rows of floats, so far apart that a fragment meets no bank twice.
 */
static constexpr int O_PITCH = D + 8, O_BYTES = KEY_WARPS * ROWS * O_PITCH * 4;

/* Entries of a list that some row sees, as many as are looked at at once. */
static constexpr int ENTRIES = 512;
static_assert(ENTRIES % THREADS == 0, "");

struct listed_entries {
    int32_t block[ENTRIES]; /* of keys */
    int32_t entry[ENTRIES]; /* where it stands in the list */
    float gate[ENTRIES];
    int32_t counts[2][WARPS];
};

/* The columns of one step. */
struct step_columns {
    int32_t key[BLOCK_N]; /* -1: none */
    float gate[BLOCK_N];
    int32_t entry[BLOCK_N]; /* -1: of no gate */
    int32_t kind[WARPS];    /* of each warp's share: IS_WHOLE | OF_WINDOW */
};
enum { IS_WHOLE = 1, OF_WINDOW = 2 };

#endif
