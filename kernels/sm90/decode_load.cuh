/* decode_load.cuh - how K and V come: a warp brings boxes of the copy engine, a page or a block
 * each; or each warp that computes brings a share of a block's rows, by copies of each lane's own.
 * Where a block's keys lie is looked up a block ahead.
 */
#ifndef FASTATTN_SM90_DECODE_LOAD_CUH
#define FASTATTN_SM90_DECODE_LOAD_CUH

#include "sm90/decode_args.cuh"
#include "sm90/ptx.cuh"

/* A ring's next stage, and the parity of its lap. */
struct stage {
    int32_t at;
    uint32_t lap;
};

DEVICE void advance(stage &s) {
    const bool wraps = ++s.at == STAGES;
    s.at = wraps ? 0 : s.at;
    s.lap ^= wraps;
}

#if IS_STRIDED

static constexpr int OWN_ROWS = BLOCK_N / MMA_WARPS; /* of a block, that a warp brings */
static_assert(OWN_ROWS <= 32, "a lane looks up one");
static constexpr bool HAS_ROOM = D * ROWS < 256 * 64; /* for registers */
static constexpr int UNROLL = HAS_ROOM ? 4 : 1;

/* The key of a lane's row of a block; none is past the last key that is seen. */
DEVICE key_place find_row(const decode_args &a, const decode_tile &t, int32_t block) {
    const int32_t row = threadIdx.x / 32 * OWN_ROWS + threadIdx.x % OWN_ROWS;
    return find_key(a, t.b, min(block * BLOCK_N + row, t.some.end - 1));
}

/* A warp's rows of a block of K or V; those from `rows` on are 0. */
template <int COLUMNS>
DEVICE void load_rows(const decode_array &array, uint32_t to, int32_t head, key_place place,
                      int32_t rows, uint32_t full) {
    constexpr int CHUNKS = COLUMNS / 8, AT_ONCE = 32 / CHUNKS; /* rows */
    const fa_tensor &t = array.tensor;
    const int32_t lane = threadIdx.x % 32, chunk = lane % CHUNKS;
    const int32_t d = (int32_t)t.shape[3] - 8 * chunk;
    const int64_t column = (head * t.stride[1] + 8 * chunk * t.stride[3]) * 2;
    const int64_t own = (place.place * t.stride[0] + place.row * t.stride[2]) * 2;
    to += chunk / 8 * PANEL;
#pragma unroll UNROLL
    for (int i = 0; i < OWN_ROWS; i += AT_ONCE) {
        const int32_t mine = i + lane / CHUNKS, row = threadIdx.x / 32 * OWN_ROWS + mine;
        const char *from = (const char *)t.data + shuffle(own, mine) + column;
        const uint32_t at = to + row * 128 + ((chunk ^ row) % 8 << 4);
        const int32_t columns = row < rows ? d : 0;
        if (columns <= 0) from = (const char *)t.data;
        copy_columns(at, from, array.width, 2 * t.stride[3], columns);
    }
    if (array.width == 2)
        mbarrier_arrive(full);
    else
        cp_async_mbarrier_arrive(full);
}

/* Where a warp's loads have come to. */
struct loads {
    int32_t block;
    stage at;
    key_place next;
};

DEVICE loads start_loads(const decode_args &a, const decode_tile &t) {
    loads l = {t.first, {0, 0}, {0, 0}};
    if (HAS_ROOM && t.first < t.last) l.next = find_row(a, t, t.first);
    return l;
}

/* A block's rows, if there is one; where those of the next lie is looked up meanwhile. */
DEVICE void load_block(loads &l, const decode_args &a, decode_smem &smem, const decode_tile &t) {
    if (l.block >= t.last) return;
    const key_place here = HAS_ROOM ? l.next : find_row(a, t, l.block);
    const int32_t rows = t.some.end - l.block * BLOCK_N;
    if (HAS_ROOM && l.block + t.step < t.last) l.next = find_row(a, t, l.block + t.step);
    mbarrier_wait(smem_address(&smem.k_empty[l.at.at]), l.at.lap ^ 1);
    load_rows<D>(a.k, smem_address(smem.k[l.at.at]), t.head, here, rows,
                 smem_address(&smem.k_full[l.at.at]));
    mbarrier_wait(smem_address(&smem.v_empty[l.at.at]), l.at.lap ^ 1);
    load_rows<DV>(a.v, smem_address(smem.v[l.at.at]), t.head, here, rows,
                  smem_address(&smem.v_full[l.at.at]));
    l.block += t.step;
    advance(l.at);
}

#else

/* A lane's box of a block, if it has one. A page of its own is looked up for keys that are seen; in
 * place of others, the last of those. */
DEVICE key_place find_box(const decode_args &a, const decode_tile &t, int32_t block) {
    const int32_t key = block * BLOCK_N + (int)threadIdx.x % 32 * a.box_rows;
    return find_key(a, t.b, a.pages.table ? min(key, t.some.end - 1) : key);
}

template <int COLUMNS>
DEVICE void load_boxes(const decode_array &array, uint32_t to, int32_t head, key_place p,
                       uint32_t full) {
#pragma unroll
    for (int i = 0; i < COLUMNS / 64; ++i)
        cp_async_bulk_tensor_load(to + i * PANEL, &array.map, 64 * i, p.row, head * array.moves[0],
                                  p.place * array.moves[1], full, EVICT_FIRST);
}

DEVICE void load_keys(const decode_args &a, decode_smem &smem, const decode_tile &t) {
    const int32_t lane = threadIdx.x % 32, boxes = BLOCK_N / a.box_rows;
    stage s = {0, 0};
    if (t.first >= t.last) return;
    key_place next = find_box(a, t, t.first);
#pragma unroll 1
    for (int32_t block = t.first; block < t.last; block += t.step, advance(s)) {
        const key_place here = next;
        const uint32_t to = lane * a.box_rows * 128;
        const uint32_t k_full = smem_address(&smem.k_full[s.at]);
        const uint32_t v_full = smem_address(&smem.v_full[s.at]);
        if (block + t.step < t.last) next = find_box(a, t, block + t.step);
        mbarrier_wait(smem_address(&smem.k_empty[s.at]), s.lap ^ 1);
        if (lane == 0) mbarrier_arrive_expect_tx(k_full, K_BYTES);
        __syncwarp();
        if (lane < boxes) load_boxes<D>(a.k, smem_address(smem.k[s.at]) + to, t.head, here, k_full);
        mbarrier_wait(smem_address(&smem.v_empty[s.at]), s.lap ^ 1);
        if (lane == 0) mbarrier_arrive_expect_tx(v_full, V_BYTES);
        __syncwarp();
        if (lane < boxes)
            load_boxes<DV>(a.v, smem_address(smem.v[s.at]) + to, t.head, here, v_full);
    }
}

#endif

#endif
