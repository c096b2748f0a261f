/* bwd_sink.cuh - the gradient of sinks: of each query head minus the sum of exp(sink - lse) delta
 * over its rows, in the same order every time. No variant's business.
 */
#ifndef FASTATTN_SM90_BWD_SINK_CUH
#define FASTATTN_SM90_BWD_SINK_CUH

#include "backward.h"
#include "common/launch.cuh"
#include "common/packed.h"
#include "common/stream.cuh"
#include "mask.h"
#include "sm90/ptx.cuh"

enum { SINK_THREADS = 256, SINK_BARRIER = 1 };

struct sink_args {
    fa_tensor lse, dlse; /* dlse.data NULL: zeros */
    fa_masks masks;
    fa_varlen varlen;
    const float *sink, *delta; /* delta: dout . out - dlse, `rows` of each head; NULL: no key */
    float *dsink;
    int64_t sink_stride, dsink_stride;
    int32_t b, hq, sq, sk;
    int32_t block_m; /* of the blocks that packed sequences have whole */
    int64_t rows;
};

/* A row of lse or dlse. */
DEVICE float sink_row(const fa_tensor &t, int32_t batch, int32_t h, int32_t row) {
    return ((const float *)t.data)[batch * t.stride[0] + h * t.stride[1] + row * t.stride[2]];
}

/* The sum of a sequence's rows, of every SINK_THREADS-th. Of a row that sees no key, whose out is 0
 * whatever dout holds, delta is -dlse. */
DEVICE float sink_sum(const sink_args &a, int32_t b, int32_t h, float sink) {
    const fa_varlen &v = a.varlen;
    const fa_sequence s = fa_find_sequence(&v, &a.masks, b, a.sq, a.sk);
    const int32_t batch = v.cu_q ? 0 : b;
    int64_t first = ((int64_t)batch * a.hq + h) * a.rows;
    if (v.cu_q)
        first +=
            (int64_t)fa_packed_first(v.cu_q, v.cu_q_stride, b, v.total_q, a.block_m) * a.block_m;
    float sum = 0.f;
    for (int32_t row = threadIdx.x; row < s.lengths.sq; row += SINK_THREADS) {
        const fa_interval keys = fa_row_interval(s.lengths, row);
        float delta = 0.f;
        if (keys.begin < keys.end && a.delta)
            delta = a.delta[first + row];
        else if (a.dlse.data)
            delta = -sink_row(a.dlse, batch, h, s.q + row);
        sum += expf(sink - sink_row(a.lse, batch, h, s.q + row)) * delta;
    }
    return sum;
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
    for (int32_t b = 0; b < a.b; ++b) sum += sink_sum(a, b, h, sink);
#pragma unroll
    for (int i = 16; i; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    bar_sync(SINK_BARRIER, SINK_THREADS);
    if (threadIdx.x > 0) return;
    for (int i = 1; i < SINK_THREADS / 32; ++i) sum += sums[i];
    a.dsink[h * a.dsink_stride] = -sum;
}

/* Behind a variant's kernels, which have written `delta`; NULL: there were none. */
static inline fa_status launch_sink(const fa_backward *r, const float *delta, int64_t rows,
                                    int32_t block_m, const fa_device *device, fa_error *error) {
    const fa_params *p = &r->forward;
    const fa_what *w = &p->what;
    if (!r->dsink || w->hq == 0) return FA_OK;
    sink_args a = {};
    a.lse = w->lse, a.dlse = r->dlse, a.masks = p->masks, a.varlen = p->varlen;
    a.sink = p->scores.sink, a.sink_stride = p->scores.sink_stride;
    a.dsink = r->dsink, a.dsink_stride = r->dsink_stride;
    a.delta = delta, a.rows = rows, a.block_m = block_m;
    a.b = w->b, a.hq = w->hq, a.sq = w->sq, a.sk = w->sk;
    return fa_launch_kernel((const void *)bwd_sink, w->hq, SINK_THREADS, SINK_THREADS / 8,
                            p->where.stream, device->early, &a, error);
}

#endif
