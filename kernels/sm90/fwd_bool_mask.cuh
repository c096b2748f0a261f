/* fwd_bool_mask.cuh - the bits of a bool mask, which the launch before packed (mask_bits.h): one
 * word for a thread's scores of a row. General variants only.
 */
#ifndef FASTATTN_SM90_FWD_BOOL_MASK_CUH
#define FASTATTN_SM90_FWD_BOOL_MASK_CUH

#include "common/compiler.cuh"
#include "sm90/fwd_args.cuh"
#include "sm90/fwd_pipeline.cuh"
#include "sm90/fwd_smem.h"
#include "sm90/fwd_visibility.cuh"
#include "sm90/ptx.cuh"

/* Which scores of a block this thread's two rows see, a bit each. */
DEVICE void load_row_mask(const score_args &a, const score_tile &t, uint32_t (&seen)[2],
                          int32_t row, int32_t key) {
    const uint32_t *words =
        a.words + 4 * fa_bits_at(&a.bits, t.plane, key / FA_BITS_KEYS, row) + threadIdx.x % 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) seen[r] = load_u32(words + 32 * r) >> key % FA_BITS_KEYS / 4;
}

/* Writes zeros over the rows of V whose bit in `seen`, as words of the packed mask, is clear. */
DEVICE void clear_unseen(const uint32_t (&seen)[4], uint8_t *v, int32_t key, int warpgroup) {
    for (int i = thread_here() % 128; i < V_BYTES / 16; i += 128) {
        int32_t n = i / 8 % BLOCK_N + key % FA_BITS_KEYS, c = n / 2 % 4;
        uint32_t word = c == 0 ? seen[0] : c == 1 ? seen[1] : c == 2 ? seen[2] : seen[3];
        if (!(word >> (n / 8 * 2 + n % 2) & 1)) ((uint4 *)v)[i] = make_uint4(0, 0, 0, 0);
    }
    fence_proxy_async();
    sync_warpgroup(warpgroup);
}

/* Writes zeros over the rows of V that no row of the tile sees: 0 * NaN is NaN. As clear_hidden_v
 * in fwd_visibility.cuh; both warpgroups write the same. */
DEVICE void clear_holes(const score_args &a, const score_tile &t, uint8_t *v, int32_t row,
                        int32_t key, int warpgroup) {
    uint32_t seen[4] = {0, 0, 0, 0};
#pragma unroll
    for (int w = 0; w < WARPGROUPS; ++w) {
        uint4 x = load_v4(a.columns + fa_columns_at(&a.bits, t.plane, key / FA_BITS_KEYS,
                                                    row / FA_BITS_ROWS + w));
        seen[0] |= x.x, seen[1] |= x.y, seen[2] |= x.z, seen[3] |= x.w;
    }
    clear_unseen(seen, v, key, warpgroup);
}

/* As row_mask_of(), with a bool mask. */
DEVICE row_mask bool_row_mask(const kernel_args &a, const work_tile &t, int32_t row, int32_t key,
                              int warpgroup) {
    row_mask seen;
    load_row_mask(a.scores, t.score, seen.rows, row, key);
    if (a.scores.bits.mask_only && visibility_of(t, key / BLOCK_N, warpgroup) != WHOLE) {
        const row_mask inside = row_mask_of(t, row, key, warpgroup);
#pragma unroll
        for (int r = 0; r < 2; ++r) seen.rows[r] &= inside.rows[r];
    }
    return seen;
}

/* clear_holes() where a bool mask and intervals hide keys, each its own: a row and a thread of the
 * warpgroup at a time, for what both together leave to the tile's rows is in no array. */
DEVICE void clear_holes_of_both(const kernel_args &a, const work_tile &t, smem_layout &smem,
                                uint8_t *v, int32_t key, int warpgroup) {
    static_assert(BLOCK_M == 128, "a row a thread");
    const int32_t thread = thread_here();
    const int32_t row = t.row + thread % 128, warp = thread % 128 / 32;
    const int32_t skip = key % FA_BITS_KEYS;
    const uint4 mask = load_v4(
        a.scores.words + 4 * fa_bits_at(&a.scores.bits, t.score.plane, key / FA_BITS_KEYS, row));
    const fa_interval inside = fa_row_interval(t.lengths, row);
    uint32_t seen[4] = {mask.x, mask.y, mask.z, mask.w};
#pragma unroll
    for (int c = 0; c < 4; ++c) {
        const int32_t column = key + 2 * c;
        const uint32_t keys = scores_of(inside.begin - column, inside.end - column);
        seen[c] = __reduce_or_sync(~0u, seen[c] & keys << skip / 4);
    }
    uint4(&columns)[4] = (uint4(&)[4])smem.columns[warpgroup];
    if (thread % 32 == 0) columns[warp] = make_uint4(seen[0], seen[1], seen[2], seen[3]);
    sync_warpgroup(warpgroup);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
        const uint4 x = columns[w];
        seen[0] |= x.x, seen[1] |= x.y, seen[2] |= x.z, seen[3] |= x.w;
    }
    clear_unseen(seen, v, key, warpgroup);
}

#endif
