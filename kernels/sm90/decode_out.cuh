/* decode_out.cuh - the end of a tile: what its warps have of each row is added up and stored, as
 * the result or as a part of it.
 */
#ifndef FASTATTN_SM90_DECODE_OUT_CUH
#define FASTATTN_SM90_DECODE_OUT_CUH

#include "sm90/decode_attend.cuh"

/* Each warp's O, tops and sums, into the stages, which nobody reads any more. */
DEVICE void share_rows(const warp_rows &w, decode_smem &smem) {
    const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, by_keys = warp / ROW_WARPS;
    const int32_t row = warp % ROW_WARPS * 16 + lane / 4;
    float *o = (float *)&smem + (by_keys * ROWS + row) * O_PITCH + lane % 4 * 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float sum = w.sum[r];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if (lane % 4 == 0)
            smem.top[by_keys][row + 8 * r] = w.top[r], smem.sum[by_keys][row + 8 * r] = sum;
#pragma unroll
        for (int j = 0; j < DV / 8; ++j)
            *(float2 *)(o + 8 * r * O_PITCH + 8 * j) =
                make_float2(w.o[j][2 * r], w.o[j][2 * r + 1]);
    }
}

/* Eight columns of a row, of which `columns` exist. */
DEVICE void store_chunk(const decode_args &a, char *to, const float (&x)[8], int32_t columns) {
    if (a.is_part) {
        if (a.out_wide && columns == 8) {
            *(float4 *)to = make_float4(x[0], x[1], x[2], x[3]);
            *(float4 *)(to + 16) = make_float4(x[4], x[5], x[6], x[7]);
            return;
        }
#pragma unroll
        for (int e = 0; e < 8; ++e)
            if (e < columns) ((float *)to)[e] = x[e];
        return;
    }
    const uint32_t y[4] = {cvt_pack(x[0], x[1]), cvt_pack(x[2], x[3]), cvt_pack(x[4], x[5]),
                           cvt_pack(x[6], x[7])};
    if (a.out_wide && columns == 8) {
        *(uint4 *)to = make_uint4(y[0], y[1], y[2], y[3]);
        return;
    }
#pragma unroll
    for (int e = 0; e < 8; ++e)
        if (e < columns)
            *(uint16_t *)(to + 2 * e * a.out.stride[3]) = (uint16_t)(y[e / 2] >> e % 2 * 16);
}

/* Of a row that has its sink alone, the sink as it is. */
DEVICE float natural_lse(const decode_args &a, int32_t head, float top, float sum) {
    const float sink = a.sink ? a.sink[head * a.sink_stride] : 0.f;
    if (a.sink && top == LOG2_E * sink && sum == 1.f) return sink;
    return (top + log2f(sum)) * 0.6931471805599453f;
}

DEVICE void store_rows(const decode_args &a, const decode_smem &smem, const decode_tile &t) {
    constexpr int CHUNKS = DV / 8;
    const int32_t size = a.is_part ? 4 : 2, dv = (int32_t)a.out.shape[3];
#pragma unroll 1
    for (int32_t n = threadIdx.x; n < ROWS * CHUNKS; n += MMA_THREADS) {
        const int32_t row = n / CHUNKS, chunk = n % CHUNKS, columns = min(8, dv - 8 * chunk);
        if (row >= t.rows) break;
        const int32_t i = query_row(a, t.row + row);
        const int32_t head = t.head * a.group + t.row + row - i * a.group;
        float top = -INFINITY, sum = 0.f, x[8] = {};
#pragma unroll
        for (int k = 0; k < KEY_WARPS; ++k) top = fmaxf(top, smem.top[k][row]);
#pragma unroll
        for (int k = 0; k < KEY_WARPS; ++k) {
            if (smem.top[k][row] == -INFINITY && smem.sum[k][row] == 0.f) continue;
            const float weight = KEY_WARPS == 1 ? 1.f : ex2_approx(smem.top[k][row] - top);
            const float *o = (const float *)&smem + (k * ROWS + row) * O_PITCH + 8 * chunk;
            sum = fmaf(weight, smem.sum[k][row], sum);
#pragma unroll
            for (int e = 0; e < 8; e += 4) {
                const float4 y = *(const float4 *)(o + e);
                x[e] = fmaf(weight, y.x, x[e]), x[e + 1] = fmaf(weight, y.y, x[e + 1]);
                x[e + 2] = fmaf(weight, y.z, x[e + 2]), x[e + 3] = fmaf(weight, y.w, x[e + 3]);
            }
        }
        const float inverse = sum == 0.f ? 0.f : 1.f / sum;
#pragma unroll
        for (int e = 0; e < 8; ++e) x[e] *= inverse;
        char *to = (char *)a.out.data +
                   size * (t.part * a.out_step + t.b * a.out.stride[0] + head * a.out.stride[1] +
                           i * a.out.stride[2] + 8 * chunk * a.out.stride[3]);
        if (columns > 0) store_chunk(a, to, x, columns);
        if (a.lse && chunk == 0) {
            a.lse[t.part * a.lse_step + t.b * a.lse_stride[0] + head * a.lse_stride[1] +
                  i * a.lse_stride[2]] =
                sum == 0.f || i >= t.n.sq ? -INFINITY : natural_lse(a, head, top, sum);
        }
    }
}

#endif
