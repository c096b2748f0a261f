/* bwd.cu - the portable backward: bwd_rows (bwd_rows.cuh), then two kernels of one loop, one for
 * dQ, one for dK and dV: without atomics, so that bits are the same in every run.
 *
 * A tile has query rows, whose Q and dO stay in shared memory, while K and V pass by; or, BY_KEYS,
 * keys, whose K and V stay, while Q and dO of the rows that see one of them pass by, of all query
 * heads that share the key head. Either way S and dP are products of the tile's rows with what
 * passes by, and gradients products of P z and dS with it: those of the forward (products_*.cuh),
 * in the same panels. Both kernels compute S and dP.
 */
#include "common/stream.cuh"
#include "sm80/bwd_args.cuh"
#include "sm80/bwd_launch.cuh"
#include "sm80/bwd_rows.cuh"
#include "sm80/bwd_scores.cuh"
#include "sm80/bwd_walk.cuh"
#if VARIANT_GENERAL
#include "sm80/bwd_mask.cuh"
#endif
#include "sm80/store.cuh"

/* What a tile sums: dQ; or dV, dK. */
template <bool BY_KEYS>
struct gradients {
    row_values x[BY_KEYS ? 2 : 1] = {};
};

template <bool BY_KEYS, bool GUARDED>
DEVICE void walk(const bwd_args &a, tile &t, gradients<BY_KEYS> &sums, uint32_t smem) {
    const uint32_t panels = smem + 2 * Q_BYTES;
    const int32_t group = BY_KEYS ? a.hq / a.hk : 1, first = t.h * group;
    if (BY_KEYS) {
        const fa_interval keys = {fa_row_interval(t.lengths, t.visible.begin).begin,
                                  fa_row_interval(t.lengths, t.visible.end - 1).end};
        load_tile_rows(a, t, smem, a.k, t.h, t.k, keys);
        load_tile_rows(a, t, smem + Q_BYTES, a.v, t.h, t.k, keys);
    } else {
        load_query_rows(a, t, smem);
    }
    bwd_ring r =
        start_ring<BY_KEYS>(a, t, first, first + group, BLOCK_PANELS < BY_KEYS ? 4 : 3 >, panels);
#pragma unroll 1
    for (bwd_cursor at = {first, t.begin, 0}; at.h < r.heads; advance(t, at, 1)) {
        row_scores s = {}, dp = {};
        multiply_rows<BY_KEYS, GUARDED>(a, t, r, s, dp, smem);
#if VARIANT_GENERAL
        if (BY_KEYS) t.h = at.h, find_scores(a.scores, t, a.b);
#endif
        weigh<BY_KEYS>(a, t, s, dp, at.h, at.block);
#pragma unroll
        for (int n = BY_KEYS ? 0 : 1; n < 2; ++n) {
            weights w;
            make_weights(w, n ? dp : s);
#pragma unroll
            for (int i = 0; i < PANELS; ++i)
                add_values<GUARDED>(sums.x[BY_KEYS ? n : 0], i * (OWN_PANEL / 8), w, n ? dp : s,
                                    take_panel<BY_KEYS>(a, t, r, panels, BY_KEYS ? n + 2 : 2));
        }
    }
}

DEVICE void store_gradient(const tile &t, const array_args &to, row_values &x, int32_t h,
                           int32_t first, real factor) {
    if (!to.data) return;
    char *base = to.data + t.batch * to.stride[0] + h * to.stride[1];
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        const int32_t row = row_of(t, i);
#pragma unroll
        for (int n = 0; n < OWN / 8; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) x[i / 2][n][i % 2 * 2 + e] *= factor;
        store_row(to, x, base + (int64_t)(first + row) * to.stride[2], row < t.rows, i);
    }
}

template <bool BY_KEYS>
DEVICE void run_tile(const bwd_args &a, tile t, uint32_t smem) {
    if (t.row >= t.rows) return;
    const int32_t h = t.h; /* walk() goes from head to head */
    gradients<BY_KEYS> sums;
    if (t.begin < t.end) walk<BY_KEYS, false>(a, t, sums, smem);
#if IS_F32
    bool finite = all_finite(sums.x[0]);
    if (BY_KEYS) finite &= all_finite(sums.x[1]);
    if (__syncthreads_or(!finite)) {
        t.h = h;
        sums = gradients<BY_KEYS>();
        walk<BY_KEYS, true>(a, t, sums, smem);
    }
#endif
    if (BY_KEYS) {
        store_gradient(t, a.dv, sums.x[0], h, t.k, 1);
        store_gradient(t, a.dk, sums.x[1], h, t.k, a.factor);
    } else {
        store_gradient(t, a.dq, sums.x[0], h, t.q, a.factor);
    }
}

__global__ void __launch_bounds__(THREADS) Q_KERNEL(const __grid_constant__ bwd_args a) {
    extern __shared__ __align__(128) uint8_t raw[];
    wait_for_stream();
    let_next_start();
    run_tile<false>(a, find_tile(a), smem_address(raw));
}

__global__ void __launch_bounds__(THREADS) VARIANT_NAME(const __grid_constant__ bwd_args a) {
    extern __shared__ __align__(128) uint8_t raw[];
    wait_for_stream();
    let_next_start();
    run_tile<true>(a, find_key_tile(a), smem_address(raw));
}

#if VARIANT_GENERAL
__global__ void __launch_bounds__(THREADS) MASK_KERNEL(const __grid_constant__ bwd_mask_args a) {
    extern __shared__ __align__(128) uint8_t raw[];
    wait_for_stream();
    let_next_start();
    run_part(a, raw);
}
#endif
