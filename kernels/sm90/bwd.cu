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
#include "sm90/bwd_ahead.cuh"
#include "sm90/bwd_args.cuh"
#include "sm90/bwd_block.cuh"
#include "sm90/bwd_launch.cuh"
#include "sm90/bwd_load.cuh"
#include "sm90/bwd_loop.cuh"
#if VARIANT_CLUSTER
#include "sm90/bwd_pair.cuh"
#include "sm90/bwd_roles.cuh"
#endif
#include "sm90/bwd_smem.h"
#include "sm90/bwd_turns.cuh"
#include "sm90/bwd_waits.cuh"
#include "sm90/bwd_walk.cuh"
#include "sm90/ptx.cuh"

/* ---- the work tile ----------------------------------------------------------------------------*/

DEVICE work_tile describe(const bwd_args &a, int32_t number) {
    work_tile t;
    const int32_t of_section = a.section * a.n_blocks;
    const int32_t first = number / of_section * a.section, place = number % of_section;
    const int32_t heads = min(a.section, a.heads - first), head = first + place % heads;
    const int32_t block = a.turns ? a.n_blocks - 1 - place / heads : place / heads;
    const fa_varlen &v = a.varlen;
    t.b = t.batch = head / a.hk; /* 0 of packed sequences, until their sequence is known */
    t.h_k = head % a.hk;
    t.key = block * TILE_N, t.k_rows = a.sk;
    t.q = t.k = t.first_block = 0;
    if (v.cu_k) {
        const fa_packed_block found =
            fa_packed_find(v.cu_k, v.cu_k_stride, a.b, v.total_k, TILE_N, block);
        t.b = found.b, t.key = found.row, t.k_rows = found.end - found.first;
        t.k = found.first;
        t.first_block = fa_packed_first(v.cu_q, v.cu_q_stride, t.b, v.total_q, BLOCK_M);
    }
    t.lengths = fa_lengths{0, 0, 0, 0, 0, 0}; /* of the keys of none */
    if (!v.cu_k || t.b < a.b) {
        const fa_sequence s = fa_find_sequence(&v, &a.masks, t.b, a.sq, a.sk);
        t.q = s.q, t.lengths = s.lengths;
    }
    t.turn = turn_of(t.key, a.sk);
    t.key += pair_rank() * BLOCK_N;
    find_seen(t);
    if (SPREAD && !a.turns && !v.cu_k && t.begin == 0)
        t.first = (int32_t)((int64_t)block * t.end / a.n_blocks);
    return t;
}

/* The number of a tile that nobody has. */
DEVICE int32_t take_number(const bwd_args &a) { return a.begun + atomicAdd(a.taken, 1); }
DEVICE int32_t first_number(const bwd_args &a) {
    return a.turns ? take_number(a) : blockIdx.x / CLUSTER;
}

/* The first tile from `number` on that its sequence has keys for; of two blocks both find it. */
DEVICE work_tile find_tile(const bwd_args &a, int32_t &number) {
    work_tile t;
    for (; number < a.tiles; number = take_number(a)) {
        t = describe(a, number);
        if (pair_key(t) < t.k_rows) return t;
    }
    t.key = -1;
    return t;
}

/* Tells the others of tiles, where they stay: the next is taken when the loads of the one before
 * are under way, for who is free first is to have it. */
DEVICE void schedule(const bwd_args &a, smem_layout &smem) {
    int32_t number = first_number(a);
    for (uint32_t i = 0;; ++i) {
        work_tile &t = smem.tile[i % 2];
        mbarrier_wait(smem_address(&smem.tile_empty[i % 2]), i / 2 % 2 ^ 1);
#if VARIANT_CLUSTER
        if (pair_rank()) number = hear_number(smem, i);
        t = find_tile(a, number);
        if (!pair_rank()) say_number(smem, number, i);
#else
        t = find_tile(a, number);
#endif
        mbarrier_arrive(smem_address(&smem.tile_full[i % 2]));
        if (t.key < 0) return;
        if (PAIRED && pair_rank()) continue;
        mbarrier_wait(smem_address(&smem.tile_loaded), i % 2);
        number = take_number(a);
    }
}

DEVICE void bring_keys(const bwd_args &a, [[maybe_unused]] smem_layout &smem, smem_keys &kv,
                       uint64_t &full, const work_tile &t) {
    const int32_t b = t.batch, key = t.k + t.key;
    bring(a.k, a.moves[1], kv.k, key, t.h_k, b, NULL, NULL, full, EVICT_FIRST);
    bring(a.v, a.moves[2], kv.v, key, t.h_k, b, NULL, NULL, full, EVICT_FIRST);
#if VARIANT_CLUSTER
    bring_other_keys(a, smem, full, t);
#endif
}

/* Block n of those that the tile walks over. */
DEVICE void bring_rows(const bwd_args &a, smem_layout &smem, const work_tile &t, int32_t h,
                       int32_t rows, int32_t row, uint32_t n) {
    const uint32_t q = n % Q_STAGES, stage = n % STAGES;
    mbarrier_wait(smem_address(&smem.q_empty[q]), n / Q_STAGES % 2 ^ 1);
    bring(a.q, a.moves[0], smem.q[q], t.q + row, h, t.batch, a.lse + rows + row, smem.lse[q],
          smem.q_full[q], EVICT_LAST);
    mbarrier_wait(smem_address(&smem.dout_empty[stage]), n / STAGES % 2 ^ 1);
    bring(a.dout, a.moves[3], smem.dout[stage], t.q + row, h, t.batch, a.delta + rows + row,
          smem.delta[stage], smem.dout_full[stage], EVICT_LAST);
}

#if VARIANT_GENERAL
/* One tile. */
DEVICE void produce(const bwd_args &a, smem_layout &smem) {
    const work_tile &t = next_tile(smem, 0, 0);
    if (t.key < 0) return;
    const bool brings = threadIdx.x < MMA_THREADS + PRODUCERS;
    if (brings) bring_keys(a, smem, smem.keys[0], smem.kv_full[0], t);
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
/* Tile after tile. What is asked for once the last block is there is kept: the tile may be gone. */
DEVICE void produce(const bwd_args &a, smem_layout &smem) {
    uint32_t n = 0; /* blocks of rows so far */
    for (uint32_t i = 0;; ++i) {
        const work_tile &t = next_tile(smem, i, i % 2);
        const int32_t begin = t.begin, end = t.end, first = t.first;
        if (t.key < 0) return;
        const uint32_t place = i % KV_STAGES;
        mbarrier_wait(smem_address(&smem.kv_empty[place]), i / KV_STAGES % 2 ^ 1);
        bring_keys(a, smem, smem.keys[place], smem.kv_full[place], t);
#pragma unroll 1
        for (int32_t g = 0; g < a.group; ++g) {
#pragma unroll 1
            for (int32_t m = begin; m < end; ++m, ++n) {
                const int32_t h = t.h_k * a.group + g, round = m + first - begin;
                const int32_t row = (round < end ? round : round - (end - begin)) * BLOCK_M;
                bring_rows(a, smem, t, h, first_row_of(a, t, h), row, n);
            }
        }
        if (!STAYS) return;
        mbarrier_arrive(smem_address(&smem.tile_loaded));
    }
}
#endif

/* ---- the MMA warpgroups -----------------------------------------------------------------------*/

/* PLAIN: nothing but what is seen changes a score. */
template <bool PLAIN>
DEVICE void consume(const bwd_args &a, smem_layout &smem, int32_t warpgroup) {
    const int32_t warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
    uint32_t n = 0; /* blocks of rows so far */
    for (uint32_t i = 0;; ++i) {
        const work_tile &t = next_tile(smem, i, uniform(i % 2));
        if (t.key < 0) break;
        const uint32_t before = n;
        float dk[DK_COLUMNS / 2], dv[DV_COLUMNS / 2];
        const uint32_t place = KV_STAGES == 1 ? 0 : uniform(i % KV_STAGES);
        smem_keys &kv = smem.keys[place];
        wait_for_keys(a, smem, kv, t, place, i / KV_STAGES % 2);
#if VARIANT_GENERAL
        const float gain = a.scores.gain;
        const int32_t sums = walk<PLAIN>(a, smem, kv, t, warpgroup, n, dk, dv);
#else
        const float gain = 1.f;
        const int32_t sums = AHEAD ? walk_ahead(a, smem, kv, t, warpgroup, n, dk, dv)
                                   : walk<PLAIN>(a, smem, kv, t, warpgroup, n, dk, dv);
#endif
        n += a.group * (t.end - t.begin);
        mbarrier_arrive(smem_address(&smem.kv_empty[place]));
        if (sums < 0) {
            clear_keys<DK_COLUMNS>(a.dk, t, warpgroup);
            clear_keys<DV_COLUMNS>(a.dv, t, warpgroup);
        } else {
            if (DIRECT_DQ) {
                bar_sync(ROWS_BARRIER, MMA_THREADS); /* for all have read dS and P */
            } else {
                fence_proxy_async();
                __syncwarp();
                add_dq(smem, a, t, sums, n - 1, n - before > 1, warp);
            }
            store_keys<DK_COLUMNS>(dk, a.dk, smem, t, warpgroup, a.scale);
            if (!DIRECT_DQ) end_turn(a, smem, n - 1);
            store_keys<DV_COLUMNS>(dv, a.dv, smem, t, warpgroup, gain);
            if (DIRECT_DQ && STAYS) bar_sync(ROWS_BARRIER, MMA_THREADS);
        }
        if (!STAYS) break;
        mbarrier_arrive(smem_address(&smem.tile_empty[i % 2]));
    }
    if (lane == 0) cp_async_bulk_wait_group(); /* shared memory ends with the block */
}

DEVICE void init_barriers(const bwd_args &a, smem_layout &smem) {
    /* What is empty every thread that has read it says itself, for racecheck sees no other. */
    for (int i = 0; i < 2; ++i) {
        mbarrier_init(smem_address(&smem.tile_full[i]), 1);
        mbarrier_init(smem_address(&smem.tile_empty[i]), MMA_THREADS + (a.turns ? 2 : PAIRED));
    }
    mbarrier_init(smem_address(&smem.tile_loaded), PRODUCERS);
    for (int i = 0; i < KV_STAGES; ++i) {
        mbarrier_init(smem_address(&smem.kv_full[i]), (2 + PAIRED) * PRODUCERS);
        mbarrier_init(smem_address(&smem.kv_empty[i]), MMA_THREADS);
    }
    for (int i = 0; i < Q_STAGES; ++i) {
        mbarrier_init(smem_address(&smem.q_full[i]), PRODUCERS);
        mbarrier_init(smem_address(&smem.q_empty[i]), MMA_THREADS);
    }
    for (int i = 0; i < STAGES; ++i) {
        mbarrier_init(smem_address(&smem.dout_full[i]), PRODUCERS);
        mbarrier_init(smem_address(&smem.dout_empty[i]), MMA_THREADS);
    }
    for (int i = 0; i < 2; ++i)
        mbarrier_init(smem_address(&smem.ds_full[i]), PAIRED ? 128 : MMA_THREADS / 32);
#if VARIANT_CLUSTER
    init_pair(smem);
#endif
    for (int i = 0; i < TURNS; ++i) {
        mbarrier_init(smem_address(&smem.turn_full[i]), 1);
        mbarrier_init(smem_address(&smem.turn_added[i]), ADDERS);
        mbarrier_init(smem_address(&smem.turn_empty[i]), 1);
    }
}

__global__ void __launch_bounds__(THREADS, 1) VARIANT_NAME(const __grid_constant__ bwd_args a) {
    alignas(1024) extern __shared__ uint8_t raw[];
    smem_layout &smem = *(smem_layout *)raw;
    if (threadIdx.x == 0) {
        init_barriers(a, smem);
        fence_mbarrier_init();
    }
    wait_for_stream();
    let_next_start();
    if (!STAYS && threadIdx.x == 0) {
        int32_t number = first_number(a);
        smem.tile[0] = find_tile(a, number);
    }
    if (PAIRED)
        cluster_sync();
    else
        __syncthreads();
    const int32_t warpgroup = uniform(threadIdx.x / 128);
    if (warpgroup == WARPGROUPS) {
        setmaxnreg_dec<PRODUCER_REGISTERS>();
        if (threadIdx.x < MMA_THREADS + SEEKERS) produce(a, smem);
        if (STAYS && threadIdx.x == MMA_THREADS + 96) schedule(a, smem);
#if VARIANT_CLUSTER
        if (threadIdx.x == MMA_THREADS + 32) send_ds(a, smem);
#endif
        if (HELPED && a.turns && threadIdx.x == MMA_THREADS + 32) ask_for_turns(a, smem);
        if (HELPED && a.turns && threadIdx.x == MMA_THREADS + 64) hand_turns_on(a, smem);
    } else {
        setmaxnreg_inc<MMA_REGISTERS>();
#if VARIANT_CLUSTER
        consume_by_roles(a, smem);
#elif VARIANT_GENERAL
        if (VARIANT_STRIDED || a.scores.only != WORDS)
            consume<false>(a, smem, warpgroup);
        else
            consume<true>(a, smem, warpgroup);
#else
        consume<true>(a, smem, warpgroup);
#endif
    }
    if (PAIRED) cluster_sync(); /* nobody sends to a block that has ended */
}
