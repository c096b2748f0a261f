/* fwd_load_pages.cuh - blocks of a cache's keys, each in pages of its own: boxes of the copy
 * engine, a page or a block each; or, of a strided variant, rows by the lanes of a warp.
 */
#ifndef FASTATTN_SM90_FWD_LOAD_PAGES_CUH
#define FASTATTN_SM90_FWD_LOAD_PAGES_CUH

#include "sm90/fwd_args.cuh"
#include "sm90/fwd_smem.h"
#include "sm90/page_rows.cuh"

/* Pages are looked up for keys that are seen; in place of others, the last of those. */
DEVICE key_place find_seen(const kernel_args &a, const work_tile &t, int32_t key) {
    return find_key(a.pages, a.by_size, t.b, min(key, t.visible.end - 1));
}

#if IS_STRIDED

static constexpr int TURNS_OF_ROWS = BLOCK_N / 32;

/* Rows that are all there, in chunks of 16 bytes: `own` are those of this lane, in bytes. */
template <int COLUMNS>
DEVICE void copy_whole(uint32_t smem, const char *column, const int64_t (&own)[TURNS_OF_ROWS]) {
    constexpr int CHUNKS = panels<COLUMNS> * 8, AT_ONCE = 32 / CHUNKS;
    const int32_t lane = threadIdx.x % 32, chunk = lane % CHUNKS, row = lane / CHUNKS;
    smem += chunk / 8 * PANEL_N + row * 128 + ((chunk ^ row) % 8 << 4);
#pragma unroll
    for (int turn = 0; turn < TURNS_OF_ROWS; ++turn, smem += 32 * 128)
#pragma unroll
        for (int i = 0; i < 32; i += AT_ONCE)
            cp_async_or_zero<16>((smem ^ i % 8 << 4) + i * 128,
                                 column + shuffle(own[turn], i + row), 16);
}

/* BLOCK_N rows of K or V (WHICH) from key `first` on; those that no row sees are 0. */
template <int COLUMNS, int WHICH>
DEVICE void load_pages(const kernel_args &a, const work_tile &t, uint32_t smem,
                       const fa_tensor &from, int32_t first, const int32_t (&)[2], uint32_t barrier,
                       uint64_t) {
    constexpr int CHUNKS = panels<COLUMNS> * 8, AT_ONCE = 32 / CHUNKS; /* rows */
    const int32_t lane = threadIdx.x % 32, chunk = lane % CHUNKS, width = a.widths[WHICH - 1];
    const int32_t d = (int32_t)from.shape[3] - 8 * chunk, rows = t.visible.end - first;
    const char *column =
        (const char *)from.data + 2 * (t.h_k * from.stride[1] + 8 * chunk * from.stride[3]);
    int64_t own[TURNS_OF_ROWS];
#pragma unroll
    for (int turn = 0; turn < TURNS_OF_ROWS; ++turn) {
        const key_place p = find_seen(a, t, first + 32 * turn + lane);
        own[turn] = 2 * (p.place * from.stride[0] + p.row * from.stride[2]);
    }
    if (width == 16 && rows >= BLOCK_N && from.shape[3] == COLUMNS) {
        copy_whole<COLUMNS>(smem, column, own);
    } else {
        smem += chunk / 8 * PANEL_N;
#pragma unroll
        for (int turn = 0; turn < TURNS_OF_ROWS; ++turn)
#pragma unroll 1
            for (int32_t i = 0; i < 32; i += AT_ONCE) {
                const int32_t mine = i + lane / CHUNKS, row = 32 * turn + mine;
                const int32_t columns = row < rows ? max(d, 0) : 0;
                const char *source = column + shuffle(own[turn], mine);
                copy_columns(smem + row * 128 + ((chunk ^ row) % 8 << 4),
                             columns ? source : (const char *)from.data, width, 2 * from.stride[3],
                             columns);
            }
    }
    cp_async_wait();
    fence_proxy_async();
    mbarrier_arrive(barrier);
}

#else

/* A lane's box. */
template <int COLUMNS, int WHICH>
DEVICE void load_pages(const kernel_args &a, const work_tile &t, uint32_t smem,
                       const CUtensorMap &from, int32_t first, const int32_t (&moves)[2],
                       uint32_t barrier, uint64_t policy) {
    const int32_t columns = a.columns[WHICH];
    const int32_t row = (int32_t)threadIdx.x % 32 * a.box_rows;
    if (row == 0) mbarrier_arrive_expect_tx(barrier, BLOCK_N * 2 * columns);
    __syncwarp();
    if (row >= BLOCK_N) return;
    const key_place p = find_seen(a, t, first + row);
#pragma unroll
    for (int c = 0; c < COLUMNS; c += 64)
        if (c == 0 || c < columns)
            cp_async_bulk_tensor_load(smem + c * 2 * BLOCK_N + row * 128,
                                      c + 64 <= columns ? &from : &a.tails[WHICH], c, p.row,
                                      t.h_k * moves[0], p.place * moves[1], barrier, policy);
}

#endif

#endif
