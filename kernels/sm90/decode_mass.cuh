/* decode_mass.cuh - after attention to a cache: the sum of p that each key has, over the rows of
 * its group. A warp has 16 keys, in registers as they come from memory, and all rows that see them,
 * 8 at a time: no sum depends on who else is there. No variant's business.
 */
#ifndef FASTATTN_SM90_DECODE_MASS_CUH
#define FASTATTN_SM90_DECODE_MASS_CUH

#include "common/launch.cuh"
#include "common/scale.h"
#include "sm90/decode_append.cuh"
#include "sm90/mma.cuh"
#include "sm90/softcap.cuh"

enum { MASS_THREADS = 128, MASS_KEYS = 16, MASS_BLOCK = MASS_THREADS / 32 * MASS_KEYS };

struct mass_args {
    fa_params params; /* of attention, whose lse is there */
    fa_tensor mass;
    int32_t blocks;    /* of a head's keys */
    float scale;       /* of q.k, in exponents */
    float cap, by_cap; /* as in decode_args.cuh */
};

/* Columns `at` and the next of a row of which d exist, the first in the low half. */
DEVICE uint32_t load_pair(const uint16_t *row, int64_t step, int32_t at, int32_t d) {
    if (step == 1 && at + 1 < d && (uintptr_t)row % 4 == 0) return *(const uint32_t *)(row + at);
    const uint32_t low = at < d ? row[at * step] : 0;
    return low | (at + 1 < d ? (uint32_t)row[(at + 1) * step] << 16 : 0);
}

/* p of one score. */
DEVICE float weigh_score(const mass_args &a, const fa_lengths &n, int32_t b, int32_t head,
                         int32_t i, int32_t key, float s, float lse) {
    const float log2_e = 1.4426950408889634f;
    const fa_scores &changes = a.params.scores;
    const fa_interval keys = fa_row_interval(n, i);
    if (key < keys.begin || key >= keys.end || lse == -INFINITY) return 0.f;
    float x = a.cap != 0.f ? a.cap * tanh_of(s * a.by_cap) : s * a.scale;
    if (changes.alibi_slopes) {
        const float slope =
            changes.alibi_slopes[b * changes.alibi_stride[0] + head * changes.alibi_stride[1]];
        x = fmaf(-log2_e * slope, fabsf((float)(fa_row_position(n, i) - key)), x);
    }
    return ex2_approx(x - log2_e * lse);
}

/* The fragment of 16 keys and all columns: lane 4 r + c has keys r and r + 8. */
template <int D>
DEVICE void load_mass_keys(uint32_t (&x)[D / 16][4], const fa_params &p, int32_t b, int32_t h,
                           int32_t first, int32_t end) {
    const fa_tensor &k = p.what.k;
    const int32_t lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int32_t key = first + lane / 4 + 8 * r;
        const bool is_there = key < end;
        const uint16_t *row =
            (const uint16_t *)k.data + (is_there ? key_at(k, p.pages, b, h, key) : 0);
#pragma unroll
        for (int i = 0; i < D / 16; ++i)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int32_t at = 16 * i + 8 * e + lane % 4 * 2;
                x[i][r + 2 * e] = is_there ? load_pair(row, k.stride[3], at, p.what.d) : 0;
            }
    }
}

/* The sums of a lane's two keys, over its rows among those from begin to end, which are numbered as
 * in a tile: row i of head h of the group is i * group + h. */
template <fa_dtype T, int D>
DEVICE void sum_rows(float (&sum)[2], const mass_args &a, const uint32_t (&k)[D / 16][4],
                     const fa_sequence &n, int32_t b, int32_t h, int32_t first, int32_t begin,
                     int32_t end) {
    const fa_what &w = a.params.what;
    const int32_t lane = threadIdx.x % 32, group = w.hq / w.hk;
    const int32_t batch = a.params.varlen.cu_q ? 0 : b;
#pragma unroll 1
    for (int32_t from = begin; from < end; from += 8) {
        const int32_t row = from + lane / 4;
        const bool is_there = row < end;
        const int64_t at = row_at(w.q, batch, h * group + row % group, n.q + row / group);
        const uint16_t *q = (const uint16_t *)w.q.data + (is_there ? at : 0);
        float s[4] = {};
#pragma unroll
        for (int i = 0; i < D / 16; ++i) {
            const int32_t column = 16 * i + lane % 4 * 2;
            const uint32_t low = is_there ? load_pair(q, w.q.stride[3], column, w.d) : 0;
            const uint32_t high = is_there ? load_pair(q, w.q.stride[3], column + 8, w.d) : 0;
            mma_m16n8k16<T>(s, k[i], low, high);
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int32_t mine = from + lane % 4 * 2 + e % 2, i = mine / group;
            const int32_t head = h * group + mine % group;
            if (mine >= end) continue;
            const float lse = ((const float *)w.lse.data)[row_at(w.lse, batch, head, n.q + i)];
            sum[e / 2] +=
                weigh_score(a, n.lengths, b, head, i, first + lane / 4 + e / 2 * 8, s[e], lse);
        }
    }
}

template <fa_dtype T, int D>
static __global__ void __launch_bounds__(MASS_THREADS)
    kvcache_mass(const __grid_constant__ mass_args a) {
    const fa_params &p = a.params;
    const fa_what &w = p.what;
    const int32_t lane = threadIdx.x % 32, pair = blockIdx.x / a.blocks;
    const int32_t b = pair / w.hk, h = pair - b * w.hk;
    const int32_t first =
        (int32_t)(blockIdx.x % a.blocks) * MASS_BLOCK + (int32_t)threadIdx.x / 32 * MASS_KEYS;
    let_next_start();
    wait_for_stream();
    const fa_sequence n = fa_find_cached(&p.varlen, &p.masks, b, w.sq, w.sk);
    const int32_t end = min(first + MASS_KEYS, n.lengths.sk);
    float sum[2] = {0.f, 0.f};
    if (first < end) {
        const fa_row_range see = fa_rows_seeing_some(n.lengths, {first, end});
        const int32_t group = w.hq / w.hk;
        uint32_t k[D / 16][4];
        load_mass_keys<D>(k, p, b, h, first, see.begin < see.end ? end : first);
        sum_rows<T, D>(sum, a, k, n, b, h, first, see.begin * group, see.end * group);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int32_t key = first + lane / 4 + 8 * r;
        sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
        sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
        if (lane % 4 == 0 && key < a.mass.shape[2])
            ((float *)a.mass.data)[row_at(a.mass, b, h, key)] = sum[r];
    }
}

template <fa_dtype T>
static const void *mass_kernel(int32_t d) {
    return d <= 64    ? (const void *)kvcache_mass<T, 64>
           : d <= 128 ? (const void *)kvcache_mass<T, 128>
                      : (const void *)kvcache_mass<T, 256>;
}

/* Behind attention with these parameters. */
static inline fa_status launch_mass(const fa_params *p, const fa_tensor *mass,
                                    const fa_device *device, fa_error *error) {
    const double log2_e = 1.4426950408889634, scale = usable_scale(p->what.scale);
    const int64_t blocks = (mass->shape[2] + MASS_BLOCK - 1) / MASS_BLOCK;
    const int64_t all = mass->shape[0] * mass->shape[1] * blocks;
    if (!mass->data || !all) return FA_OK;
    if (all > INT32_MAX)
        return fa_fail(error, FA_UNSUPPORTED, "sm90 takes at most 2^31 blocks of 64 keys");
    mass_args a = {*p, *mass, (int32_t)blocks, (float)(scale * log2_e), 0.f, 0.f};
    if (p->scores.softcap != 0) {
        const double cap = usable_scale(p->scores.softcap);
        a.cap = (float)(cap * log2_e), a.by_cap = (float)usable_scale(scale / cap);
    }
    const void *kernel =
        p->what.dtype == FA_BF16 ? mass_kernel<FA_BF16>(p->what.d) : mass_kernel<FA_F16>(p->what.d);
    return fa_launch_kernel(kernel, (int32_t)all, MASS_THREADS, 0, p->where.stream, device->early,
                            &a, error);
}

#endif
