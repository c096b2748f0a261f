/* fwd_load_raw.cuh - K and V whose rows lie side by side, or nearly, and begin anywhere: the copy
 * engine brings them as they lie in memory, and a warp moves them to their places, a row a lane.
 *
 * What comes is in units of 16 bytes, of which the first and the last may be in part no row's of
 * the block, but are the array's: where it begins or ends within one, lanes load the few elements
 * there themselves. They come in pieces, a ring of them, and those of the next block set out while
 * this one is moved.
 */
#ifndef FASTATTN_SM90_FWD_LOAD_RAW_CUH
#define FASTATTN_SM90_FWD_LOAD_RAW_CUH

#include "sm90/fwd_args.cuh"
#include "sm90/fwd_load_strided.cuh"
#include "sm90/fwd_smem.h"
#include "sm90/ptx.cuh"

struct raw_rows {
    uint32_t smem, full;         /* where the ring begins, and its barriers */
    int32_t width, pitch;        /* bytes of a row, and from row to row */
    int32_t rows, bytes;         /* of a piece */
    int32_t ring;                /* pieces that there is room for */
    int32_t slot, parity, ahead; /* the next piece's; how many are on their way */
    int64_t begin, end;          /* addresses of the array's whole units */
    int64_t head;                /* of row 0 */
};

DEVICE raw_rows raw_rows_of(const fa_tensor &t, const uint8_t *smem, const uint64_t *full) {
    raw_rows r = {smem_address(smem), smem_address(full)};
    r.width = 2 * (int32_t)t.shape[3];
    r.pitch = 2 * (int32_t)t.stride[2];
    /* From anywhere in 128 bytes to the end of a unit, and a word more. */
    for (r.rows = 64; (r.bytes = (r.rows - 1) * r.pitch + r.width + 273 & ~127) > RAW_BYTES;)
        r.rows /= 2;
    r.ring = min(RAW_BYTES / r.bytes, RING);
    r.begin = (int64_t)t.data + 15 & -16;
    r.end =
        (int64_t)element_at(t, t.shape[0] - 1, t.shape[1] - 1, t.shape[2] - 1, t.shape[3]) & -16;
    return r;
}

/* The i-th piece behind the next one sets out: `rows` from `from` on. The copy engine likes equal
 * places in 128 bytes. */
DEVICE void fetch(const raw_rows &r, int32_t i, int64_t from, int32_t rows) {
    if (threadIdx.x % 32) return;
    const int32_t slot = r.slot + i - (r.slot + i >= r.ring ? r.ring : 0);
    const uint32_t full = r.full + 8 * slot, to = r.smem + slot * r.bytes + (from & 127);
    const int64_t start = max(from & -16, r.begin);
    const int64_t stop = min(from + (rows - 1) * r.pitch + r.width + 15 & -16, r.end);
    const int32_t bytes = max((int32_t)(stop - start), 0);
    mbarrier_arrive_expect_tx(full, bytes);
    if (bytes) cp_async_bulk_load(to + (int32_t)(start - from), (void *)start, bytes, full);
}

/* What fetch() left out of the same piece, which is at `to`. */
DEVICE void load_ends(const raw_rows &r, uint32_t to, int64_t from, int32_t rows) {
    const int64_t stop = from + (rows - 1) * r.pitch + r.width;
    if (from >= r.begin && stop <= r.end) return;
    const int32_t lane = threadIdx.x % 32;
    const int64_t at = (lane < 8 ? from : max(from, r.end)) + lane % 8 * 2;
    if (lane < 16 && at < (lane < 8 ? min(r.begin, stop) : stop))
        st_shared_b16(to + (int32_t)(at - from), *(const uint16_t *)at);
    __syncwarp();
}

/* CHUNKS of 16 bytes from `from` on to places of a panel's row, the first of which is `to`. LAST:
 * those that `keep` says, of one. */
template <int CHUNKS, bool LAST>
DEVICE void align_chunks(uint32_t to, uint32_t from, uint32_t select, const uint32_t (&keep)[4]) {
    uint32_t x[4 * CHUNKS + 1];
#pragma unroll
    for (int i = 0; i <= 4 * CHUNKS; ++i) x[i] = ld_shared(from + 4 * i);
#pragma unroll
    for (int i = 0; i < 4 * CHUNKS; ++i) {
        x[i] = __byte_perm(x[i], x[i + 1], select);
        if (LAST) x[i] &= keep[i % 4];
    }
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i)
        st_shared_v4(to ^ i << 4, x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]);
}

/* `rows` of d elements to panels of ROWS rows, the first of them a multiple of 8. */
template <int ROWS>
DEVICE void align_rows(uint32_t to, uint32_t from, int32_t pitch, int32_t rows, int32_t d) {
    constexpr int CHUNKS = PRODUCER_REGISTERS < 80 ? 4 : 8;
    const int32_t lane = threadIdx.x % 32;
    uint32_t keep[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) keep[i] = bit_mask(0, 16 * max(d % 8 - 2 * i, 0));
    to += lane % 8 << 4; /* the first chunk of a row whose number has this rest */
#pragma unroll 1
    for (int32_t row = lane; row < rows; row += 32) {
        uint32_t begin = from + row * pitch, at = to + row * 128, words = begin & ~3u;
        const uint32_t select = begin & 2 ? 0x5432 : 0x3210;
        int32_t left = d;
#pragma unroll 1
        for (; left >= 64; left -= 64, at += ROWS * 128)
#pragma unroll
            for (int j = 0; j < 8; j += CHUNKS, words += 16 * CHUNKS)
                align_chunks<CHUNKS, false>(at ^ j << 4, words, select, keep);
#pragma unroll 1
        for (int j = 0; left > 0; left -= 8, ++j, words += 16)
            if (left < 8)
                align_chunks<1, true>(at ^ j << 4, words, select, keep);
            else
                align_chunks<1, false>(at ^ j << 4, words, select, keep);
    }
}

/* The block of ROWS rows from the first-th on, of which `rows` exist, and zeros below; pieces of
 * the block from the next-th row on, of which `next_rows` exist, set out behind it. Columns past
 * the head size are 0 from the start. */
template <int ROWS>
DEVICE void load_raw(raw_rows &r, uint32_t to, int32_t first, int32_t rows, int32_t next,
                     int32_t next_rows, uint32_t barrier) {
    const int32_t lane = threadIdx.x % 32, d = r.width / 2;
    rows = min(rows, ROWS);
    const int32_t here = (rows + r.rows - 1) & -r.rows, end = here + min(next_rows, ROWS);
    int32_t issued = r.ahead * r.rows;
    for (int32_t row = 0;; row += r.rows) {
#pragma unroll 1
        for (; issued < end && r.ahead < r.ring; issued += r.rows, ++r.ahead) {
            const bool far = issued >= here;
            const int32_t from = far ? next + issued - here : first + issued;
            fetch(r, r.ahead, r.head + (int64_t)from * r.pitch,
                  min((far ? end : rows) - issued, r.rows));
        }
        if (row >= rows) break;
        const int64_t from = r.head + (int64_t)(first + row) * r.pitch;
        const uint32_t piece = r.smem + r.slot * r.bytes + (from & 127);
        const int32_t count = min(rows - row, r.rows);
        mbarrier_wait(r.full + 8 * r.slot, r.parity);
        load_ends(r, piece, from, count);
        align_rows<ROWS>(to + row * 128, piece, r.pitch, count, d);
        __syncwarp();
        const bool wrap = ++r.slot == r.ring;
        r.slot = wrap ? 0 : r.slot;
        r.parity ^= wrap;
        --r.ahead;
    }
#pragma unroll 1
    for (int32_t row = rows + lane; row < ROWS; row += 32)
#pragma unroll 1
        for (int32_t c = 0; c < d; c += 8)
            st_shared_v4(to + (c / 64 * ROWS + row) * 128 + ((c / 8 % 8 ^ row % 8) << 4), 0, 0, 0,
                         0);
    fence_proxy_async();
    mbarrier_arrive(barrier);
}

#endif
