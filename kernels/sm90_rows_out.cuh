/* sm90_rows_out.cuh - how the rows of a tile leave: the division by l, the vote, the way out.
 *
 * A part of sm90_fwd.cu, which includes it behind rows_state. Every warp takes its own 16 rows to
 * memory, 16 bytes a thread: through its panel of shared memory (STAGED), or, where there is no
 * room for one, by exchanging registers.
 */
#ifndef FASTATTN_SM90_ROWS_OUT_CUH
#define FASTATTN_SM90_ROWS_OUT_CUH

/* O and l are 0, for the rows of item n. */
PTX void open_rows(rows_state &st, int32_t n) {
    softmax_start(st.softmax);
#pragma unroll
    for (int j = 0; j < (DV + 8 * ONES) / 2; ++j) st.o[j] = 0.f;
    wgmma_accumulators(st.o);
    st.open = n;
}

/* This warp has read item n for the last time. */
PTX void leave_item(smem_layout &smem, int32_t n) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(smem_address(&smem.item_empty[n % ITEMS]));
}

/* Two rows of O, divided by l and rounded: pair 2 * j + r holds columns 8j + 2 * (lane % 4) and the
 * next of row r. */
typedef uint32_t rows_out[DV / 4];

/* The vote: whether these rows' tops are precise, their sums in range and every O finite (x * 0 is
 * NaN if x is not). */
PTX bool kept_well(const rows_state &st, const rows_out &o, const float (&l)[2],
                   const bool (&live)[2]) {
    bool well = !softmax_is_coarse(st.softmax);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        uint32_t probe[2] = {0, 0};
#pragma unroll
        for (int j = 0; j < DV / 8; ++j) probe[j % 2] = fma_pair(o[2 * j + r], 0, probe[j % 2]);
        bool finite = ((probe[0] | probe[1]) & 0x7FFF7FFF) == 0;
        well &= !live[r] || (l[r] > 0x1p-50f && l[r] < 0x1p120f && finite);
    }
    return well;
}

PTX uint16_t *out_row(const kernel_args &a, const item &t, int32_t i) {
    return (uint16_t *)a.out.data + t.b * a.out.stride[0] + t.h * a.out.stride[1] +
           i * a.out.stride[2];
}

/* The rows that this thread holds, `row` and 8 below, of `rows` in all. */
PTX void store_rows(const kernel_args &a, smem_layout &smem, const item &t, const rows_out &o,
                    int32_t row, int32_t rows) {
    int32_t lane = threadIdx.x % 32;
#if ROW_STRIDED
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        uint16_t *to = out_row(a, t, row + 8 * r);
        int32_t columns = row + 8 * r < rows ? (int32_t)a.out.shape[3] : 0;
#pragma unroll
        for (int j = 0; j < DV / 8; ++j) {
            int32_t column = 8 * j + lane % 4 * 2;
            uint32_t pair = o[2 * j + r];
            if (column < columns) to[column * a.out.stride[3]] = (uint16_t)pair;
            if (column + 1 < columns) to[(column + 1) * a.out.stride[3]] = (uint16_t)(pair >> 16);
        }
    }
#elif ROW_STAGED
    /* Chunk c of row r of a panel lies at c ^ r % 8: no bank is asked twice at once. */
    uint32_t panel = smem_address(smem.o[threadIdx.x / 32]);
    uint32_t in = panel + lane % 16 * 128, out = panel + lane / 8 * 128;
    int32_t first = row - lane / 4 + lane / 8, left = rows - first;
    uint16_t *to = out_row(a, t, first) + lane % 8 * 8;
#pragma unroll
    for (int c = 0; c < DV; c += 64) {
        __syncwarp();
#pragma unroll
        for (int j = 0; j < 8 && c + 8 * j < DV; j += 2)
            stmatrix_x4(in + ((j + lane / 16 ^ lane % 8) << 4), o[c / 4 + 2 * j],
                        o[c / 4 + 2 * j + 1], o[c / 4 + 2 * j + 2], o[c / 4 + 2 * j + 3]);
        __syncwarp();
        bool inside = lane % 8 * 8 + c < a.out.shape[3];
#pragma unroll
        for (int i = 0; i < 16; i += 4) {
            uint4 x = ld_shared_v4(out + i * 128 + ((lane % 8 ^ lane / 8 ^ i % 8) << 4));
            if (inside && i < left) *(uint4 *)(to + i * a.out.stride[2] + c) = x;
        }
    }
#else
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        uint16_t *to = out_row(a, t, row + 8 * r) + lane % 4 * 8;
        int32_t columns = row + 8 * r < rows ? (int32_t)a.out.shape[3] - lane % 4 * 8 : 0;
#pragma unroll
        for (int j = 0; j < DV / 8; j += 4) {
            uint32_t x[4];
#pragma unroll
            for (int k = 0; k < 4; ++k) x[k] = o[2 * (j + k) + r];
            transpose_quad(x);
            if (8 * j < columns) *(uint4 *)(to + 8 * j) = make_uint4(x[0], x[1], x[2], x[3]);
        }
    }
#endif
}

/* The sink joins a row's sum `l` of 2^minus; its weight may be far beyond the row's. Returns what O
 * is multiplied by. */
PTX float add_sink(float sink, float &l, float &minus) {
    float over = fmaf(sink, 1.4426950408889634f, minus);
    float shrink = over > 0.f ? ex2_approx(-over) : 1.f;
    l = fmaf(l, shrink, over > 0.f ? 1.f : ex2_approx(over));
    minus -= fmaxf(over, 0.f);
    return __fdividef(shrink, l);
}

/* The open tile's rows leave, and the warpgroup its item; O and l are 0 again. All P V must have
 * ended. */
PTX void end_rows(const kernel_args &a, smem_layout &smem, rows_state &st, int warpgroup) {
    const item &t = smem.items[st.open % ITEMS];
    int32_t row = first_row(t, warpgroup);
    bool live[2], zero[2];
    float l[2], lse[2];
    rows_out o;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        fa_interval seen = fa_row_interval(&a.masks, t.lengths, row + 8 * r);
        l[r] = ONES ? st.o[DV / 2 * ONES + 2 * r] : softmax_row_sum(st.softmax.l[r]);
        live[r] = seen.begin < seen.end;
        zero[r] = !live[r];
        float sum = l[r], minus = st.softmax.minus[r];
        bool empty = !live[r] || l[r] == 0.f; /* the top gives 1: 0 means that no score is finite */
        float inverse = add_sink(t.sink, sum, minus);
#if ROW_GENERAL
        inverse *= a.scores.gain;
        zero[r] = empty || a.scores.gain == 0.f;
#endif
        lse[r] = empty ? t.sink : (__log2f(sum) - minus) * 0.6931471805599453f;
        if (row + 8 * r >= t.lengths.sq) lse[r] = -INFINITY;
        if (l[r] == 0.f) inverse = 0.f;
#pragma unroll
        for (int j = 0; j < DV / 8; ++j)
            o[2 * j + r] =
                cvt_pack(st.o[4 * j + 2 * r] * inverse, st.o[4 * j + 2 * r + 1] * inverse);
    }
    bool stores = t.warpgroups >> warpgroup & 1;
    if (KEPT) {
        bool bad = bar_red_or(1 + warpgroup, 128, !kept_well(st, o, l, live)) && !t.watch;
        if (bad && stores && threadIdx.x % 128 == 0)
            atomicOr(&smem.again[st.open % ITEMS], 1u << warpgroup);
        stores &= !bad;
    }
    if (__any_sync(~0u, zero[0] || zero[1])) /* one past its sequence may have read NaN as q */
#pragma unroll
        for (int j = 0; j < DV / 4; ++j)
            if (zero[j % 2]) o[j] = 0;
    int32_t rows = stores ? a.sq : 0;
#pragma unroll
    for (int r = 0; r < 2; ++r)
        if (row + 8 * r < rows && a.lse && threadIdx.x % 4 == 0)
            a.lse[t.b * a.lse_stride[0] + t.h * a.lse_stride[1] + (row + 8 * r) * a.lse_stride[2]] =
                lse[r];
    store_rows(a, smem, t, o, row, rows);
    leave_item(smem, st.open);
    open_rows(st, -1);
}

#endif
