/* fwd_out.cuh - how the rows of a tile leave: the division by l, the vote, the way out.
 *
 * Every warp takes its own 16 rows to memory: by the copy engine from its part of shared memory
 * (STAGED), or, where there is no room for that, 16 bytes a thread after an exchange of registers.
 */
#ifndef FASTATTN_SM90_FWD_OUT_CUH
#define FASTATTN_SM90_FWD_OUT_CUH

#include "common/compiler.cuh"
#include "common/quads.cuh"
#include "mask.h"
#include "sm90/fwd_args.cuh"
#include "sm90/fwd_compiler.cuh"
#include "sm90/fwd_pipeline.cuh"
#include "sm90/fwd_products.cuh"
#include "sm90/fwd_smem.h"
#include "sm90/fwd_visibility.cuh"
#include "sm90/loads.h"
#include "sm90/ptx.cuh"
#include "sm90/softmax.cuh"
#include "sm90/wgmma.cuh"

/* These are the rows of no tile. */
DEVICE void close_rows(rows_state &st, const output_rows &out) {
    forget_output(st.o, out);
    st.open = false;
    st.fresh = true;
}

/* What the end of a tile needs besides O: known as soon as the last exponentials are. */
struct epilogue {
    float inverse[2]; /* what O is multiplied by: 1 / l; 0: the row is 0 whatever O holds */
    bool holds;       /* l is in range and top precise, where that matters */
    int32_t row;      /* the first of this thread's two */
    int32_t rows;     /* those at or past this one are not stored */
};

DEVICE uint16_t *out_row(const kernel_args &a, const work_tile &t, int32_t i) {
    return (uint16_t *)a.out.data + t.b * a.out.stride[0] + t.h * a.out.stride[1] +
           (t.q + i) * a.out.stride[2];
}

/* The sink joins a row's sum `l` of 2^minus; its weight may be far beyond the row's. Returns what O
 * is multiplied by. */
DEVICE float add_sink(float sink, float &l, float &minus) {
    float over = fmaf(sink, 1.4426950408889634f, minus);
    float shrink = over > 0.f ? ex2_approx(-over) : 1.f;
    l = fmaf(l, shrink, over > 0.f ? 1.f : ex2_approx(over));
    minus -= fmaxf(over, 0.f);
    return __fdividef(shrink, l);
}

/* Writes lse. (It may be wrong, like the rows, if the tile comes again: then it is written again,
 * by the same thread.) The softmax may start with other rows. */
DEVICE epilogue begin_epilogue(const kernel_args &a, const work_tile &t, rows_state &st,
                               int warpgroup) {
    epilogue e;
    e.row = first_row(t, warpgroup);
    e.rows = t.warpgroups >> warpgroup & 1 ? t.rows : 0;
    const bool watch = !REDOES || t.watch;
    e.holds = watch || !softmax_is_coarse(st.softmax);
    float l[2];
    bool sees[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        l[r] = ONES ? st.o[DV / 2 * ONES + 2 * r] : softmax_row_sum(st.softmax.l[r]);
        if (ONES && st.fresh) l[r] = 0.f;
        sees[r] = e.row + 8 * r < t.lengths.sq;
    }
    if (__any_sync(~0u, l[0] == 0.f || l[1] == 0.f)) /* does it see no key, or none that counts? */
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const fa_interval keys = fa_row_interval(t.lengths, e.row + 8 * r);
            sees[r] = keys.begin < keys.end;
        }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        e.holds &= watch || !sees[r] || (l[r] > 0x1p-50f && l[r] < 0x1p120f);
        const bool empty = !sees[r] || l[r] == 0.f; /* the top gives 1: 0 means none is finite */
        float minus = st.softmax.minus[r];
        e.inverse[r] = a.sink ? add_sink(t.sink, l[r], minus) : rcp_approx(l[r]);
#if VARIANT_GENERAL
        e.inverse[r] *= a.scores.gain;
#endif
        if (empty) e.inverse[r] = 0.f;
        const int32_t row = e.row + 8 * r;
        if (a.lse && row < e.rows && threadIdx.x % 4 == 0) {
            const float lse = empty ? t.sink : (__log2f(l[r]) - minus) * 0.6931471805599453f;
            a.lse[t.b * a.lse_stride[0] + t.h * a.lse_stride[1] + (t.q + row) * a.lse_stride[2]] =
                row < t.lengths.sq ? lse : -INFINITY;
        }
    }
    softmax_start(st.softmax);
    return e;
}

/* The other half of the vote: whether every O is finite. A sum of products is finite only if all
 * factors are; of finite ones it is not if they are beyond 1e18, and then the tile comes again for
 * nothing. (x * 0 is NaN if x is not finite.) */
DEVICE bool is_finite(const output_rows &o, const epilogue &e) {
    bool finite = true;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        uint32_t probe = 0;
#pragma unroll
        for (int j = 0; j < DV / 8; j += 2)
            probe = fma_pair(o[2 * j + r], o[2 * (j + 1) + r], probe);
        finite &= e.inverse[r] == 0.f || (fma_pair(probe, 0, 0) & 0x7FFF7FFF) == 0;
    }
    return finite;
}

#if IS_STRIDED || HAS_SLICES
/* This thread's two rows, element by element. */
DEVICE void store_rows(const kernel_args &a, smem_layout &, const work_tile &t,
                       const output_rows &o, const epilogue &e) {
    const int32_t lane = threadIdx.x % 32;
    const int32_t skip = SLICES ? t.h_k * a.moves[2][0] % FA_SLICE : 0; /* other heads' columns */
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        uint16_t *to = out_row(a, t, e.row + 8 * r);
        const int32_t columns = e.row + 8 * r < e.rows ? (int32_t)a.out.shape[3] : 0;
#pragma unroll
        for (int j = 0; j < DV / 8; ++j) {
            const int32_t column = 8 * j + lane % 4 * 2 - skip;
            const uint32_t pair = o[2 * j + r];
            if (column >= 0 && column < columns) to[column * a.out.stride[3]] = (uint16_t)pair;
            if (column + 1 >= 0 && column + 1 < columns)
                to[(column + 1) * a.out.stride[3]] = (uint16_t)(pair >> 16);
        }
    }
}
#elif VARIANT_STAGED
/* The warp's 16 rows by the copy engine, from its part of shared memory; row by row where they are
 * not all the tile's. */
DEVICE void store_rows(const kernel_args &a, smem_layout &smem, const work_tile &t,
                       const output_rows &o, const epilogue &e) {
    const int32_t rows = e.rows, lane = threadIdx.x % 32;
    /* As the copy engine has it: chunk c of row r of a panel lies at c ^ r % 8. */
    uint8_t (&staged)[panels<DV>][O_BYTES] = smem.o[uniform(threadIdx.x / 32)];
    uint32_t row = smem_address(staged) + lane % 16 * 128;
#pragma unroll
    for (int j = 0; j < DV / 8; j += 2)
        stmatrix_x4(row + j / 8 * O_BYTES + ((j % 8 + lane / 16 ^ lane % 8) << 4), o[2 * j],
                    o[2 * j + 1], o[2 * j + 2], o[2 * j + 3]);
    const int32_t first = uniform(e.row - lane / 4);
    if (!uniform(first + 16 <= t.boxed)) { /* the next sequence's rows are not ours to write */
        __syncwarp();
        for (int i = lane; i < 16 * 8 * panels<DV>; i += 32) {
            int32_t r = i / 8 % 16, column = i / 128 * 64 + i % 8 * 8;
            uint4 chunk = *(uint4 *)&staged[i / 128][r * 128 + ((i % 8 ^ r % 8) << 4)];
            if (first + r < rows && column < a.out.shape[3])
                *(uint4 *)(out_row(a, t, first + r) + column) = chunk;
        }
        return;
    }
    fence_proxy_async();
    __syncwarp();
    if (lane == 0 && rows) {
        for (int c = 0; c < panels<DV>; ++c)
            cp_async_bulk_tensor_store(&a.out_map, smem_address(staged[c]), 64 * c, t.q + first,
                                       t.h, t.b * a.moves[3][1]);
        cp_async_bulk_commit_group();
    }
}
#else
/* As much as this thread's two rows, 16 bytes at a time, after an exchange with its quad. */
DEVICE void store_rows(const kernel_args &a, smem_layout &, const work_tile &t,
                       const output_rows &o, const epilogue &e) {
    const int32_t lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        uint16_t *to = out_row(a, t, e.row + 8 * r) + lane % 4 * 8;
        int32_t columns = e.row + 8 * r < e.rows ? (int32_t)a.out.shape[3] - lane % 4 * 8 : 0;
#pragma unroll
        for (int j = 0; j < DV / 8; j += 4) {
            uint32_t x[4];
#pragma unroll
            for (int k = 0; k < 4; ++k) x[k] = o[2 * (j + k) + r];
            transpose_quad(x);
            if (8 * j < columns) *(uint4 *)(to + 8 * j) = make_uint4(x[0], x[1], x[2], x[3]);
        }
    }
}
#endif

/* The rows of the n-th tile leave, and the warpgroup the tile; O and l are 0 again. All P V must
 * have ended. A warp that could not keep its tops says so: its warpgroup's rows come again. */
DEVICE void end_epilogue(const kernel_args &a, smem_layout &smem, int32_t n, rows_state &st,
                         const epilogue &e, int warpgroup) {
    const work_tile &t = smem.tiles[n % TILE_SLOTS];
    output_rows o;
    if (STAGED && threadIdx.x % 32 == 0) {
        /* The tile before must have been read; this tile's first store, if it comes again, must be
         * there: nothing else orders the two. */
        if (REDOES && t.watch)
            cp_async_bulk_wait_group();
        else
            cp_async_bulk_wait_group_read();
    }
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int j = 0; j < DV / 8; ++j) {
            st.o[4 * j + 2 * r] *= e.inverse[r], st.o[4 * j + 2 * r + 1] *= e.inverse[r];
            o[2 * j + r] = cvt_pack(st.o[4 * j + 2 * r], st.o[4 * j + 2 * r + 1]);
        }
    if (REDOES && __any_sync(~0u, !(e.holds && (t.watch || is_finite(o, e)))) &&
        threadIdx.x % 32 == 0 && e.rows)
        atomicOr(&smem.votes[n % TILE_SLOTS], 1u << warpgroup);
    if (__any_sync(~0u, e.inverse[0] == 0.f || e.inverse[1] == 0.f)) /* of padding O may be NaN */
#pragma unroll
        for (int j = 0; j < DV / 4; ++j)
            if (e.inverse[j % 2] == 0.f) o[j] = 0;
    __syncwarp();
    store_rows(a, smem, t, o, e);
    leave_tile(smem, n);
    close_rows(st, o);
}

#endif
