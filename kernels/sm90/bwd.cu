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
#include "sm90/bwd_launch.cuh"
#include "sm90/bwd_load.cuh"
#include "sm90/bwd_products.cuh"
#include "sm90/bwd_smem.h"
#include "sm90/bwd_store.cuh"
#include "sm90/bwd_waits.cuh"
#include "sm90/bwd_walk.cuh"
#include "sm90/ptx.cuh"
#include "sm90/wgmma.cuh"
#if VARIANT_GENERAL
#include "sm90/bwd_scores.cuh"
#endif

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

DEVICE void bring_rows(const bwd_args &a, smem_layout &smem, const work_tile &t, int32_t h,
                       int64_t rows, int32_t row, uint32_t stage, uint32_t parity) {
    mbarrier_wait(smem_address(&smem.q_empty[stage]), parity);
    bring(a.q, a.moves[0], smem.q[stage], t.q + row, h, t.batch, a.lse + rows + row,
          smem.lse[stage], smem.q_full[stage], EVICT_LAST);
    mbarrier_wait(smem_address(&smem.dout_empty[stage]), parity);
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
                bring_rows(a, smem, t, h, first_row_of(a, t, h), row, stage, parity);
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
            bring_rows(a, smem, t, h, rows, m * BLOCK_M, n % STAGES, n / STAGES % 2 ^ 1);
    }
}
#endif

/* ---- the MMA warpgroups -----------------------------------------------------------------------*/

#if !VARIANT_GENERAL
/* Columns (rows of Q) from `low` on and before `high`, of this thread's two keys. */
struct seen_rows {
    int32_t low[2], high[2];
};

DEVICE seen_rows seen_rows_of(const work_tile &t, int32_t key, int32_t row) {
    seen_rows s;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int32_t k = key + 8 * r;
        const fa_row_range rows = fa_rows_seeing_some(t.lengths, fa_interval{k, k + 1});
        s.low[r] = rows.begin - row;
        s.high[r] = rows.end - row;
    }
    return s;
}

template <int N>
DEVICE void mask_columns(const seen_rows &seen, float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const int32_t column = i / 4 * 8 + i % 2, r = i / 2 % 2;
        if (column < seen.low[r] || column >= seen.high[r]) x[i] = 0.f;
    }
}

/* P^T of S^T, in place. */
DEVICE void exponentials(float (&s)[BLOCK_M / 2], const float (&lse)[BLOCK_M], float scale) {
    const uint32_t from = smem_address(lse) + threadIdx.x % 4 * 8;
#pragma unroll
    for (int j = 0; j < BLOCK_M / 8; ++j) {
        const float2 l = ld_shared_v2(from + 32 * j);
        s[4 * j] = ex2_approx(fmaf(s[4 * j], scale, -l.x));
        s[4 * j + 1] = ex2_approx(fmaf(s[4 * j + 1], scale, -l.y));
        s[4 * j + 2] = ex2_approx(fmaf(s[4 * j + 2], scale, -l.x));
        s[4 * j + 3] = ex2_approx(fmaf(s[4 * j + 3], scale, -l.y));
    }
}

/* dS^T of P^T, in place of dP^T. */
DEVICE void slopes(const float (&p)[BLOCK_M / 2], float (&dp)[BLOCK_M / 2],
                   const float (&delta)[BLOCK_M]) {
    const uint32_t from = smem_address(delta) + threadIdx.x % 4 * 8;
#pragma unroll
    for (int j = 0; j < BLOCK_M / 8; ++j) {
        const float2 d = ld_shared_v2(from + 32 * j);
        dp[4 * j] = p[4 * j] * (dp[4 * j] - d.x);
        dp[4 * j + 1] = p[4 * j + 1] * (dp[4 * j + 1] - d.y);
        dp[4 * j + 2] = p[4 * j + 2] * (dp[4 * j + 2] - d.x);
        dp[4 * j + 3] = p[4 * j + 3] * (dp[4 * j + 3] - d.y);
    }
}
#endif

/* Rounded pairs: four registers of 16 columns are wgmma's A fragment as they come. */
DEVICE void pack(const float (&x)[BLOCK_M / 2], uint32_t (&y)[BLOCK_M / 16][4]) {
#pragma unroll
    for (int i = 0; i < BLOCK_M / 4; ++i) y[i / 4][i % 4] = cvt_pack(x[2 * i], x[2 * i + 1]);
}

/* This warp's 16 keys of dS^T, for dQ. */
DEVICE void store_ds(const uint32_t (&ds)[BLOCK_M / 16][4], uint8_t (&to)[BLOCK_M / 64][PANEL_N],
                     int32_t thread) {
    const int32_t lane = thread % 32,
                  key = thread / 32 * 16 + lane % 16; /* matrices 0, 2 and 1, 3 */
#pragma unroll
    for (int i = 0; i < BLOCK_M / 16; ++i) {
        const int32_t chunk = i % 4 * 2 + lane / 16;
        stmatrix_x4(smem_address(to[i / 4]) + key * 128 + ((chunk ^ key % 8) << 4), ds[i][0],
                    ds[i][1], ds[i][2], ds[i][3]);
    }
}

/* This warp's share of dQ, put where the copy engine has read the one before, */
DEVICE void store_dq(const float (&dq)[DQ_COLUMNS / 2], smem_layout &smem) {
    const int32_t lane = threadIdx.x % 32;
    if (lane == 0) cp_async_bulk_wait_group_read();
    __syncwarp();
#pragma unroll
    for (int i = 0; i < DQ_COLUMNS / 8; ++i)
        *(float4 *)smem.dq[threadIdx.x / 32][i][lane] =
            make_float4(dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]);
}
/* and, after a fence, added to the sums of a block of rows. */
DEVICE void add_dq(smem_layout &smem, float *sums, int32_t block, int32_t warp) {
    if (threadIdx.x % 32 == 0 && sums) {
        cp_reduce_async_bulk_add(
            sums + (int64_t)block * (BLOCK_M * D) + warp * (sizeof smem.dq[0] / 4),
            smem_address(smem.dq[warp]), sizeof smem.dq[0]);
        cp_async_bulk_commit_group();
    }
}

/* What this warp has stored, dS and dQ, may be read by the tensor cores and the copy engine. */
DEVICE void hand_over(uint64_t &full) {
    fence_proxy_async();
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(smem_address(&full));
}

/* 64 keys of dK or dV, `factor` times, to their rows. */
template <int COLUMNS>
DEVICE void store_keys(const float (&x)[COLUMNS / 2], const fa_tensor &to, const work_tile &t,
                       int32_t warpgroup, float factor) {
    const int32_t thread = threadIdx.x % 128, lane = thread % 32;
    const int32_t first = t.key + 64 * warpgroup + thread / 32 * 16 + lane / 4;
    if (!to.data) return;
    uint16_t *head = (uint16_t *)to.data + t.batch * to.stride[0] + t.h_k * to.stride[1];
    const bool words = has_words(to);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int32_t key = first + 8 * r;
        if (key >= t.k_rows) continue;
        uint16_t *row = head + (t.k + key) * to.stride[2];
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; ++j)
            store_pair(to, row, lane % 4 * 2 + 8 * j, x[4 * j + 2 * r] * factor,
                       x[4 * j + 2 * r + 1] * factor, words);
    }
}

#if !VARIANT_GENERAL
/* Zeros where a row of block m does not see this thread's keys; `plain`: blocks that see all. */
DEVICE void mask_block(float (&x)[BLOCK_M / 2], const work_tile &t, const fa_row_range &plain,
                       int32_t m, int32_t warpgroup) {
    if (m >= plain.begin && m < plain.end) return;
    const int32_t thread = threadIdx.x % 128;
    const int32_t key = t.key + 64 * warpgroup + thread / 32 * 16 + thread % 32 / 4;
    mask_columns(seen_rows_of(t, key, m * BLOCK_M + thread % 4 * 2), x);
}
#endif

/* A block of rows, as a warpgroup comes to it. */
struct row_step {
    walk_step block;
    int32_t warpgroup;
    uint32_t stage;
    bool fresh; /* the first */
};

/* P^T and dS^T of a block of rows, in place of S^T and dP^T; dV is begun where EARLY_DV says so. */
#if VARIANT_GENERAL
DEVICE void scores_of_block(const bwd_args &a, smem_layout &smem, const row_step &at,
                            const fa_row_range &, float (&dv)[DV / 2], float (&s)[BLOCK_M / 2],
                            uint32_t (&p)[BLOCK_M / 16][4], float (&dp)[BLOCK_M / 2]) {
    const work_tile &t = smem.tile;
    clear_empty_rows(smem, at.stage);
    const score_bits bits = bits_of(a, t, at.block, at.warpgroup);
    issue_transposed<QK_PANELS, D>(s, smem.k, smem.q[at.stage], at.warpgroup);
    wgmma_wait_group<0>();
    wgmma_accumulators(s);
    weigh(a, t, at.block, at.warpgroup, smem.lse[at.stage], bits, s, p);
    issue_sum<V_PANELS, DV>(dv, p, smem.dout[at.stage], at.fresh);
    wgmma_wait_group<0>(); /* P^T makes room for dP^T */
    wgmma_accumulators(dv);
    issue_transposed<V_PANELS, DV>(dp, smem.v, smem.dout[at.stage], at.warpgroup);
    wgmma_wait_group<0>();
    wgmma_accumulators(dp);
    bit_slopes(bits, a.scores.gain, s, dp, smem.delta[at.stage]);
}

DEVICE float gain_of(const bwd_args &a) { return a.scores.gain; }
#else
DEVICE void scores_of_block(const bwd_args &a, smem_layout &smem, const row_step &at,
                            const fa_row_range &plain, float (&dv)[DV / 2], float (&s)[BLOCK_M / 2],
                            uint32_t (&p)[BLOCK_M / 16][4], float (&dp)[BLOCK_M / 2]) {
    const work_tile &t = smem.tile;
    issue_transposed<QK_PANELS, D>(s, smem.k, smem.q[at.stage], at.warpgroup);
    issue_transposed<V_PANELS, DV>(dp, smem.v, smem.dout[at.stage], at.warpgroup);
    wgmma_wait_group<1>();
    wgmma_accumulators(s);
    exponentials(s, smem.lse[at.stage], a.scale_log2);
    mask_block(s, t, plain, at.block.m, at.warpgroup);
    pack(s, p);
    if (EARLY_DV) issue_sum<V_PANELS, DV>(dv, p, smem.dout[at.stage], at.fresh);
    wgmma_wait_group<EARLY_DV>();
    wgmma_accumulators(dp);
    slopes(s, dp, smem.delta[at.stage]);
    mask_block(dp, t, plain, at.block.m, at.warpgroup);
}

DEVICE float gain_of(const bwd_args &) { return 1.f; }
#endif

template <int N>
DEVICE void set_zero(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = 0.f;
}

DEVICE void consume(const bwd_args &a, smem_layout &smem, int32_t warpgroup) {
    const work_tile &t = smem.tile; /* read again where it is needed: registers are scarce */
    const bool first = threadIdx.x % 128 == 0;
    const int32_t warp = uniform(threadIdx.x / 32);
    float dk[D / 2], dv[DV / 2];
    wait_for_keys(a, smem, t);
    const fa_row_range clean = whole_blocks(t.rows), plain = whole_blocks(t.all);
    const int32_t begin = uniform(t.begin), end = uniform(t.end);
    const uint32_t blocks = a.group * (end - begin); /* of rows, where none is passed by */
    walk_step at = {t.h_k * a.group, begin, 0};
    int32_t sums = sums_of(a, t, at);
    uint32_t n = 0;
    for (; GENERAL || n < blocks; ++n) {
        const uint32_t stage = n % STAGES, parity = n / STAGES % 2;
#if VARIANT_GENERAL
        at = next_step(smem, stage, parity);
        if (at.m < 0) break;
#endif
        const int32_t m = at.m;
        float s[BLOCK_M / 2], dp[BLOCK_M / 2], dq[DQ_COLUMNS / 2];
        uint32_t p[BLOCK_M / 16][4], ds[BLOCK_M / 16][4];
        wait_for_rows(smem.q[stage], smem.q_full[stage], parity, t,
                      GENERAL ? whole_blocks(t.rows) : clean, m);
        wait_for_rows(smem.dout[stage], smem.dout_full[stage], parity, t,
                      GENERAL ? whole_blocks(t.rows) : clean, m);
        scores_of_block(a, smem, {at, warpgroup, stage, n == 0}, plain, dv, s, p, dp);
        pack(dp, ds);
        store_ds(ds, smem.ds[n % 2], threadIdx.x);
        hand_over(smem.ds_full[n % 2]);
        if (n > 0) add_dq(smem, a.dq, sums, warp);
        if (GENERAL)
            sums = sums_of(a, t, at);
        else if (n > 0)
            sums += m == begin ? a.m_blocks - (end - begin) + 1 : 1;
        if (!EARLY_DV && !GENERAL) issue_sum<V_PANELS, DV>(dv, p, smem.dout[stage], n == 0);
        mbarrier_wait(smem_address(&smem.ds_full[n % 2]), n / 2 % 2);
        issue_dq(dq, smem, smem.ds[n % 2], warpgroup);
        issue_sum<QK_PANELS, D>(dk, ds, smem.q[stage], n == 0);
        wgmma_wait_group<1>();
        wgmma_accumulators(dq);
        wgmma_accumulators(dv);
        if (first) mbarrier_arrive(smem_address(&smem.dout_empty[stage]));
        store_dq(dq, smem);
        wgmma_wait_group<0>();
        wgmma_accumulators(dk);
        if (first) mbarrier_arrive(smem_address(&smem.q_empty[stage]));
        if (!GENERAL) at.m = m + 1 == end ? begin : m + 1;
    }
    if (n == 0) {
        set_zero(dk);
        set_zero(dv);
    } else {
        fence_proxy_async();
        __syncwarp();
        add_dq(smem, a.dq, sums, warp);
    }
    store_keys<D>(dk, a.dk, t, warpgroup, a.scale);
    store_keys<DV>(dv, a.dv, t, warpgroup, gain_of(a));
    if (threadIdx.x % 32 == 0) cp_async_bulk_wait_group(); /* shared memory ends with the block */
}

__global__ void __launch_bounds__(THREADS, 1) VARIANT_NAME(const __grid_constant__ bwd_args a) {
    extern __shared__ uint8_t raw[];
    smem_layout &smem = *(smem_layout *)(raw + (-smem_address(raw) & 1023));
    if (threadIdx.x == 0) {
        mbarrier_init(smem_address(&smem.kv_full), 2 * PRODUCERS);
        for (int i = 0; i < STAGES; ++i) {
            mbarrier_init(smem_address(&smem.q_full[i]), PRODUCERS);
            mbarrier_init(smem_address(&smem.dout_full[i]), PRODUCERS);
            mbarrier_init(smem_address(&smem.q_empty[i]), WARPGROUPS);
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
