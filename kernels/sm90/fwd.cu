/* fwd.cu - the Hopper forward kernel: stop 6 of 6. kernels/README.md has the pictures.
 *
 * One object per line of fwd.def: setup.py passes its columns as VARIANT_<COLUMN> (fwd_variant.h),
 * and the object exports one function, fa_launch_<name> (fwd_launch.cuh).
 *
 * A block stays on its SM and works through tiles of 64 * WARPGROUPS query rows of one head. Each
 * MMA warpgroup owns 64 rows of a tile and keeps S, P and O in registers (fwd_consume.cuh,
 * fwd_attend.cuh). Four more warps serve them, one thread each: one decides what comes next
 * (fwd_scheduler.cuh), one brings Q, one K, one V (fwd_producers.cuh). A tile ends while the next
 * one's first block is under way (NEXT in fwd_attend.cuh).
 *
 * The softmax offset (softmax.cuh) comes from the first, masked key blocks of a tile. Variants that
 * KEEP it never look at it again: their main loop has no maximum at all; those that FOLLOW look at
 * P. At the end of a tile each warp votes whether everything stayed finite and in range; if not,
 * the tile comes again for its warpgroup, with the loop that watches every score, and what was
 * stored is stored once more.
 *
 * GENERAL variants change scores (fwd_scores.cuh): they watch every score, always, and take their
 * key blocks from the right to the left, those that a bool mask hides from all rows left out.
 *
 * STRIDED variants take arrays that the copy engine cannot address: whole warps load in its place,
 * element by element, and O is stored likewise. Everything between is the same. SLICES: the copy
 * engine does, but not a head alone: the columns of other heads that it brings are cleared. RAW:
 * strided, but the copy engine brings K and V as they lie in memory, and warps move them.
 */
#include <stddef.h>
#include <stdint.h>

#include "common/stream.cuh"
#include "sm90/fwd_args.cuh"
#include "sm90/fwd_consume.cuh"
#include "sm90/fwd_launch.cuh"
#include "sm90/fwd_pipeline.cuh"
#include "sm90/fwd_producers.cuh"
#include "sm90/fwd_scheduler.cuh"
#include "sm90/fwd_smem.h"
#include "sm90/fwd_variant.h"
#include "sm90/ptx.cuh"

/* Longer than a function should be: the barriers set up by a function of their own are other
 * machine code. */
__global__ void __launch_bounds__(THREADS, SHARES)
    VARIANT_NAME(const __grid_constant__ kernel_args a) {
    extern __shared__ uint8_t raw[];
    smem_layout &smem = *(smem_layout *)(raw + (-smem_address(raw) & 1023));
    if (threadIdx.x == 0) {
#if !IS_STRIDED
        prefetch_tensormap(&a.q);
        prefetch_tensormap(&a.k);
        prefetch_tensormap(&a.v);
#endif
        for (int i = 0; i < Q_SLOTS; ++i) {
            mbarrier_init(smem_address(&smem.q_full[i]), LOADERS);
            mbarrier_init(smem_address(&smem.q_empty[i]), RELEASERS);
        }
        for (int i = 0; i < TILE_SLOTS; ++i) {
            mbarrier_init(smem_address(&smem.tile_full[i]), 1);
            mbarrier_init(smem_address(&smem.tile_empty[i]), READERS);
            smem.votes[i] = 0;
        }
        for (int i = 0; i < STAGES; ++i) {
            mbarrier_init(smem_address(&smem.k_full[i]), LOADERS);
            mbarrier_init(smem_address(&smem.v_full[i]), LOADERS);
            mbarrier_init(smem_address(&smem.k_empty[i]), WARPGROUPS * RELEASERS);
            mbarrier_init(smem_address(&smem.v_empty[i]), WARPGROUPS * RELEASERS);
        }
#if IS_RAW
        for (int i = 0; i < 2 * RING; ++i) mbarrier_init(smem_address(&smem.raw_full[0][i]), 1);
#endif
#if VARIANT_GENERAL
        for (int w = 0; w < WARPGROUPS; ++w) {
            mbarrier_init(smem_address(&smem.mask_full[w]), 1);
            mbarrier_init(smem_address(&smem.mask_empty[w]), 4);
        }
#endif
        fence_mbarrier_init();
    }
    int32_t tile = 0, round = 0;
    if (threadIdx.x == 128 * WARPGROUPS) {
        if (a.reads) wait_for_stream();
        tile = first_tile(a, smem, &round);
    }
    if (ONES) {
        uint32_t one = IS_BF16 ? 0x3F803F80 : 0x3C003C00;
        for (int i = threadIdx.x; i < PANEL_N / 4; i += THREADS) ((uint32_t *)smem.ones)[i] = one;
        fence_proxy_async();
    }
    bool wider = STRIDED; /* than the heads are: no load touches those columns */
#if !IS_STRIDED
    wider = a.columns[1] < D || a.columns[2] < DV;
#endif
    if (wider) {
        for (int i = threadIdx.x; i < (int)offsetof(smem_layout, o) / 16; i += THREADS)
            ((uint4 *)&smem)[i] = make_uint4(0, 0, 0, 0);
        fence_proxy_async();
    }
    __syncthreads();
    wait_for_stream();

    int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
    if (warpgroup == WARPGROUPS) {
        setmaxnreg_dec<PRODUCER_REGISTERS>();
        int producer = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
        if (producer == 0 && lane == 0) schedule(a, smem, tile, round);
        if (producer == 1 && lane < LOADERS) bring_q(a, smem);
        if (producer == 2 && lane < LANES) bring_k(a, smem);
        if (producer == 3 && lane < LANES) bring_v(a, smem);
    } else {
        setmaxnreg_inc<MMA_REGISTERS>();
        consume(a, smem, warpgroup);
    }
}
