/* bwd_mask.cuh - the gradient of a float mask: dS, summed over all that the mask broadcasts to.
 *
 * A kernel of its own, part of each general variant: it computes S^T and dP^T again, so that a
 * block of the gradient is summed in registers, in the same order every time, and there is no array
 * of scores. A tile is BLOCK_M rows by BLOCK_N keys of the mask, or all of an axis that is summed;
 * its steps are the blocks of scores of all batches and heads that it stands for.
 */
#ifndef FASTATTN_SM90_BWD_MASK_CUH
#define FASTATTN_SM90_BWD_MASK_CUH

#include "backward.h"
#include "common/compiler.cuh"
#include "common/element.cuh"
#include "common/launch.cuh"
#include "common/stream.cuh"
#include "sm90/bwd_args.cuh"
#include "sm90/bwd_load.cuh"
#include "sm90/bwd_products.cuh"
#include "sm90/bwd_scores.cuh"
#include "sm90/bwd_smem.h"
#include "sm90/bwd_walk.cuh"
#include "sm90/ptx.cuh"

enum { MASK_BARRIER = 1 }; /* of all MMA threads */

struct bwd_mask_args {
    bwd_args of;  /* the main kernel's */
    fa_tensor to; /* the gradient */
    int32_t dtype, row_blocks, key_blocks;
    int64_t tiles;
};

struct mask_step {
    int64_t number; /* of the mask's tile */
    work_tile tile;
    walk_step at; /* m < 0: the tile's sums are whole; h < 0: there are no more tiles */
};

static constexpr int STEP_BYTES = (QK_PANELS + V_PANELS) * (PANEL_M + PANEL_N),
                     MASK_STAGES = STEP_BYTES <= 110 * 1024 ? 2 : 1;

struct mask_smem {
    uint8_t k[MASK_STAGES][QK_PANELS][PANEL_N], v[MASK_STAGES][V_PANELS][PANEL_N];
    uint8_t q[MASK_STAGES][QK_PANELS][PANEL_M], dout[MASK_STAGES][V_PANELS][PANEL_M];
    float lse[MASK_STAGES][BLOCK_M], delta[MASK_STAGES][BLOCK_M];
    float rows[BLOCK_N / 16][BLOCK_M]; /* each warp's sums over its keys; over its rows, */
    float keys[SHARED_KEYS ? WARPGROUPS : 1][BLOCK_N];
    uint64_t full[MASK_STAGES], empty[MASK_STAGES];
    mask_step steps[MASK_STAGES];
};
static constexpr int MASK_SMEM_BYTES = sizeof(mask_smem);
static_assert(MASK_SMEM_BYTES <= 227 * 1024, "a block has no more");

/* Batches or heads that one element of the gradient stands for. */
DEVICE fa_interval summed(int64_t size, int32_t all, int64_t at) {
    if (size == 1) return fa_interval{0, all};
    return fa_interval{(int32_t)at, (int32_t)at + 1};
}

/* ---- the producer -----------------------------------------------------------------------------*/

/* Keys of a sequence from `key` on. */
DEVICE work_tile mask_tile(const bwd_args &a, int32_t b, int32_t key) {
    const fa_varlen &v = a.varlen;
    const fa_sequence s = fa_find_sequence(&v, &a.masks, b, a.sq, a.sk);
    work_tile t;
    t.b = b, t.batch = v.cu_q ? 0 : b;
    t.h_k = 0, t.key = key, t.k_rows = s.lengths.sk;
    t.q = v.cu_q ? s.q : 0, t.k = v.cu_q ? s.k : 0;
    t.first_block = v.cu_q ? fa_packed_first(v.cu_q, v.cu_q_stride, b, v.total_q, BLOCK_M) : 0;
    t.lengths = s.lengths;
    find_seen(t);
    return t;
}

/* The next stage is free, and says what it will hold. */
DEVICE uint32_t say_mask_step(mask_smem &smem, uint32_t n, int64_t number, const work_tile &t,
                              walk_step at) {
    const uint32_t stage = n % MASK_STAGES;
    mbarrier_wait(smem_address(&smem.empty[stage]), n / MASK_STAGES % 2 ^ 1);
    if (threadIdx.x == MMA_THREADS) smem.steps[stage] = mask_step{number, t, at};
    return stage;
}

DEVICE void bring_step(const bwd_args &a, mask_smem &smem, const work_tile &t, int32_t h, int32_t m,
                       uint32_t stage) {
    const int32_t b = t.batch, h_k = h / a.group, key = t.k + t.key, row = m * BLOCK_M;
    const int64_t rows = first_row_of(a, t, h) + row;
    uint64_t &full = smem.full[stage];
    bring(a.k, a.moves[1], smem.k[stage], key, h_k, b, NULL, NULL, full, EVICT_LAST);
    bring(a.q, a.moves[0], smem.q[stage], t.q + row, h, b, a.lse + rows, smem.lse[stage], full,
          EVICT_LAST);
    bring(a.v, a.moves[2], smem.v[stage], key, h_k, b, NULL, NULL, full, EVICT_LAST);
    bring(a.dout, a.moves[3], smem.dout[stage], t.q + row, h, b, a.delta + rows, smem.delta[stage],
          full, EVICT_LAST);
}

/* A stage without scores; a stage's four arrays each have an arrival. */
DEVICE void say_end(mask_smem &smem, uint32_t n, int64_t number, const work_tile &t, int32_t h) {
    const uint32_t stage = say_mask_step(smem, n, number, t, walk_step{h, -1, 0});
    for (int i = 0; i < 4; ++i) mbarrier_arrive(smem_address(&smem.full[stage]));
}

DEVICE void produce_mask(const bwd_mask_args &a, mask_smem &smem) {
    const int64_t *shape = a.to.shape;
    work_tile t = {};
    uint32_t n = 0; /* steps so far */
    for (int64_t tile = blockIdx.x; tile < a.tiles; tile += gridDim.x) {
        const int32_t key_block = (int32_t)(tile % a.key_blocks),
                      row_block = (int32_t)(tile / a.key_blocks % a.row_blocks);
        const int64_t plane = tile / a.key_blocks / a.row_blocks;
        const fa_interval batches = summed(shape[0], a.of.b, plane / shape[1]),
                          heads = summed(shape[1], a.of.hq, plane % shape[1]);
        const int32_t first = key_block * BLOCK_N, end = shape[3] == 1 ? a.of.sk : first + BLOCK_N;
        for (int32_t b = batches.begin; b < batches.end; ++b)
            for (int32_t key = first; key < end; key += BLOCK_N) {
                t = mask_tile(a.of, b, key);
                const int32_t begin = shape[2] == 1 ? t.begin : max(t.begin, row_block),
                              stop = shape[2] == 1 ? t.end : min(t.end, row_block + 1);
                for (int32_t h = heads.begin; h < heads.end; ++h)
                    for (int32_t m = begin; m < stop; ++m, ++n) {
                        const uint32_t stage = say_mask_step(smem, n, tile, t, walk_step{h, m, 1});
                        bring_step(a.of, smem, t, h, m, stage);
                    }
            }
        say_end(smem, n++, tile, t, 0);
    }
    say_end(smem, n, 0, t, -1);
}

/* ---- the MMA warpgroups -----------------------------------------------------------------------*/

DEVICE void store_mask(const bwd_mask_args &a, int64_t at, float x) {
    if (a.dtype == FA_F32)
        ((float *)a.to.data)[at] = x;
    else
        ((uint16_t *)a.to.data)[at] =
            a.dtype == FA_BF16 ? element<FA_BF16>::narrow(x) : element<FA_F16>::narrow(x);
}

/* Sums of a tile that has all keys: over a thread's, a warp's and all warps', row by row. */
DEVICE void store_row_sums(const bwd_mask_args &a, mask_smem &smem, const float (&x)[ROWS / 2],
                           int64_t base, int32_t first, int32_t warpgroup) {
    const int32_t lane = threadIdx.x % 32;
    float *rows = smem.rows[threadIdx.x / 32 % (BLOCK_N / 16)] + own_row(warpgroup);
#pragma unroll
    for (int i = 0; i < ROWS / 2; ++i) {
        if (i / 2 % 2) continue;
        float sum = x[i] + x[i + 2]; /* the thread's two keys */
#pragma unroll
        for (int bit = 4; bit < 32; bit *= 2) sum += __shfl_xor_sync(~0u, sum, bit);
        if (lane < 4) rows[i / 4 * 8 + lane * 2 + i % 2] = sum;
    }
    bar_sync(MASK_BARRIER, MMA_THREADS);
    const bool one = a.to.shape[2] == 1;
    if (threadIdx.x < (one ? 1 : BLOCK_M) && (one || first + threadIdx.x < a.to.shape[2])) {
        float sum = 0.f;
        for (int32_t row = threadIdx.x; row < (one ? BLOCK_M : (int32_t)threadIdx.x + 1); ++row)
            for (int warp = 0; warp < BLOCK_N / 16; ++warp) sum += smem.rows[warp][row];
        store_mask(a, base + (one ? 0 : first + threadIdx.x) * a.to.stride[2], sum);
    }
    bar_sync(MASK_BARRIER, MMA_THREADS);
}

/* Sums of a tile that has all rows: over a thread's, a quad's and all warpgroups', key by key. */
DEVICE void store_key_sums(const bwd_mask_args &a, mask_smem &smem, const float (&x)[ROWS / 2],
                           int64_t base, int32_t first, int32_t warpgroup) {
    const int32_t thread = threadIdx.x % 128;
    float *keys = smem.keys[SHARED_KEYS ? warpgroup : 0] + own_key(warpgroup);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < ROWS / 4; ++i) sum += x[i / 2 * 4 + 2 * r + i % 2];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if (thread % 4 == 0) keys[thread / 32 * 16 + thread % 32 / 4 + 8 * r] = sum;
    }
    bar_sync(MASK_BARRIER, MMA_THREADS);
    const int32_t key = first + threadIdx.x;
    if (threadIdx.x < BLOCK_N && key < a.to.shape[3]) {
        float sum = 0.f;
        for (const auto &part : smem.keys) sum += part[threadIdx.x];
        store_mask(a, base + key * a.to.stride[3], sum);
    }
    bar_sync(MASK_BARRIER, MMA_THREADS);
}

DEVICE void store_tile(const bwd_mask_args &a, mask_smem &smem, const float (&x)[ROWS / 2],
                       int64_t tile, int32_t warpgroup) {
    const int64_t *shape = a.to.shape, *stride = a.to.stride;
    const int64_t plane = tile / a.key_blocks / a.row_blocks;
    const int32_t thread = thread_here() % 128;
    const int32_t first_key = (int32_t)(tile % a.key_blocks) * BLOCK_N,
                  first_row = (int32_t)(tile / a.key_blocks % a.row_blocks) * BLOCK_M;
    const int64_t base = plane / shape[1] * stride[0] + plane % shape[1] * stride[1];
    if (shape[3] == 1) return store_row_sums(a, smem, x, base, first_row, warpgroup);
    if (shape[2] == 1) return store_key_sums(a, smem, x, base, first_key, warpgroup);
    const int32_t row = first_row + own_row(warpgroup) + thread % 4 * 2,
                  key = first_key + own_key(warpgroup) + thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
    for (int i = 0; i < ROWS / 2; ++i) {
        const int32_t y = row + i / 4 * 8 + i % 2, k = key + i / 2 % 2 * 8;
        if (y < shape[2] && k < shape[3]) store_mask(a, base + y * stride[2] + k * stride[3], x[i]);
    }
}

/* dS^T of a step is added to the sums. */
DEVICE void add_step(const bwd_args &a, mask_smem &smem, uint32_t stage, int32_t warpgroup,
                     float (&sums)[ROWS / 2]) {
    const work_tile &t = smem.steps[stage].tile;
    const walk_step at = smem.steps[stage].at;
    float s[ROWS / 2], dp[ROWS / 2];
    uint32_t p[ROWS / 16][4];
    const score_bits bits = bits_of(a, t, at, warpgroup);
    issue_transposed<QK_PANELS, D>(s, smem.k[stage], smem.q[stage], warpgroup);
    wgmma_wait_group<0>();
    wgmma_accumulators(s);
    weigh<false>(a, t, at, warpgroup, smem.lse[stage], bits, s, p);
    issue_transposed<V_PANELS, DV>(dp, smem.v[stage], smem.dout[stage], warpgroup);
    wgmma_wait_group<0>();
    wgmma_accumulators(dp);
    bit_slopes(bits, a.scores.gain, s, dp, smem.delta[stage] + own_row(warpgroup));
#pragma unroll
    for (int i = 0; i < ROWS / 2; ++i) sums[i] += dp[i];
}

DEVICE void consume_mask(const bwd_mask_args &a, mask_smem &smem, int32_t warpgroup) {
    float sums[ROWS / 2] = {};
    for (uint32_t n = 0;; ++n) {
        const uint32_t stage = n % MASK_STAGES;
        mbarrier_wait(smem_address(&smem.full[stage]), n / MASK_STAGES % 2);
        const mask_step &step = smem.steps[stage];
        const int32_t h = uniform(step.at.h), m = uniform(step.at.m);
        if (h < 0) return;
        if (m >= 0) {
            add_step(a.of, smem, stage, warpgroup, sums);
        } else {
            store_tile(a, smem, sums, step.number, warpgroup);
#pragma unroll
            for (int i = 0; i < ROWS / 2; ++i) sums[i] = 0.f;
        }
        mbarrier_arrive(smem_address(&smem.empty[stage]));
    }
}

static __global__ void __launch_bounds__(THREADS, 1)
    bwd_mask(const __grid_constant__ bwd_mask_args a) {
    alignas(1024) extern __shared__ uint8_t raw[];
    mask_smem &smem = *(mask_smem *)raw;
    if (threadIdx.x == 0) {
        for (int i = 0; i < MASK_STAGES; ++i) {
            mbarrier_init(smem_address(&smem.full[i]), 4 * PRODUCERS);
            mbarrier_init(smem_address(&smem.empty[i]), MMA_THREADS);
        }
        fence_mbarrier_init();
    }
    wait_for_stream();
    __syncthreads();
    const int32_t warpgroup = uniform(threadIdx.x / 128);
    if (warpgroup == WARPGROUPS) {
        setmaxnreg_dec<PRODUCER_REGISTERS>();
        if (threadIdx.x < MMA_THREADS + PRODUCERS) produce_mask(a, smem);
    } else {
        setmaxnreg_inc<MMA_REGISTERS>();
        consume_mask(a, smem, warpgroup);
    }
}

/* ---- the launch -------------------------------------------------------------------------------*/

/* Behind what has written lse and delta. */
static fa_status launch_bwd_mask(const bwd_args &of, const fa_backward *r, const fa_device *device,
                                 fa_error *error) {
    const int64_t *shape = r->dmask.shape;
    bwd_mask_args a = {};
    a.of = of, a.to = r->dmask, a.dtype = r->forward.scores.mask_dtype;
    a.row_blocks = shape[2] == 1 ? 1 : (int32_t)((shape[2] + BLOCK_M - 1) / BLOCK_M);
    a.key_blocks = shape[3] == 1 ? 1 : (int32_t)((shape[3] + BLOCK_N - 1) / BLOCK_N);
    a.tiles = shape[0] * shape[1] * a.row_blocks * a.key_blocks;
    static uint64_t allowed;
    const fa_status status =
        fa_allow_smem(&allowed, device, (const void *)bwd_mask, MASK_SMEM_BYTES, error);
    if (status != FA_OK) return status;
    const int32_t blocks = (int32_t)(a.tiles < device->sms ? a.tiles : device->sms);
    return fa_launch_kernel((const void *)bwd_mask, blocks, THREADS, MASK_SMEM_BYTES,
                            r->forward.where.stream, device->early, &a, error);
}

#endif
