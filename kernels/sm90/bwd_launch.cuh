/* bwd_launch.cuh - the launcher of a backward variant: three kernels in a row. */
#ifndef FASTATTN_SM90_BWD_LAUNCH_CUH
#define FASTATTN_SM90_BWD_LAUNCH_CUH

#include "backward.h"
#include "common/launch.cuh"
#include "common/scale.h"
#include "sm90/bwd_args.cuh"
#include "sm90/bwd_choice.h"
#include "sm90/bwd_ends.cuh"
#include "sm90/bwd_smem.h"
#include "sm90/scores_launch.cuh"
#if VARIANT_GENERAL
#include "sm90/bwd_mask.cuh"
#endif

__global__ void VARIANT_NAME(const __grid_constant__ bwd_args a);

#if VARIANT_STRIDED
static bool encode_rows(array *rows, const fa_device *, const fa_tensor *t, int, int32_t[2]) {
    *rows = *t;
    return true;
}
#else
/* Panels of 64 columns by `rows` rows; an axis of stride 0 is one long, and not moved along. */
static bool encode_rows(CUtensorMap *map, const fa_device *device, const fa_tensor *t, int rows,
                        int32_t moves[2]) {
    cuuint64_t shape[4] = {(cuuint64_t)t->shape[3], (cuuint64_t)t->shape[2],
                           (cuuint64_t)t->shape[1], (cuuint64_t)t->shape[0]};
    cuuint64_t strides[3] = {16, 16, 16};
    for (int i = 0; i < 3; ++i) {
        const int axis = 2 - i;
        if (t->shape[axis] > 1 && t->stride[axis] != 0) {
            strides[i] = (cuuint64_t)(t->stride[axis] * 2);
        } else {
            if (i == 0 && t->shape[axis] > 1) return false; /* one row, repeated */
            shape[1 + i] = 1;
        }
        if (i) moves[i - 1] = shape[1 + i] > 1;
    }
    const cuuint32_t box[4] = {64, (cuuint32_t)rows, 1, 1}, steps[4] = {1, 1, 1, 1};
    return device->encode(
               map, IS_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
               t->data, shape, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}
#endif

/* Whether rows lie side by side, on 16 bytes. */
static bool is_wide(const fa_tensor *t) {
    return t->stride[3] == 1 && t->shape[3] % 8 == 0 && (uintptr_t)t->data % 16 == 0 &&
           (t->stride[0] | t->stride[1] | t->stride[2]) % 8 == 0;
}

/* The main kernel, and where it is wanted the mask's gradient. */
static fa_status launch_main(bwd_args &a, const fa_backward *r, const fa_device *device,
                             int32_t blocks, fa_error *error) {
    static uint64_t allowed;
    fa_status status =
        fa_allow_smem(&allowed, device, (const void *)VARIANT_NAME, SMEM_BYTES, error);
    if (status != FA_OK) return status;
    status = fa_launch_clusters((const void *)VARIANT_NAME, blocks, CLUSTER, THREADS, SMEM_BYTES,
                                r->forward.where.stream, device->early, &a, error);
#if VARIANT_GENERAL
    if (status == FA_OK && r->dmask.data) status = launch_bwd_mask(a, r, device, error);
#endif
    return status;
}

extern "C" fa_status PASTE(fa_launch_, VARIANT_NAME)(const fa_backward *r, const fa_device *device,
                                                     void *workspace, fa_error *error) {
    const fa_what *w = &r->forward.what;
    const fa_varlen *v = &r->forward.varlen;
    const fa_backward_workspace at = fa_lay_out_backward(&r->forward, BLOCK_M, SUM_COLUMNS);
    const int64_t rows = at.delta, batches = v->cu_q ? 1 : w->b;
    const int64_t blocks = v->cu_q ? fa_packed_blocks(v->total_k, w->b, TILE_N)
                                   : ((int64_t)w->sk + TILE_N - 1) / TILE_N;
    if (rows > INT32_MAX || batches * w->hk * blocks > INT32_MAX)
        return fa_fail(error, FA_UNSUPPORTED, "sm90 takes at most 2^31 rows in all");
    const int32_t m_blocks = (int32_t)(at.head / BLOCK_M), n_blocks = (int32_t)blocks;
    float *lse = (float *)workspace, *delta = lse + at.delta, *sums = lse + at.sums;
    void *stream = r->forward.where.stream;

    bwd_rows_args before = {};
    before.out = w->out, before.dout = r->dout, before.lse = w->lse, before.dlse = r->dlse;
    before.varlen = *v, before.masks = r->forward.masks;
    before.b = w->b, before.hq = w->hq, before.sq = w->sq, before.sk = w->sk, before.dv = w->dv;
    before.rows = m_blocks * BLOCK_M;
    before.scaled_lse = lse, before.delta = delta, before.dq = r->dq.data ? (float4 *)sums : NULL;
    before.taken = (int32_t *)lse + at.taken;
    if (fa_bwd_takes_turns(r)) before.turns = (int32_t *)lse + at.turns;
    before.wide = is_wide(&w->out) && is_wide(&r->dout);
#if VARIANT_GENERAL
    const score_args scores = make_scores(&r->forward, (const char *)(lse + at.mask));
    before.bits = scores.bits;
    if (r->forward.scores.sink) before.words = scores.words; /* or NULL, where it is no bool mask */
#endif
    fa_status status = fa_launch_kernel((const void *)bwd_rows, (int32_t)(rows / ROWS_OF_BLOCK),
                                        ENDS_THREADS, 0, stream, device->early, &before, error);
    if (status != FA_OK) return status;

    bwd_args a = {};
    if (!encode_rows(&a.q, device, &w->q, BLOCK_M, a.moves[0]) ||
        !encode_rows(&a.k, device, &w->k, BLOCK_N, a.moves[1]) ||
        !encode_rows(&a.v, device, &w->v, BLOCK_N, a.moves[2]) ||
        !encode_rows(&a.dout, device, &r->dout, BLOCK_M, a.moves[3]))
        return fa_fail(error, FA_RUNTIME, "cuTensorMapEncodeTiled rejected q, k, v or dout");
    a.dk = r->dk, a.dv = r->dv;
    a.masks = r->forward.masks, a.varlen = *v;
    a.b = w->b, a.sq = w->sq, a.sk = w->sk, a.hq = w->hq, a.hk = w->hk, a.group = w->hq / w->hk;
    a.m_blocks = m_blocks, a.n_blocks = n_blocks;
    a.scale = w->scale == 0 ? 0.f : (float)usable_scale(w->scale);
    a.scale_log2 = (float)(usable_scale(w->scale) * 1.4426950408889634);
    a.heads = (int32_t)batches * w->hk, a.tiles = a.heads * n_blocks, a.taken = before.taken;
    a.lse = lse, a.delta = delta, a.dq = r->dq.data ? sums : NULL, a.turns = before.turns;
#if VARIANT_GENERAL
    a.scores = scores;
#endif
    const int32_t launched = STAYS ? min(a.tiles, max(device->sms / CLUSTER, 1)) : a.tiles;
    a.begun = a.turns ? 0 : launched, a.section = fa_bwd_section(r, a.heads, SUM_COLUMNS);
    status = launch_main(a, r, device, launched * CLUSTER, error);
    if (status != FA_OK || !r->dq.data) return status;

    const bwd_dq_args behind = {r->dq,           sums,   *v, w->b, w->hq, w->sq, m_blocks,
                                is_wide(&r->dq), a.scale};
    return fa_launch_kernel((const void *)bwd_dq, (int32_t)(rows / BLOCK_M), ENDS_THREADS, 0,
                            stream, device->early, (void *)&behind, error);
}

#endif
