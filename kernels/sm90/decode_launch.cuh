/* decode_launch.cuh - the launcher of a decode variant: tensor maps, arguments, the launch.
 */
#ifndef FASTATTN_SM90_DECODE_LAUNCH_CUH
#define FASTATTN_SM90_DECODE_LAUNCH_CUH

#include "common/launch.cuh"
#include "common/scale.h"
#include "sm90/decode_args.cuh"
#include "sm90/decode_choice.h"

__global__ void VARIANT_NAME(const __grid_constant__ decode_args a);

#if IS_STRIDED

static bool describe(decode_array *to, const fa_device *, const fa_tensor *t, int32_t) {
    to->tensor = *t;
    to->width = fa_copy_width(t);
    return true;
}

#else

/* Panels of 64 columns by `rows` rows; dimensions of stride 0 are one long, and not moved along.
 * Asked for 256 bytes at a time, memory gives 8 % less. */
static bool describe(decode_array *to, const fa_device *device, const fa_tensor *t, int32_t rows) {
    cuuint64_t shape[4] = {(cuuint64_t)t->shape[3], (cuuint64_t)t->shape[2], 1, 1};
    cuuint64_t strides[3] = {16, 16, 16};
    if (t->shape[2] > 1) strides[0] = (cuuint64_t)t->stride[2] * 2;
    for (int i = 0; i < 2; ++i) {
        const int axis = 1 - i;
        to->moves[i] = t->shape[axis] > 1 && t->stride[axis] != 0;
        if (!to->moves[i]) continue;
        shape[2 + i] = (cuuint64_t)t->shape[axis];
        strides[1 + i] = (cuuint64_t)t->stride[axis] * 2;
    }
    const cuuint32_t box[4] = {64, (cuuint32_t)rows, 1, 1}, steps[4] = {1, 1, 1, 1};
    return device->encode(
               &to->map,
               IS_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
               t->data, shape, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

#endif

/* Whether all rows begin on 16 bytes, their columns side by side. */
static bool is_wide(const fa_tensor *t, int32_t size) {
    int64_t bits = (int64_t)(uintptr_t)t->data;
    for (int i = 0; i < 3; ++i)
        if (t->shape[i] > 1) bits |= t->stride[i] * size;
    return bits % 16 == 0 && (t->shape[3] == 1 || t->stride[3] == 1);
}

static decode_rows rows_to(const fa_tensor *out, const fa_tensor *lse, bool is_part) {
    decode_rows to = {*out, (float *)lse->data, {}, is_part, is_wide(out, is_part ? 4 : 2)};
    for (int i = 0; i < 3; ++i) to.lse_stride[i] = lse->stride[i];
    return to;
}

/* What the scores are made of, in exponents. */
static void set_scores(decode_args &a, const fa_params *p) {
    const double log2_e = 1.4426950408889634, scale = usable_scale(p->what.scale);
    const fa_scores *s = &p->scores;
    a.scale = (float)(scale * log2_e);
    if (s->softcap != 0) {
        const double cap = usable_scale(s->softcap);
        a.cap = (float)(cap * log2_e);
        a.by_cap = (float)usable_scale(scale / cap);
    }
    a.slopes = s->alibi_slopes;
    for (int i = 0; i < 2; ++i) a.slope_stride[i] = s->alibi_stride[i];
    a.sink = s->sink;
    a.sink_stride = s->sink_stride;
}

/* `out` and `lse`: the request's, or the first part of a stack whose parts lie these elements
 * apart. */
extern "C" fa_status PASTE(fa_launch_, VARIANT_NAME)(const fa_params *p, const fa_device *device,
                                                     const fa_decode_plan *plan,
                                                     const fa_tensor *out, int64_t out_step,
                                                     const fa_tensor *lse, int64_t lse_step,
                                                     fa_error *error) {
    const fa_what *w = &p->what;
    const int64_t blocks = fa_decode_grid(p, plan);
    if (blocks > INT32_MAX)
        return fa_fail(error, FA_UNSUPPORTED, "sm90 takes at most 2^31 parts of tiles");
    decode_args a = {};
    a.box_rows = fa_box_rows(p, BLOCK_N);
    if (!describe(&a.k, device, &w->k, a.box_rows) || !describe(&a.v, device, &w->v, a.box_rows))
        return fa_fail(error, FA_RUNTIME, "cuTensorMapEncodeTiled rejected k or v");
    a.q = w->q;
    a.to = rows_to(out, lse, plan->parts > plan->cluster);
    if (plan->deal) a.single = rows_to(&w->out, &w->lse, false);
    a.out_step = out_step, a.lse_step = lse_step;
    a.masks = p->masks, a.varlen = p->varlen, a.pages = p->pages;
    a.group = fa_decode_group(w), a.heads = w->hk;
    a.b = w->b, a.sq = w->sq, a.sk = w->sk;
    a.tiles = (int32_t)plan->tiles, a.parts = plan->parts, a.part_blocks = plan->part_blocks;
    a.deal = (int32_t)plan->deal;
    a.by_size = fa_divisor_make(p->pages.table ? p->pages.size : 1);
    a.by_group = fa_divisor_make(a.group);
    a.by_tiles = fa_divisor_make(a.tiles);
    a.by_parts = fa_divisor_make(a.parts);
    a.by_heads = fa_divisor_make(a.heads);
    a.cluster = plan->cluster, a.few = plan->few;
    a.q_wide = is_wide(&a.q, 2);
    set_scores(a, p);

    static uint64_t allowed;
    fa_status status =
        fa_allow_smem(&allowed, device, (const void *)VARIANT_NAME, SMEM_BYTES, error);
    if (status != FA_OK) return status;
    return fa_launch_clusters((const void *)VARIANT_NAME, (int32_t)blocks, a.cluster, THREADS,
                              SMEM_BYTES, p->where.stream, device->early, &a, error);
}

#endif
