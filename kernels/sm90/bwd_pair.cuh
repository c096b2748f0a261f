/* bwd_pair.cuh - two blocks of a cluster that have neighbouring keys and walk over the same rows.
 *
 * dQ's sums in memory are what bounds a block of 64 keys at d 256. So the two send each other their
 * dS^T, and each adds half of dQ's columns, of the keys of both: half as many sums.
 *
 * Nobody asks whether the other's place for dS^T is free. Who has the other's of block n knows that
 * it has computed dQ of block n - 1, and received what it was sent of that; and there are two
 * places.
 */
#ifndef FASTATTN_SM90_BWD_PAIR_CUH
#define FASTATTN_SM90_BWD_PAIR_CUH

#include "common/compiler.cuh"
#include "sm90/bwd_args.cuh"
#include "sm90/bwd_smem.h"
#include "sm90/bwd_walk.cuh"
#include "sm90/ptx.cuh"

DEVICE void init_pair(smem_layout &smem) {
    mbarrier_init(smem_address(&smem.p_full), 128);
    for (int i = 0; i < 2; ++i) mbarrier_init(smem_address(&smem.other_full[i]), 1);
    mbarrier_init(smem_address(&smem.number_full), 1);
    mbarrier_init(smem_address(&smem.number_empty), 1);
}

/* The same place in the other block. */
template <typename T>
DEVICE uint32_t in_other(const T &x) {
    return mapa(smem_address(&x), pair_rank() ^ 1);
}

/* The first block says which tile is the i-th, the second hears. */
DEVICE void say_number(smem_layout &smem, int32_t number, uint32_t i) {
    mbarrier_wait(smem_address(&smem.number_empty), i % 2 ^ 1);
    st_async(in_other(smem.number), number, in_other(smem.number_full));
}
DEVICE int32_t hear_number(smem_layout &smem, uint32_t i) {
    mbarrier_arrive_expect_tx(smem_address(&smem.number_full), sizeof smem.number);
    mbarrier_wait(smem_address(&smem.number_full), i % 2);
    const int32_t number = ld_shared(smem_address(&smem.number));
    mbarrier_arrive_cluster(in_other(smem.number_empty));
    return number;
}

/* K of the other's keys, the columns of this block's dQ. */
DEVICE void bring_other_keys(const bwd_args &a, smem_layout &smem, uint64_t &full,
                             const work_tile &t) {
    const uint32_t barrier = smem_address(&full);
    const int32_t key = t.k + other_key(t), first = pair_rank() * (QK_PANELS / 2);
    mbarrier_arrive_expect_tx(barrier, sizeof smem.other_k);
#pragma unroll
    for (int i = 0; i < QK_PANELS / 2; ++i)
        cp_async_bulk_tensor_load(smem_address(smem.other_k[i]), &a.k, 64 * (first + i), key,
                                  t.h_k * a.moves[1][0], t.batch * a.moves[1][1], barrier,
                                  EVICT_FIRST);
}

/* One thread sends each block's dS^T, once it is whole. */
DEVICE void send_ds(const bwd_args &a, smem_layout &smem) {
    uint32_t n = 0; /* blocks of rows so far */
    for (uint32_t i = 0;; ++i) {
        const work_tile &t = next_tile(smem, i, i % 2);
        if (t.key < 0) return;
        const uint32_t end = n + a.group * (t.end - t.begin);
        mbarrier_arrive(smem_address(&smem.tile_empty[i % 2]));
        for (; n < end; ++n) {
            const uint32_t place = n % 2;
            mbarrier_wait(smem_address(&smem.ds_full[place]), n / 2 % 2);
            mbarrier_arrive_expect_tx(smem_address(&smem.other_full[place]), PANEL_N);
            cp_async_bulk_cluster(in_other(smem.other_ds[place]), smem_address(smem.ds[place]),
                                  PANEL_N, in_other(smem.other_full[place]));
        }
    }
}

/* This warp's dQ of a block of rows. */
DEVICE void add_pair_dq(const float (&dq)[DQ_COLUMNS / 2], float *sums, int32_t block) {
    const int32_t warp = uniform(threadIdx.x / 32) + pair_rank() * (MMA_THREADS / 32);
    float *to = sums + (int64_t)block * (BLOCK_M * SUM_COLUMNS) + warp * (16 * DQ_COLUMNS) +
                threadIdx.x % 32 * 4;
#pragma unroll
    for (int i = 0; i < DQ_COLUMNS / 8; ++i)
        red_add_v4(to + 128 * i, dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]);
}

#endif
