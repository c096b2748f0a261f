/* backward_request.h - a backward request out of what tests say. */
#ifndef FASTATTN_TESTS_BACKWARD_REQUEST_H
#define FASTATTN_TESTS_BACKWARD_REQUEST_H

#include "backward.h"

struct changed_scores {
    double softcap, dropout;
    int64_t seed;
    const fa_tensor *mask;
    const float *slopes; /* (b, hq) */
    int32_t mask_dtype;
    const fa_tensor *dmask; /* or NULL: not wanted */
};

/* arrays: q, k, v, out, lse, dout, dlse, dq, dk, dv, as they are described, or NULL: none. masks:
 * flags, left, right, offset; lengths: of queries, of keys, starts, or NULL; sinks: sink and dsink
 * of each head, or NULL; packed: cu_q and cu_k, or NULL, and b and the longest sequences of q and
 * k; scores: what changes them, or NULL. */
static fa_backward make_request(fa_dtype dtype, const fa_tensor *const *arrays, double scale,
                                const int32_t *masks, const int32_t *const *lengths,
                                float *const *sinks, const int32_t *const *packed,
                                const changed_scores *scores) {
    fa_backward r = {};
    fa_params &p = r.forward;
    fa_tensor *to[] = {&p.what.q, &p.what.k, &p.what.v, &p.what.out, &p.what.lse,
                       &r.dout,   &r.dlse,   &r.dq,     &r.dk,       &r.dv};
    for (int i = 0; i < 10; ++i)
        if (arrays[i]) *to[i] = *arrays[i];
    p.what.dtype = dtype;
    p.what.b = (int32_t)p.what.q.shape[0];
    p.what.hq = (int32_t)p.what.q.shape[1], p.what.hk = p.what.hv = (int32_t)p.what.k.shape[1];
    p.what.sq = (int32_t)p.what.q.shape[2], p.what.sk = (int32_t)p.what.k.shape[2];
    p.what.d = (int32_t)p.what.q.shape[3], p.what.dv = (int32_t)p.what.v.shape[3];
    p.what.scale = scale;
    if (packed[0]) {
        p.varlen = {packed[0], packed[1], 1, 1, p.what.sq, p.what.sk};
        p.what.b = packed[2][0], p.what.sq = packed[2][1], p.what.sk = packed[2][2];
    }
    p.masks.flags = (uint32_t)masks[0], p.masks.left = masks[1], p.masks.right = masks[2];
    p.masks.offset = masks[3];
    p.masks.q_lengths = lengths[0], p.masks.q_lengths_stride = 1;
    p.masks.k_lengths = lengths[1], p.masks.k_lengths_stride = 1;
    p.masks.k_start = lengths[2], p.masks.k_start_stride = 1;
    p.scores.sink = sinks[0], p.scores.sink_stride = 1;
    r.dsink = sinks[1], r.dsink_stride = 1;
    if (scores) {
        p.scores.softcap = scores->softcap;
        if (scores->mask) p.scores.mask = *scores->mask;
        p.scores.mask_dtype = (fa_dtype)scores->mask_dtype;
        if (scores->dmask) r.dmask = *scores->dmask;
        p.scores.alibi_slopes = scores->slopes;
        p.scores.alibi_stride[0] = p.what.hq, p.scores.alibi_stride[1] = 1;
        p.dropout.p = scores->dropout, p.dropout.seed = scores->seed;
        p.dropout.threshold = (uint32_t)(scores->dropout * 65536 + 0.5);
        p.dropout.gain = scores->dropout < 1 ? 1 / (1 - scores->dropout) : 0;
    }
    return r;
}

#endif
