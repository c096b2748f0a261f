/* sparse_rows.cuh - a warp's 16 rows and the keys of a step, as fragments: products by mma.sync,
 * rows brought to shared memory, scores of listed keys.
 *
 * Lane 4 r + c of a warp has rows r and r + 8, and of every eight columns 2 c and 2 c + 1.
 */
#ifndef FASTATTN_SM90_SPARSE_ROWS_CUH
#define FASTATTN_SM90_SPARSE_ROWS_CUH

#include "sm90/mma.cuh"
#include "sm90/ptx.cuh"
#include "sm90/softcap.cuh"
#include "sm90/sparse_args.cuh"
#include "sm90/sparse_variant.h"
#include "sm90/wgmma.cuh"

static constexpr float LOG2_E = 1.4426950408889634f;

/* Where 16 bytes of row `row` lie in panels: chunk `chunk`. */
DEVICE uint32_t chunk_at(int32_t row, int32_t chunk, int32_t panel) {
    return chunk / 8 * panel + row * 128 + ((chunk ^ row) % 8 << 4);
}

/* Rows of the tile that a warp has begin here, and the keys of a step. */
DEVICE int32_t warp_row() { return (int32_t)threadIdx.x / 32 % ROW_WARPS * 16; }
DEVICE int32_t warp_key() { return (int32_t)threadIdx.x / 32 / ROW_WARPS * KEYS; }

/* Row r of a lane's two, among the tile's; past the last: the last. */
DEVICE int32_t lane_row(const sparse_tile &t, int32_t r) {
    return min(warp_row() + (int32_t)threadIdx.x % 32 / 4 + 8 * r, t.rows - 1);
}

/* An array's row of a tile's row. */
DEVICE int64_t row_at(const fa_tensor &x, const sparse_args &a, const sparse_tile &t, int32_t row) {
    const int32_t i = query_row(a, t.row + row);
    const int32_t head = t.head * a.group + t.row + row - i * a.group;
    return t.at.batch * x.stride[0] + head * x.stride[1] + (t.at.q + i) * x.stride[2];
}

/* Rows of an array like q into panels, columns past its last and rows that do not count as 0. */
template <typename COUNTS>
DEVICE void stage_rows(const fa_tensor &x, int32_t is_wide, const sparse_args &a,
                       const sparse_tile &t, uint32_t to, COUNTS counts) {
    constexpr int CHUNKS = D / 8;
#pragma unroll 2
    for (int32_t n = threadIdx.x; n < ROWS * CHUNKS; n += THREADS) {
        const int32_t row = n / CHUNKS, chunk = n % CHUNKS;
        const int32_t columns = min(8, (int32_t)x.shape[3] - 8 * chunk);
        uint32_t y[4] = {0, 0, 0, 0};
        if (row < t.rows && columns > 0 && counts(row)) {
            const char *from =
                (const char *)x.data + 2 * (row_at(x, a, t, row) + 8 * chunk * x.stride[3]);
            if (is_wide && columns == 8) {
                const uint4 z = load_v4(from);
                y[0] = z.x, y[1] = z.y, y[2] = z.z, y[3] = z.w;
            } else {
#pragma unroll
                for (int e = 0; e < 8; ++e)
                    if (e < columns) y[e / 2] |= load_u16(from + 2 * e * x.stride[3]) << e % 2 * 16;
            }
        }
        st_shared_v4(to + chunk_at(row, chunk, Q_PANEL), y[0], y[1], y[2], y[3]);
    }
}

/* S += rows times keys: of a warp's rows in `rows`, and its keys in `keys`. */
DEVICE void multiply_keys(float (&s)[KEYS / 8][4], uint32_t rows, uint32_t keys) {
    const int32_t lane = threadIdx.x % 32;
    const int32_t row = warp_row() + lane % 16, key = warp_key() + lane / 16 * 8 + lane % 8;
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
        uint32_t a[4], b[4];
        ldmatrix_x4(a, rows + chunk_at(row, 2 * i + lane / 16, Q_PANEL));
#pragma unroll
        for (int j = 0; j < KEYS / 16; ++j) {
            ldmatrix_x4(b, keys + chunk_at(key + 16 * j, 2 * i + lane / 8 % 2, PANEL));
            mma_m16n8k16<VARIANT_DTYPE>(s[2 * j], a, b[0], b[1]);
            mma_m16n8k16<VARIANT_DTYPE>(s[2 * j + 1], a, b[2], b[3]);
        }
    }
}

/* O += P times the rows of its keys, in `keys`. */
DEVICE void multiply_weights(float (&o)[D / 8][4], const float (&p)[KEYS / 8][4], uint32_t keys) {
    const int32_t lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < KEYS / 16; ++i) {
        const uint32_t a[4] = {
            cvt_pack(p[2 * i][0], p[2 * i][1]), cvt_pack(p[2 * i][2], p[2 * i][3]),
            cvt_pack(p[2 * i + 1][0], p[2 * i + 1][1]), cvt_pack(p[2 * i + 1][2], p[2 * i + 1][3])};
        const int32_t key = warp_key() + 16 * i + lane % 16;
#pragma unroll
        for (int j = 0; j < D / 16; ++j) {
            uint32_t b[4];
            ldmatrix_x4_trans(b, keys + chunk_at(key, 2 * j + lane / 16, PANEL));
            mma_m16n8k16<VARIANT_DTYPE>(o[2 * j], a, b[0], b[1]);
            mma_m16n8k16<VARIANT_DTYPE>(o[2 * j + 1], a, b[2], b[3]);
        }
    }
}

/* What a lane's two rows see: of the list's keys those of `listed` that are not in `window`. */
struct row_keys {
    fa_interval listed[2], window[2];
};

DEVICE row_keys find_row_keys(const sparse_args &a, const sparse_tile &t) {
    row_keys x;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int32_t i = query_row(a, t.row + lane_row(t, r));
        x.listed[r] = fa_row_interval(t.at.n, i);
        x.window[r] = fa_interval{0, 0};
        if (a.lists.has_window) x.window[r] = fa_row_interval(t.at.window, i);
    }
    return x;
}

/* Whether row r sees a key of a step. */
DEVICE bool sees(const row_keys &x, int32_t r, int32_t key, bool of_window) {
    return of_window ? is_in(x.window[r], key)
                     : is_in(x.listed[r], key) && !is_in(x.window[r], key);
}

/* What the warps said of a step. */
DEVICE int32_t kind_of(const step_columns &c) {
    int32_t kind = c.kind[0];
#pragma unroll
    for (int i = 1; i < WARPS; ++i) kind &= c.kind[i];
    return kind;
}

/* Eight columns of a row, of which `columns` exist, rounded. */
DEVICE void store_chunk(char *to, const float (&x)[8], int32_t columns, int64_t step,
                        int32_t is_wide) {
    const uint32_t y[4] = {cvt_pack(x[0], x[1]), cvt_pack(x[2], x[3]), cvt_pack(x[4], x[5]),
                           cvt_pack(x[6], x[7])};
    if (is_wide && columns == 8) {
        *(uint4 *)to = make_uint4(y[0], y[1], y[2], y[3]);
        return;
    }
#pragma unroll
    for (int e = 0; e < 8; ++e)
        if (e < columns) *(uint16_t *)(to + 2 * e * step) = (uint16_t)(y[e / 2] >> e % 2 * 16);
}

/* A warp's sums of its rows, as floats: those of its keys, where several warps have a row. */
DEVICE void share_sums(const float (&o)[D / 8][4], float *to) {
    const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    to += (warp / ROW_WARPS * ROWS + warp_row() + lane / 4) * O_PITCH + lane % 4 * 2;
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int j = 0; j < D / 8; ++j)
            *(float2 *)(to + 8 * r * O_PITCH + 8 * j) = make_float2(o[j][2 * r], o[j][2 * r + 1]);
}

#endif
