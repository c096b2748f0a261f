/* A variant of the portable forward with threads as fibers, one block after the other. */
#define FIBERS (32 * VARIANT_ROW_WARPS * VARIANT_COLUMN_WARPS)
#include "portable.h"

static fa_status fa_launch_kernel(const void *kernel, int32_t blocks, int32_t threads, int32_t smem,
                                  void *stream, bool early, void *arguments, fa_error *error);

#include "pack_host.h"
#include "sm80/fwd.cu"
#include "sm80/fwd_choice.h"

static const kernel_args *arguments_now;

static fa_status fa_launch_kernel(const void *, int32_t blocks, int32_t, int32_t smem, void *, bool,
                                  void *arguments, fa_error *) {
    arguments_now = (const kernel_args *)arguments;
    gridDim.x = blocks;
    for (blockIdx.x = blocks - 1; blockIdx.x >= 0; --blockIdx.x) {
        start_block();
        memset(raw + smem, 0, sizeof raw - smem);
        run_block([] { VARIANT_NAME(*arguments_now); });
        for (size_t i = smem; i < sizeof raw; ++i)
            if (raw[i]) abort(); /* past its shared memory */
    }
    return FA_OK;
}

struct changed_scores {
    double softcap, dropout;
    int64_t seed;
    const fa_tensor *mask;
    const float *slopes; /* (b, hq) */
    const float *sink;   /* (hq,) */
    int32_t mask_dtype;
};

/* q, k, v, out, lse (data NULL: none), as they are described; of packed sequences, cu_q and cu_k
 * and b, sq and sk in `packed`. masks: flags, left, right, offset; lengths: of queries, of keys,
 * starts, offsets, or NULL. Returns a status. */
extern "C" int forward(const fa_tensor *arrays, double scale, const int32_t *masks,
                       const int32_t *const *lengths, const int32_t *const *cu,
                       const int32_t *packed, const changed_scores *scores, int is_late) {
    fa_params p = {};
    fa_what &w = p.what;
    w.q = arrays[0], w.k = arrays[1], w.v = arrays[2], w.out = arrays[3], w.lse = arrays[4];
    w.dtype = VARIANT_DTYPE;
    w.b = (int32_t)w.q.shape[0], w.sq = (int32_t)w.q.shape[2], w.sk = (int32_t)w.k.shape[2];
    if (packed) {
        p.varlen = {cu[0], cu[1], 1, 1, w.sq, w.sk};
        w.b = packed[0], w.sq = packed[1], w.sk = packed[2];
    }
    w.hq = (int32_t)w.q.shape[1], w.hk = w.hv = (int32_t)w.k.shape[1];
    w.d = (int32_t)w.q.shape[3], w.dv = (int32_t)w.v.shape[3];
    w.scale = scale;
    fa_masks &m = p.masks;
    m.flags = (uint32_t)masks[0], m.left = masks[1], m.right = masks[2], m.offset = masks[3];
    m.q_lengths = lengths[0], m.k_lengths = lengths[1], m.k_start = lengths[2];
    m.q_offset = lengths[3];
    m.q_lengths_stride = m.k_lengths_stride = m.k_start_stride = m.q_offset_stride = 1;
    fa_scores &s = p.scores;
    s.softcap = scores->softcap, s.alibi_slopes = scores->slopes, s.sink = scores->sink;
    s.alibi_stride[0] = w.hq, s.alibi_stride[1] = s.sink_stride = 1;
    if (scores->mask) s.mask = *scores->mask, s.mask_dtype = (fa_dtype)scores->mask_dtype;
    p.dropout.p = scores->dropout, p.dropout.seed = scores->seed;
    p.dropout.gain = scores->dropout < 1 ? 1 / (1 - scores->dropout) : 0;
    p.dropout.threshold = (uint32_t)lround(scores->dropout * 65536);
    std::vector<char> workspace(fa_sm80_workspace(&p) + 16);
    char *aligned = workspace.data() + (-(uintptr_t)workspace.data() & 15);
    if (workspace.size() > 16) pack_host(&p, aligned);
    const fa_device device = {2, 0};
    fa_error error = {};
    late = is_late;
    return PASTE(fa_launch_, VARIANT_NAME)(&p, &device, aligned, &error);
}
