/* sm90_fwd.cu - the Hopper forward kernel: stop 6 of 6. kernels/README.md has the pictures.
 *
 * One object per row of variants.def: setup.py passes the row's columns as ROW_<COLUMN>, and the
 * object exports one function, fa_launch_<name> (sm90_launch.cuh). What is included on the way are
 * parts of this file.
 *
 * A block stays on its SM and works through tiles of 64 * WARPGROUPS query rows of one head. Each
 * MMA warpgroup owns 64 rows of a tile and keeps S, P and O in registers. Four more warps serve
 * them, one thread each: one decides what comes next, one brings Q, one K, one V. A tile ends while
 * the next one's first block is under way (NEXT, below).
 *
 * The softmax offset (softmax.cuh) comes from the first, masked key blocks of a tile. KEPT rows
 * never look at it again: their main loop has no maximum at all. At the end of a tile each warp
 * votes whether everything stayed finite and in range; if not, the tile comes again for its
 * warpgroup, with the loop that watches every score, and what was stored is stored once more.
 *
 * GENERAL rows change scores (sm90_scores.cuh): they watch every score, always, and take their key
 * blocks from the right to the left, those that a bool mask hides from all rows left out.
 *
 * STRIDED rows take arrays that the copy engine cannot address: whole warps load in its place,
 * element by element, and O is stored likewise. Everything between is the same.
 */
#include <stddef.h>

#include "launch.cuh"
#include "packed.h"
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
                      STRIDED = ROW_STRIDED, GENERAL = ROW_GENERAL;
static constexpr int D = ROW_D, DV = ROW_DV, WARPGROUPS = ROW_WARPGROUPS, BLOCK_N = ROW_BLOCK_N,
                     STAGES = ROW_STAGES, Q_SLOTS = ROW_Q_SLOTS, BLOCKS_PER_SM = ROW_BLOCKS_PER_SM;
static constexpr int BLOCK_M = 64 * WARPGROUPS;
static constexpr int ITEMS = 4; /* tiles that the scheduler may be ahead */
typedef softmax_range<IS_BF16, GENERAL> range;

static_assert(D % 16 == 0 && BLOCK_N % 16 == 0, "wgmma takes k by 16");
static_assert(DV % (ROW_STAGED ? 16 : 32) == 0, "sm90_rows_out.cuh");
static_assert(BLOCK_N <= 128, "a mask has 32 bits");
static_assert(!GENERAL || (!KEPT && !ONES && (BLOCK_N == 64 || BLOCK_N == 128)), "sm90_scores.cuh");
static_assert(!ONES || DV == 64, "the block of ones is the second panel of V");

/* P V of a block is issued behind Q K^T of the next (DELAYED), or, where registers are too few to
 * keep P beside S, 16 keys at a time as soon as their exponentials are there, P a ring of two. */
static constexpr bool DELAYED = WARPGROUPS < 4;
static constexpr int P_PIECES = DELAYED ? BLOCK_N / 16 : 2;
/* Where a score raises its row's top, O shrinks once P V of the block before has ended, and the
 * exponentials need not wait for that. The factors take registers, which not all rows have. */
static constexpr bool SHRINKS_LATE =
    !KEPT && (WARPGROUPS == 2 ? DV <= 192 : DELAYED && BLOCK_N <= 80);
/* Q of a tile can arrive while another is computed: its release may wait for the end of a loop. */
[[maybe_unused]] static constexpr bool Q_AHEAD = DELAYED && Q_SLOTS >= 2 * WARPGROUPS;
/* Two or three warpgroups take turns at Q K^T; four find their rhythm alone. */
static constexpr bool TURNS = WARPGROUPS == 2 || WARPGROUPS == 3;

/* Registers a thread: the launch gives all threads the same, the warpgroups then exchange them; the
 * pool is the number of threads times what the launch gave. */
static constexpr int THREADS = 128 * (WARPGROUPS + 1);
static constexpr int POOL = 65536 / BLOCKS_PER_SM / THREADS / 8 * 8 * (WARPGROUPS + 1);
static constexpr int MMA_REGISTERS = ROW_MMA_REGISTERS;
static constexpr int SERVER_REGISTERS = POOL - WARPGROUPS * MMA_REGISTERS;
static_assert(SERVER_REGISTERS >= 24, "the pool is too small");

/* O leaves through shared memory where there is room for that. */
static constexpr bool STAGED = !STRIDED && ROW_STAGED;

static constexpr int LOADERS = STRIDED ? 32 : 1; /* threads that bring Q, K, V, each */

/* ---- shared memory: panels of 64 columns, 128 bytes a row, swizzled, each on 1024 bytes -------*/

template <int COLUMNS>
static constexpr int panels = (COLUMNS + 63) / 64;
static constexpr int PANEL_Q = 64 * 128, PANEL_N = BLOCK_N * 128;
static constexpr int Q_BYTES = PANEL_Q * panels<D>;
static constexpr int O_BYTES = 16 * 128; /* a panel of a warp's rows */
static constexpr int K_BYTES = PANEL_N * panels<D>, V_BYTES = PANEL_N * panels<DV>;

#if ROW_GENERAL
/* Loops for one change of scores alone, where registers and the time to compile them allow. */
static constexpr bool SPECIAL = !STRIDED && DV <= 128;
#include "sm90_scores.cuh"
#endif

/* What the scheduler tells the others about a tile. */
struct item {
    int32_t b, h, row;   /* batch, query head, first query row */
    int32_t h_k;         /* key head */
    fa_lengths lengths;  /* of this sequence */
    int32_t q, k;        /* packed: its first rows in the arrays; else 0 */
    int32_t rows, keys;  /* rows to store, padding included; keys up to the array's end */
    int32_t boxed;       /* rows that may leave in boxes of 16, which only the array's end clips */
    int32_t begin, end;  /* key blocks that some row sees */
    int32_t left, right; /* how many of them, from either side, not every row sees whole */
    fa_interval seen;    /* keys that some row of the sequence sees */
    fa_interval some[WARPGROUPS], whole[WARPGROUPS]; /* keys that one row, that all rows see */
    int32_t skip[WARPGROUPS]; /* blocks in front of the first that a row sees; all, if none does */
    int32_t masked[WARPGROUPS]; /* those, that one, and all up to the last that not all see whole */
    int32_t warpgroups;         /* bit set of those that compute it */
    int32_t watch;              /* the offset is not kept */
    float sink;                 /* one more score of every row; -inf: none */
    int32_t last;               /* there is no tile, and there will be no more */
#if ROW_GENERAL
    score_item score;
#endif
};

struct smem_layout {
    uint8_t q[Q_SLOTS][Q_BYTES]; /* a warpgroup's, in their turn */
    uint8_t k[STAGES][K_BYTES];
    uint8_t v[STAGES][V_BYTES];
#if ROW_GENERAL
    uint8_t mask[WARPGROUPS][MASK_BYTES];
#endif
    uint8_t o[STAGED ? 4 * WARPGROUPS : 1][STAGED ? panels<DV> : 1][STAGED ? O_BYTES : 16];
    uint8_t ones[ONES ? PANEL_N : 16]; /* 64 more columns of V: O's column 64 becomes the row sum */
    uint64_t q_full[Q_SLOTS], q_empty[Q_SLOTS];
    uint64_t k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
    uint64_t item_full[ITEMS], item_empty[ITEMS];
    item items[ITEMS];
    uint32_t again[ITEMS]; /* the votes: bit w, warpgroup w could not keep its offset */
#if ROW_GENERAL
    uint32_t tags[STAGES]; /* of a bool mask: which block of K is in a stage, and who sees it */
    uint64_t mask_full[WARPGROUPS], mask_empty[WARPGROUPS];
    uint4 columns[WARPGROUPS][4]; /* keys of a block that some row of a tile's quarter sees */
#endif
};
static_assert(offsetof(smem_layout, o) % 1024 == 0, "the copy engine's pattern");
#if ROW_GENERAL
static_assert(offsetof(smem_layout, mask) % 1024 == 0, "the copy engine's pattern");
#endif
static_assert(!ONES || offsetof(smem_layout, ones) % 1024 == 0, "wgmma's pattern");
static constexpr int SMEM_BYTES = sizeof(smem_layout) + 1024; /* room to align the base */

#if ROW_STRIDED
typedef fa_tensor array;
#else
typedef CUtensorMap array; /* {columns, rows, heads, batches} */
#endif

struct kernel_args {
    array q, k, v, out_map;
    fa_tensor out;
    fa_schedule schedule;
    fa_packed packed;
    fa_varlen varlen;
    fa_masks masks;
    int32_t sq, sk, hq;
    fa_divisor by_hq, by_group; /* query heads; those that share a key head */
    uint32_t descriptor_high;   /* of wgmma's operands */
    int32_t watch;              /* 1: keep no offset anywhere */
    int32_t reads;              /* the arguments alone do not describe a tile */
    int32_t ahead;              /* items that a block may have claimed, at most ITEMS */
    int32_t moves[4][2];        /* q, k, v, out: 0 where the stride of heads, of batches is 0 */
    float scale;                /* times log2(e) */
    float slack;                /* softmax_slack of it */
    float *lse;                 /* (b, hq, sq), strides in elements; NULL: not wanted */
    int64_t lse_stride[3];
    const float *sink; /* (hq,), or NULL */
    int64_t sink_stride;
#if ROW_GENERAL
    int32_t b;
    score_args scores;
#endif
};

/* A ring of stages; the parity flips each time around. */
struct cursor {
    int stage;
    uint32_t parity;
};
PTX void advance(cursor &c) {
    bool wrap = ++c.stage == STAGES;
    c.stage = wrap ? 0 : c.stage;
    c.parity ^= wrap;
}

#include "sm90_sight.cuh"
#include "sm90_servers.cuh"

/* ---- an MMA warpgroup -------------------------------------------------------------------------*/

/* wgmma's descriptor of what lies `offset` + 16 * `step` bytes into shared memory. Linear in
 * `step`, so that one instruction finds a stage; the upper half is an argument, for of a constant
 * the compiler makes moves at each use. General rows have no uniform register left for it. */
PTX uint64_t operand(const kernel_args &a, smem_layout &smem, uint32_t offset, uint32_t panel,
                     uint32_t step) {
    const uint32_t base = smem_address(&smem);
    if (GENERAL) return wgmma_descriptor(base + offset + 16 * step, panel);
    return (uint64_t)a.descriptor_high << 32 | (base / 16 + offset / 16 + (panel << 16) + step);
}
PTX uint64_t q_descriptor(const kernel_args &a, smem_layout &smem, int slot) {
    return operand(a, smem, offsetof(smem_layout, q), 1, slot * (Q_BYTES / 16));
}
PTX uint64_t k_descriptor(const kernel_args &a, smem_layout &smem, int stage) {
    return operand(a, smem, offsetof(smem_layout, k), 1, stage * (K_BYTES / 16));
}
PTX uint64_t v_descriptor(const kernel_args &a, smem_layout &smem, int stage) {
    constexpr uint32_t V = offsetof(smem_layout, v), STEP = V_BYTES / 16;
    if (!ONES) return operand(a, smem, V, PANEL_N / 16, stage * STEP);
    /* The next panel is the block of ones, nearer by a stage. */
    return operand(a, smem, V, (offsetof(smem_layout, ones) - V) / 16,
                   stage * (STEP - (STEP << 16)));
}

/* What a warpgroup keeps over the key blocks of a tile, and into the first block of the next. */
struct rows_state {
    float o[(DV + 8 * ONES) / 2];
    uint32_t p[P_PIECES][4];
    softmax_rows softmax;
    cursor v;   /* the stage of V that P V reads, or will */
    bool held;  /* it has not been handed back */
    bool open;  /* these rows are an item's, while one begins the last one's; else l is 0 */
    bool fresh; /* O holds nothing: the first P V writes it */
};

PTX void release(uint32_t barrier) {
    if (threadIdx.x % 128 == 0) mbarrier_arrive(barrier);
}

/* All of this warpgroup's P V have ended: hands back the V that the last ones read. `held`: what
 * st.held is, where the compiler cannot know. */
PTX void settle(rows_state &st, smem_layout &smem, bool held) {
    wgmma_accumulators(st.o);
    if (held) release(smem_address(&smem.v_empty[st.v.stage]));
    st.held = false;
}

/* While one warpgroup has the tensor cores for Q K^T, the others are at their exponentials and P V;
 * without turns they fall into step, and the tensor cores idle. */
PTX void take_turn(int warpgroup) {
    if (TURNS) bar_sync(8 + warpgroup, 256);
}
PTX void pass_turn(int warpgroup) {
    if (TURNS) bar_arrive(8 + (warpgroup + 1) % WARPGROUPS, 256);
}

/* O += P V of the block whose P is in registers. */
PTX void issue_pv(const kernel_args &a, rows_state &st, smem_layout &smem, bool fresh) {
    const uint64_t v = v_descriptor(a, smem, st.v.stage);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < BLOCK_N / 16; ++i)
        wgmma_rs<DV + 8 * ONES>(st.o, st.p[i % P_PIECES], v + i * 128, i > 0 || !fresh);
    wgmma_commit_group();
    st.fresh = false;
}

#if ROW_GENERAL
#include "sm90_blocks.cuh"
#endif
#include "sm90_rows_out.cuh"

/* What comes before a block: nothing (ALONE), the block before it in its tile (BEHIND), or the last
 * block of the tile before (NEXT). If DELAYED, the P V of those two is issued behind Q K^T. */
enum place { ALONE, BEHIND, NEXT };

/* One key block: S = Q K^T, P = 2^(S scale - offset), O += P V. On return P V may still run, or, if
 * DELAYED, has not begun. NEXT ends the tile before in passing, so that the tensor cores have work
 * while its rows are divided and stored. MASKED: rows see the block in part; WATCH: the offset.
 * `q_done`: the barrier to tell that Q was read for the last time, or 0. `fresh`: the P V issued
 * here is its tile's first. ONLY: enum changes, of general rows. */
template <place PLACE, bool MASKED, bool WATCH, int ONLY = 0>
PTX void attend(const kernel_args &a, smem_layout &smem, int32_t n, rows_state &st, cursor &kv,
                uint64_t q, uint32_t q_done, int32_t key, bool cut, bool fresh, int warpgroup,
                bool holes = false) {
    constexpr bool PENDING = DELAYED && PLACE != ALONE;
    const bool held = !(MASKED || GENERAL) || st.held; /* before a plain row's loops was a block */
    const item &t = smem.items[n % ITEMS];
    float s[BLOCK_N / 2];
    const uint64_t k = k_descriptor(a, smem, kv.stage);
    mbarrier_wait(smem_address(&smem.k_full[kv.stage]), kv.parity);
#if ROW_GENERAL
    constexpr enum changes CHANGES = (enum changes)ONLY;
    const int32_t row = first_row(t, warpgroup);
    const bool drops = CHANGES == ANY ? a.scores.drops : CHANGES == DROPS;
    const mask_tile tile = tile_of(smem, kv, warpgroup);
    sight seen = {};
    if (MASKED && cut && a.scores.mask == BITS) seen = look_up(a, t, row, key, warpgroup);
    /* Whoever has the turn has 500 clocks: what takes longer comes before. */
    if (CHANGES == ANY)
        begin_tile(a.scores, t.score, tile, row - threadIdx.x % 32 / 4, key, a.sq, a.sk);
#endif
    if (PENDING) mbarrier_wait(smem_address(&smem.v_full[st.v.stage]), st.v.parity);
    take_turn(warpgroup);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < D / 16; ++i)
        wgmma_ss<BLOCK_N>(s, q + i / 4 * (PANEL_Q / 16) + i % 4 * 2,
                          k + i / 4 * (PANEL_N / 16) + i % 4 * 2, i > 0);
    wgmma_commit_group();
    if (PENDING) issue_pv(a, st, smem, fresh);
    /* While the tensor cores work: what does not depend on them. */
    ending end;
    if (PLACE == NEXT) end = begin_end(a, smem.items[(n - 1) % ITEMS], st, warpgroup);
#if ROW_GENERAL
    if (MASKED && cut && a.scores.mask != BITS) seen = look(a, t, row, key, warpgroup);
#else
    sight seen;
    if (MASKED && cut) seen = look(a, t, first_row(t, warpgroup), key, warpgroup);
#endif
    wgmma_wait_group<PENDING>();
    pass_turn(warpgroup);
    wgmma_accumulators(s);
    release(smem_address(&smem.k_empty[kv.stage]));
    if (q_done) release(q_done);
    if (!DELAYED) settle(st, smem, held);

#if ROW_GENERAL
    const float scale = fabsf(a.scores.scale);
    /* A change may end in exponents, but not of offsets that are coarse (of a cap none is). */
    constexpr bool DIRECT = TO_EXPONENTS<CHANGES>;
    bool direct = DIRECT && (CHANGES == CAPS || __all_sync(~0u, softmax_is_settled(st.softmax)));
    final_scores<CHANGES>(
        a, t, s, tile, key, warpgroup, direct ? scale : 1.f,
        make_float2(direct ? st.softmax.minus[0] : 0.f, direct ? st.softmax.minus[1] : 0.f));
#else
    constexpr bool DIRECT = false;
    bool direct = false;
    float scale = a.scale;
    if ((WATCH || MASKED) && scale < 0.f) { /* the greatest score must give the greatest P */
#pragma unroll
        for (int i = 0; i < BLOCK_N / 2; ++i) s[i] = -s[i];
        scale = -scale;
    }
#endif
    if (MASKED && cut) mask_scores(seen, s);
    float2 minus = make_float2(st.softmax.minus[0], st.softmax.minus[1]), factor;
    bool raised = false; /* O must shrink, when P V of the block before has ended */
    if (WATCH) {
        if (PENDING && PLACE == BEHIND && !SHRINKS_LATE) {
            wgmma_wait_group<0>();
            settle(st, smem, held);
        }
        /* The first block of a tile gives tops to the rows that see a key of it; where they are
         * kept, a later one does so for those that have none yet. */
        if (direct && __any_sync(~0u, !softmax_is_settled(st.softmax) ||
                                          softmax_exceeds<range>(s))) { /* scores again, then */
            softmax_linear(s, 1.f / scale, make_float2(-minus.x / scale, -minus.y / scale));
            direct = false;
        }
        if (DIRECT) {
            if (!direct) factor = softmax_raise<range, false>(st.softmax, s, scale, a.slack);
            raised = !direct;
        } else if (PLACE == NEXT || (PLACE == ALONE && KEPT && !t.watch)) {
            softmax_raise<range, true>(st.softmax, s, scale, a.slack);
        } else if (__any_sync(~0u, softmax_exceeds(st.softmax, s, a.slack))) {
            factor = softmax_raise<range, false>(st.softmax, s, scale, a.slack);
            raised = true;
        }
        if (!SHRINKS_LATE && raised) softmax_shrink(st.o, factor);
        if (!direct) minus = softmax_center<range>(st.softmax, s);
        if (DIRECT && !direct) softmax_linear(s, scale, minus);
    } else if (MASKED) {
        /* Rows that see their first key here: a row of few is exact only with a top of its own. */
        if (__any_sync(~0u, fminf(st.softmax.top[0], st.softmax.top[1]) == -INFINITY)) {
            softmax_raise<range, true>(st.softmax, s, scale, a.slack);
            minus = make_float2(st.softmax.minus[0], st.softmax.minus[1]);
        }
    }
    if (DELAYED) {
        if (DIRECT)
            softmax_exp<!ONES>(st.softmax, s);
        else
            softmax_exp<!ONES>(st.softmax, s, scale, minus);
        if (PENDING && (PLACE == NEXT || !WATCH || SHRINKS_LATE)) {
            wgmma_wait_group<0>();
            settle(st, smem, held);
        }
        if (SHRINKS_LATE && raised) softmax_shrink(st.o, factor);
        softmax_pack(s, &st.p[0][0]);
        if (PLACE == NEXT) end_rows(a, smem, n - 1, st, end, warpgroup);
#if ROW_GENERAL
        if (drops) drop_scores(a.scores, t.score, &st.p[0][0], t.h, row, key);
#endif
        /* Not sooner: this V may be waiting for the stage of the one that has just been settled. */
        if (MASKED && cut) mbarrier_wait(smem_address(&smem.v_full[kv.stage]), kv.parity);
#if ROW_GENERAL
        if (!MASKED || CHANGES == WORDS) {
        } else if (holes && a.scores.bits.bare)
            clear_bare_holes(a, t, smem, smem.v[kv.stage], key, warpgroup);
        else if (holes)
            clear_holes(a.scores, t.score, smem.v[kv.stage], t.row, key, warpgroup);
        else if (cut && a.scores.mask != BITS)
            clear_hidden_v(t, smem.v[kv.stage], key, warpgroup);
#else
        if (MASKED && cut) clear_hidden_v(t, smem.v[kv.stage], key, warpgroup);
#endif
    } else {
        mbarrier_wait(smem_address(&smem.v_full[kv.stage]), kv.parity);
        if (MASKED && cut) clear_hidden_v(t, smem.v[kv.stage], key, warpgroup);
        const uint64_t v = v_descriptor(a, smem, kv.stage);
#pragma unroll
        for (int i = 0; i < BLOCK_N / 16; ++i) {
            if (i >= P_PIECES) wgmma_wait_group<P_PIECES - 1>();
            float (&piece)[8] = *(float (*)[8])(s + 8 * i);
            softmax_exp<!ONES>(st.softmax, piece, scale, minus);
            softmax_pack(piece, st.p[i % P_PIECES]);
            wgmma_fence();
            wgmma_rs<DV + 8 * ONES>(st.o, st.p[i % P_PIECES], v + i * 128, i > 0 || !fresh);
            if (P_PIECES < BLOCK_N / 16 || i == BLOCK_N / 16 - 1) wgmma_commit_group();
        }
        st.fresh = false;
    }
    st.v = kv;
    st.held = true;
    advance(kv);
}

#if ROW_GENERAL
/* `run` blocks from `key` to the left, which all rows see whole, with one change. */
template <enum changes ONLY>
PTX void attend_run(const kernel_args &a, smem_layout &smem, int32_t n, rows_state &st, cursor &kv,
                    uint64_t q, uint32_t q_last, int32_t key, int32_t run, int warpgroup) {
    for (; run > 0; --run, key -= BLOCK_N)
        attend<BEHIND, false, true, ONLY>(a, smem, n, st, kv, q, run == 1 ? q_last : 0, key, false,
                                          st.fresh, warpgroup);
}

/* The block of this tag and those behind it, while they have no holes and some row sees them, with
 * a bool mask; returns the last one's tag. */
PTX uint32_t attend_words(const kernel_args &a, smem_layout &smem, int32_t n, rows_state &st,
                          cursor &kv, uint64_t q, uint32_t q_empty, uint32_t tag, int warpgroup) {
    for (;;) {
        attend<BEHIND, true, true, WORDS>(a, smem, n, st, kv, q, tag & TAG_LAST ? q_empty : 0,
                                          (int32_t)(tag >> TAG_BLOCK) * BLOCK_N,
                                          see_tag(tag, warpgroup) == PART, st.fresh, warpgroup);
        if (tag & TAG_LAST) return tag;
        uint32_t next = peek_tag(smem, kv);
        if (next & TAG_HOLES || see_tag(next, warpgroup) == NONE) return tag;
        tag = next;
    }
}

/* The blocks from the i-th on, at `key`, that lie side by side and are seen whole, with the one
 * change that there is; returns their number. */
PTX int32_t attend_whole(const kernel_args &a, smem_layout &smem, int32_t n, rows_state &st,
                         cursor &kv, uint64_t q, uint32_t q_empty, int32_t i, int32_t key,
                         int warpgroup) {
    const item &t = smem.items[n % ITEMS];
    const int32_t run = whole_blocks(t, i, key / BLOCK_N, warpgroup);
    const uint32_t q_last = i + run == t.end - t.begin ? q_empty : 0;
    switch (a.scores.only) {
        case CAPS:
            attend_run<CAPS>(a, smem, n, st, kv, q, q_last, key, run, warpgroup);
            break;
        case TILES:
            attend_run<TILES>(a, smem, n, st, kv, q, q_last, key, run, warpgroup);
            break;
        case ALIBI:
            attend_run<ALIBI>(a, smem, n, st, kv, q, q_last, key, run, warpgroup);
            break;
        default:
            attend_run<DROPS>(a, smem, n, st, kv, q, q_last, key, run, warpgroup);
    }
    return run;
}
#endif

/* Ends P V of the last block. */
PTX void finish_pv(const kernel_args &a, rows_state &st, smem_layout &smem) {
    if (DELAYED && !st.held) return;
    if (DELAYED) {
        mbarrier_wait(smem_address(&smem.v_full[st.v.stage]), st.v.parity);
        issue_pv(a, st, smem, st.fresh);
    }
    wgmma_wait_group<0>();
    settle(st, smem, st.held);
}

/* Ends the open tile where no block does so in passing. */
PTX void finish_tile(const kernel_args &a, smem_layout &smem, int32_t n, rows_state &st,
                     int warpgroup) {
    finish_pv(a, st, smem);
    ending end = begin_end(a, smem.items[n % ITEMS], st, warpgroup);
    end_rows(a, smem, n, st, end, warpgroup);
}

/* A block that this warpgroup has no use for: it must still be handed back, once it is there. The
 * warps stay together, or one could miss two phases of a barrier. */
PTX void pass(smem_layout &smem, cursor &kv, uint32_t q_done, int warpgroup) {
    take_turn(warpgroup);
    pass_turn(warpgroup);
    mbarrier_wait(smem_address(&smem.k_full[kv.stage]), kv.parity);
    mbarrier_wait(smem_address(&smem.v_full[kv.stage]), kv.parity);
    bar_sync(1 + warpgroup, 128);
    release(smem_address(&smem.k_empty[kv.stage]));
    release(smem_address(&smem.v_empty[kv.stage]));
    if (q_done) release(q_done);
    advance(kv);
}

PTX void consume(const kernel_args &a, smem_layout &smem, int warpgroup) {
    cursor kv = {0, 0};
    rows_state st = {};
    softmax_start(st.softmax);
    close_rows(st, rows_out{});
    if (warpgroup == WARPGROUPS - 1) pass_turn(warpgroup); /* the first turn is warpgroup 0's */
    for (int32_t n = 0;; ++n) {
        const item &t = smem.items[n % ITEMS];
        mbarrier_wait(smem_address(&smem.item_full[n % ITEMS]), n / ITEMS & 1);
        const int32_t place = n * WARPGROUPS + warpgroup, slot = place % Q_SLOTS;
        int32_t last = uniform(t.last), blocks = uniform(t.end - t.begin);

        /* The tile before ends in passing if there is a block for it before its V is needed. */
#if ROW_GENERAL
        uint32_t tag = blocks ? read_tag(a, smem, t, kv, 0, warpgroup) : 0;
        bool next = st.held && blocks && see_tag(tag, warpgroup) != NONE;
#else
        const int32_t skip = uniform(t.skip[warpgroup]), masked = uniform(t.masked[warpgroup]);
        const int32_t watch = KEPT ? uniform(t.watch) : 1;
        bool next = DELAYED && st.held && skip < masked && skip < STAGES;
#endif
        if (DELAYED && st.open && !next) finish_tile(a, smem, n - 1, st, warpgroup);
        if (last) { /* the copy engine may not have read all that has been stored */
            if (STAGED && threadIdx.x % 32 == 0) cp_async_bulk_wait_group_read();
            return;
        }
        const uint64_t q = q_descriptor(a, smem, slot);
        const uint32_t q_empty = smem_address(&smem.q_empty[slot]);
        mbarrier_wait(smem_address(&smem.q_full[slot]), place / Q_SLOTS & 1);
        if (blocks == 0) { /* all warps have met this Q, or one could miss two of its phases */
            bar_sync(1 + warpgroup, 128);
            release(q_empty);
        }

#if ROW_GENERAL
        for (int32_t i = 0; blocks;) {
            const int32_t key = (int32_t)(tag >> TAG_BLOCK) * BLOCK_N;
            const uint32_t q_done = tag & TAG_LAST ? q_empty : 0;
            const enum seen seen = see_tag(tag, warpgroup);
            const bool cut = seen == PART, holes = tag & TAG_HOLES;
            if (seen == NONE) {
                finish_pv(a, st, smem);
                pass_tiles(a.scores, tile_of(smem, kv, warpgroup));
                pass(smem, kv, q_done, warpgroup);
            } else if (next) {
                attend<NEXT, true, true>(a, smem, n, st, kv, q, q_done, key, cut, st.fresh,
                                         warpgroup, holes);
                next = false;
            } else if (!st.held) {
                attend<ALONE, true, true>(a, smem, n, st, kv, q, q_done, key, cut, st.fresh,
                                          warpgroup, holes);
            } else if (SPECIAL && a.scores.only == WORDS && !holes) {
                tag = attend_words(a, smem, n, st, kv, q, q_empty, tag, warpgroup);
            } else if (SPECIAL && a.scores.only && a.scores.only != WORDS && !cut) {
                i += attend_whole(a, smem, n, st, kv, q, q_empty, i, key, warpgroup);
                if (i == t.end - t.begin) break;
                tag = interval_tag(t, i, warpgroup);
                continue;
            } else {
                attend<BEHIND, true, true>(a, smem, n, st, kv, q, q_done, key, cut, st.fresh,
                                           warpgroup, holes);
            }
            if (tag & TAG_LAST) break;
            tag = read_tag(a, smem, t, kv, ++i, warpgroup);
        }
#else
        int32_t i = 0;
        for (; i < masked; ++i) {
            int32_t block = uniform(key_block(t, i)), key = block * BLOCK_N;
            uint32_t q_done = i == blocks - 1 ? q_empty : 0;
            enum seen seen = i < skip ? NONE : see(t, block, warpgroup);
            bool cut = seen == PART;
            if (seen == NONE) {
                if (!next) finish_pv(a, st, smem);
                pass(smem, kv, q_done, warpgroup);
            } else if (next) {
                attend<NEXT, true, true>(a, smem, n, st, kv, q, q_done, key, cut, st.fresh,
                                         warpgroup);
                next = false;
            } else if (DELAYED && !st.held) {
                attend<ALONE, true, true>(a, smem, n, st, kv, q, q_done, key, cut, st.fresh,
                                          warpgroup);
            } else if (!watch) {
                attend<BEHIND, true, false>(a, smem, n, st, kv, q, q_done, key, cut, st.fresh,
                                            warpgroup);
            } else {
                attend<BEHIND, true, true>(a, smem, n, st, kv, q, q_done, key, cut, st.fresh,
                                           warpgroup);
            }
        }
        const bool late = Q_AHEAD && i < blocks;
        const int32_t second = uniform(DELAYED && st.fresh ? i : -1); /* its P V is the first's */
        if (!watch)
            for (; i < blocks; ++i)
                attend<BEHIND, false, false>(a, smem, n, st, kv, q,
                                             !Q_AHEAD && i == blocks - 1 ? q_empty : 0, 0, false,
                                             i == second, warpgroup);
        else
            for (; i < blocks; ++i)
                attend<BEHIND, false, true>(a, smem, n, st, kv, q,
                                            !Q_AHEAD && i == blocks - 1 ? q_empty : 0, 0, false,
                                            i == second, warpgroup);
        if (late) release(q_empty);
#endif
        st.open = true;
        if (!DELAYED) finish_tile(a, smem, n, st, warpgroup);
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
#endif
        for (int i = 0; i < Q_SLOTS; ++i) {
            mbarrier_init(smem_address(&smem.q_full[i]), LOADERS);
            mbarrier_init(smem_address(&smem.q_empty[i]), 1);
        }
        for (int i = 0; i < ITEMS; ++i) {
            mbarrier_init(smem_address(&smem.item_full[i]), 1);
            mbarrier_init(smem_address(&smem.item_empty[i]), 4 * WARPGROUPS + 2); /* K's, V's */
            smem.again[i] = 0;
        }
        for (int i = 0; i < STAGES; ++i) {
            mbarrier_init(smem_address(&smem.k_full[i]), LOADERS);
            mbarrier_init(smem_address(&smem.v_full[i]), LOADERS);
            mbarrier_init(smem_address(&smem.k_empty[i]), WARPGROUPS);
            mbarrier_init(smem_address(&smem.v_empty[i]), WARPGROUPS);
        }
#if ROW_GENERAL
        for (int w = 0; w < WARPGROUPS; ++w) {
            mbarrier_init(smem_address(&smem.mask_full[w]), 1);
            mbarrier_init(smem_address(&smem.mask_empty[w]), 4);
        }
#endif
        fence_mbarrier_init();
    }
    int32_t tile = 0, round = 0;
    if (threadIdx.x == 128 * WARPGROUPS) {
        if (a.reads) wait_for_stream();
        tile = first_tile(a, smem, &round);
    }
    if (ONES) {
        uint32_t one = IS_BF16 ? 0x3F803F80 : 0x3C003C00;
        for (int i = threadIdx.x; i < PANEL_N / 4; i += THREADS) ((uint32_t *)smem.ones)[i] = one;
        fence_proxy_async();
    }
    if (STRIDED) { /* columns past the head size, which no load touches */
        for (int i = threadIdx.x; i < (int)offsetof(smem_layout, o) / 16; i += THREADS)
            ((uint4 *)&smem)[i] = make_uint4(0, 0, 0, 0);
        fence_proxy_async();
    }
    __syncthreads();
    wait_for_stream();

    int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
    if (warpgroup == WARPGROUPS) {
        setmaxnreg_dec<SERVER_REGISTERS>();
        int server = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
        if (server == 0 && lane == 0) schedule(a, smem, tile, round);
        if (server == 1 && lane < LOADERS) bring_q(a, smem);
        if (server == 2 && lane < LOADERS) bring_k(a, smem);
        if (server == 3 && lane < LOADERS) bring_v(a, smem);
    } else {
        setmaxnreg_inc<MMA_REGISTERS>();
        consume(a, smem, warpgroup);
    }
}

#include "sm90_launch.cuh"
