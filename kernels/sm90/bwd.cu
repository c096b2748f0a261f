/* bwd.cu - the Hopper backward kernel: dK and dV of a block of keys, and its share of dQ.
 *
 * A block of threads has BLOCK_N keys of one key head, 64 to each MMA warpgroup, whose dK and dV
 * stay in registers while it walks over the blocks of query rows that see one of those keys:
 *
 *     S^T = K Q^T    dP^T = V dO^T         K, V, Q, dO as they lie in shared memory
 *     P^T = 2^(S^T scale - lse)            columns are rows of Q: lse and delta by column
 *     dS^T = P^T (dP^T - delta)
 *     dV += P^T dO   dK += dS^T Q          P^T and dS^T from registers, as they are
 *     dQ += dS K                           dS through shared memory: all keys of the block
 *
 * Transposed scores have their keys along wgmma's rows, so that P^T and dS^T are the A operands of
 * dV and dK without a move. dQ is added to sums in global memory by the copy engine, as the threads
 * hold it; bwd_dq() puts it in order.
 */
#include <stddef.h>
#include <stdint.h>

#include "common/compiler.cuh"
#include "common/element.cuh"
#include "common/launch.cuh"
#include "common/stream.cuh"
#include "sm90/bwd_args.cuh"
#include "sm90/bwd_block.cuh"
#include "sm90/bwd_launch.cuh"
#include "sm90/bwd_load.cuh"
#include "sm90/bwd_loop.cuh"
#include "sm90/bwd_smem.h"
#include "sm90/bwd_waits.cuh"
#include "sm90/bwd_walk.cuh"
#include "sm90/ptx.cuh"

/* ---- the work tile ----------------------------------------------------------------------------*/

DEVICE work_tile describe(const bwd_args &a, int32_t number) {
    work_tile t;
    const int32_t head = number / a.n_blocks, block = number % a.n_blocks;
    const fa_varlen &v = a.varlen;
    t.b = t.batch = head / a.hk; /* 0 of packed sequences, until their sequence is known */
    t.h_k = head % a.hk;
    t.key = block * BLOCK_N, t.k_rows = a.sk;
    t.q = t.k = t.first_block = 0;
    if (v.cu_k) {
        const fa_packed_block found =
            fa_packed_find(v.cu_k, v.cu_k_stride, a.b, v.total_k, BLOCK_N, block);
        t.b = found.b, t.key = found.row, t.k_rows = found.end - found.first;
        t.k = found.first;
        t.first_block = fa_packed_first(v.cu_q, v.cu_q_stride, t.b, v.total_q, BLOCK_M);
    }
    t.lengths = fa_lengths{0, 0, 0, 0, 0, 0}; /* of the keys of none */
    if (!v.cu_k || t.b < a.b) {
        const fa_sequence s = fa_find_sequence(&v, &a.masks, t.b, a.sq, a.sk);
        t.q = s.q, t.lengths = s.lengths;
    }
    find_seen(t);
    return t;
}

/* ---- the producer: a thread, or a warpgroup ---------------------------------------------------*/

DEVICE void bring_keys(const bwd_args &a, smem_layout &smem, const work_tile &t) {
    const int32_t b = t.batch, key = t.k + t.key;
    bring(a.k, a.moves[1], smem.k, key, t.h_k, b, NULL, NULL, smem.kv_full, EVICT_FIRST);
    bring(a.v, a.moves[2], smem.v, key, t.h_k, b, NULL, NULL, smem.kv_full, EVICT_FIRST);
}

/* Block n of those that the tile walks over. */
DEVICE void bring_rows(const bwd_args &a, smem_layout &smem, const work_tile &t, int32_t h,
                       int64_t rows, int32_t row, uint32_t n) {
    const uint32_t q = n % Q_STAGES, stage = n % STAGES;
    mbarrier_wait(smem_address(&smem.q_empty[q]), n / Q_STAGES % 2 ^ 1);
    bring(a.q, a.moves[0], smem.q[q], t.q + row, h, t.batch, a.lse + rows + row, smem.lse[q],
          smem.q_full[q], EVICT_LAST);
    mbarrier_wait(smem_address(&smem.dout_empty[stage]), n / STAGES % 2 ^ 1);
    bring(a.dout, a.moves[3], smem.dout[stage], t.q + row, h, t.batch, a.delta + rows + row,
          smem.delta[stage], smem.dout_full[stage], EVICT_LAST);
}

#if VARIANT_GENERAL
DEVICE void produce(const bwd_args &a, smem_layout &smem, const work_tile &t) {
    const bool brings = threadIdx.x < MMA_THREADS + PRODUCERS;
    if (brings) bring_keys(a, smem, t);
    uint32_t n = 0; /* blocks of rows so far */
    for (int32_t g = 0; g < a.group; ++g) {
        const int32_t h = t.h_k * a.group + g;
        for (int32_t first = t.begin; first < t.end; first += 32) {
            const seen_blocks seen = blocks_seen(a, t, h, first);
            const uint32_t inside = bit_mask(0, t.end - first);
            for (uint32_t left = seen.some & inside; left && brings; left &= left - 1, ++n) {
                const int32_t i = __ffs(left) - 1, row = (first + i) * BLOCK_M;
                const uint32_t stage = n % STAGES, parity = n / STAGES % 2 ^ 1;
                mbarrier_wait(smem_address(&smem.q_empty[stage]), parity);
                say_step(smem, stage, h, first + i, seen.all >> i & 1);
                bring_rows(a, smem, t, h, first_row_of(a, t, h), row, n);
            }
            __syncwarp();
        }
    }
    if (!brings) return;
    mbarrier_wait(smem_address(&smem.q_empty[n % STAGES]), n / STAGES % 2 ^ 1);
    say_step(smem, n % STAGES, 0, -1, false);
    mbarrier_arrive(smem_address(&smem.q_full[n % STAGES]));
}
#else
DEVICE void produce(const bwd_args &a, smem_layout &smem, const work_tile &t) {
    bring_keys(a, smem, t);
    uint32_t n = 0; /* blocks of rows so far */
    for (int32_t g = 0; g < a.group; ++g) {
        const int32_t h = t.h_k * a.group + g;
        const int64_t rows = first_row_of(a, t, h);
        for (int32_t m = t.begin; m < t.end; ++m, ++n)
            bring_rows(a, smem, t, h, rows, m * BLOCK_M, n);
    }
}
#endif

/* ---- the MMA warpgroups -----------------------------------------------------------------------*/

template <int N>
DEVICE void set_zero(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = 0.f;
}

DEVICE void consume(const bwd_args &a, smem_layout &smem, int32_t warpgroup) {
    const work_tile &t = smem.tile;
    float dk[DK_COLUMNS / 2], dv[DV_COLUMNS / 2];
    wait_for_keys(a, smem, t);
#if VARIANT_GENERAL
    const float gain = a.scores.gain;
    const int32_t sums = walk(a, smem, warpgroup, dk, dv);
#else
    const float gain = 1.f;
    const int32_t sums =
        AHEAD ? walk_ahead(a, smem, warpgroup, dk, dv) : walk(a, smem, warpgroup, dk, dv);
#endif
    if (sums < 0) {
        set_zero(dk);
        set_zero(dv);
    } else if (!DIRECT_DQ) {
        fence_proxy_async();
        __syncwarp();
        add_dq(smem, a.dq, sums, uniform(threadIdx.x / 32));
    }
    store_keys<DK_COLUMNS>(dk, a.dk, t, warpgroup, a.scale);
    store_keys<DV_COLUMNS>(dv, a.dv, t, warpgroup, gain);
    if (threadIdx.x % 32 == 0) cp_async_bulk_wait_group(); /* shared memory ends with the block */
}

__global__ void __launch_bounds__(THREADS, 1) VARIANT_NAME(const __grid_constant__ bwd_args a) {
    extern __shared__ uint8_t raw[];
    smem_layout &smem = *(smem_layout *)(raw + (-smem_address(raw) & 1023));
    if (threadIdx.x == 0) {
        mbarrier_init(smem_address(&smem.kv_full), 2 * PRODUCERS);
        for (int i = 0; i < Q_STAGES; ++i) {
            mbarrier_init(smem_address(&smem.q_full[i]), PRODUCERS);
            mbarrier_init(smem_address(&smem.q_empty[i]), WARPGROUPS);
        }
        for (int i = 0; i < STAGES; ++i) {
            mbarrier_init(smem_address(&smem.dout_full[i]), PRODUCERS);
            mbarrier_init(smem_address(&smem.dout_empty[i]), WARPGROUPS);
        }
        for (int i = 0; i < 2; ++i) mbarrier_init(smem_address(&smem.ds_full[i]), MMA_THREADS / 32);
        fence_mbarrier_init();
    }
    wait_for_stream();
    if (threadIdx.x == 0) smem.tile = describe(a, blockIdx.x);
    __syncthreads();
    if (smem.tile.key >= smem.tile.k_rows) return; /* a block that its sequence has no keys for */
    const int32_t warpgroup = uniform(threadIdx.x / 128);
    if (warpgroup == WARPGROUPS) {
        setmaxnreg_dec<PRODUCER_REGISTERS>();
        if (threadIdx.x < MMA_THREADS + SEEKERS) produce(a, smem, smem.tile);
    } else {
        setmaxnreg_inc<MMA_REGISTERS>();
        consume(a, smem, warpgroup);
    }
}
