/* bwd_sink.cuh - the gradient of sinks: of each query head minus the sum of exp(sink - lse) delta
 * over its rows, in the same order every time. No variant's business.
 */
#ifndef FASTATTN_SM80_BWD_SINK_CUH
#define FASTATTN_SM80_BWD_SINK_CUH

#include <math.h>

#include "backward.h"
#include "common/element.cuh"
#include "common/launch.cuh"
#include "common/stream.cuh"

enum { SINK_THREADS = 256 };

struct sink_args {
    fa_tensor lse, dlse; /* dlse.data NULL: zeros */
    const float *sink;
    const void *terms; /* pairs lse and delta, `rows` of each head; NULL: there is no key */
    float *dsink;
    int64_t sink_stride, dsink_stride, rows;
    int32_t batches, hq;
};

/* A row of lse or dlse. */
template <typename REAL>
DEVICE double row_of_head(const fa_tensor &t, int64_t b, int32_t h, int64_t row) {
    return ((const REAL *)t.data)[b * t.stride[0] + h * t.stride[1] + row * t.stride[2]];
}

/* A block has a head. */
template <typename REAL>
static __global__ void __launch_bounds__(SINK_THREADS)
    bwd_sink(const __grid_constant__ sink_args a) {
    extern __shared__ __align__(128) uint8_t raw[];
    double *sums = (double *)raw;
    wait_for_stream();
    const int32_t h = blockIdx.x;
    const double sink = a.sink[h * a.sink_stride];
    double sum = 0;
    for (int64_t n = threadIdx.x; n < a.batches * a.rows; n += SINK_THREADS) {
        const int64_t b = n / a.rows, row = n % a.rows;
        const double lse = row_of_head<REAL>(a.lse, b, h, row);
        double delta = 0;
        if (a.terms)
            delta = ((const pair_of<REAL> *)a.terms)[(b * a.hq + h) * a.rows + row].x[1];
        else if (a.dlse.data)
            delta = -row_of_head<REAL>(a.dlse, b, h, row);
        if (delta != 0 && lse != -INFINITY) sum += exp(sink - lse) * delta; /* else padding */
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int i = 1; i < SINK_THREADS; ++i) sum += sums[i];
    a.dsink[h * a.dsink_stride] = (float)-sum;
}

/* Behind a variant's kernels, which have written the terms; NULL: there were none. */
static inline fa_status launch_sink(const fa_backward *r, const void *terms,
                                    const fa_device *device, fa_error *error) {
    const fa_what *w = &r->forward.what;
    if (!r->dsink || w->hq == 0) return FA_OK;
    sink_args a = {};
    a.lse = w->lse, a.dlse = r->dlse;
    a.sink = r->forward.scores.sink, a.sink_stride = r->forward.scores.sink_stride;
    a.terms = terms;
    a.dsink = r->dsink, a.dsink_stride = r->dsink_stride;
    a.rows = w->q.shape[2], a.batches = (int32_t)w->q.shape[0], a.hq = w->hq;
    const void *kernel =
        w->dtype == FA_F64 ? (const void *)bwd_sink<double> : (const void *)bwd_sink<float>;
    return fa_launch_kernel(kernel, w->hq, SINK_THREADS, SINK_THREADS * 8, r->forward.where.stream,
                            device->early, &a, error);
}

#endif
