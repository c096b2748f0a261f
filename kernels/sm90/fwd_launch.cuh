/* fwd_launch.cuh - the launcher of a variant: tensor maps, arguments, the launch.
 *
 * launch.cuh has what does not depend on the variant.
 */
#ifndef FASTATTN_SM90_FWD_LAUNCH_CUH
#define FASTATTN_SM90_FWD_LAUNCH_CUH

#include "common/launch.cuh"
#include "common/packed.h"
#include "common/scale.h"
#include "common/schedule.h"
#include "sm90/fwd_args.cuh"
#include "sm90/fwd_smem.h"
#include "sm90/fwd_variant.h"
#include "sm90/fwd_workspace.h"
#include "sm90/loads.h"
#include "sm90/softmax.cuh"
#if VARIANT_GENERAL
#include "sm90/scores_launch.cuh"
#endif

__global__ void VARIANT_NAME(const __grid_constant__ kernel_args a);

#if !IS_STRIDED || VARIANT_GENERAL
/* Panels of `bytes` by `rows` rows; dimensions of stride 0 are one long, and not moved along. */
static bool encode(CUtensorMap *map, const fa_device *device, const fa_tensor *t, int rows,
                   int32_t moves[2], int element_bytes = 2, int bytes = 128) {
    cuuint64_t shape[4] = {(cuuint64_t)t->shape[3], (cuuint64_t)t->shape[2],
                           (cuuint64_t)t->shape[1], (cuuint64_t)t->shape[0]};
    cuuint64_t strides[3] = {16, 16, 16};
    for (int i = 0; i < 3; ++i) {
        int axis = 2 - i;
        if (t->shape[axis] > 1 && t->stride[axis] != 0) {
            strides[i] = (cuuint64_t)(t->stride[axis] * element_bytes);
        } else {
            if (i == 0 && t->shape[axis] > 1) return false; /* one row, repeated */
            shape[1 + i] = 1;
        }
        if (i) moves[i - 1] = shape[1 + i] > 1;
    }
    if (SLICES && moves[0]) { /* all heads are one */
        moves[0] = (int32_t)t->stride[1];
        shape[0] += (cuuint64_t)(t->shape[1] - 1) * (cuuint64_t)t->stride[1];
        shape[2] = 1;
        strides[1] = 16;
    }
    const cuuint32_t box[4] = {(cuuint32_t)(bytes / element_bytes), (cuuint32_t)rows, 1, 1};
    const cuuint32_t steps[4] = {1, 1, 1, 1};
    return device->encode(map,
                          element_bytes == 4 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                          : IS_BF16          ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                             : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                          4, t->data, shape, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                          CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                          CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}
#endif

#if IS_STRIDED
static bool encode(fa_tensor *array, const fa_device *, const fa_tensor *t, int, int32_t[2]) {
    *array = *t;
    return true;
}
#endif

#if IS_PAGED
/* Where keys lie; what boxes or copies bring at a time. */
static void set_pages(kernel_args &a, const fa_params *p) {
    a.pages = p->pages;
    a.by_size = fa_divisor_make(p->pages.table ? p->pages.size : 1);
#if IS_STRIDED
    a.widths[0] = fa_copy_width(&p->what.k), a.widths[1] = fa_copy_width(&p->what.v);
#else
    a.box_rows = fa_box_rows(p, BLOCK_N);
#endif
}
#endif

/* Of K and V. */
static int32_t rows_of_box(const kernel_args &a) {
#if IS_PAGED && !IS_STRIDED
    return a.box_rows;
#else
    return BLOCK_N;
#endif
}

/* The arrays, as the loaders and the stores address them. */
static fa_status encode_arrays(kernel_args &a, const fa_device *device, const fa_what *w,
                               fa_error *error) {
    const int32_t box_rows = rows_of_box(a);
    if (!encode(&a.q, device, &w->q, 64, a.moves[0]) ||
        !encode(&a.k, device, &w->k, box_rows, a.moves[1]) ||
        !encode(&a.v, device, &w->v, box_rows, a.moves[2]) ||
        (STAGED && !encode(&a.out_map, device, &w->out, 16, a.moves[3])))
        return fa_fail(error, FA_RUNTIME, "cuTensorMapEncodeTiled rejected q, k, v or out");
#if !IS_STRIDED
    const fa_tensor *heads[3] = {&w->q, &w->k, &w->v};
    for (int i = 0; i < 3; ++i) {
        const int32_t slack = SLICES ? fa_slack_of(heads[i]) : 0, rows = i ? box_rows : 64;
        a.columns[i] = ((int32_t)heads[i]->shape[3] + slack + 7) & -8;
        const int tail = a.columns[i] % 64 * 2;
        if (tail && !encode(&a.tails[i], device, heads[i], rows, a.moves[i], 2, tail))
            return fa_fail(error, FA_RUNTIME, "cuTensorMapEncodeTiled rejected q, k or v");
    }
#endif
    a.out = w->out;
    return FA_OK;
}

#if VARIANT_GENERAL
/* What changes scores; after all else that the offset's slack depends on. */
static fa_status set_scores(kernel_args &a, const fa_device *device, const fa_params *p,
                            void *workspace, fa_error *error) {
    a.b = p->what.b;
    a.scores = make_scores(p, (char *)workspace + fa_lay_out_forward(p, BLOCK_M).mask);
    a.slack = softmax_slack(a.scores.scale);
    if (!a.scores.tiles) return FA_OK;
    fa_tensor mask = p->scores.mask;
    if (!a.scores.tile_rows) mask.shape[2] = 1;
    if (encode(&a.scores.mask_map, device, &mask, a.scores.tile_rows ? 64 : 1, a.scores.mask_moves,
               a.scores.mask == ADD_F32 ? 4 : 2))
        return FA_OK;
    return fa_fail(error, FA_RUNTIME, "cuTensorMapEncodeTiled rejected the mask");
}
#endif

extern "C" fa_status PASTE(fa_launch_, VARIANT_NAME)(const fa_params *p, const fa_device *device,
                                                     void *workspace, fa_error *error) {
    const fa_what *w = &p->what;
    const bool packed = p->varlen.cu_q != NULL;
    int64_t tiles = packed ? w->hq * fa_packed_capacity(&p->varlen, w->b, BLOCK_M)
                           : (int64_t)w->b * w->hq * ((w->sq + BLOCK_M - 1) / BLOCK_M);
    int32_t slots = device->sms * BLOCKS_PER_SM;
    if (tiles > INT32_MAX - slots)
        return fa_fail(error, FA_UNSUPPORTED, "sm90 takes at most 2^31 tiles of %d rows", BLOCK_M);
    kernel_args a = {};
#if IS_PAGED
    set_pages(a, p);
#endif
    fa_status status = encode_arrays(a, device, w, error);
    if (status != FA_OK) return status;
    a.descriptor_high = 64 | 1u << 30; /* as in wgmma_descriptor() */
#if HAS_SLICES
    a.d = w->d;
#endif
    a.masks = p->masks;
    a.sq = w->sq;
    a.sk = w->sk;
    a.hq = w->hq;
    a.by_hq = fa_divisor_make(a.hq);
    a.by_group = fa_divisor_make(w->hq / w->hk);
    a.watch = w->batch_invariant;
    a.scale = (float)(usable_scale(w->scale) * 1.4426950408889634);
    a.slack = softmax_slack(a.scale);
    a.lse = (float *)w->lse.data;
    for (int i = 0; i < 3; ++i) a.lse_stride[i] = w->lse.stride[i];
    a.sink = p->scores.sink;
    a.sink_stride = p->scores.sink_stride;
    const fa_masks &m = p->masks;
    a.reads = GENERAL || packed || a.sink || m.q_lengths || m.k_lengths || m.k_start || m.q_offset;
#if VARIANT_GENERAL
    status = set_scores(a, device, p, workspace, error);
    if (status != FA_OK) return status;
#endif
    int32_t blocks = tiles < slots ? (int32_t)tiles : slots;
    a.ahead = TILE_SLOTS;
    if (packed) {
        a.packed = fa_packed_make(w, &p->masks, &p->varlen, BLOCK_M, workspace);
        a.varlen = p->varlen;
    } else {
        a.schedule = fa_schedule_make(w, &p->masks, BLOCK_M, blocks);
    }
    /* Who claims far ahead takes the last tiles from blocks that have nothing left; but where tiles
     * are short or many, only the time to find them counts. */
    const int64_t keys = packed && !IS_PAGED ? p->varlen.total_k / w->b : w->sk;
    if (tiles < 16 * (int64_t)slots && keys >= 4 * BLOCK_N) a.ahead = 2;

    static uint64_t allowed;
    status = fa_allow_smem(&allowed, device, (const void *)VARIANT_NAME, SMEM_BYTES, error);
    if (status != FA_OK) return status;
    /* An early start saves 2 us; but its blocks sit on other SMs than in their order, and where
     * there are many short tiles, neighbours of which share K and V, that costs up to 6 %. */
    const bool early = device->early && tiles <= 16 * (int64_t)slots;
    return fa_launch_kernel((const void *)VARIANT_NAME, blocks, THREADS, SMEM_BYTES,
                            p->where.stream, early, &a, error);
}

#endif
