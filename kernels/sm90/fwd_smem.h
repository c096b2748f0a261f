/* fwd_smem.h - the shared memory of a block: what lies where, and what the warps tell each other.
 *
 * C++ without CUDA: tests/gpu_host/test_layout.py compiles it for every line of the table.
 */
#ifndef FASTATTN_SM90_FWD_SMEM_H
#define FASTATTN_SM90_FWD_SMEM_H

#include <stddef.h>
#include <stdint.h>

#include "mask.h"
#include "sm90/fwd_variant.h"

/* ---- panels of 64 columns, 128 bytes a row, swizzled, each on 1024 bytes ----------------------*/

template <int COLUMNS>
static constexpr int panels = (COLUMNS + 63) / 64;
static constexpr int PANEL_Q = 64 * 128, PANEL_N = BLOCK_N * 128;
static constexpr int Q_BYTES = PANEL_Q * panels<D>;
static constexpr int O_BYTES = 16 * 128; /* a panel of a warp's rows */
static constexpr int K_BYTES = PANEL_N * panels<D>, V_BYTES = PANEL_N * panels<DV>;
[[maybe_unused]] static constexpr int MASK_BYTES = 64 * BLOCK_N * 2; /* a float mask's tile */
#if IS_RAW
static constexpr int RING = 4, RAW_BYTES = DV > 128 ? 15360 : 17408; /* fwd_load_raw.cuh */
#endif

#if VARIANT_GENERAL
/* What a work tile says about changes of scores. */
struct score_tile {
    const char *mask; /* element (0, 0) of its head */
    int64_t plane, seed;
    int32_t b;     /* as dropout counts */
    int32_t split; /* the block to the left of which the order begins */
    float slope;
};
#endif

/* A work tile: BLOCK_M query rows of one head, as the scheduler describes them to the others. */
struct work_tile {
    int32_t b, h, row;   /* batch, query head, first query row */
    int32_t h_k;         /* key head */
    fa_lengths lengths;  /* of this sequence */
    int32_t q, k;        /* packed: its first rows in the arrays; else 0 */
    int32_t rows, keys;  /* rows to store, padding included; keys up to the array's end */
    int32_t boxed;       /* rows that may leave in boxes of 16, which only the array's end clips */
    int32_t begin, end;  /* key blocks that some row sees */
    int32_t left, right; /* how many of them, from either side, not every row sees whole */
    fa_interval visible; /* keys that some row of the sequence sees */
    fa_interval some[WARPGROUPS], whole[WARPGROUPS]; /* keys that one row, that all rows see */
    int32_t skip[WARPGROUPS]; /* blocks in front of the first that a row sees; all, if none does */
    int32_t masked[WARPGROUPS]; /* those, that one, and all up to the last that not all see whole */
    int32_t warpgroups;         /* bit set of those that compute it */
    int32_t watch;              /* the offset is neither kept nor followed */
    float sink;                 /* one more score of every row; -inf: none */
    int32_t last;               /* there is no tile, and there will be no more */
#if VARIANT_GENERAL
    score_tile score;
#endif
};

struct smem_layout {
    uint8_t q[Q_SLOTS][Q_BYTES]; /* a warpgroup's, in their turn */
    uint8_t k[STAGES][K_BYTES];
    uint8_t v[STAGES][V_BYTES];
#if VARIANT_GENERAL
    uint8_t mask[WARPGROUPS][MASK_BYTES];
#endif
    uint8_t o[STAGED ? 4 * WARPGROUPS : 1][STAGED ? panels<DV> : 1][STAGED ? O_BYTES : 16];
#if IS_RAW
    alignas(128) uint8_t raw[2][RAW_BYTES]; /* rows of V, of K, as they lie in memory */
    uint64_t raw_full[2][RING];
#endif
    uint8_t ones[ONES ? PANEL_N : 16]; /* 64 more columns of V: O's column 64 becomes the row sum */
    uint64_t q_full[Q_SLOTS], q_empty[Q_SLOTS];
    uint64_t k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
    uint64_t tile_full[TILE_SLOTS], tile_empty[TILE_SLOTS];
    work_tile tiles[TILE_SLOTS];
    uint32_t votes[TILE_SLOTS]; /* bit w: warpgroup w could not keep its offset */
#if VARIANT_GENERAL
    uint32_t tags[STAGES]; /* of a bool mask: which block of K is in a stage, and who sees it */
    uint64_t mask_full[WARPGROUPS], mask_empty[WARPGROUPS];
    alignas(16) uint32_t columns[WARPGROUPS][4][4]; /* keys of a block that a quarter's rows see */
#endif
};
static_assert(offsetof(smem_layout, o) % 1024 == 0, "the copy engine's pattern");
#if VARIANT_GENERAL
static_assert(offsetof(smem_layout, mask) % 1024 == 0, "the copy engine's pattern");
#endif
static_assert(!ONES || offsetof(smem_layout, ones) % 1024 == 0, "wgmma's pattern");

static constexpr int SMEM_BYTES = sizeof(smem_layout) + 1024; /* room to align the base */
static_assert(SMEM_BYTES <= 227 * 1024, "a block has no more");

#endif
