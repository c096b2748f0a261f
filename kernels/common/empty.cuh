/* empty.cuh - what is written where a request has no score to compute: stop 5 of 6. */
#ifndef FASTATTN_EMPTY_CUH
#define FASTATTN_EMPTY_CUH

#include "common/launch.cuh"
#include "common/packed.h"
#include "common/stream.cuh"

struct empty_args {
    fa_what what;
    fa_masks masks;
    fa_varlen varlen;
    const float *sink;
    int64_t sink_stride;
};

/* Whether row i of q, packed or of batch b, is no query. */
static __device__ bool is_padding(const empty_args &a, int64_t b, int32_t i) {
    const fa_what &w = a.what;
    if (w.b == 0) return true;
    if (a.varlen.cu_q) b = fa_packed_at(&a.varlen, w.b, i);
    const fa_sequence s = a.varlen.cu_k ? fa_find_sequence(&a.varlen, &a.masks, b, w.sq, w.sk)
                                        : fa_find_cached(&a.varlen, &a.masks, b, w.sq, w.sk);
    return i - s.q >= s.lengths.sq;
}

/* No key: every output row is 0 and every lse is the sink's value, -inf without one and for
 * padding. All formats of a size, an integer's, write 0 as 0. */
template <typename STORED, typename LSE>
static __global__ void write_empty_rows(const __grid_constant__ empty_args a) {
    const fa_what &w = a.what;
    wait_for_stream();
    int64_t sq = w.out.shape[2], rows = w.out.shape[0] * w.hq * sq;
    for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
        int64_t i = row % sq, h = row / sq % w.hq, b = row / sq / w.hq;
        STORED *out =
            (STORED *)w.out.data + b * w.out.stride[0] + h * w.out.stride[1] + i * w.out.stride[2];
        for (int32_t c = threadIdx.x; c < w.dv; c += blockDim.x) out[c * w.out.stride[3]] = 0;
        if (!w.lse.data || threadIdx.x != 0) continue;
        const bool padding = a.sink && is_padding(a, b, (int32_t)i);
        ((LSE *)w.lse.data)[b * w.lse.stride[0] + h * w.lse.stride[1] + i * w.lse.stride[2]] =
            a.sink && !padding ? a.sink[h * a.sink_stride] : -INFINITY;
    }
}

static inline fa_status launch_empty(const fa_params *p, const fa_device *device, fa_error *error) {
    const fa_what *w = &p->what;
    int64_t rows = w->out.shape[0] * w->hq * w->out.shape[2];
    if (rows == 0) return FA_OK;
    int64_t blocks = rows < 8 * device->sms ? rows : 8 * device->sms;
    empty_args a = {*w, p->masks, p->varlen, p->scores.sink, p->scores.sink_stride};
    const int64_t size = fa_dtype_size(w->dtype);
    const void *kernel = size == 2   ? (const void *)write_empty_rows<uint16_t, float>
                         : size == 4 ? (const void *)write_empty_rows<uint32_t, float>
                                     : (const void *)write_empty_rows<uint64_t, double>;
    return fa_launch_kernel(kernel, (int32_t)blocks, 128, 0, p->where.stream, device->early, &a,
                            error);
}

/* 0 in every row of an array. */
template <typename STORED>
static __global__ void write_zeros(const __grid_constant__ fa_tensor t) {
    wait_for_stream();
    const int64_t rows = t.shape[0] * t.shape[1] * t.shape[2];
    for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
        const int64_t i = row % t.shape[2], h = row / t.shape[2] % t.shape[1],
                      b = row / t.shape[2] / t.shape[1];
        STORED *to = (STORED *)t.data + b * t.stride[0] + h * t.stride[1] + i * t.stride[2];
        for (int64_t c = threadIdx.x; c < t.shape[3]; c += blockDim.x) to[c * t.stride[3]] = 0;
    }
}

/* An array may have no rows, or not be wanted: data NULL. */
static inline fa_status launch_clear(const fa_tensor *t, fa_dtype dtype, const fa_device *device,
                                     void *stream, fa_error *error) {
    const int64_t rows = t->shape[0] * t->shape[1] * t->shape[2], size = fa_dtype_size(dtype);
    if (!t->data || rows == 0) return FA_OK;
    const int64_t blocks = rows < 8 * device->sms ? rows : 8 * device->sms;
    const void *kernel = size == 2   ? (const void *)write_zeros<uint16_t>
                         : size == 4 ? (const void *)write_zeros<uint32_t>
                                     : (const void *)write_zeros<uint64_t>;
    return fa_launch_kernel(kernel, (int32_t)blocks, 128, 0, stream, device->early, (void *)t,
                            error);
}

#endif
