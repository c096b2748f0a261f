/* fwd_mask_tiles.cuh - a float mask, by tiles of 64 rows in shared memory. General variants only.
 *
 * K's loader brings the tile of a block where the copy engine takes the mask; where it does not,
 * the warpgroup's threads write the same tile themselves.
 */
#ifndef FASTATTN_SM90_FWD_MASK_TILES_CUH
#define FASTATTN_SM90_FWD_MASK_TILES_CUH

#include "common/compiler.cuh"
#include "sm90/fwd_args.cuh"
#include "sm90/fwd_pipeline.cuh"
#include "sm90/fwd_smem.h"
#include "sm90/ptx.cuh"

/* A warpgroup's tile, swizzled, 128 bytes of a row in a panel: the block's columns of 16 bits, or
 * half of them of 32. */
struct mask_tile {
    uint32_t at, full, empty, parity;
    uint32_t row; /* of 16 bits: what this thread asks ldmatrix for, 8 columns of one row */
    bool there;   /* it has come */
};

/* The tile of a mask of 16 bits that comes with a block: there is one, so that its phase is the
 * block's number's parity. */
DEVICE mask_tile mask_tile_of(smem_layout &smem, const cursor &kv, int warpgroup) {
    return {smem_address(smem.mask[warpgroup]), smem_address(&smem.mask_full[warpgroup]),
            smem_address(&smem.mask_empty[warpgroup]), (kv.stage + STAGES * kv.parity) & 1};
}

/* What can be known of a tile of 16 bits before there are scores. `comes`: by the copy engine. */
DEVICE void open_mask_tile(const score_args &a, mask_tile &m, bool comes) {
    const uint32_t thread = thread_here(), lane = thread % 32;
    const uint32_t row = a.tile_rows ? thread % 128 / 32 * 16 + lane % 16 : 0;
    m.row = m.at + row * 128 + ((lane / 16 ^ row % 8) << 4);
    m.there = (!comes && !a.tiles) || mbarrier_test(m.full, m.parity);
}

DEVICE void enter_mask_tile(const score_args &a, const mask_tile &m) {
    if (a.tiles) mbarrier_wait(m.full, m.parity);
}

/* This warp has read the tile, or has no use for it. */
DEVICE void leave_mask_tile(const score_args &a, const mask_tile &m) {
    __syncwarp();
    if (a.tiles && threadIdx.x % 32 == 0) mbarrier_arrive(m.empty);
}

DEVICE void pass_mask_tiles(const score_args &a, mask_tile m) {
    for (int i = 0; i < a.tiles; ++i) {
        if (a.tiles == 2) m.parity = i;
        enter_mask_tile(a, m);
        leave_mask_tile(a, m);
    }
}

/* Where the copy engine does not take the mask, each warp writes its own 16 rows of the tile, from
 * `row` and `key` on. Rows and keys past the ends are the last one's: the interval hides them. */
template <mask_kind KIND>
DEVICE void fill_mask_tile(const score_args &a, const score_tile &t, const mask_tile &m,
                           int32_t row, int32_t key, int32_t sq, int32_t sk) {
    constexpr int COLUMNS = KIND == ADD_F32 ? 1 : 2; /* in 4 bytes */
    const int32_t thread = thread_here(), lane = thread % 32, warp = thread % 128 / 32;
    constexpr int BATCH = 8; /* rows whose loads are in flight at once */
#pragma unroll 1
    for (int first = 0; first < 16 * (BLOCK_N / 64); first += BATCH) {
        const int32_t j = key + (first / 16 * 32 + lane) * COLUMNS;
        const int64_t left = min(j, sk - 1) * a.mask_stride[3];
        const int64_t right = min(j + 1, sk - 1) * a.mask_stride[3];
        uint32_t x[BATCH], y[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const char *from = t.mask + min(row + (first + i) % 16, sq - 1) * a.mask_stride[2];
            x[i] = KIND == ADD_F32 ? load_u32(from + left) : load_u16(from + left);
            y[i] = COLUMNS == 2 ? load_u16(from + right) : 0;
        }
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const int32_t r = (first + i) % 16;
            st_shared(m.at + first / 16 * PANEL_Q + (warp * 16 + r) * 128 +
                          ((lane / 4 ^ r % 8) << 4) + lane % 4 * 4,
                      x[i] | y[i] << 16);
        }
    }
    __syncwarp();
}

/* A block's first tile, before its scores. */
DEVICE void begin_mask_tile(const score_args &a, const score_tile &t, const mask_tile &m,
                            int32_t row, int32_t key, int32_t sq, int32_t sk) {
    if (a.mask <= BITS || a.tiles) return;
    if (a.mask == ADD_F32)
        fill_mask_tile<ADD_F32>(a, t, m, row, key, sq, sk);
    else
        fill_mask_tile<ADD_F16>(a, t, m, row, key, sq, sk);
}

/* The warp's first row in a tile whose rows may all be the same one. */
DEVICE int32_t mask_tile_row(const score_args &a, int32_t thread) {
    return a.tile_rows ? thread % 128 / 32 * 16 : 0;
}

/* The two halves of a 16-bit mask's word. */
template <bool IS_BF16_MASK>
DEVICE float2 widen(uint32_t x) {
    if (IS_BF16_MASK) return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000));
    float2 y;
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\n"
        "cvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}"
        : "=f"(y.x), "=f"(y.y)
        : "r"(x));
    return y;
}

template <bool IS_BF16_MASK>
DEVICE void add_mask_tile(const score_args &a, float (&s)[BLOCK_N / 2], const mask_tile &m,
                          float unit) {
    if (!m.there) enter_mask_tile(a, m);
#pragma unroll
    for (int j = 0; j < BLOCK_N / 8; j += 2) {
        uint32_t x[4];
        ldmatrix_x4(x, (m.row ^ j % 8 << 4) + j / 8 * PANEL_Q);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float2 y = widen<IS_BF16_MASK>(x[i]);
            s[4 * j + 2 * i] = fmaf(s[4 * j + 2 * i], unit, y.x);
            s[4 * j + 2 * i + 1] = fmaf(s[4 * j + 2 * i + 1], unit, y.y);
        }
    }
    leave_mask_tile(a, m);
}

/* Of float32, in halves. `row`: the warp's first. */
DEVICE void add_float_mask(const score_args &a, const score_tile &t, float (&s)[BLOCK_N / 2],
                           mask_tile m, int32_t row, int32_t key, int32_t sq, int32_t sk,
                           float unit) {
    const int32_t thread = thread_here(), lane = thread % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if (half && !a.tiles) fill_mask_tile<ADD_F32>(a, t, m, row, key + BLOCK_N / 2, sq, sk);
        m.parity = half;
        enter_mask_tile(a, m);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int32_t place = a.tile_rows ? mask_tile_row(a, thread) + lane / 4 + 8 * r : 0;
#pragma unroll
            for (int j = 0; j < BLOCK_N / 16; ++j) {
                float &left = s[4 * (half * (BLOCK_N / 16) + j) + 2 * r];
                float &right = s[4 * (half * (BLOCK_N / 16) + j) + 2 * r + 1];
                float2 x =
                    ld_shared_v2(m.at + j / 4 * PANEL_Q + place * 128 +
                                 ((j % 4 * 2 + lane % 4 / 2 ^ place % 8) << 4) + lane % 2 * 8);
                left = fmaf(left, unit, x.x);
                right = fmaf(right, unit, x.y);
            }
        }
        leave_mask_tile(a, m);
    }
}

/* A block's tiles of a float mask, for each warpgroup; n of them went before. */
DEVICE void bring_mask(const kernel_args &a, smem_layout &smem, const work_tile &t, int32_t key,
                       uint32_t &n) {
    const score_args &s = a.scores;
    const int columns = s.tiles == 2 ? 32 : 64; /* of a panel */
    for (int i = 0; i < s.tiles; ++i, ++n)
        for (int w = 0; w < WARPGROUPS; ++w) {
            uint32_t full = smem_address(&smem.mask_full[w]), to = smem_address(smem.mask[w]);
            mbarrier_wait(smem_address(&smem.mask_empty[w]), n & 1 ^ 1);
            mbarrier_arrive_expect_tx(full, BLOCK_N / 64 * (s.tile_rows ? PANEL_Q : 128));
            for (int c = 0; c < BLOCK_N / 64; ++c)
                cp_async_bulk_tensor_load(to + c * PANEL_Q, &s.mask_map,
                                          key + (i * (BLOCK_N / 64) + c) * columns,
                                          s.tile_rows ? t.row + 64 * w : 0, t.h * s.mask_moves[0],
                                          t.b * s.mask_moves[1], full, EVICT_NORMAL);
        }
}

#endif
