/* sparse_walk.cuh - the keys of a tile, step by step: first those that the list names, then those
 * of the window that is united with it.
 *
 * All threads look at entries of the list and keep those that some row sees, in their order; all
 * bring K and V of a step by copies of their own, while the steps before it are computed. A key
 * that no row of the tile sees is none: in its place are zeros.
 */
#ifndef FASTATTN_SM90_SPARSE_WALK_CUH
#define FASTATTN_SM90_SPARSE_WALK_CUH

#include "sm90/ptx.cuh"
#include "sm90/sparse_args.cuh"
#include "sm90/sparse_variant.h"

enum walk_phase { LISTED, WINDOW, THROUGH };

/* Where a tile's loads have come to; the same in all threads. */
struct sparse_walk {
    walk_phase phase;
    int32_t next;            /* entry of the list to be looked at */
    int32_t column, columns; /* of those at hand: the next one, and how many there are */
    int32_t stage;           /* that the next step comes to */
};

static constexpr int OWN_KEYS = BLOCK_N / WARPS; /* of a step, that a warp brings */
static_assert(OWN_KEYS <= 32, "a lane looks up one");

DEVICE sparse_walk start_walk() { return sparse_walk{LISTED, 0, 0, 0, 0}; }

/* Whether some row sees a key of a block, and not in its window alone. */
DEVICE bool is_seen(const sparse_args &a, const sparse_tile &t, int32_t block) {
    const int32_t sk = t.at.n.sk, size = 1 << a.shift;
    if (block < 0 || block >= (sk + size - 1) >> a.shift) return false;
    const int32_t begin = block << a.shift, end = min(sk - begin, size) + begin;
    if (begin >= t.some.end || end <= t.some.begin) return false;
    return begin < t.all_window.begin || end > t.all_window.end;
}

/* The entries that come next, as many as there is room for. */
DEVICE void look_at_entries(sparse_walk &w, const sparse_args &a, const sparse_tile &t,
                            listed_entries &kept) {
    const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const fa_tensor &e = a.lists.entries, &g = a.lists.gate;
    const int64_t first = list_at(e, t.at.batch, t.head, t.at.block);
    const int64_t first_gate = g.data ? list_at(g, t.at.batch, t.head, t.at.block) : 0;
    int32_t count = 0;
    bar_sync(1, THREADS); /* nobody reads those before */
#pragma unroll 1
    for (int32_t round = 0; w.next < t.length && count <= ENTRIES - THREADS; ++round) {
        const int32_t i = w.next + (int32_t)threadIdx.x;
        const int32_t block =
            i < t.length ? ((const int32_t *)e.data)[first + i * e.stride[3]] : -1;
        const bool keeps = is_seen(a, t, block);
        const uint32_t keepers = __ballot_sync(~0u, keeps);
        if (lane == 0) kept.counts[round % 2][warp] = __popc(keepers);
        bar_sync(1, THREADS);
        int32_t place = count + __popc(keepers & ((1u << lane) - 1));
#pragma unroll
        for (int j = 0; j < WARPS; ++j) {
            if (j < warp) place += kept.counts[round % 2][j];
            count += kept.counts[round % 2][j];
        }
        if (keeps) {
            kept.block[place] = block;
            kept.entry[place] = i;
            kept.gate[place] = g.data ? ((const float *)g.data)[first_gate + i * g.stride[3]] : 1.f;
        }
        w.next += THREADS;
    }
    bar_sync(1, THREADS);
    w.column = 0, w.columns = count << a.shift;
}

/* Whether there is a further step; then some of its columns are at hand. */
DEVICE bool find_step(sparse_walk &w, const sparse_args &a, const sparse_tile &t,
                      listed_entries &kept) {
    while (w.column >= w.columns) {
        if (w.phase == LISTED && w.next < t.length) {
            look_at_entries(w, a, t, kept);
        } else if (w.phase == LISTED) {
            w.phase = WINDOW;
            w.column = 0, w.columns = t.some_window.end - t.some_window.begin;
        } else {
            w.phase = THROUGH;
            return false;
        }
    }
    return true;
}

/* ---- copies -----------------------------------------------------------------------------------*/

/* Eight columns of a row, of which `columns` exist, by copies of BYTES. */
template <int BYTES>
DEVICE void copy_chunk(uint32_t to, const char *from, int32_t columns) {
#pragma unroll
    for (int i = 0; i < 16; i += BYTES) {
        const int32_t bytes = max(0, min(BYTES, 2 * columns - i));
        cp_async_or_zero<BYTES>(to + i, bytes ? from + i : from, bytes);
    }
}

DEVICE void copy_elements(uint32_t to, const char *from, int64_t step, int32_t columns) {
#pragma unroll 1
    for (int i = 0; i < 8; ++i)
        st_shared_b16(to + 2 * i, i < columns ? load_u16(from + i * step) : 0);
}

/* A warp's rows of a step of K or V, of which each lane below OWN_KEYS knows one: where it begins,
 * -1 for zeros. `base`: of the sequence's head. */
DEVICE void load_keys(const fa_tensor &t, int32_t width, const char *base, int64_t own,
                      uint32_t to) {
    constexpr int CHUNKS = D / 8, AT_ONCE = 32 / CHUNKS; /* rows */
    const int32_t lane = threadIdx.x % 32, chunk = lane % CHUNKS;
    const int32_t d = (int32_t)t.shape[3] - 8 * chunk;
    const int64_t column = 8 * chunk * t.stride[3] * 2;
    to += chunk / 8 * PANEL;
#pragma unroll 4
    for (int i = 0; i < OWN_KEYS; i += AT_ONCE) {
        const int32_t mine = i + lane / CHUNKS, row = threadIdx.x / 32 * OWN_KEYS + mine;
        const uint32_t low = __shfl_sync(~0u, (uint32_t)own, mine);
        const uint32_t high = __shfl_sync(~0u, (uint32_t)(own >> 32), mine);
        const int64_t offset = (int64_t)((uint64_t)high << 32 | low);
        const int32_t columns = offset == INT64_MIN ? 0 : d;
        const char *from = columns > 0 ? base + offset + column : (const char *)t.data;
        const uint32_t at = to + row * 128 + ((chunk ^ row) % 8 << 4);
        if (width == 16)
            copy_chunk<16>(at, from, columns);
        else if (width == 8)
            copy_chunk<8>(at, from, columns);
        else if (width == 4)
            copy_chunk<4>(at, from, columns);
        else
            copy_elements(at, from, 2 * t.stride[3], columns);
    }
}

/* Bytes from a head's first row; INT64_MIN: nothing. */
DEVICE int64_t key_at(const fa_tensor &t, int32_t key) {
    return key < 0 ? INT64_MIN : key * t.stride[2] * 2;
}

DEVICE const char *head_of(const fa_tensor &t, const sparse_tile &tile) {
    return (const char *)t.data +
           2 * (tile.at.batch * t.stride[0] + tile.head * t.stride[1] + tile.at.k * t.stride[2]);
}

/* The lane's own key of the step, and what is told of it. */
DEVICE int32_t choose_key(const sparse_walk &w, const sparse_args &a, const sparse_tile &t,
                          const listed_entries &kept, step_columns &to) {
    const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int32_t row = warp * OWN_KEYS + lane % OWN_KEYS, column = w.column + row;
    int32_t key = -1, entry = -1;
    float gate = 1.f;
    bool is_whole = false;
    if (column < w.columns) {
        if (w.phase == WINDOW) {
            key = t.some_window.begin + column;
            is_whole = is_in(t.all_window, key);
        } else {
            const int32_t place = column >> a.shift;
            key = (kept.block[place] << a.shift) + (column & ((1 << a.shift) - 1));
            gate = kept.gate[place], entry = kept.entry[place];
            is_whole = is_in(t.all, key) && !is_in(t.some_window, key);
            if (!is_in(t.some, key)) key = -1;
        }
    }
    const uint32_t not_whole = __ballot_sync(~0u, !is_whole);
    if (lane < OWN_KEYS) to.key[row] = key, to.gate[row] = gate, to.entry[row] = entry;
    if (lane == 0) to.kind[warp] = (not_whole ? 0 : IS_WHOLE) | (w.phase == WINDOW ? OF_WINDOW : 0);
    return key;
}

/* The next step, if there is one: its keys are chosen and on their way. Called by all threads, when
 * nobody reads the stage any more. */
template <typename SMEM>
DEVICE bool bring_step(sparse_walk &w, const sparse_args &a, const sparse_tile &t, SMEM &smem) {
    if (w.phase == THROUGH || !find_step(w, a, t, smem.kept)) {
        cp_async_commit_group();
        return false;
    }
    const int32_t key = choose_key(w, a, t, smem.kept, smem.columns[w.stage]);
    load_keys(a.k, a.k_width, head_of(a.k, t), key_at(a.k, key), smem_address(smem.k[w.stage]));
    load_keys(a.v, a.v_width, head_of(a.v, t), key_at(a.v, key), smem_address(smem.v[w.stage]));
    cp_async_commit_group();
    w.column += BLOCK_N;
    w.stage = w.stage + 1 == STAGES ? 0 : w.stage + 1;
    return true;
}

#endif
