/* sm90_fwd.cu - the Hopper forward kernel: stop 6 of 6. kernels/README.md has the pictures.
 *
 * One object per row of variants.def: setup.py passes the row's columns as ROW_<COLUMN>, and the
 * object exports one function, fa_launch_<name> (launch.cuh), at the end of this file.
 *
 * A block stays on its SM and works through tiles of 64 * WARPGROUPS query rows. One producer warp
 * brings Q, K and V by the copy engine; each MMA warpgroup owns 64 rows of the tile and keeps S, P
 * and O in registers. P V is issued 16 keys at a time, right after their exponentials.
 *
 * The softmax offset (softmax.cuh) comes from the first, masked blocks of a tile. KEPT rows never
 * look at it again: the main loop has no maximum at all. At the end of a tile each warpgroup votes
 * whether everything stayed finite and in range; if not, it stores nothing, and the producer brings
 * the tile again for the warpgroups that need it, with the loop that watches every score.
 *
 * STRIDED rows take arrays that the copy engine cannot address: three warps load in its place,
 * element by element, and O is stored likewise. Everything between is the same.
 */
#include "launch.cuh"
#include "rows.h"
#include "schedule.h"

#define PASTE_(a, b) a##b
#define PASTE(a, b) PASTE_(a, b)
#define PTX_TYPE_FA_BF16 "bf16"
#define PTX_TYPE_FA_F16 "f16"
#define FA_PTX_TYPE PASTE(PTX_TYPE_, ROW_DTYPE)
#include "softmax.cuh"

/* ---- the row ----------------------------------------------------------------------------------*/

static constexpr bool IS_BF16 = ROW_DTYPE == FA_BF16, KEPT = ROW_KEPT, ONES = ROW_ONES,
                      STRIDED = ROW_STRIDED;
static constexpr int D = ROW_D, DV = ROW_DV, WARPGROUPS = ROW_WARPGROUPS, BLOCK_N = ROW_BLOCK_N,
                     STAGES = ROW_STAGES, Q_BUFFERS = ROW_Q_BUFFERS,
                     BLOCKS_PER_SM = ROW_BLOCKS_PER_SM;
static constexpr int BLOCK_M = 64 * WARPGROUPS;
static constexpr int ITEMS = 4; /* tiles that the scheduler may be ahead */
typedef softmax_range<IS_BF16> range;

static_assert(D % 16 == 0 && DV % 16 == 0 && BLOCK_N % 16 == 0, "wgmma takes k by 16");
static_assert(!ONES || DV == 64, "the block of ones is the second panel of V");

/* Registers a thread: the launch gives all threads the same; the pool is threads times that. One
 * warpgroup needs no exchange, and then the producer is a warp instead of a warpgroup. */
static constexpr bool EXCHANGE = WARPGROUPS > 1;
static constexpr int THREADS = 128 * WARPGROUPS + (EXCHANGE ? 128 : 64);
static constexpr int POOL = 65536 / BLOCKS_PER_SM / THREADS / 8 * 8 * (WARPGROUPS + 1);
static constexpr int MMA_REGISTERS = ROW_MMA_REGISTERS;
static constexpr int PRODUCER_REGISTERS = EXCHANGE ? (POOL - WARPGROUPS * MMA_REGISTERS) : 0;
static_assert(!EXCHANGE || PRODUCER_REGISTERS >= 24, "the pool is too small");

static constexpr int LOADERS = STRIDED ? 96 : 1; /* threads: all but the scheduler's warp */
static_assert(!STRIDED || EXCHANGE, "strided rows load with a warpgroup");

/* P in registers, in pieces of 16 keys: all of a block, or a ring where registers are short. */
#ifndef RING
#define RING (WARPGROUPS == 4 ? 2 : BLOCK_N / 16)
#endif
static constexpr int P_RING = RING;

/* ---- shared memory: panels of 64 columns, 128 bytes a row, swizzled, each on 1024 bytes
 * --------*/

template <int COLUMNS>
static constexpr int panels = (COLUMNS + 63) / 64;
static constexpr int PANEL_Q = 64 * 128, PANEL_N = BLOCK_N * 128;
static constexpr int Q_BYTES = PANEL_Q * panels<(D > DV ? D : DV)>; /* of one warpgroup; O's too */
static constexpr int K_BYTES = PANEL_N * panels<D>, V_BYTES = PANEL_N * panels<DV>;

/* What the scheduler tells the others about a tile. */
struct item {
    int32_t tile;        /* the scheduler's own, to bring it again */
    int32_t b, h, row;   /* batch, query head, first query row */
    fa_lengths lengths;  /* of this sequence */
    int32_t begin, end;  /* key blocks that some row sees */
    int32_t left, right; /* how many of them, from either side, need the mask */
    int32_t warpgroups;  /* bit set of those that compute it; 0: no tile */
    int32_t watch;       /* the offset is not kept */
    int32_t last;        /* there will be no more */
};

struct smem_layout {
    uint8_t q[Q_BUFFERS][WARPGROUPS][Q_BYTES]; /* then O, on its way out */
    uint8_t k[STAGES][K_BYTES];
    uint8_t v[STAGES][V_BYTES];
    uint8_t ones[ONES ? PANEL_N : 16]; /* 64 more columns of V: O's column 64 becomes the row sum */
    uint64_t q_full[Q_BUFFERS][WARPGROUPS], q_empty[Q_BUFFERS];
    uint64_t k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
    uint64_t item_full[ITEMS], item_empty[ITEMS];
    item items[ITEMS];
    uint32_t again[ITEMS]; /* the votes: bit w, warpgroup w could not keep its offset */
};
static constexpr int SMEM_BYTES = sizeof(smem_layout) + 1024; /* room to align the base */

#if ROW_STRIDED
typedef fa_tensor array;
#else
typedef CUtensorMap array; /* {columns, rows, heads, batches} */
#endif

struct kernel_args {
    array q, k, v, out;
    fa_schedule schedule;
    fa_masks masks;
    int32_t sq, sk, hq, group; /* group: query heads per key head */
    int32_t watch;             /* 1: keep no offset anywhere */
    int32_t moves[3][2];       /* q, k, v: 0 where the stride of heads, of batches is 0 */
    float scale;               /* times log2(e) */
    float *lse;                /* (b, hq, sq), strides in elements; NULL: not wanted */
    int64_t lse_stride[3];
};

/* A ring of stages; the parity flips each time around. */
struct cursor {
    int stage;
    uint32_t parity;
};
PTX void advance(cursor &c) {
    if (++c.stage == STAGES) c.stage = 0, c.parity ^= 1;
}

/* The i-th key block of an item: the masked ones first, from the right, then from the left. */
PTX int32_t key_block(const item &t, int32_t i) {
    if (i < t.right) return t.end - 1 - i;
    if (i < t.right + t.left) return t.begin + i - t.right;
    return t.end - 1 - (i - t.left);
}

/* ---- the scheduler and the producer
 * -----------------------------------------------------------------*/

PTX void describe(const kernel_args &a, item &t) {
    fa_tile tile = fa_schedule_tile(&a.schedule, t.tile);
    t.b = tile.head / a.hq;
    t.h = tile.head % a.hq;
    t.row = tile.m_block * BLOCK_M;
    t.lengths = fa_sequence_lengths(&a.masks, t.b, a.sq, a.sk);
    t.begin = t.end = t.left = t.right = 0;
    t.warpgroups = (1 << WARPGROUPS) - 1;
    t.watch = a.watch || !KEPT;
    t.last = 0;
    if (t.row >= t.lengths.sq) return;
    int32_t last_row = min(t.row + BLOCK_M, t.lengths.sq) - 1;
    fa_interval first = fa_row_interval(&a.masks, t.lengths, t.row);
    fa_interval last = fa_row_interval(&a.masks, t.lengths, last_row);
    if (last.end <= first.begin) return;
    t.begin = first.begin / BLOCK_N;
    t.end = (last.end + BLOCK_N - 1) / BLOCK_N;
    int32_t seen_begin =
        (last.begin + BLOCK_N - 1) / BLOCK_N;               /* blocks that every row sees whole */
    int32_t seen_end = min(first.end / BLOCK_N, t.end - 1); /* the first block finds the offset */
    seen_begin = fa_clamp(seen_begin, t.begin, t.end);
    seen_end = fa_clamp(seen_end, seen_begin, t.end);
    t.right = t.end - seen_end;
    t.left = seen_begin - t.begin;
}

#if ROW_STRIDED
/* The i-th chunk of 16 bytes of ROWS rows in panels: its row, its first column, its place. */
template <int ROWS>
PTX uint32_t chunk(int i, int32_t &row, int32_t &column) {
    row = i / 8 % ROWS;
    column = i / 8 / ROWS * 64 + i % 8 * 8;
    return i / 8 * 128 + ((i % 8 ^ row % 8) << 4);
}

PTX uint16_t *element(const fa_tensor &t, int32_t b, int32_t h, int32_t row, int32_t column) {
    return (uint16_t *)t.data + b * t.stride[0] + h * t.stride[1] + row * t.stride[2] +
           column * t.stride[3];
}

/* As the copy engine does it: what lies past the ends becomes zeros. */
template <int ROWS, int COLUMNS>
PTX void load(uint32_t smem, const fa_tensor &from, int32_t first, int32_t h, int32_t b,
              const int32_t (&)[2], uint32_t barrier, uint64_t) {
    int thread = threadIdx.x - 128 * WARPGROUPS;
#pragma unroll 2
    for (int i = thread < 32 ? thread : thread - 32; i < ROWS * panels<COLUMNS> * 8; i += LOADERS) {
        int32_t row, column;
        uint32_t place = chunk<ROWS>(i, row, column), x[8];
        const uint16_t *source = element(from, b, h, first + row, column);
        int32_t there = first + row < from.shape[2] ? (int32_t)from.shape[3] - column : 0;
#pragma unroll
        for (int j = 0; j < 8; ++j) x[j] = j < there ? source[j * from.stride[3]] : 0;
        st_shared_v4(smem + place, x[0] | x[1] << 16, x[2] | x[3] << 16, x[4] | x[5] << 16,
                     x[6] | x[7] << 16);
    }
    fence_proxy_async();
    mbarrier_arrive(barrier);
}

/* The way back, by the 128 threads of a warpgroup. */
PTX void store(const fa_tensor &to, const uint8_t *smem, int32_t first, int32_t h, int32_t b) {
    for (int i = threadIdx.x % 128; i < 64 * panels<DV> * 8; i += 128) {
        int32_t row, column;
        const uint16_t *x = (const uint16_t *)(smem + chunk<64>(i, row, column));
        if (first + row >= to.shape[2]) continue;
        uint16_t *target = element(to, b, h, first + row, column);
        for (int j = 0; j < 8 && column + j < to.shape[3]; ++j) target[j * to.stride[3]] = x[j];
    }
}
#else
template <int ROWS, int COLUMNS>
PTX void load(uint32_t smem, const CUtensorMap &from, int32_t first, int32_t h, int32_t b,
              const int32_t (&moves)[2], uint32_t barrier, uint64_t policy) {
    mbarrier_arrive_expect_tx(barrier, ROWS * 128 * panels<COLUMNS>);
    for (int c = 0; c < COLUMNS; c += 64)
        cp_async_bulk_tensor_load(smem + c * 2 * ROWS, &from, c, first, h * moves[0], b * moves[1],
                                  barrier, policy);
}
#endif

/* One thread decides what comes next; it runs ahead of the others, divisions and all. */
PTX void schedule(const kernel_args &a, smem_layout &smem) {
    int32_t round = 0, unsure = 0; /* unsure: items whose vote has not been read */
    for (int32_t n = 0;; ++n) {
        /* The slot is free when all warpgroups have left its last item, votes and all. */
        item &t = smem.items[n % ITEMS];
        volatile uint32_t &votes = smem.again[n % ITEMS];
        mbarrier_wait(smem_address(&smem.item_empty[n % ITEMS]), n / ITEMS & 1 ^ 1);
        uint32_t again = 0;
        if (KEPT && n >= ITEMS) {
            again = votes;
            votes = 0;
            unsure -= !t.watch;
        }
        if (again) {
            t.warpgroups = again;
            t.watch = 1;
        } else {
            t.tile = fa_schedule_next(&a.schedule, gridDim.x, blockIdx.x, &round);
            if (t.tile < a.schedule.tiles) {
                describe(a, t);
            } else {
                t.begin = t.end = t.left = t.right = t.warpgroups = 0;
                t.watch = 1;
                t.last = unsure == 0;
            }
        }
        if (KEPT) unsure += !t.watch;
        mbarrier_arrive(smem_address(&smem.item_full[n % ITEMS]));
        if (t.last) return;
    }
}

/* Brings what the items name: one thread, or all LOADERS. */
PTX void produce(const kernel_args &a, smem_layout &smem) {
    cursor kv = {0, 0};
    for (int32_t n = 0;; ++n) {
        const item &t = smem.items[n % ITEMS];
        mbarrier_wait(smem_address(&smem.item_full[n % ITEMS]), n / ITEMS & 1);
        if (t.last) return;
        int32_t hk = t.h / a.group, blocks = t.end - t.begin, slot = n % Q_BUFFERS;
        for (int32_t i = 0; i < blocks || i == 0; ++i) {
            int32_t key = key_block(t, i) * BLOCK_N;
            uint32_t full = smem_address(&smem.k_full[kv.stage]);
            if (i < blocks) {
                mbarrier_wait(smem_address(&smem.k_empty[kv.stage]), kv.parity ^ 1);
                load<BLOCK_N, D>(smem_address(smem.k[kv.stage]), a.k, key, hk, t.b, a.moves[1],
                                 full, EVICT_LAST);
            }
            if (i == 0) { /* Q after the first K, which does not wait for the last tile's O */
                mbarrier_wait(smem_address(&smem.q_empty[slot]), n / Q_BUFFERS & 1 ^ 1);
                for (int w = 0; w < WARPGROUPS; ++w) {
                    uint32_t q_full = smem_address(&smem.q_full[slot][w]);
                    if (!(t.warpgroups >> w & 1)) {
                        mbarrier_arrive(q_full);
                        continue;
                    }
                    load<64, D>(smem_address(smem.q[slot][w]), a.q, t.row + 64 * w, t.h, t.b,
                                a.moves[0], q_full, EVICT_FIRST);
                }
            }
            if (i < blocks) {
                full = smem_address(&smem.v_full[kv.stage]);
                mbarrier_wait(smem_address(&smem.v_empty[kv.stage]), kv.parity ^ 1);
                load<BLOCK_N, DV>(smem_address(smem.v[kv.stage]), a.v, key, hk, t.b, a.moves[2],
                                  full, EVICT_LAST);
                advance(kv);
            }
        }
    }
}

/* ---- an MMA warpgroup -------------------------------------------------------------------------*/

/* What a warpgroup keeps over the key blocks of a tile. */
struct rows_state {
    float o[(DV + 8 * ONES) / 2];
    softmax_rows softmax;
    int held; /* the stage of V that P V is still reading, or -1 */
};

PTX void release(uint32_t barrier) {
    if (threadIdx.x % 128 == 0) mbarrier_arrive(barrier);
}

/* All of this warpgroup's wgmmas have ended: hands back the V that the last ones read. */
PTX void settle(rows_state &st, smem_layout &smem) {
    if (st.held >= 0) release(smem_address(&smem.v_empty[st.held]));
    st.held = -1;
}

/* Hides every key outside each row's interval. */
PTX void mask_scores(float (&s)[BLOCK_N / 2], const fa_interval (&seen)[2], int32_t key) {
    int32_t column = key + 2 * (threadIdx.x % 4);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        int32_t begin = seen[r].begin - column, end = seen[r].end - column;
#pragma unroll
        for (int i = 2 * r; i < BLOCK_N / 2; i += 4) {
            if (2 * i - 4 * r >= end || 2 * i - 4 * r < begin) s[i] = -INFINITY;
            if (2 * i - 4 * r + 1 >= end || 2 * i - 4 * r + 1 < begin) s[i + 1] = -INFINITY;
        }
    }
}

/* Writes zeros over the rows of V that no row of the sequence sees: 0 * NaN is NaN. Every
 * warpgroup does so before it reads the stage; what they all write is the same. */
PTX void clear_hidden_v(const kernel_args &a, const item &t, uint8_t *v, int32_t key,
                        int warpgroup) {
    int32_t begin = fa_row_interval(&a.masks, t.lengths, 0).begin;
    int32_t end = fa_row_interval(&a.masks, t.lengths, t.lengths.sq - 1).end;
    if (key >= begin && min(key + BLOCK_N, a.sk) <= end) return;
    for (int i = threadIdx.x % 128; i < V_BYTES / 16; i += 128) {
        int32_t row = key + i / 8 % BLOCK_N;
        if (row < begin || row >= end) ((uint4 *)v)[i] = make_uint4(0, 0, 0, 0);
    }
    fence_proxy_async();
    bar_sync(1 + warpgroup, 128);
}

/* One key block: S = Q K^T, P = 2^(S scale - offset), O += P V. On return P V may still run. */
template <bool MASKED, bool WATCH>
PTX void attend(const kernel_args &a, smem_layout &smem, const item &t,
                const fa_interval (&seen)[2], rows_state &st, cursor &kv, uint64_t q, int32_t key,
                int warpgroup) {
    float s[BLOCK_N / 2];
    uint64_t k = wgmma_descriptor(smem_address(smem.k[kv.stage]), 1);
    mbarrier_wait(smem_address(&smem.k_full[kv.stage]), kv.parity);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < D / 16; ++i)
        wgmma_ss<BLOCK_N>(s, q + i / 4 * (PANEL_Q / 16) + i % 4 * 2,
                          k + i / 4 * (PANEL_N / 16) + i % 4 * 2, i > 0);
    wgmma_commit_group();
    wgmma_wait_group<0>();
    wgmma_accumulators(s);
    wgmma_accumulators(st.o);
    release(smem_address(&smem.k_empty[kv.stage]));
    settle(st, smem);

    float scale = a.scale;
    if (WATCH) {
        if (scale < 0.f) {
#pragma unroll
            for (int i = 0; i < BLOCK_N / 2; ++i) s[i] = -s[i];
            scale = -scale;
        }
        if (MASKED) mask_scores(s, seen, key);
        if (__any_sync(~0u, softmax_exceeds(st.softmax, s)))
            softmax_raise<range>(st.softmax, s, st.o, scale);
    }

    mbarrier_wait(smem_address(&smem.v_full[kv.stage]), kv.parity);
    if (MASKED) clear_hidden_v(a, t, smem.v[kv.stage], key, warpgroup);
    uint32_t ones = smem_address(smem.ones) - smem_address(smem.v[kv.stage]);
    uint64_t v = wgmma_descriptor(smem_address(smem.v[kv.stage]), (ONES ? ones : PANEL_N) / 16);
    uint32_t p[P_RING][4];
#pragma unroll
    for (int i = 0; i < BLOCK_N / 16; ++i) {
        if (i >= P_RING) wgmma_wait_group<P_RING - 1>();
        softmax_exp<!ONES>(st.softmax, s + 8 * i, scale, p[i % P_RING]);
        wgmma_fence();
        wgmma_rs<DV + 8 * ONES>(st.o, p[i % P_RING], v + i * 128);
        if (P_RING < BLOCK_N / 16 || i == BLOCK_N / 16 - 1) wgmma_commit_group();
    }
    st.held = kv.stage;
    advance(kv);
}

/* A block that this warpgroup has no use for: it must still be handed back, once it is there. */
PTX void pass(smem_layout &smem, cursor &kv) {
    mbarrier_wait(smem_address(&smem.k_full[kv.stage]), kv.parity);
    release(smem_address(&smem.k_empty[kv.stage]));
    mbarrier_wait(smem_address(&smem.v_full[kv.stage]), kv.parity);
    release(smem_address(&smem.v_empty[kv.stage]));
    advance(kv);
}

/* This warpgroup is done with item n: its Q, its description and its vote. */
PTX void leave(smem_layout &smem, int32_t n) {
    mbarrier_arrive(smem_address(&smem.q_empty[n % Q_BUFFERS]));
    mbarrier_arrive(smem_address(&smem.item_empty[n % ITEMS]));
}

PTX void consume(const kernel_args &a, smem_layout &smem, int warpgroup) {
    cursor kv = {0, 0};
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    for (int32_t n = 0;; ++n) {
        int32_t slot = n % Q_BUFFERS;
        mbarrier_wait(smem_address(&smem.item_full[n % ITEMS]), n / ITEMS & 1);
        const item t = smem.items[n % ITEMS];
        if (t.last) return;
        mbarrier_wait(smem_address(&smem.q_full[slot][warpgroup]), n / Q_BUFFERS & 1);
        int32_t blocks = t.end - t.begin, masked = t.left + t.right;
        bool leader = threadIdx.x % 128 == 0;
        if (!(t.warpgroups >> warpgroup & 1)) {
            for (int32_t i = 0; i < blocks; ++i) pass(smem, kv);
            bar_sync(1 + warpgroup, 128);
            if (leader) leave(smem, n);
            continue;
        }

        /* The rows of this warpgroup and of this thread, and the keys they see. */
        int32_t first = t.row + 64 * warpgroup, row = first + 16 * warp + lane / 4;
        int32_t last = min(first + 63, t.lengths.sq - 1);
        fa_interval seen[2] = {fa_row_interval(&a.masks, t.lengths, row),
                               fa_row_interval(&a.masks, t.lengths, row + 8)};
        fa_interval top = fa_row_interval(&a.masks, t.lengths, first);
        fa_interval bottom = fa_row_interval(&a.masks, t.lengths, last);
        fa_interval some = {top.begin, first > last ? top.begin : bottom.end};
        fa_interval whole = {bottom.begin, top.end}; /* the keys that every row sees */
        bool keep = KEPT && !t.watch;
        bool live[2] = {seen[0].begin < seen[0].end, seen[1].begin < seen[1].end};

        rows_state st;
        softmax_start(st.softmax);
        st.held = -1;
#pragma unroll
        for (int i = 0; i < (DV + 8 * ONES) / 2; ++i) st.o[i] = 0.f;
        uint64_t q = wgmma_descriptor(smem_address(smem.q[slot][warpgroup]), 1);

        for (int32_t i = 0; i < blocks; ++i) {
            int32_t key = key_block(t, i) * BLOCK_N;
            if (i >= masked && keep)
                attend<false, false>(a, smem, t, seen, st, kv, q, key, warpgroup);
            else if (i >= masked || (key >= whole.begin && key + BLOCK_N <= whole.end))
                attend<false, true>(a, smem, t, seen, st, kv, q, key, warpgroup);
            else if (key < some.end && key + BLOCK_N > some.begin)
                attend<true, true>(a, smem, t, seen, st, kv, q, key, warpgroup);
            else
                pass(smem, kv);
        }
        wgmma_wait_group<0>();
        wgmma_accumulators(st.o);
        settle(st, smem);

        float l[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            l[r] = ONES ? st.o[DV / 2 * ONES + 2 * r] : softmax_row_sum(st.softmax.l[r]);
            if (!live[r]) l[r] = 0.f;
        }

        /* The vote: sums in range, and every O finite (x * 0 is NaN where x is not). */
        if (keep) {
            bool bad = false;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float probe = 0.f;
#pragma unroll
                for (int j = 2 * r; j < DV / 2; j += 4)
                    probe = fmaf(st.o[j], 0.f, fmaf(st.o[j + 1], 0.f, probe));
                bad |= live[r] && !(l[r] > 0x1p-50f && l[r] < 0x1p120f && probe == 0.f);
            }
            bad = bar_red_or(1 + warpgroup, 128, bad);
            if (__shfl_sync(~0u, bad, 0)) {
                if (leader) {
                    atomicOr(&smem.again[n % ITEMS], 1u << warpgroup);
                    leave(smem, n);
                }
                continue;
            }
        }

        /* O leaves through this warpgroup's Q, whose rows only this warp has read. */
        uint32_t buffer = smem_address(smem.q[slot][warpgroup]);
        int matrix_row = 16 * warp + lane % 16;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float inverse = l[r] == 0.f ? 0.f : 1.f / l[r];
#pragma unroll
            for (int j = 2 * r; j < DV / 2; j += 4) {
                st.o[j] = live[r] ? st.o[j] * inverse : 0.f;
                st.o[j + 1] = live[r] ? st.o[j + 1] * inverse : 0.f;
            }
            if (a.lse && lane % 4 == 0 && row + 8 * r < a.sq)
                a.lse[t.b * a.lse_stride[0] + t.h * a.lse_stride[1] +
                      (row + 8 * r) * a.lse_stride[2]] =
                    l[r] == 0.f ? -INFINITY
                                : (__log2f(l[r]) - st.softmax.minus[r]) * 0.6931471805599453f;
        }
#pragma unroll
        for (int c = 0; c < DV / 16; ++c) {
            const float *o = st.o + 8 * c;
            int chunk = c % 4 * 2 + lane / 16;
            stmatrix_x4(
                buffer + c / 4 * PANEL_Q + matrix_row * 128 + ((chunk ^ matrix_row % 8) << 4),
                cvt_pack(o[0], o[1]), cvt_pack(o[2], o[3]), cvt_pack(o[4], o[5]),
                cvt_pack(o[6], o[7]));
        }
#if ROW_STRIDED
        bar_sync(1 + warpgroup, 128);
        store(a.out, smem.q[slot][warpgroup], first, t.h, t.b);
        bar_sync(1 + warpgroup, 128);
#else
        fence_proxy_async();
        bar_sync(1 + warpgroup, 128);
        if (leader) {
            for (int c = 0; c < DV; c += 64)
                cp_async_bulk_tensor_store(&a.out, buffer + c / 64 * PANEL_Q, c, first, t.h, t.b);
            cp_async_bulk_commit_group();
            cp_async_bulk_wait_group_read();
        }
#endif
        if (leader) leave(smem, n);
    }
}

/* ---- the kernel -------------------------------------------------------------------------------*/

__global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    ROW_NAME(const __grid_constant__ kernel_args a) {
    extern __shared__ uint8_t raw[];
    smem_layout &smem = *(smem_layout *)(raw + (-smem_address(raw) & 1023));
    if (threadIdx.x == 0) {
#if !ROW_STRIDED
        prefetch_tensormap(&a.q);
        prefetch_tensormap(&a.k);
        prefetch_tensormap(&a.v);
        prefetch_tensormap(&a.out);
#endif
        for (int i = 0; i < Q_BUFFERS; ++i) {
            for (int w = 0; w < WARPGROUPS; ++w)
                mbarrier_init(smem_address(&smem.q_full[i][w]), LOADERS);
            mbarrier_init(smem_address(&smem.q_empty[i]), WARPGROUPS);
        }
        for (int i = 0; i < ITEMS; ++i) {
            mbarrier_init(smem_address(&smem.item_full[i]), 1);
            mbarrier_init(smem_address(&smem.item_empty[i]), WARPGROUPS);
            smem.again[i] = 0;
        }
        for (int i = 0; i < STAGES; ++i) {
            mbarrier_init(smem_address(&smem.k_full[i]), LOADERS);
            mbarrier_init(smem_address(&smem.v_full[i]), LOADERS);
            mbarrier_init(smem_address(&smem.k_empty[i]), WARPGROUPS);
            mbarrier_init(smem_address(&smem.v_empty[i]), WARPGROUPS);
        }
        fence_mbarrier_init();
    }
    if (ONES) {
        uint32_t one = IS_BF16 ? 0x3F803F80 : 0x3C003C00;
        for (int i = threadIdx.x; i < PANEL_N / 4; i += THREADS) ((uint32_t *)smem.ones)[i] = one;
        fence_proxy_async();
    }
    __syncthreads();

    int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
    if (warpgroup == WARPGROUPS) {
        if (EXCHANGE) setmaxnreg_dec<PRODUCER_REGISTERS>();
        int thread = threadIdx.x - 128 * WARPGROUPS;
        if (thread == 32) schedule(a, smem);
        if (STRIDED ? thread / 32 != 1 : thread == 0) produce(a, smem);
    } else {
        if (EXCHANGE) setmaxnreg_inc<MMA_REGISTERS>();
        consume(a, smem, warpgroup);
    }
}

/* ---- the launcher -----------------------------------------------------------------------------*/

#if ROW_STRIDED
static bool encode(fa_tensor *array, const fa_sm90_device *, const fa_tensor *t, int, int32_t[2]) {
    *array = *t;
    return true;
}
#else
/* Panels of 64 columns by `rows` rows; dimensions of stride 0 are one long, and not moved along. */
static bool encode(CUtensorMap *map, const fa_sm90_device *device, const fa_tensor *t, int rows,
                   int32_t moves[2]) {
    cuuint64_t shape[4] = {(cuuint64_t)t->shape[3], (cuuint64_t)t->shape[2],
                           (cuuint64_t)t->shape[1], (cuuint64_t)t->shape[0]};
    cuuint64_t strides[3] = {16, 16, 16};
    for (int i = 0; i < 3; ++i) {
        int axis = 2 - i;
        if (t->shape[axis] > 1 && t->stride[axis] != 0) {
            strides[i] = (cuuint64_t)t->stride[axis] * 2;
        } else {
            if (i == 0 && t->shape[axis] > 1)
                return false; /* one row, repeated along the sequence */
            shape[1 + i] = 1;
        }
        if (i) moves[i - 1] = shape[1 + i] > 1;
    }
    const cuuint32_t box[4] = {64, (cuuint32_t)rows, 1, 1}, steps[4] = {1, 1, 1, 1};
    return device->encode(
               map, IS_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
               t->data, shape, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}
#endif

extern "C" fa_status PASTE(fa_launch_, ROW_NAME)(const fa_params *p, const fa_sm90_device *device,
                                                 void *, fa_error *error) {
    const fa_what *w = &p->what;
    if ((int64_t)w->b * w->hq * ((w->sq + BLOCK_M - 1) / BLOCK_M) > INT32_MAX)
        return fa_fail(error, FA_UNSUPPORTED, "sm90 takes at most 2^31 tiles of %d rows", BLOCK_M);
    kernel_args a = {};
    int32_t out_moves[2];
    if (!encode(&a.q, device, &w->q, 64, a.moves[0]) ||
        !encode(&a.k, device, &w->k, BLOCK_N, a.moves[1]) ||
        !encode(&a.v, device, &w->v, BLOCK_N, a.moves[2]) ||
        !encode(&a.out, device, &w->out, 64, out_moves))
        return fa_fail(error, FA_RUNTIME, "cuTensorMapEncodeTiled rejected q, k, v or out");
    a.masks = p->masks;
    a.sq = w->sq;
    a.sk = w->sk;
    a.hq = w->hq;
    a.group = w->hq / w->hk;
    a.watch = w->batch_invariant;
    /* A scale of 0 must not meet the -inf of a hidden score: 1e-37 of any score is 0 too. */
    a.scale = w->scale == 0 ? 1e-37f : (float)(w->scale * 1.4426950408889634);
    a.lse = (float *)w->lse.data;
    for (int i = 0; i < 3; ++i) a.lse_stride[i] = w->lse.stride[i];

    static uint64_t allowed;
    fa_status status = fa_allow_smem(&allowed, device, (const void *)ROW_NAME, SMEM_BYTES, error);
    if (status != FA_OK) return status;
    int64_t tiles = (int64_t)w->b * w->hq * ((w->sq + BLOCK_M - 1) / BLOCK_M);
    int32_t slots = device->sms * BLOCKS_PER_SM, blocks = tiles < slots ? (int32_t)tiles : slots;
    a.schedule = fa_schedule_make(w, &p->masks, BLOCK_M, blocks);
    return fa_launch_kernel((const void *)ROW_NAME, blocks, THREADS, SMEM_BYTES, p->where.stream, &a,
                            error);
}
