/* decode_gather.cuh - the parts that were dealt to a sequence become one result: a warp a row. Rows
 * that have a single part have been stored, and their parts say that they are empty; what nobody
 * wrote is not read. No variant's business.
 */
#ifndef FASTATTN_SM90_DECODE_GATHER_CUH
#define FASTATTN_SM90_DECODE_GATHER_CUH

#include "common/element.cuh"
#include "common/launch.cuh"
#include "sm90/decode_append.cuh"

enum { GATHER_THREADS = 128 };

struct gather_args {
    fa_tensor out, lse;       /* lse.data NULL: not wanted */
    const float *part, *lses; /* contiguous */
    int64_t part_step, lse_step, rows;
    int32_t parts; /* at most 32 */
};

template <fa_dtype T>
static __global__ void __launch_bounds__(GATHER_THREADS)
    gather_dealt(const __grid_constant__ gather_args a) {
    constexpr int AT_ONCE = 4, COLUMNS = 256 / 32; /* parts; of a lane */
    const int32_t lane = threadIdx.x % 32, dv = (int32_t)a.out.shape[3];
    const int64_t row = (int64_t)blockIdx.x * (GATHER_THREADS / 32) + threadIdx.x / 32;
    let_next_start();
    wait_for_stream();
    if (row >= a.rows) return;
    const float lse = lane < a.parts ? a.lses[lane * a.lse_step + row] : -INFINITY;
    const uint32_t there = __ballot_sync(~0u, lse != -INFINITY);
    if (!there) return;
    float top = lse;
    for (int i = 1; i < 32; i *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, i));
    const float weight = lse == -INFINITY ? 0.f : exp2f((lse - top) * 1.4426950408889634f);
    float total = weight, sum[COLUMNS] = {};
    for (int i = 1; i < 32; i *= 2) total += __shfl_xor_sync(~0u, total, i);
#pragma unroll 1
    for (int32_t first = 0; first < a.parts && there >> first; first += AT_ONCE) {
        float x[AT_ONCE][COLUMNS] = {}, share[AT_ONCE];
#pragma unroll
        for (int n = 0; n < AT_ONCE; ++n) {
            const float *from = a.part + (first + n) * a.part_step + row * dv;
            share[n] = __shfl_sync(~0u, weight, first + n) / total;
#pragma unroll
            for (int i = 0; i < COLUMNS; ++i)
                if (there >> first >> n && 32 * i + lane < dv) x[n][i] = from[32 * i + lane];
        }
#pragma unroll
        for (int n = 0; n < AT_ONCE; ++n)
#pragma unroll
            for (int i = 0; i < COLUMNS; ++i) sum[i] = fmaf(share[n], x[n][i], sum[i]);
    }
    const int64_t h = row / a.out.shape[2], b = h / a.out.shape[1];
    const int64_t head = h - b * a.out.shape[1], at = row - h * a.out.shape[2];
    uint16_t *to = (uint16_t *)a.out.data + row_at(a.out, b, head, at);
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i)
        if (32 * i + lane < dv) to[(32 * i + lane) * a.out.stride[3]] = element<T>::narrow(sum[i]);
    if (a.lse.data && lane == 0)
        ((float *)a.lse.data)[row_at(a.lse, b, head, at)] = top + logf(total);
}

/* Behind a decode variant whose parts these are. */
static inline fa_status launch_gather(const fa_params *p, const fa_tensor *part, int64_t part_step,
                                      const fa_tensor *lse, int64_t lse_step, int32_t parts,
                                      const fa_device *device, fa_error *error) {
    const int64_t rows = part->shape[0] * part->shape[1] * part->shape[2];
    const int64_t blocks = (rows + GATHER_THREADS / 32 - 1) / (GATHER_THREADS / 32);
    gather_args a = {p->what.out,
                     p->what.lse,
                     (const float *)part->data,
                     (const float *)lse->data,
                     part_step,
                     lse_step,
                     rows,
                     parts};
    const void *kernel = p->what.dtype == FA_BF16 ? (const void *)gather_dealt<FA_BF16>
                                                  : (const void *)gather_dealt<FA_F16>;
    return fa_launch_kernel(kernel, (int32_t)blocks, GATHER_THREADS, 0, p->where.stream,
                            device->early, &a, error);
}

#endif
