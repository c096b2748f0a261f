/* sparse_ends.cuh - before and behind the kernel of gradients over lists: delta of each row; the
 * keys' sums, rounded; the gates', where several heads share a gate; and the sinks'. A part of
 * backend.cu.
 */
#ifndef FASTATTN_SM90_SPARSE_ENDS_CUH
#define FASTATTN_SM90_SPARSE_ENDS_CUH

#include "common/element.cuh"
#include "common/launch.cuh"
#include "sm90/sparse_bwd_plan.h"

enum { ENDS_THREADS = 128, ENDS_ROWS = ENDS_THREADS / 32 };

struct sparse_ends_args {
    fa_tensor out, dout, lse, dlse; /* dout, dlse: data NULL: zeros */
    fa_tensor dk, dv, dgate;        /* data NULL: not wanted */
    fa_sparse_bwd_plan at;
    float *workspace;
    fa_tensor gates;   /* the shape of the sums of dgate, one list after the other */
    const float *sink; /* or NULL */
    float *dsink;
    int64_t sink_stride, dsink_stride,
        zeros; /* floats of the workspace that begin as 0, from dk on */
};

DEVICE float sum_of_warp(float x) {
#pragma unroll
    for (int i = 16; i; i /= 2) x += __shfl_xor_sync(~0u, x, i);
    return x;
}

DEVICE int64_t ends_at(const fa_tensor &t, int64_t row) {
    const int64_t i = row % t.shape[2], h = row / t.shape[2] % t.shape[1];
    return row / t.shape[2] / t.shape[1] * t.stride[0] + h * t.stride[1] + i * t.stride[2];
}

/* dout . out - dlse; what a row that sees no key has in dout may be anything. */
template <fa_dtype T>
static __global__ void __launch_bounds__(ENDS_THREADS)
    sparse_delta(const __grid_constant__ sparse_ends_args a) {
    const int64_t rows = a.lse.shape[0] * a.lse.shape[1] * a.lse.shape[2];
    const int32_t lane = threadIdx.x % 32;
    let_next_start();
    wait_for_stream();
    for (int64_t i = (int64_t)blockIdx.x * ENDS_THREADS + threadIdx.x; i < a.zeros;
         i += (int64_t)gridDim.x * ENDS_THREADS)
        a.workspace[a.at.dk + i] = 0.f;
#pragma unroll 1
    for (int64_t row = (int64_t)blockIdx.x * ENDS_ROWS + threadIdx.x / 32; row < rows;
         row += (int64_t)gridDim.x * ENDS_ROWS) {
        float sum = 0.f;
        if (a.dout.data) {
            const uint16_t *x = (const uint16_t *)a.out.data + ends_at(a.out, row);
            const uint16_t *y = (const uint16_t *)a.dout.data + ends_at(a.dout, row);
            for (int32_t c = lane; c < a.out.shape[3]; c += 32) {
                const float out = element<T>::widen(x[c * a.out.stride[3]]);
                if (out != 0.f) sum = fmaf(out, element<T>::widen(y[c * a.dout.stride[3]]), sum);
            }
        }
        sum = sum_of_warp(sum);
        if (a.dlse.data) sum -= ((const float *)a.dlse.data)[ends_at(a.dlse, row)];
        if (lane == 0) a.workspace[row] = sum;
    }
}

/* Rows of sums that have `pitch` floats, over all parts -> an array's. */
template <fa_dtype T>
DEVICE void round_sums(const fa_tensor &t, const float *sums, int32_t pitch,
                       const sparse_ends_args &a) {
    const int64_t rows = t.shape[0] * t.shape[1] * t.shape[2];
    if (!t.data) return;
#pragma unroll 1
    for (int64_t row = (int64_t)blockIdx.x * ENDS_ROWS + threadIdx.x / 32; row < rows;
         row += (int64_t)gridDim.x * ENDS_ROWS) {
        uint16_t *to = (uint16_t *)t.data + ends_at(t, row);
        for (int32_t c = threadIdx.x % 32; c < t.shape[3]; c += 32) {
            float sum = 0.f;
            for (int32_t i = 0; i < a.at.sums; ++i) sum += sums[i * a.at.of_part + row * pitch + c];
            to[c * t.stride[3]] = element<T>::narrow(sum);
        }
    }
}

template <fa_dtype T>
static __global__ void __launch_bounds__(ENDS_THREADS)
    sparse_sums(const __grid_constant__ sparse_ends_args a) {
    let_next_start();
    wait_for_stream();
    round_sums<T>(a.dk, a.workspace + a.at.dk, a.at.dk_pitch, a);
    round_sums<T>(a.dv, a.workspace + a.at.dv, a.at.dv_pitch, a);
    if (!a.at.of_gates) return;
    const int64_t *n = a.dgate.shape, list = n[2] * n[3];
    for (int64_t i = (int64_t)blockIdx.x * ENDS_THREADS + threadIdx.x; i < n[0] * n[1] * list;
         i += (int64_t)gridDim.x * ENDS_THREADS) {
        const int64_t b = i / list / n[1], h = i / list % n[1];
        float sum = 0.f;
        for (int64_t x = n[0] == 1 ? 0 : b; x < (n[0] == 1 ? a.gates.shape[0] : b + 1); ++x)
            for (int64_t y = n[1] == 1 ? 0 : h; y < (n[1] == 1 ? a.gates.shape[1] : h + 1); ++y)
                sum += a.workspace[a.at.gates + (x * a.gates.shape[1] + y) * list + i % list];
        ((float *)a.dgate.data)[ends_at(a.dgate, i / n[3]) + i % n[3] * a.dgate.stride[3]] = sum;
    }
}

/* A block has a head. */
static __global__ void __launch_bounds__(ENDS_THREADS)
    sparse_sink(const __grid_constant__ sparse_ends_args a) {
    extern __shared__ uint8_t raw[];
    float *sums = (float *)raw;
    const int64_t h = blockIdx.x, sq = a.lse.shape[2], heads = a.lse.shape[1];
    let_next_start();
    wait_for_stream();
    const float sink = a.sink[h * a.sink_stride];
    float sum = 0.f;
    for (int64_t i = threadIdx.x; i < a.lse.shape[0] * sq; i += ENDS_THREADS) {
        const int64_t row = (i / sq * heads + h) * sq + i % sq;
        const float lse = ((const float *)a.lse.data)[ends_at(a.lse, row)];
        if (lse != -INFINITY) sum += expf(sink - lse) * a.workspace[row];
    }
    sum = sum_of_warp(sum);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int i = 1; i < ENDS_ROWS; ++i) sum += sums[i];
    a.dsink[h * a.dsink_stride] = -sum;
}

#endif
