/* decode.cu - the Hopper decode kernel: few query rows, many keys, bound by memory.
 *
 * One object per line of decode.def: setup.py passes its columns as VARIANT_<COLUMN>
 * (decode_variant.h), and the object exports one function, fa_launch_<name> (decode_launch.cuh).
 *
 * A block has one tile: rows of a group, the query heads that share a key head, so that each key is
 * read once for all of them; and one part of the tile's keys. A warp keeps STAGES blocks of K and V
 * on their way (decode_load.cuh), four compute (decode_attend.cuh), each by itself: no barrier
 * holds them together until the end (decode_out.cuh). Where there are several parts, merge.cu's
 * kernel follows in the stream.
 */
#include <stdint.h>

#include "common/stream.cuh"
#include "sm90/decode_args.cuh"
#include "sm90/decode_attend.cuh"
#include "sm90/decode_launch.cuh"
#include "sm90/decode_load.cuh"
#include "sm90/decode_out.cuh"
#include "sm90/ptx.cuh"

__global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    VARIANT_NAME(const __grid_constant__ decode_args a) {
    alignas(1024) extern __shared__ uint8_t raw[];
    decode_smem &smem = *(decode_smem *)raw;
    if (threadIdx.x == 0) {
#if !IS_STRIDED
        prefetch_tensormap(&a.k.map);
        prefetch_tensormap(&a.v.map);
#endif
        for (int i = 0; i < STAGES; ++i) {
            mbarrier_init(smem_address(&smem.k_full[i]), LOADERS);
            mbarrier_init(smem_address(&smem.v_full[i]), LOADERS);
            mbarrier_init(smem_address(&smem.k_empty[i]), RELEASERS);
            mbarrier_init(smem_address(&smem.v_empty[i]), RELEASERS);
        }
        fence_mbarrier_init();
    }
    __syncthreads();
    let_next_start();
    wait_for_stream();
    const decode_tile t = find_tile(a, blockIdx.x);
    if (t.rows <= 0) return; /* and so do the others of its cluster */
    if (threadIdx.x >= MMA_THREADS) {
#if !IS_STRIDED
        load_keys(a, smem, t);
#endif
    } else {
        warp_rows w;
        attend(w, a, smem, t);
        bar_sync(1, MMA_THREADS);
        share_rows(w, smem, t.rows);
        bar_sync(1, MMA_THREADS);
        add_warps(smem, t.rows);
    }
    if (a.cluster > 1)
        cluster_sync();
    else
        __syncthreads();
    if (threadIdx.x < MMA_THREADS) store_rows(a, smem, t);
    if (a.cluster > 1) cluster_sync(); /* nobody leaves while others read what it has */
}
