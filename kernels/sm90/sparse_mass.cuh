/* sparse_mass.cuh - the share of attention that each entry of a list has: the sum of p over its
 * keys and its rows, the group's heads, and all sequences and heads that share the list, in the
 * same order every time. A part of backend.cu.
 *
 * A warp has an entry, or 16 where each is one key: S^T of 16 keys and 8 rows at a time, and p of
 * the lse that attention has left.
 */
#ifndef FASTATTN_SM90_SPARSE_MASS_CUH
#define FASTATTN_SM90_SPARSE_MASS_CUH

#include "common/launch.cuh"
#include "sm90/mma.cuh"
#include "sm90/softcap.cuh"
#include "sm90/sparse_request.cuh"

enum { ENTRY_THREADS = 128 };

struct sparse_mass_args {
    sparse_args a;
    fa_tensor mass;
    fa_divisor by_warps, by_blocks, by_heads; /* of the mass: its heads */
    int32_t warps;                            /* blocks of the grid of a list */
    int32_t units;                            /* of a list: entries, or 16 of them */
};

/* One list of those that share an entry's sum: of sequence b and head h. */
struct mass_list {
    query_block at;
    int32_t head, length;
};

/* Columns `at` and the next of a row of which d exist, the first in the low half. */
DEVICE uint32_t two_of(const uint16_t *row, int64_t step, int32_t at, int32_t d) {
    if (step == 1 && at + 1 < d && (uintptr_t)row % 4 == 0) return *(const uint32_t *)(row + at);
    const uint32_t low = at < d ? row[at * step] : 0;
    return low | (at + 1 < d ? (uint32_t)row[(at + 1) * step] << 16 : 0);
}

/* The columns of a lane: two keys, of which entry, and their gates; key -1: none. */
struct mass_columns {
    int32_t key[2];
    float gate[2];
};

DEVICE mass_columns find_columns(const sparse_args &a, const mass_list &l, int32_t unit,
                                 int32_t step) {
    const fa_tensor &e = a.lists.entries, &g = a.lists.gate;
    mass_columns c;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int32_t place = (int32_t)threadIdx.x % 32 / 4 + 8 * r;
        const int32_t entry = a.shift ? unit : unit * 16 + place;
        c.key[r] = -1, c.gate[r] = 1.f;
        if (entry >= l.length) continue;
        const int32_t block =
            ((const int32_t *)
                 e.data)[list_at(e, l.at.batch, l.head, l.at.block) + entry * e.stride[3]];
        if (block < 0 || block > (l.at.n.sk - 1) >> a.shift) continue;
        c.key[r] = (block << a.shift) + (a.shift ? 16 * step + place : 0);
        if (c.key[r] >= l.at.n.sk) c.key[r] = -1;
        if (g.data && a.lists.key_gate)
            c.gate[r] =
                ((const float *)
                     g.data)[list_at(g, l.at.batch, l.head, l.at.block) + entry * g.stride[3]];
    }
    return c;
}

/* The fragment of the lanes' keys and all columns of K. */
template <int D>
DEVICE void load_mass_columns(uint32_t (&x)[D / 16][4], const sparse_args &a, const mass_list &l,
                              const mass_columns &c) {
    const fa_tensor &k = a.k;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const bool is_there = c.key[r] >= 0;
        const uint16_t *row =
            (const uint16_t *)k.data + (is_there ? l.at.batch * k.stride[0] + l.head * k.stride[1] +
                                                       (int64_t)(l.at.k + c.key[r]) * k.stride[2]
                                                 : 0);
#pragma unroll
        for (int i = 0; i < D / 16; ++i)
#pragma unroll
            for (int e = 0; e < 2; ++e)
                x[i][r + 2 * e] = is_there ? two_of(row, k.stride[3],
                                                    16 * i + 8 * e + (int32_t)threadIdx.x % 4 * 2,
                                                    (int32_t)k.shape[3])
                                           : 0;
    }
}

/* p of a score. */
DEVICE float weigh_listed(const sparse_args &a, const mass_list &l, int32_t i, int32_t key, float s,
                          float gate, float lse) {
    if (key < 0 || lse == -INFINITY || !is_in(fa_row_interval(l.at.n, i), key)) return 0.f;
    if (a.lists.has_window && is_in(fa_row_interval(l.at.window, i), key)) return 0.f;
    const float t = s * gate;
    const float x = a.cap != 0.f ? a.cap * tanh_of(t * a.by_cap) : t * a.scale;
    return ex2_approx(x - 1.4426950408889634f * lse);
}

/* The sums of a lane's two keys over all rows of the block. */
template <fa_dtype T, int D>
DEVICE void sum_listed(float (&sum)[2], const sparse_args &a, const mass_list &l,
                       const mass_columns &c) {
    const int32_t lane = threadIdx.x % 32;
    const int32_t begin = l.at.first * a.group, end = begin + l.at.rows * a.group;
    uint32_t k[D / 16][4];
    load_mass_columns<D>(k, a, l, c);
#pragma unroll 1
    for (int32_t from = begin; from < end; from += 8) {
        const int32_t row = from + lane / 4, i = query_row(a, row);
        const bool is_there = row < end;
        const uint16_t *q = (const uint16_t *)a.q.data;
        if (is_there)
            q += l.at.batch * a.q.stride[0] +
                 (l.head * a.group + row - i * a.group) * a.q.stride[1] +
                 (int64_t)(l.at.q + i) * a.q.stride[2];
        float s[4] = {};
#pragma unroll
        for (int n = 0; n < D / 16; ++n) {
            const int32_t at = 16 * n + lane % 4 * 2, d = (int32_t)a.q.shape[3];
            const uint32_t low = is_there ? two_of(q, a.q.stride[3], at, d) : 0;
            const uint32_t high = is_there ? two_of(q, a.q.stride[3], at + 8, d) : 0;
            mma_m16n8k16<T>(s, k[n], low, high);
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int32_t mine = from + lane % 4 * 2 + e % 2;
            if (mine >= end) continue;
            const int32_t of = query_row(a, mine), head = l.head * a.group + mine - of * a.group;
            const float lse =
                ((const float *)a.lse.data)[l.at.batch * a.lse.stride[0] + head * a.lse.stride[1] +
                                            (l.at.q + of) * a.lse.stride[2]];
            sum[e / 2] += weigh_listed(a, l, of, c.key[e / 2], s[e], c.gate[e / 2], lse);
        }
    }
}

template <fa_dtype T, int D>
static __global__ void __launch_bounds__(ENTRY_THREADS)
    sparse_mass(const __grid_constant__ sparse_mass_args m) {
    const sparse_args &a = m.a;
    const int32_t lane = threadIdx.x % 32, list = fa_divide(blockIdx.x, m.by_warps);
    const int32_t unit = ((int32_t)blockIdx.x - list * m.warps) * 4 + (int32_t)threadIdx.x / 32;
    const int32_t pair = fa_divide(list, m.by_blocks),
                  block = list - pair * (int32_t)m.mass.shape[2];
    const int32_t own_b = fa_divide(pair, m.by_heads),
                  own_h = pair - own_b * (int32_t)m.mass.shape[1];
    const int32_t size = 1 << a.shift, steps = a.shift ? size / 16 : 1;
    let_next_start();
    wait_for_stream();
    float sum[2] = {0.f, 0.f};
    if (unit >= m.units) return;
    const bool all_b = m.mass.shape[0] == 1 && !a.varlen.cu_q, all_h = m.mass.shape[1] == 1;
#pragma unroll 1
    for (int32_t b = all_b ? 0 : own_b; b < (all_b ? a.b : own_b + 1); ++b) {
        mass_list l;
        l.at = find_block(a, b, block);
        if (l.at.rows <= 0) continue;
#pragma unroll 1
        for (l.head = all_h ? 0 : own_h; l.head < (all_h ? a.heads : own_h + 1); ++l.head) {
            l.length = list_length(a.lists, l.at.batch, l.head, block);
#pragma unroll 1
            for (int32_t step = 0; step < steps; ++step)
                sum_listed<T, D>(sum, a, l, find_columns(a, l, unit, step));
        }
    }
#pragma unroll
    for (int i = 1; i < 4; i *= 2)
#pragma unroll
        for (int r = 0; r < 2; ++r) sum[r] += __shfl_xor_sync(~0u, sum[r], i);
    float *to = (float *)m.mass.data + list_at(m.mass, own_b, own_h, block);
    if (!a.shift) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int32_t entry = unit * 16 + lane / 4 + 8 * r;
            if (lane % 4 == 0 && entry < m.mass.shape[3]) to[entry * m.mass.stride[3]] = sum[r];
        }
        return;
    }
    float all = sum[0] + sum[1];
#pragma unroll
    for (int i = 4; i < 32; i *= 2) all += __shfl_xor_sync(~0u, all, i);
    if (lane == 0) to[unit * m.mass.stride[3]] = all;
}

template <fa_dtype T>
static const void *sparse_mass_kernel(int32_t d) {
    return d <= 64    ? (const void *)sparse_mass<T, 64>
           : d <= 128 ? (const void *)sparse_mass<T, 128>
                      : (const void *)sparse_mass<T, 256>;
}

/* Behind attention, whose lse is in a.lse. */
static inline fa_status launch_sparse_mass(const fa_params *p, const fa_lists *lists,
                                           const fa_tensor *mass, const fa_device *device,
                                           fa_error *error) {
    const int64_t count = mass->shape[0] * mass->shape[1] * mass->shape[2];
    sparse_mass_args m = {fa_sparse_arguments(p, lists, 1), *mass, {}, {}, {}, 0, 0};
    m.units = (int32_t)(lists->k_block == 1 ? (mass->shape[3] + 15) / 16 : mass->shape[3]);
    m.warps = (m.units + 3) / 4;
    if (!count || !m.units) return FA_OK;
    if (count * m.warps > INT32_MAX)
        return fa_fail(error, FA_UNSUPPORTED, "sm90 takes at most 2^31 entries of lists");
    m.by_warps = fa_divisor_make(m.warps);
    m.by_blocks = fa_divisor_make((int32_t)mass->shape[2]);
    m.by_heads = fa_divisor_make((int32_t)mass->shape[1]);
    const void *kernel = p->what.dtype == FA_BF16 ? sparse_mass_kernel<FA_BF16>(p->what.d)
                                                  : sparse_mass_kernel<FA_F16>(p->what.d);
    return fa_launch_kernel(kernel, (int32_t)(count * m.warps), ENTRY_THREADS, 0, p->where.stream,
                            device->early, &m, error);
}

#endif
