/* sparse_bwd.cu - the Hopper kernel of the gradients of attention to lists of keys.
 *
 * One object per line of sparse_bwd.def: setup.py passes its columns as VARIANT_<COLUMN>
 * (sparse_variant.h), and the object exports one function, fa_launch_<name>.
 *
 * Tiles and steps are the forward's. Of a step's keys a warp computes S and dP of its rows, P times
 * the gates and dS, adds dS K to dQ, which stays in registers, and leaves P and dS in shared
 * memory; then the four warps share the products P^T dO and dS^T Q out by 16 keys and 64 columns,
 * and add them to the keys' sums in global memory, and the gates' gradients to their entries'. A
 * block of the grid has one tile, and sums come in any order; or, for deterministic ones, a part of
 * a head's tiles one after the other, and sums of its own.
 */
#include <stdint.h>

#include "common/stream.cuh"
#include "sm90/ptx.cuh"
#include "sm90/sparse_bwd_args.cuh"
#include "sm90/sparse_bwd_launch.cuh"
#include "sm90/sparse_bwd_smem.h"
#include "sm90/sparse_rows.cuh"
#include "sm90/sparse_variant.h"
#include "sm90/sparse_walk.cuh"

/* What a lane knows of its two rows. */
struct row_values {
    float lse[2], delta[2]; /* lse in exponents; inf: the row has no keys */
};

/* The lse of a row of the tile; -inf: it saw no key, or none beside its sink. */
DEVICE float read_lse(const sparse_args &a, const sparse_tile &t, int32_t row) {
    const int32_t i = query_row(a, t.row + row),
                  head = t.head * a.group + t.row + row - i * a.group;
    const float lse = ((const float *)a.lse.data)[row_at(a.lse, a, t, row)];
    const bool has_nothing = i >= t.at.n.sq || (a.sink && lse == a.sink[head * a.sink_stride]);
    return has_nothing ? -INFINITY : lse;
}

DEVICE row_values read_rows(const sparse_bwd_args &b, const sparse_tile &t) {
    const sparse_args &a = b.a;
    row_values x;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int32_t row = lane_row(t, r), i = query_row(a, t.row + row);
        const int32_t head = t.head * a.group + t.row + row - i * a.group;
        const float lse = read_lse(a, t, row);
        /* The last row stands in for those past it, of which nothing may come. */
        const bool is_there = warp_row() + (int32_t)threadIdx.x % 32 / 4 + 8 * r < t.rows;
        x.lse[r] = lse == -INFINITY || !is_there ? INFINITY : LOG2_E * lse;
        x.delta[r] =
            b.delta[((int64_t)t.at.batch * a.heads * a.group + head) * b.rows + t.at.q + i];
    }
    return x;
}

/* S and dP become P times its gate and dS; returns nothing of what a row does not see, whatever its
 * products are. */
DEVICE void differentiate(float (&s)[KEYS / 8][4], float (&dp)[KEYS / 8][4],
                          const sparse_bwd_args &b, const row_keys &keys, const row_values &x,
                          sparse_bwd_smem &smem, const step_columns &columns) {
    const sparse_args &a = b.a;
    const int32_t lane = threadIdx.x % 32, first = warp_key() + lane % 4 * 2;
    const int32_t kind = kind_of(columns);
    const bool is_whole = kind & IS_WHOLE, of_window = kind & OF_WINDOW;
    const bool has_gates = a.lists.gate.data && !of_window, by_key = has_gates && a.lists.key_gate;
#pragma unroll
    for (int j = 0; j < KEYS / 8; ++j) {
        float of_gate[2] = {0.f, 0.f};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int32_t column = first + 8 * j + e % 2, r = e / 2;
            const bool is_seen =
                (is_whole || sees(keys, r, columns.key[column], of_window)) && x.lse[r] != INFINITY;
            const float gate = has_gates ? columns.gate[column] : 1.f, raw = s[j][e];
            const float t = by_key ? raw * gate : raw;
            float exponent = t * a.scale, slope = 1.f;
            if (a.cap != 0.f) {
                const float tanh = tanh_of(t * a.by_cap);
                exponent = a.cap * tanh, slope = fmaf(-tanh, tanh, 1.f);
            }
            const float p = ex2_approx(exponent - x.lse[r]);
            const float ds = p * fmaf(gate, dp[j][e], -x.delta[r]) * slope;
            const float own = p * dp[j][e] + (by_key ? ds * b.dscale * raw : 0.f);
            if (is_seen) of_gate[e % 2] += own;
            s[j][e] = is_seen ? p * gate : 0.f;
            dp[j][e] = !is_seen ? 0.f : by_key ? ds * gate : ds;
        }
        if (!b.dgate.data) continue;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
#pragma unroll
            for (int i = 4; i < 32; i *= 2) of_gate[e] += __shfl_xor_sync(~0u, of_gate[e], i);
            if (lane < 4) smem.gates[warp_row() / 16][first + 8 * j + e] = of_gate[e];
        }
    }
}

/* A warp's part of P or dS, to where all warps read it. */
DEVICE void store_weights(const float (&x)[KEYS / 8][4], uint8_t *to) {
    const int32_t lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int32_t row = warp_row() + lane / 4 + 8 * r, chunk = warp_key() / 8 + j;
            *(uint32_t *)(to + chunk_at(row, chunk, Q_PANEL) + lane % 4 * 4) =
                cvt_pack(x[j][2 * r], x[j][2 * r + 1]);
        }
}

/* Sums of 16 keys and 64 columns, of all rows, to the keys' own. Neighbours share theirs, so that
 * each lane adds four columns of one key. */
DEVICE void add_to_keys(const float (&x)[8][4], const step_columns &columns, int32_t first_key,
                        const float *base, int32_t pitch, int32_t first_column, float factor) {
    const int32_t lane = threadIdx.x % 32;
    const bool odd = lane % 2;
    const int32_t key = columns.key[first_key + lane / 4 + (odd ? 8 : 0)];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const float low = __shfl_xor_sync(~0u, odd ? x[j][0] : x[j][2], 1);
        const float high = __shfl_xor_sync(~0u, odd ? x[j][1] : x[j][3], 1);
        const int32_t column = first_column + 8 * j + lane % 4 / 2 * 4;
        if (key < 0 || column >= pitch) continue;
        float *to = (float *)base + (int64_t)key * pitch + column;
        if (odd)
            red_add_v4(to, low * factor, high * factor, x[j][2] * factor, x[j][3] * factor);
        else
            red_add_v4(to, x[j][0] * factor, x[j][1] * factor, low * factor, high * factor);
    }
}

/* P^T dO and dS^T Q. */
DEVICE void multiply_rows(const sparse_bwd_args &b, const sparse_tile &t, int32_t part,
                          sparse_bwd_smem &smem, const step_columns &columns) {
    constexpr int PANELS = D / 64, UNITS = BLOCK_N / 16 * PANELS;
    const int32_t lane = threadIdx.x % 32;
    const int64_t head = (int64_t)t.at.batch * b.a.heads + t.head, key = head * b.keys + t.at.k;
#pragma unroll 1
    for (int32_t unit = threadIdx.x / 32; unit < 2 * UNITS; unit += WARPS) {
        const bool is_v = unit < UNITS;
        const int32_t panel = unit % UNITS % PANELS, first_key = unit % UNITS / PANELS * 16;
        float *const sums = is_v ? b.dv : b.dk;
        if (!sums) continue;
        const uint32_t weights = smem_address(is_v ? smem.p : smem.ds);
        const uint32_t rows = smem_address(is_v ? smem.dout : smem.q) + panel * Q_PANEL;
        float x[8][4] = {};
#pragma unroll
        for (int k = 0; k < ROWS; k += 16) {
            uint32_t w[4], y[4];
            ldmatrix_x4_trans(w, weights + chunk_at(k + lane / 16 * 8 + lane % 8,
                                                    first_key / 8 + lane / 8 % 2, Q_PANEL));
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                ldmatrix_x4_trans(y, rows + chunk_at(k + lane % 16, 2 * j + lane / 16, Q_PANEL));
                mma_m16n8k16<VARIANT_DTYPE>(x[2 * j], w, y[0], y[1]);
                mma_m16n8k16<VARIANT_DTYPE>(x[2 * j + 1], w, y[2], y[3]);
            }
        }
        const int32_t pitch = is_v ? b.dv_pitch : b.dk_pitch;
        add_to_keys(x, columns, first_key, sums + part * b.of_part + key * pitch, pitch, 64 * panel,
                    is_v ? 1.f : b.dscale);
    }
}

/* What a step's keys give their entries' gates, an entry by one thread. */
DEVICE void add_to_gates(const sparse_bwd_args &b, const sparse_tile &t,
                         const sparse_bwd_smem &smem, const step_columns &columns) {
    if (!b.dgate.data || t.at.block >= b.dgate.shape[2]) return;
    const int32_t lane = threadIdx.x % 32, size = min(1 << b.a.shift, BLOCK_N);
    const fa_tensor &g = b.dgate;
    float *to = (float *)g.data + list_at(g, t.at.batch, t.head, t.at.block);
    if (size == 1) {
        const int32_t column = threadIdx.x;
        if (column >= BLOCK_N || columns.key[column] < 0 || columns.entry[column] < 0) return;
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < ROW_WARPS; ++i) sum += smem.gates[i][column];
        atomicAdd(to + columns.entry[column] * g.stride[3], sum);
        return;
    }
#pragma unroll 1
    for (int32_t first = threadIdx.x / 32 * size; first < BLOCK_N; first += WARPS * size) {
        float sum = 0.f;
        for (int32_t column = first + lane; column < first + size; column += 32)
#pragma unroll
            for (int i = 0; i < ROW_WARPS; ++i) sum += smem.gates[i][column];
#pragma unroll
        for (int i = 16; i; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);
        /* An entry may begin with keys that no row sees. */
        if (lane == 0 && columns.entry[first] >= 0)
            atomicAdd(to + columns.entry[first] * g.stride[3], sum);
    }
}

DEVICE void store_dq(const sparse_bwd_args &b, const sparse_bwd_smem &smem, const sparse_tile &t) {
    constexpr int CHUNKS = D / 8;
    if (!b.dq.data) return;
#pragma unroll 1
    for (int32_t n = threadIdx.x; n < ROWS * CHUNKS; n += THREADS) {
        const int32_t row = n / CHUNKS, chunk = n % CHUNKS;
        const int32_t columns = min(8, (int32_t)b.dq.shape[3] - 8 * chunk);
        if (row >= t.rows) break;
        float x[8] = {};
#pragma unroll
        for (int k = 0; k < KEY_WARPS; ++k)
#pragma unroll
            for (int e = 0; e < 8; ++e)
                x[e] += smem.sums[(k * ROWS + row) * O_PITCH + 8 * chunk + e];
#pragma unroll
        for (int e = 0; e < 8; ++e) x[e] *= b.dscale;
        char *to = (char *)b.dq.data + 2 * (row_at(b.dq, b.a, t, row) + 8 * chunk * b.dq.stride[3]);
        if (columns > 0) store_chunk(to, x, columns, b.dq.stride[3], b.dq_wide);
    }
}

DEVICE void run_tile(const sparse_bwd_args &b, sparse_bwd_smem &smem, const sparse_tile &t,
                     int32_t part) {
    const sparse_args &a = b.a;
    sparse_walk walk = start_walk();
    int32_t steps = 0, stage = 0;
#pragma unroll 1
    for (int i = 0; i < STAGES - 1; ++i) steps += bring_step(walk, a, t, smem);
    /* Rows that have no keys may be anything. */
    const auto counts = [&](int32_t row) { return read_lse(a, t, row) != -INFINITY; };
    stage_rows(a.q, a.q_wide, a, t, smem_address(smem.q), counts);
    stage_rows(b.dout, b.dout_wide, a, t, smem_address(smem.dout),
               [&](int32_t row) { return b.dout.data && counts(row); });
    const row_keys keys = find_row_keys(a, t);
    const row_values values = read_rows(b, t);
    float dq[D / 8][4] = {};
#pragma unroll 1
    for (int32_t step = 0; step < steps; ++step) {
        const step_columns &columns = smem.columns[stage];
        float s[KEYS / 8][4] = {}, dp[KEYS / 8][4] = {};
        cp_async_wait_group<STAGES - 2>(); /* this step has come, */
        bar_sync(1, THREADS);              /* for all; and nobody reads the one before */
        steps += bring_step(walk, a, t, smem);
        multiply_keys(s, smem_address(smem.q), smem_address(smem.k[stage]));
        multiply_keys(dp, smem_address(smem.dout), smem_address(smem.v[stage]));
        differentiate(s, dp, b, keys, values, smem, columns);
        multiply_weights(dq, dp, smem_address(smem.k[stage]));
        store_weights(s, smem.p);
        store_weights(dp, smem.ds);
        bar_sync(1, THREADS);
        multiply_rows(b, t, part, smem, columns);
        add_to_gates(b, t, smem, columns);
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
    cp_async_wait_group<0>();
    bar_sync(1, THREADS);
    share_sums(dq, smem.sums);
    bar_sync(1, THREADS);
    store_dq(b, smem, t);
    bar_sync(1, THREADS);
}

__global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    VARIANT_NAME(const __grid_constant__ sparse_bwd_args b) {
    alignas(1024) extern __shared__ uint8_t raw[];
    sparse_bwd_smem &smem = *(sparse_bwd_smem *)raw;
    let_next_start();
    wait_for_stream();
    const int32_t pair = fa_divide(blockIdx.x, b.by_parts),
                  part = (int32_t)blockIdx.x - pair * b.parts;
    const int32_t end = min(b.head_tiles, (part + 1) * b.each);
#pragma unroll 1
    for (int32_t tile = part * b.each; tile < end; ++tile) {
        const sparse_tile t = find_tile(b.a, pair * b.head_tiles + tile, ROWS);
        if (t.rows > 0) run_tile(b, smem, t, b.sums > 1 ? part : 0);
    }
}
