/* decode_out.cuh - the end of a tile: what its warps, and the blocks of a cluster, have of each row
 * is added up and stored, as the result or as a part of it.
 */
#ifndef FASTATTN_SM90_DECODE_OUT_CUH
#define FASTATTN_SM90_DECODE_OUT_CUH

#include "sm90/decode_attend.cuh"

/* Each warp's O, tops and sums of `rows` rows, into the stages, which nobody reads any more. */
DEVICE void share_rows(const warp_rows &w, decode_smem &smem, int32_t rows) {
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
        if (row + 8 * r >= rows) continue;
#pragma unroll
        for (int j = 0; j < DV / 8; ++j)
            *(float2 *)(o + 8 * r * O_PITCH + 8 * j) =
                make_float2(w.o[j][2 * r], w.o[j][2 * r + 1]);
    }
}

/* Eight columns of a row, of which `columns` exist. */
DEVICE void store_chunk(const decode_rows &a, char *to, const float (&x)[8], int32_t columns) {
    if (a.is_part) {
        if (a.wide && columns == 8) {
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
    if (a.wide && columns == 8) {
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

/* Of one row: parts of it are added up, each with its own top. */
struct row_sum {
    float top, sum, x[8]; /* x: of eight columns */
};

/* A part that has nothing says nothing, whatever its x. */
DEVICE void add_part(row_sum &r, float top, float sum, float4 low, float4 high) {
    if (top == -INFINITY && sum == 0.f) return;
    const float weight = top == r.top ? 1.f : ex2_approx(top - r.top);
    const float y[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    r.sum = fmaf(weight, sum, r.sum);
#pragma unroll
    for (int e = 0; e < 8; ++e) r.x[e] = fmaf(weight, y[e], r.x[e]);
}

/* A sink is a key without a value. It joins when its row has all else of the part: were it the top
 * before, P of the greatest key would be no power of 2, and be rounded. */
DEVICE void add_sink(row_sum &r, float sink) {
    if (sink == -INFINITY) return;
    const float top = fmaxf(r.top, sink), shrink = r.top == top ? 1.f : ex2_approx(r.top - top);
    r.sum = fmaf(r.sum, shrink, sink == top ? 1.f : ex2_approx(sink - top));
    r.top = top;
#pragma unroll
    for (int e = 0; e < 8; ++e) r.x[e] *= shrink;
}

/* What the warps have of the block's rows becomes one, in the place of the first warps'. */
DEVICE void add_warps(decode_smem &smem, int32_t rows) {
    constexpr int CHUNKS = DV / 8;
#pragma unroll 1
    for (int32_t n = threadIdx.x; n < rows * CHUNKS; n += MMA_THREADS) {
        const int32_t row = n / CHUNKS, chunk = n % CHUNKS;
        float4 *const o = (float4 *)((float *)&smem + row * O_PITCH + 8 * chunk);
        row_sum r = {-INFINITY, 0.f, {}};
#pragma unroll
        for (int k = 0; k < KEY_WARPS; ++k) r.top = fmaxf(r.top, smem.top[k][row]);
#pragma unroll
        for (int k = 0; k < KEY_WARPS; ++k) {
            const float4 *y = o + k * ROWS * O_PITCH / 4;
            add_part(r, smem.top[k][row], smem.sum[k][row], y[0], y[1]);
        }
        o[0] = make_float4(r.x[0], r.x[1], r.x[2], r.x[3]);
        o[1] = make_float4(r.x[4], r.x[5], r.x[6], r.x[7]);
        if (chunk == 0) smem.all_top[row] = r.top, smem.all_sum[row] = r.sum;
    }
}

DEVICE float *lse_of(const decode_args &a, const decode_rows &rows, const decode_tile &t,
                     int32_t part, int32_t head, int32_t i) {
    return rows.lse + part * a.lse_step + t.batch * rows.lse_stride[0] + head * rows.lse_stride[1] +
           (t.q + i) * rows.lse_stride[2];
}

/* Each block of a cluster stores its share of the rows, of what all blocks have of them. */
DEVICE void store_rows(const decode_args &a, decode_smem &smem, const decode_tile &t) {
    constexpr int CHUNKS = DV / 8;
    const bool is_single = a.deal && t.parts == 1;
    const decode_rows &rows = is_single ? a.single : a.to;
    const fa_tensor &out = rows.out;
    const int32_t size = rows.is_part ? 4 : 2, dv = (int32_t)out.shape[3];
    const int32_t rank = t.part % a.cluster, part = t.part / a.cluster;
    const uint32_t o = smem_address(&smem), tops = smem_address(smem.all_top);
    const uint32_t sums = smem_address(smem.all_sum);
#pragma unroll 1
    for (int32_t n = rank * MMA_THREADS + threadIdx.x; n < ROWS * CHUNKS;
         n += a.cluster * MMA_THREADS) {
        const int32_t row = n / CHUNKS, chunk = n % CHUNKS, columns = min(8, dv - 8 * chunk);
        if (row >= t.rows) break;
        const int32_t i = query_row(a, t.row + row);
        const int32_t head = t.head * a.group + t.row + row - i * a.group;
        const uint32_t from = o + (row * O_PITCH + 8 * chunk) * 4;
        row_sum r = {-INFINITY, 0.f, {}};
#pragma unroll 4
        for (int k = 0; k < a.cluster; ++k)
            r.top = fmaxf(r.top, ld_cluster(mapa(tops + 4 * row, k)));
#pragma unroll 4
        for (int k = 0; k < a.cluster; ++k)
            add_part(r, ld_cluster(mapa(tops + 4 * row, k)), ld_cluster(mapa(sums + 4 * row, k)),
                     ld_cluster_v4(mapa(from, k)), ld_cluster_v4(mapa(from + 16, k)));
        if (a.sink && part == 0) add_sink(r, LOG2_E * a.sink[head * a.sink_stride]);
        const float inverse = r.sum == 0.f ? 0.f : 1.f / r.sum;
#pragma unroll
        for (int e = 0; e < 8; ++e) r.x[e] *= inverse;
        char *to = (char *)out.data +
                   size * (part * a.out_step + t.batch * out.stride[0] + head * out.stride[1] +
                           (t.q + i) * out.stride[2] + 8 * chunk * out.stride[3]);
        if (columns > 0) store_chunk(rows, to, r.x, columns);
        if (chunk != 0) continue;
        if (rows.lse)
            *lse_of(a, rows, t, part, head, i) =
                r.sum == 0.f || i >= t.n.sq ? -INFINITY : natural_lse(a, head, r.top, r.sum);
        for (int32_t n = is_single ? 0 : t.parts; n < a.parts && part == 0 && a.deal; ++n)
            *lse_of(a, a.to, t, n, head, i) = -INFINITY; /* nothing is there */
    }
}

#endif
