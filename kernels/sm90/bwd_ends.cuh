/* bwd_ends.cuh - what comes before and behind the backward's main kernel, a part of each variant.
 *
 * bwd_rows(): lse in the units of exponents, delta = dout . out - dlse, and zeros in dQ's sums; a
 * warp a row. bwd_dq(): dQ of its sums; a thread has the elements that its like in bwd.cu added.
 */
#ifndef FASTATTN_SM90_BWD_ENDS_CUH
#define FASTATTN_SM90_BWD_ENDS_CUH

#include "common/element.cuh"
#include "common/stream.cuh"
#include "sm90/bwd_args.cuh"
#include "sm90/bwd_smem.h"
#include "sm90/bwd_store.cuh"
#include "sm90/wgmma.cuh"

enum { ROWS_THREADS = 256, ROWS_OF_BLOCK = ROWS_THREADS / 32 };

DEVICE float dot_row(const bwd_rows_args &a, const uint16_t *x, const uint16_t *y, int64_t x_step,
                     int64_t y_step) {
    typedef element<VARIANT_DTYPE> E;
    float sum = 0.f;
    if (a.wide) {
        for (int32_t i = threadIdx.x % 32 * 8; i < a.dv; i += 256) {
            uint32_t u[4], v[4];
            load_once(u, x + i);
            load_once(v, y + i);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                float p[2], q[2];
                E::unpack(p, u[j]);
                E::unpack(q, v[j]);
                sum = fmaf(p[0], q[0], fmaf(p[1], q[1], sum));
            }
        }
    } else {
        for (int32_t i = threadIdx.x % 32; i < a.dv; i += 32)
            sum = fmaf(E::widen(x[i * x_step]), E::widen(y[i * y_step]), sum);
    }
#pragma unroll
    for (int i = 16; i; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);
    return sum;
}

static __global__ void __launch_bounds__(ROWS_THREADS)
    bwd_rows(const __grid_constant__ bwd_rows_args a) {
    wait_for_stream();
    let_next_start();
    const int64_t number = (int64_t)blockIdx.x * ROWS_OF_BLOCK + threadIdx.x / 32;
    const int64_t head = number / a.rows, h = head % a.hq, b = head / a.hq;
    const int32_t row = (int32_t)(number % a.rows);
    const fa_tensor &o = a.out, &g = a.dout, &l = a.lse, &dl = a.dlse;
    float lse = INFINITY, delta = 0.f;
    if (row < a.sq) {
        const float x =
            ((const float *)l.data)[b * l.stride[0] + h * l.stride[1] + row * l.stride[2]];
        if (x != -INFINITY) lse = x * 1.4426950408889634f;
        if (g.data)
            delta = dot_row(
                a, (const uint16_t *)o.data + b * o.stride[0] + h * o.stride[1] + row * o.stride[2],
                (const uint16_t *)g.data + b * g.stride[0] + h * g.stride[1] + row * g.stride[2],
                o.stride[3], g.stride[3]);
        if (dl.data)
            delta -=
                ((const float *)dl.data)[b * dl.stride[0] + h * dl.stride[1] + row * dl.stride[2]];
        if (x == -INFINITY) delta = 0.f;
    }
    if (threadIdx.x % 32 == 0) {
        a.scaled_lse[number] = lse;
        a.delta[number] = delta;
    }
    /* A row's share of zeros, wherever they lie. */
    if (a.dq)
        for (int32_t i = threadIdx.x % 32; i < D / 4; i += 32)
            a.dq[number * (D / 4) + i] = make_float4(0.f, 0.f, 0.f, 0.f);
}

/* A block has one block of rows of one head. */
static __global__ void __launch_bounds__(128 * WARPGROUPS)
    bwd_dq(const __grid_constant__ bwd_dq_args a) {
    wait_for_stream();
    const int32_t m = blockIdx.x % a.m_blocks, head = blockIdx.x / a.m_blocks;
    const int32_t warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128;
    const float4 *from = (const float4 *)a.sums + (int64_t)blockIdx.x * (BLOCK_M * D / 4) +
                         warpgroup * (DQ_COLUMNS / 8) * 128 + thread;
    const fa_tensor &to = a.dq;
    const int32_t row =
        m * BLOCK_M + (DQ_BY_ROWS ? 64 * warpgroup : 0) + thread / 32 * 16 + thread % 32 / 4;
    const int32_t column = (DQ_BY_ROWS ? 0 : DQ_COLUMNS * warpgroup) + thread % 4 * 2;
    uint16_t *at = (uint16_t *)to.data + head / a.hq * to.stride[0] + head % a.hq * to.stride[1] +
                   row * to.stride[2];
    const bool words = has_words(to);
#pragma unroll
    for (int i = 0; i < DQ_COLUMNS / 8; ++i) {
        const float4 x = from[i * 128];
        if (row < a.sq) store_pair(to, at, column + 8 * i, x.x * a.scale, x.y * a.scale, words);
        if (row + 8 < a.sq)
            store_pair(to, at + 8 * to.stride[2], column + 8 * i, x.z * a.scale, x.w * a.scale,
                       words);
    }
}

#endif
