/* bwd_sink.cuh - the gradient of sinks: of each query head minus the sum of exp(sink - lse) delta
 * over its rows, in the same order every time. No variant's business.
 */
#ifndef FASTATTN_SM90_BWD_SINK_CUH
#define FASTATTN_SM90_BWD_SINK_CUH

#include "backward.h"
#include "common/launch.cuh"
#include "common/stream.cuh"
#include "mask.h"
#include "sm90/ptx.cuh"

enum { SINK_THREADS = 256, SINK_BARRIER = 1 };

struct sink_args {
    fa_tensor lse, dlse; /* dlse.data NULL: zeros */
    fa_masks masks;
    const float *sink, *delta; /* delta: dout . out - dlse, `rows` of each head; NULL: no key */
    float *dsink;
    int64_t sink_stride, dsink_stride;
    int32_t b, hq, sq, sk, rows;
};

/* delta of a row. Of one that sees no key, whose out is 0 whatever dout holds, it is -dlse. */
DEVICE float sink_delta(const sink_args &a, const fa_lengths &lengths, int32_t b, int32_t h,
                        int32_t row) {
    const fa_interval keys = fa_row_interval(lengths, row);
    const fa_tensor &t = a.dlse;
    if (keys.begin < keys.end && a.delta) return a.delta[((int64_t)b * a.hq + h) * a.rows + row];
    if (!t.data) return 0.f;
    return -((const float *)t.data)[b * t.stride[0] + h * t.stride[1] + row * t.stride[2]];
}

/* A block has a head. */
static __global__ void __launch_bounds__(SINK_THREADS)
    bwd_sink(const __grid_constant__ sink_args a) {
    extern __shared__ uint8_t raw[];
    float *sums = (float *)raw;
    wait_for_stream();
    const int32_t h = blockIdx.x;
    const float sink = a.sink[h * a.sink_stride];
    float sum = 0.f;
    for (int32_t b = 0; b < a.b; ++b) {
        const fa_lengths lengths = fa_sequence_lengths(&a.masks, b, a.sq, a.sk);
        const float *lse = (const float *)a.lse.data + b * a.lse.stride[0] + h * a.lse.stride[1];
        for (int32_t row = threadIdx.x; row < lengths.sq; row += SINK_THREADS)
            sum += expf(sink - lse[row * a.lse.stride[2]]) * sink_delta(a, lengths, b, h, row);
    }
#pragma unroll
    for (int i = 16; i; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    bar_sync(SINK_BARRIER, SINK_THREADS);
    if (threadIdx.x > 0) return;
    for (int i = 1; i < SINK_THREADS / 32; ++i) sum += sums[i];
    a.dsink[h * a.dsink_stride] = -sum;
}

/* Behind a variant's kernels, which have written `delta`; NULL: there were none. */
static inline fa_status launch_sink(const fa_backward *r, const float *delta, int32_t rows,
                                    const fa_device *device, fa_error *error) {
    const fa_params *p = &r->forward;
    const fa_what *w = &p->what;
    if (!r->dsink || w->hq == 0) return FA_OK;
    sink_args a = {
        w->lse,          r->dlse, p->masks, p->scores.sink, delta, r->dsink, p->scores.sink_stride,
        r->dsink_stride, w->b,    w->hq,    w->sq,          w->sk, rows};
    return fa_launch_kernel((const void *)bwd_sink, w->hq, SINK_THREADS, SINK_THREADS / 8,
                            p->where.stream, device->early, &a, error);
}

#endif
