/* decode_attend.cuh - a warp's part of a tile: 16 rows against its keys of each block.
 *
 * As a warp of FlashAttention-2 does it, by mma.sync: S = Q K^T, a running maximum, P V. Memory
 * bounds it: a block of 64 keys, d 128, takes 1,800 clocks to come at an SM's share of the memory's
 * rate, and 850 of the tensor cores for 64 rows. Lane 4 r + c of a warp has rows r and r + 8.
 */
#ifndef FASTATTN_SM90_DECODE_ATTEND_CUH
#define FASTATTN_SM90_DECODE_ATTEND_CUH

#include "sm90/decode_args.cuh"
#include "sm90/decode_load.cuh"
#include "sm90/mma.cuh"
#include "sm90/ptx.cuh"
#include "sm90/softcap.cuh"
#include "sm90/wgmma.cuh"

static constexpr float LOG2_E = 1.4426950408889634f;

/* What a warp knows and has of its 16 rows. */
struct warp_rows {
    float o[DV / 8][4];
    float top[2], sum[2]; /* of exponents; of this lane's columns */
    fa_interval keys[2];  /* that the rows see */
    float slope[2];       /* in exponents */
    int32_t position[2];  /* on the key axis */
};

/* Q stays in registers where there is room beside O. */
static constexpr bool KEEPS_Q = ROWS == 16 ? D <= 128 : D <= 64;

/* Where a lane's 16 bytes lie for ldmatrix_x4: of row `row` (its low three bits being r), 16-byte
 * chunk `chunk`. */
DEVICE uint32_t chunk_at(int32_t row, int32_t chunk, int32_t panel) {
    return chunk / 8 * panel + row * 128 + ((chunk ^ row) % 8 << 4);
}

/* The fragment of 16 rows and 16 columns of Q. */
DEVICE void load_q(uint32_t (&x)[4], uint32_t q, int32_t row, int k) {
    const int32_t lane = threadIdx.x % 32;
    ldmatrix_x4(x, q + chunk_at(row + lane % 16, 2 * k + lane / 16, Q_PANEL));
}

struct queries {
    uint32_t kept[KEEPS_Q ? D / 16 : 1][4];
    uint32_t smem; /* of all rows */
    int32_t row;   /* the warp's first */
};

DEVICE void multiply_keys(float (&s)[KEYS / 8][4], const queries &q, uint32_t k, int32_t first) {
    const int32_t lane = threadIdx.x % 32;
    const int32_t row = first + lane / 16 * 8 + lane % 8;
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
        uint32_t a[4], b[4];
        if (KEEPS_Q) {
#pragma unroll
            for (int e = 0; e < 4; ++e) a[e] = q.kept[KEEPS_Q ? i : 0][e];
        } else {
            load_q(a, q.smem, q.row, i);
        }
#pragma unroll
        for (int j = 0; j < KEYS / 16; ++j) {
            ldmatrix_x4(b, k + chunk_at(row + 16 * j, 2 * i + lane / 8 % 2, PANEL));
            mma_m16n8k16<VARIANT_DTYPE>(s[2 * j], a, b[0], b[1]);
            mma_m16n8k16<VARIANT_DTYPE>(s[2 * j + 1], a, b[2], b[3]);
        }
    }
}

/* Scores in exponents; MASKED: -inf where the row does not see the key. `key`: of s[0][0]. */
template <bool MASKED>
DEVICE void change_scores(float (&s)[KEYS / 8][4], const decode_args &a, const warp_rows &w,
                          int32_t key) {
#pragma unroll
    for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            float x = s[j][e] * a.scale;
            if (a.cap != 0.f) x = a.cap * tanh_of(s[j][e] * a.by_cap);
            const int32_t at = key + 8 * j + e % 2;
            if (a.slopes) x = fmaf(-w.slope[e / 2], fabsf((float)(w.position[e / 2] - at)), x);
            if (MASKED && (at < w.keys[e / 2].begin || at >= w.keys[e / 2].end)) x = -INFINITY;
            s[j][e] = x;
        }
}

/* S becomes P; O and the sums follow their rows' new tops. */
DEVICE void weigh(float (&s)[KEYS / 8][4], warp_rows &w) {
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
        for (int j = 0; j < DV / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) w.o[j][e] *= shrink[e / 2];
    }
#pragma unroll
    for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            s[j][e] = ex2_approx(s[j][e] - base[e / 2]);
            w.sum[e / 2] += s[j][e];
        }
}

/* Of two keys side by side, halves of a register: all ones for those in the interval. */
DEVICE uint32_t keep_pair(fa_interval keys, int32_t key) {
    const uint32_t low = key >= keys.begin && key < keys.end ? 0xFFFF : 0;
    return low | (key + 1 >= keys.begin && key + 1 < keys.end ? 0xFFFF0000 : 0);
}

/* MASKED: V of keys that no row sees counts as 0, whatever is there; 0 * NaN is NaN. `key`: of
 * s[0][0]. */
template <bool MASKED>
DEVICE void multiply_values(warp_rows &w, const float (&s)[KEYS / 8][4], uint32_t v, int32_t first,
                            fa_interval some, int32_t key) {
    const int32_t lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < KEYS / 16; ++i) {
        const uint32_t p[4] = {
            cvt_pack(s[2 * i][0], s[2 * i][1]), cvt_pack(s[2 * i][2], s[2 * i][3]),
            cvt_pack(s[2 * i + 1][0], s[2 * i + 1][1]), cvt_pack(s[2 * i + 1][2], s[2 * i + 1][3])};
        uint32_t keep[2];
        if (MASKED) {
            keep[0] = keep_pair(some, key + 16 * i);
            keep[1] = keep_pair(some, key + 16 * i + 8);
        }
        const int32_t row = first + 16 * i + lane % 16;
#pragma unroll
        for (int j = 0; j < DV / 16; ++j) {
            uint32_t b[4];
            ldmatrix_x4_trans(b, v + chunk_at(row, 2 * j + lane / 16, PANEL));
            if (MASKED)
#pragma unroll
                for (int e = 0; e < 4; ++e) b[e] &= keep[e % 2];
            mma_m16n8k16<VARIANT_DTYPE>(w.o[2 * j], p, b[0], b[1]);
            mma_m16n8k16<VARIANT_DTYPE>(w.o[2 * j + 1], p, b[2], b[3]);
        }
    }
}

/* This thread, or its warp, has read a stage. */
DEVICE void release(uint32_t empty) {
    if (RELEASERS == MMA_WARPS) __syncwarp();
    if (RELEASERS == MMA_THREADS || threadIdx.x % 32 == 0) mbarrier_arrive(empty);
}

/* One block, whose stage is handed back as soon as it has been read. */
template <bool MASKED>
DEVICE void attend_block(warp_rows &w, const queries &q, const decode_args &a, decode_smem &smem,
                         const decode_tile &t, int32_t block, const stage &at) {
    const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int32_t first = warp / ROW_WARPS * KEYS; /* of the block's keys, the warp's */
    const int32_t key = block * BLOCK_N + first + lane % 4 * 2;
    float s[KEYS / 8][4] = {};
    mbarrier_wait(smem_address(&smem.k_full[at.at]), at.lap);
    multiply_keys(s, q, smem_address(smem.k[at.at]), first);
    release(smem_address(&smem.k_empty[at.at]));
    change_scores<MASKED>(s, a, w, key);
    weigh(s, w);
    mbarrier_wait(smem_address(&smem.v_full[at.at]), at.lap);
    multiply_values<MASKED>(w, s, smem_address(smem.v[at.at]), first, t.some, key);
    release(smem_address(&smem.v_empty[at.at]));
}

/* Rows as they are before the first block. */
DEVICE void start_rows(warp_rows &w, const decode_args &a, const decode_tile &t) {
    const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int j = 0; j < DV / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) w.o[j][e] = 0.f;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        /* Past the tile's rows: as the last one. */
        const int32_t row = min(warp % ROW_WARPS * 16 + lane / 4 + 8 * r, t.rows - 1);
        const int32_t i = query_row(a, t.row + row);
        const int32_t head = t.head * a.group + t.row + row - i * a.group;
        w.keys[r] = fa_row_interval(t.n, i);
        w.position[r] = fa_row_position(t.n, i);
        w.slope[r] =
            a.slopes ? LOG2_E * a.slopes[t.b * a.slope_stride[0] + head * a.slope_stride[1]] : 0.f;
        w.top[r] = -INFINITY, w.sum[r] = 0.f;
    }
}

/* Q into shared memory, columns past d and rows past the last as 0. */
DEVICE void stage_q(const decode_args &a, decode_smem &smem, const decode_tile &t) {
    constexpr int CHUNKS = D / 8;
    const uint32_t to = smem_address(smem.q);
    const int32_t d = (int32_t)a.q.shape[3];
#pragma unroll 2
    for (int32_t n = threadIdx.x; n < ROWS * CHUNKS; n += MMA_THREADS) {
        const int32_t row = n / CHUNKS, chunk = n % CHUNKS, columns = min(8, d - 8 * chunk);
        uint32_t x[4] = {0, 0, 0, 0};
        if (row < t.rows && columns > 0) {
            const int32_t i = query_row(a, t.row + row);
            const int32_t head = t.head * a.group + t.row + row - i * a.group;
            const char *from = (const char *)a.q.data +
                               2 * (t.batch * a.q.stride[0] + head * a.q.stride[1] +
                                    (t.q + i) * a.q.stride[2] + 8 * chunk * a.q.stride[3]);
            if (a.q_wide && columns == 8) {
                const uint4 y = load_v4(from);
                x[0] = y.x, x[1] = y.y, x[2] = y.z, x[3] = y.w;
            } else {
#pragma unroll
                for (int e = 0; e < 8; ++e)
                    if (e < columns)
                        x[e / 2] |= load_u16(from + 2 * e * a.q.stride[3]) << e % 2 * 16;
            }
        }
        st_shared_v4(to + chunk_at(row, chunk, Q_PANEL), x[0], x[1], x[2], x[3]);
    }
}

DEVICE void attend(warp_rows &w, const decode_args &a, decode_smem &smem, const decode_tile &t) {
    queries q;
#if IS_STRIDED
    loads l = start_loads(a, t);
    for (int i = 0; i < STAGES - 1; ++i) load_block(l, a, smem, t);
#endif
    stage_q(a, smem, t);
    start_rows(w, a, t);
    bar_sync(1, MMA_THREADS);
    q.smem = smem_address(smem.q);
    q.row = threadIdx.x / 32 % ROW_WARPS * 16;
    if (KEEPS_Q)
#pragma unroll
        for (int i = 0; i < D / 16; ++i) load_q(q.kept[KEEPS_Q ? i : 0], q.smem, q.row, i);
    stage at = {0, 0};
#pragma unroll 1
    for (int32_t block = t.first; block < t.last; block += t.step, advance(at)) {
        const int32_t key = block * BLOCK_N;
#if IS_STRIDED
        load_block(l, a, smem, t);
#endif
        if (key >= t.all.begin && key + BLOCK_N <= t.all.end)
            attend_block<false>(w, q, a, smem, t, block, at);
        else
            attend_block<true>(w, q, a, smem, t, block, at);
    }
}

#endif
