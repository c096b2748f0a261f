/* bwd_smem.h - the backward's variant, and the shared memory of a block.
 *
 * A work tile has BLOCK_N keys of one key head, 64 for each MMA warpgroup, or the same 64 for all.
 * It walks over the blocks of BLOCK_M query rows that see one of them, of all query heads that
 * share the key head.
 */
#ifndef FASTATTN_SM90_BWD_SMEM_H
#define FASTATTN_SM90_BWD_SMEM_H

#include <stddef.h>
#include <stdint.h>

#include "mask.h"
#include "sm90/variant.h"

static constexpr int D = VARIANT_D, DV = VARIANT_DV, BLOCK_M = VARIANT_BLOCK_M,
                     BLOCK_N = VARIANT_BLOCK_N, WARPGROUPS = VARIANT_WARPGROUPS,
                     STAGES = VARIANT_STAGES;
static constexpr int MMA_REGISTERS = VARIANT_MMA_REGISTERS;
static constexpr int THREADS = 128 * (WARPGROUPS + 1), MMA_THREADS = 128 * WARPGROUPS;
static constexpr int POOL = 65536 / THREADS / 8 * 8 * (WARPGROUPS + 1);
/* A block of threads stays and takes one work tile after the other, or has one. */
static constexpr bool STAYS = !GENERAL && !VARIANT_STRIDED;
/* Threads that bring Q, K, V and dO: one, where the copy engine does. */
static constexpr int PRODUCERS = VARIANT_STRIDED ? 128 : 1;
/* And those that look for what to bring: warps. */
static constexpr int SEEKERS = GENERAL && !VARIANT_STRIDED ? 32 : PRODUCERS;
/* Two more threads ask for turns at dQ's sums and hand them on, where the producers leave some. */
static constexpr bool HELPED = !VARIANT_STRIDED;
static constexpr int TURNS = 4; /* that they may have on their hands, a block of rows each */
static constexpr int PRODUCER_REGISTERS = POOL - WARPGROUPS * MMA_REGISTERS;
static_assert(PRODUCER_REGISTERS >= 24, "the pool is too small");

/* Panels of 64 columns, 128 bytes a row, swizzled, each on 1024 bytes. */
static constexpr int PANEL_M = BLOCK_M * 128, PANEL_N = BLOCK_N * 128;
static constexpr int QK_PANELS = (D + 63) / 64, V_PANELS = (DV + 63) / 64;

/* What is shared out by columns: whole panels for each warpgroup, the last may get fewer than it
 * computes. */
template <int PANELS>
static constexpr int SHARE = (PANELS + WARPGROUPS - 1) / WARPGROUPS * 64;

/* All warpgroups may have the same 64 keys (dK and dV of more have no room in registers): each has
 * the scores of its own rows, and its columns of dK and dV. Then P^T goes through shared memory. */
static constexpr bool SHARED_KEYS = BLOCK_N < 64 * WARPGROUPS;
static_assert(BLOCK_N == 64 * (SHARED_KEYS ? 1 : WARPGROUPS), "the rows of a wgmma");
/* Two blocks of threads of a cluster may have neighbouring keys and walk over the same rows: each
 * sends the other its dS, and has its columns of dQ for the keys of both (bwd_pair.cuh). Their
 * warpgroups have all rows and columns, and share out the products (bwd_roles.cuh). */
static constexpr bool PAIRED = VARIANT_CLUSTER == 2, SHARED_OUT = SHARED_KEYS && !PAIRED;
static constexpr int ROWS = SHARED_OUT ? BLOCK_M / WARPGROUPS : BLOCK_M; /* of a warpgroup's S^T */
/* Where these begin among the block's keys and rows. */
FA_INLINE int32_t own_key(int32_t warpgroup) { return SHARED_KEYS ? 0 : 64 * warpgroup; }
FA_INLINE int32_t own_row(int32_t warpgroup) { return SHARED_OUT ? ROWS * warpgroup : 0; }
static constexpr int DK_COLUMNS = SHARED_OUT ? SHARE<QK_PANELS> : D,
                     DV_COLUMNS = SHARED_OUT ? SHARE<V_PANELS> : DV;

static constexpr int CLUSTER = PAIRED ? 2 : 1;
static constexpr int TILE_N = CLUSTER * BLOCK_N; /* keys of a cluster's work tile */
static_assert(!PAIRED || (SHARED_KEYS && STAYS && D == DV), "what bwd_pair.cuh does");

/* dQ of a block of rows is shared out by rows where each warpgroup gets 64, else by columns. */
static constexpr bool DQ_BY_ROWS = BLOCK_M == 64 * WARPGROUPS;
static constexpr int DQ_COLUMNS = DQ_BY_ROWS ? D : SHARE<QK_PANELS> / CLUSTER;
static constexpr int SUM_COLUMNS = /* of a row of sums */
    DQ_BY_ROWS ? D : DQ_COLUMNS * WARPGROUPS * CLUSTER;
static_assert(DQ_BY_ROWS || BLOCK_M == 64, "dQ is 64 rows, or 64 for each warpgroup");
/* Added to the sums from registers, where shared memory has no place for it beside two blocks of Q
 * and dO (d 192: 18 % faster so). */
static constexpr bool DIRECT_DQ = DV > 128;

/* S^T of the next block is begun in this one (bwd_ahead.cuh), where that pays: its Q is there while
 * dK still reads the last one's. (128 rows a block: 4 to 21 % slower.) */
static constexpr bool AHEAD = BLOCK_M == 64 && !SHARED_KEYS && !VARIANT_STRIDED && !GENERAL;
static constexpr int Q_STAGES = AHEAD || PAIRED ? 2 * STAGES : STAGES;

/* Blocks of keys that see the first row begin their walks at different ones, and go round, or all
 * would add to the same sums at the same time (d 64 and d 128: 2 % faster). */
static constexpr bool SPREAD = STAYS && !SHARED_KEYS;

/* Below that the error of lse is too small for a P above 1 to be rounded to another number. */
static constexpr float GREAT_LSE = 0x1p11f;

/* A work tile, and the rows that it walks over. */
struct work_tile {
    int32_t b, h_k, key; /* its first key; -1: there are no more tiles */
    int32_t batch;       /* of the arrays: 0 of packed sequences, else b */
    int32_t q, k;        /* the sequence's first rows in the arrays */
    int32_t k_rows;      /* of its K and V, what no row sees included */
    int32_t first_block; /* of its rows in the workspace, of a head */
    int32_t turn;        /* bwd_turns.cuh */
    fa_lengths lengths;
    fa_row_range some, all; /* rows that see one of its keys, every one */
    fa_row_range rows;      /* rows that see any key of the sequence */
    fa_interval keys;       /* keys that some row sees */
    int32_t begin, end;     /* blocks of rows, */
    int32_t first;          /* of which the walk begins with this one */
};

/* A block of rows of a query head, of a general variant's walk (bwd_walk.cuh). */
struct walk_step {
    int32_t h, m;
    int32_t whole; /* a bool mask hides none of its scores */
};

/* Of the next tile, too, where there is room. */
static constexpr int KV_STAGES = STAYS && D == 64 ? 2 : 1;
struct smem_keys {
    uint8_t k[QK_PANELS][PANEL_N], v[V_PANELS][PANEL_N];
};

struct smem_layout {
    smem_keys keys[KV_STAGES];
    uint8_t q[Q_STAGES][QK_PANELS][PANEL_M], dout[STAGES][V_PANELS][PANEL_M];
    uint8_t ds[2][BLOCK_M / 64][PANEL_N]; /* dS^T: a row a key */
    uint8_t p[SHARED_OUT ? 2 : 0][BLOCK_M / 64][PANEL_N];
    float exact_p[PAIRED ? ROWS / 8 : 0][128][4]; /* P^T as a warpgroup's threads hold it */
    /* The other block's, of a cluster's two: K of this block's columns of dQ, dS^T. */
    uint8_t other_k[PAIRED ? QK_PANELS / 2 : 0][PANEL_N], other_ds[PAIRED ? 2 : 0][PANEL_N];
    /* Each warp's share, as its lanes hold it. */
    float dq[DIRECT_DQ ? 0 : MMA_THREADS / 32][DQ_COLUMNS / 8][32][4];
    float lse[Q_STAGES][BLOCK_M], delta[STAGES][BLOCK_M];
    uint64_t tile_full[2], tile_empty[2], tile_loaded;
    uint64_t kv_full[KV_STAGES], kv_empty[KV_STAGES];
    uint64_t q_full[Q_STAGES], q_empty[Q_STAGES], dout_full[STAGES], dout_empty[STAGES];
    uint64_t ds_full[2], turn_full[TURNS], turn_added[TURNS], turn_empty[TURNS];
#if VARIANT_CLUSTER
    uint64_t p_full, other_full[2], number_full, number_empty;
    int32_t number; /* of the tile, as the cluster's first block says */
#endif
#if VARIANT_GENERAL
    walk_step steps[STAGES];
    uint8_t seen[BLOCK_N]; /* keys that some row sees, of a bool mask */
#endif
    work_tile tile[2]; /* this one, and the next */
};
static constexpr int SMEM_BYTES = sizeof(smem_layout);
static_assert(SMEM_BYTES <= 227 * 1024, "a block has no more");
static_assert(offsetof(smem_layout, ds) % 1024 == 0, "wgmma's pattern");

#endif
