/* sparse.cu - the Hopper kernel of attention to lists of keys.
 *
 * One object per line of sparse.def: setup.py passes its columns as VARIANT_<COLUMN>
 * (sparse_variant.h), and the object exports one function, fa_launch_<name> (sparse_launch.cuh).
 *
 * A block has one tile: rows of a block of queries, of all heads that share its list. Its four
 * warps gather the listed keys, whatever the size of key blocks (sparse_walk.cuh), a few steps
 * ahead, and compute as FlashAttention-2 does (sparse_rows.cuh), with a running maximum. A gate
 * multiplies P, behind the row's sum. What a step shows some rows only is asked of each score; a
 * step that all rows see whole asks nothing.
 */
#include <stdint.h>

#include "common/stream.cuh"
#include "sm90/ptx.cuh"
#include "sm90/sparse_args.cuh"
#include "sm90/sparse_launch.cuh"
#include "sm90/sparse_rows.cuh"
#include "sm90/sparse_smem.h"
#include "sm90/sparse_variant.h"
#include "sm90/sparse_walk.cuh"

/* What a warp has of its 16 rows. */
struct warp_rows {
    float o[D / 8][4];
    float top[2], sum[2]; /* of exponents; of this lane's columns */
};

/* Scores in exponents; MASKED: -inf where the row does not see the key. */
template <bool MASKED>
DEVICE void change_scores(float (&s)[KEYS / 8][4], const sparse_args &a, const row_keys &keys,
                          const step_columns &columns, bool of_window) {
    const int32_t first = warp_key() + (int32_t)threadIdx.x % 4 * 2;
#pragma unroll
    for (int j = 0; j < KEYS / 8; ++j) {
        if (a.lists.key_gate)
#pragma unroll
            for (int e = 0; e < 4; ++e) s[j][e] *= columns.gate[first + 8 * j + e % 2];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const float x = a.cap != 0.f ? a.cap * tanh_of(s[j][e] * a.by_cap) : s[j][e] * a.scale;
            const bool is_hidden =
                MASKED && !sees(keys, e / 2, columns.key[first + 8 * j + e % 2], of_window);
            s[j][e] = is_hidden ? -INFINITY : x;
        }
    }
}

/* S becomes P, times its gates; O and the sums follow their rows' new tops. A hidden key's gate may
 * be NaN. */
DEVICE void weigh(float (&s)[KEYS / 8][4], warp_rows &w, bool has_gates,
                  const step_columns &columns) {
    const int32_t first = warp_key() + (int32_t)threadIdx.x % 4 * 2;
    float top[2] = {w.top[0], w.top[1]}, base[2];
#pragma unroll
    for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) top[e / 2] = fmaxf(top[e / 2], s[j][e]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], 1));
        top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], 2));
        base[r] = top[r] == -INFINITY ? 0.f : top[r];
    }
    if (__any_sync(~0u, top[0] != w.top[0] || top[1] != w.top[1])) {
        float shrink[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            shrink[r] = top[r] == w.top[r] ? 1.f : ex2_approx(w.top[r] - base[r]);
            w.sum[r] *= shrink[r];
            w.top[r] = top[r];
        }
#pragma unroll
        for (int j = 0; j < D / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) w.o[j][e] *= shrink[e / 2];
    }
#pragma unroll
    for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const bool is_hidden = s[j][e] == -INFINITY;
            s[j][e] = ex2_approx(s[j][e] - base[e / 2]);
            w.sum[e / 2] += s[j][e];
            if (has_gates && !is_hidden) s[j][e] *= columns.gate[first + 8 * j + e % 2];
        }
}

DEVICE void attend_step(warp_rows &w, const sparse_args &a, const row_keys &keys, sparse_smem &smem,
                        int32_t stage) {
    const step_columns &columns = smem.columns[stage];
    const int32_t kind = kind_of(columns);
    const bool of_window = kind & OF_WINDOW;
    float s[KEYS / 8][4] = {};
    multiply_keys(s, smem_address(smem.q), smem_address(smem.k[stage]));
    if (kind & IS_WHOLE)
        change_scores<false>(s, a, keys, columns, of_window);
    else
        change_scores<true>(s, a, keys, columns, of_window);
    weigh(s, w, a.lists.gate.data && !of_window, columns);
    multiply_weights(w.o, s, smem_address(smem.v[stage]));
}

DEVICE void attend(warp_rows &w, const sparse_args &a, sparse_smem &smem, const sparse_tile &t) {
    sparse_walk walk = start_walk();
    int32_t steps = 0, stage = 0;
#pragma unroll 1
    for (int i = 0; i < STAGES - 1; ++i) steps += bring_step(walk, a, t, smem);
    stage_rows(a.q, a.q_wide, a, t, smem_address(smem.q), [](int32_t) { return true; });
    const row_keys keys = find_row_keys(a, t);
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) w.o[j][e] = 0.f;
    w.top[0] = w.top[1] = -INFINITY;
    w.sum[0] = w.sum[1] = 0.f;
#pragma unroll 1
    for (int32_t step = 0; step < steps; ++step) {
        cp_async_wait_group<STAGES - 2>(); /* this step has come, */
        bar_sync(1, THREADS);              /* for all; and nobody reads the one before */
        steps += bring_step(walk, a, t, smem);
        attend_step(w, a, keys, smem, stage);
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
}

/* ---- the end of a tile ------------------------------------------------------------------------*/

DEVICE void share_rows(const warp_rows &w, sparse_smem &smem) {
    const int32_t lane = threadIdx.x % 32, by_keys = threadIdx.x / 32 / ROW_WARPS;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int32_t row = warp_row() + lane / 4 + 8 * r;
        float sum = w.sum[r];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if (lane % 4 == 0) smem.top[by_keys][row] = w.top[r], smem.sum[by_keys][row] = sum;
    }
    share_sums(w.o, smem.o);
}

/* Of one row: what its warps have of it is added up, each part with its own top. */
struct row_sum {
    float top, sum, x[8]; /* x: of eight columns */
};

DEVICE row_sum add_warps(const sparse_smem &smem, int32_t row, int32_t chunk) {
    row_sum r = {-INFINITY, 0.f, {}};
#pragma unroll
    for (int k = 0; k < KEY_WARPS; ++k) r.top = fmaxf(r.top, smem.top[k][row]);
#pragma unroll
    for (int k = 0; k < KEY_WARPS; ++k) {
        const float top = smem.top[k][row], sum = smem.sum[k][row];
        if (top == -INFINITY && sum == 0.f) continue; /* a part that has nothing says nothing */
        const float weight = top == r.top ? 1.f : ex2_approx(top - r.top);
        const float4 *from = (const float4 *)(smem.o + (k * ROWS + row) * O_PITCH + 8 * chunk);
        const float4 low = from[0], high = from[1];
        const float y[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        r.sum = fmaf(weight, sum, r.sum);
#pragma unroll
        for (int e = 0; e < 8; ++e) r.x[e] = fmaf(weight, y[e], r.x[e]);
    }
    return r;
}

/* A sink joins the sum; where the row has nothing else, lse is the sink as it is. In natural
 * logarithms; x and the sum have a common factor. */
DEVICE float join_sink(row_sum &r, float sink) {
    const float own = LOG2_E * sink;
    const bool nothing = r.sum == 0.f;
    if (nothing || own > r.top + 60.f) {
        const float weight = nothing ? 0.f : ex2_approx(r.top - own);
#pragma unroll
        for (int e = 0; e < 8; ++e) r.x[e] *= weight;
        r.top = own, r.sum = fmaf(weight, r.sum, 1.f);
        if (r.sum == 1.f) return sink;
    } else {
        r.sum += ex2_approx(own - r.top);
    }
    return (r.top + log2f(r.sum)) * 0.6931471805599453f;
}

DEVICE void store_rows(const sparse_args &a, const sparse_smem &smem, const sparse_tile &t) {
    constexpr int CHUNKS = D / 8;
#pragma unroll 1
    for (int32_t n = threadIdx.x; n < ROWS * CHUNKS; n += THREADS) {
        const int32_t row = n / CHUNKS, chunk = n % CHUNKS;
        const int32_t columns = min(8, (int32_t)a.out.shape[3] - 8 * chunk);
        if (row >= t.rows) break;
        const int32_t i = query_row(a, t.row + row),
                      head = t.head * a.group + t.row + row - i * a.group;
        row_sum r = add_warps(smem, row, chunk);
        float lse = -INFINITY;
        if (a.sink && a.sink[head * a.sink_stride] != -INFINITY && i < t.at.n.sq)
            lse = join_sink(r, a.sink[head * a.sink_stride]);
        else if (r.sum != 0.f)
            lse = (r.top + log2f(r.sum)) * 0.6931471805599453f;
        const float inverse = r.sum == 0.f ? 0.f : 1.f / r.sum;
#pragma unroll
        for (int e = 0; e < 8; ++e) r.x[e] *= inverse;
        char *to =
            (char *)a.out.data + 2 * (row_at(a.out, a, t, row) + 8 * chunk * a.out.stride[3]);
        if (columns > 0) store_chunk(to, r.x, columns, a.out.stride[3], a.out_wide);
        if (a.lse.data && chunk == 0) ((float *)a.lse.data)[row_at(a.lse, a, t, row)] = lse;
    }
}

__global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    VARIANT_NAME(const __grid_constant__ sparse_args a) {
    alignas(1024) extern __shared__ uint8_t raw[];
    sparse_smem &smem = *(sparse_smem *)raw;
    let_next_start();
    wait_for_stream();
    const sparse_tile t = find_tile(a, blockIdx.x, ROWS);
    if (t.rows <= 0) return;
    warp_rows w;
    attend(w, a, smem, t);
    cp_async_wait_group<0>();
    bar_sync(1, THREADS);
    share_rows(w, smem);
    bar_sync(1, THREADS);
    store_rows(a, smem, t);
}
