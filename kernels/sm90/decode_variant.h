/* decode_variant.h - the decode variant that is compiled, from the columns of its line of
 * decode.def; and the shared memory of a block.
 *
 * C++ without CUDA. Four warps compute; a fifth loads, or they do. Of a tile of 16 rows each warp
 * has all rows and a quarter of a block's keys; of 64 rows each has 16 and all keys.
 */
#ifndef FASTATTN_SM90_DECODE_VARIANT_H
#define FASTATTN_SM90_DECODE_VARIANT_H

#include <stdint.h>

#include "sm90/variant.h"

static constexpr int D = VARIANT_D, DV = VARIANT_DV, ROWS = VARIANT_ROWS;
static constexpr int BLOCK_N = VARIANT_BLOCK_N, STAGES = VARIANT_STAGES;
static constexpr int BLOCKS_PER_SM = VARIANT_BLOCKS_PER_SM;
static constexpr bool STRIDED = VARIANT_STRIDED;
#define IS_STRIDED VARIANT_STRIDED

static constexpr int MMA_WARPS = 4, MMA_THREADS = 32 * MMA_WARPS;
static constexpr int THREADS = MMA_THREADS + (STRIDED ? 0 : 32);
static constexpr int ROW_WARPS = ROWS / 16, KEY_WARPS = MMA_WARPS / ROW_WARPS;
static constexpr int KEYS = BLOCK_N / KEY_WARPS; /* of a block, that a warp computes with */
static_assert(KEYS % 16 == 0 && ROW_WARPS * KEY_WARPS == MMA_WARPS, "");
/* Arrivals at a barrier of stages that have been read: each thread speaks for itself, for racecheck
 * does not follow one that speaks for its warp. What MMA_WARPS would bring is not measured. */
static constexpr int RELEASERS = MMA_THREADS;
static constexpr int LOADERS = STRIDED ? MMA_THREADS : 1; /* arrivals at a barrier of loads */

/* Panels of 64 columns, 128 bytes a row, swizzled, each on 1024 bytes. */
static constexpr int PANEL = BLOCK_N * 128, Q_PANEL = ROWS * 128;
static constexpr int K_BYTES = D / 64 * PANEL, V_BYTES = DV / 64 * PANEL;

/* O of a warp on its way out: rows of floats, so far apart that a fragment meets no bank twice. */
static constexpr int O_PITCH = DV + 8;

struct decode_smem {
    uint8_t k[STAGES][K_BYTES], v[STAGES][V_BYTES]; /* at the end: KEY_WARPS x ROWS rows of O */
    union {
        uint8_t q[D / 64 * Q_PANEL];
        struct {
            float all_top[ROWS], all_sum[ROWS]; /* of the block's keys, at the end */
        };
    };
    float top[KEY_WARPS][ROWS], sum[KEY_WARPS][ROWS]; /* of each warp's keys, at the end */
    uint64_t k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
};
static_assert(KEY_WARPS * ROWS * O_PITCH * 4 <= STAGES * (K_BYTES + V_BYTES), "");
static constexpr int SMEM_BYTES = sizeof(decode_smem);

#endif
