/* A variant of the Hopper forward with threads as fibers, one block after the other. */
#define FIBERS (128 * (VARIANT_WARPGROUPS + 1))
#include "hopper.h"

static fa_status fa_launch_kernel(const void *kernel, int32_t blocks, int32_t threads, int32_t smem,
                                  void *stream, bool early, void *arguments, fa_error *error);

#include "sm90/fwd.cu"

static const kernel_args *arguments_now;

static fa_status fa_launch_kernel(const void *, int32_t blocks, int32_t, int32_t, void *, bool,
                                  void *arguments, fa_error *) {
    arguments_now = (const kernel_args *)arguments;
    gridDim.x = blocks;
    for (blockIdx.x = blocks - 1; blockIdx.x >= 0; --blockIdx.x) {
        start_block();
        run_block([] { VARIANT_NAME(*arguments_now); });
    }
    return FA_OK;
}

/* Of one batch entry or more, arrays as they are described. masks: flags, left, right; lengths:
 * of queries, of keys, starts, or NULL. Returns a status. */
extern "C" int forward(const fa_tensor *q, const fa_tensor *k, const fa_tensor *v,
                       const fa_tensor *out, const fa_tensor *lse, double scale,
                       const int32_t *masks, const int32_t *const *lengths, int sms, int is_late) {
    fa_params p = {};
    p.what.q = *q, p.what.k = *k, p.what.v = *v, p.what.out = *out;
    if (lse) p.what.lse = *lse;
    p.what.dtype = VARIANT_DTYPE;
    p.what.b = (int32_t)q->shape[0];
    p.what.hq = (int32_t)q->shape[1], p.what.hk = p.what.hv = (int32_t)k->shape[1];
    p.what.sq = (int32_t)q->shape[2], p.what.sk = (int32_t)k->shape[2];
    p.what.d = (int32_t)q->shape[3], p.what.dv = (int32_t)v->shape[3];
    p.what.scale = scale;
    p.masks.flags = (uint32_t)masks[0], p.masks.left = masks[1], p.masks.right = masks[2];
    p.masks.q_lengths = lengths[0], p.masks.q_lengths_stride = 1;
    p.masks.k_lengths = lengths[1], p.masks.k_lengths_stride = 1;
    p.masks.k_start = lengths[2], p.masks.k_start_stride = 1;
    const fa_device device = {sms, 0, encode_host};
    fa_error error = {};
    late = is_late;
    return PASTE(fa_launch_, VARIANT_NAME)(&p, &device, NULL, &error);
}
