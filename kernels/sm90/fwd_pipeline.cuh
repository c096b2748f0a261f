/* fwd_pipeline.cuh - who waits for whom: rings of shared memory, turns at the tensor cores,
 * barriers.
 *
 * Work tiles pass through a ring of TILE_SLOTS: the scheduler fills a slot (tile_full), everybody
 * reads it, and when the warpgroups and the loaders of K and V have left it (tile_empty) it is
 * filled again. K and V have rings of STAGES each, Q one of Q_SLOTS, a warpgroup's 64 rows a slot.
 */
#ifndef FASTATTN_SM90_FWD_PIPELINE_CUH
#define FASTATTN_SM90_FWD_PIPELINE_CUH

#include <stdint.h>

#include "sm90/fwd_smem.h"
#include "sm90/ptx.cuh"

/* ---- named barriers ---------------------------------------------------------------------------*/

/* A warpgroup's own: 1 .. 4, of its 128 threads. Its turn: 8 .. 10, of its threads, which wait, and
 * those of the warpgroup before it, which arrive. (0 is __syncthreads().) */
enum { WARPGROUP_BARRIER = 1, TURN_BARRIER = 8 };
static_assert(WARPGROUP_BARRIER + WARPGROUPS <= TURN_BARRIER && TURN_BARRIER + WARPGROUPS <= 16,
              "16 named barriers, each of one use");

DEVICE void sync_warpgroup(int warpgroup) { bar_sync(WARPGROUP_BARRIER + warpgroup, 128); }

/* While one warpgroup has the tensor cores for Q K^T, the others are at their exponentials and P V;
 * without turns they fall into step, and the tensor cores idle. */
DEVICE void take_turn(int warpgroup) {
    if (TURNS) bar_sync(TURN_BARRIER + warpgroup, 256);
}
DEVICE void pass_turn(int warpgroup) {
    if (TURNS) bar_arrive(TURN_BARRIER + (warpgroup + 1) % WARPGROUPS, 256);
}

/* ---- the rings of K and V ---------------------------------------------------------------------*/

/* A place in a ring of stages; the parity flips each time around. */
struct cursor {
    int stage;
    uint32_t parity;
};
DEVICE void advance(cursor &c) {
    bool wrap = ++c.stage == STAGES;
    c.stage = wrap ? 0 : c.stage;
    c.parity ^= wrap;
}

/* A warpgroup hands back what lies behind this barrier. */
DEVICE void release(uint32_t barrier) {
    if (RELEASERS == 128 || threadIdx.x % 128 == 0) mbarrier_arrive(barrier);
}

/* ---- the ring of work tiles -------------------------------------------------------------------*/

/* The n-th work tile of this block, once the scheduler has described it. */
DEVICE const work_tile &wait_tile(smem_layout &smem, int32_t n) {
    mbarrier_wait(smem_address(&smem.tile_full[n % TILE_SLOTS]), n / TILE_SLOTS & 1);
    return smem.tiles[n % TILE_SLOTS];
}
/* This thread has read the n-th work tile for the last time. */
DEVICE void leave_tile(smem_layout &smem, int32_t n) {
    mbarrier_arrive(smem_address(&smem.tile_empty[n % TILE_SLOTS]));
}
/* All have. */
DEVICE void wait_tile_left(smem_layout &smem, int32_t n) {
    mbarrier_wait(smem_address(&smem.tile_empty[n % TILE_SLOTS]), n / TILE_SLOTS & 1);
}

/* The slot of Q that has a warpgroup's rows of the n-th work tile, and the parity of its phase. */
DEVICE int q_slot(int32_t n, int warpgroup) { return (n * WARPGROUPS + warpgroup) % Q_SLOTS; }
DEVICE uint32_t q_parity(int32_t n, int warpgroup) {
    return (n * WARPGROUPS + warpgroup) / Q_SLOTS & 1;
}

#endif
