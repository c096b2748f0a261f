/* fwd.cu - the Hopper forward kernel: stop 6 of 6. kernels/README.md has the pictures.
 *
 * One object per row of fwd.def: setup.py passes the row's columns as VARIANT_<COLUMN>, and the
 * object exports one function, fa_launch_<name> (fwd_launch.cuh). What is included on the way are
 * parts of this file.
 *
 * A block stays on its SM and works through tiles of 64 * WARPGROUPS query rows of one head. Each
 * MMA warpgroup owns 64 rows of a tile and keeps S, P and O in registers. Four more warps serve
 * them, one thread each: one decides what comes next, one brings Q, one K, one V. A tile ends while
 * the next one's first block is under way (NEXT, below).
 *
 * The softmax offset (softmax.cuh) comes from the first, masked key blocks of a tile. Rows that
 * KEEP it never look at it again: their main loop has no maximum at all; those that FOLLOW look at
 * P. At the end of a tile each warp votes whether everything stayed finite and in range; if not,
 * the tile comes again for its warpgroup, with the loop that watches every score, and what was
 * stored is stored once more.
 *
 * GENERAL rows change scores (scores.cuh): they watch every score, always, and take their key
 * blocks from the right to the left, those that a bool mask hides from all rows left out.
 *
 * STRIDED rows take arrays that the copy engine cannot address: whole warps load in its place,
 * element by element, and O is stored likewise. Everything between is the same. SLICES: the copy
 * engine does, but not a head alone: the columns of other heads that it brings are cleared. RAW:
 * strided, but the copy engine brings K and V as they lie in memory, and warps move them.
 */
#include <stddef.h>

#include "common/launch.cuh"
#include "common/packed.h"
#include "common/schedule.h"
#include "loads.h"
#include "workspace.h"

/* What the preprocessor must know of a row's loads. */
#define LOADS_FA_BOXES 0
#define LOADS_FA_STRIDED 1
#define LOADS_FA_SLICES 2
#define LOADS_FA_RAW 3
#define IS_RAW (PASTE(LOADS_, VARIANT_LOADS) == 3)
#define IS_STRIDED (PASTE(LOADS_, VARIANT_LOADS) == 1 || IS_RAW)
#define HAS_SLICES (PASTE(LOADS_, VARIANT_LOADS) == 2)

#define PASTE_(a, b) a##b
#define PASTE(a, b) PASTE_(a, b)
#define PTX_TYPE_FA_BF16 "bf16"
#define PTX_TYPE_FA_F16 "f16"
#define FA_PTX_TYPE PASTE(PTX_TYPE_, VARIANT_DTYPE)
#include "softmax.cuh"

/* ---- the row ----------------------------------------------------------------------------------*/

static constexpr bool IS_BF16 = VARIANT_DTYPE == FA_BF16, ONES = VARIANT_ONES, STRIDED = IS_STRIDED,
                      SLICES = VARIANT_LOADS == FA_SLICES, GENERAL = VARIANT_GENERAL;
static constexpr enum offset OFFSET = VARIANT_OFFSET;
static constexpr bool REDOES = OFFSET != WATCH; /* tiles whose offsets did not hold */
static constexpr int D = VARIANT_D, DV = VARIANT_DV, WARPGROUPS = VARIANT_WARPGROUPS,
                     BLOCK_N = VARIANT_BLOCK_N, STAGES = VARIANT_STAGES, Q_SLOTS = VARIANT_Q_SLOTS,
                     BLOCKS_PER_SM = VARIANT_BLOCKS_PER_SM;
static constexpr int BLOCK_M = 64 * WARPGROUPS;
static constexpr int TILE_SLOTS = 4; /* tiles that the scheduler may be ahead */
typedef softmax_range<IS_BF16, GENERAL> range;

static_assert(D % 16 == 0 && BLOCK_N % 16 == 0, "wgmma takes k by 16");
static_assert(DV % (VARIANT_STAGED ? 16 : 32) == 0, "out.cuh");
static_assert(BLOCK_N <= 128, "a mask has 32 bits");
static_assert(!GENERAL || (OFFSET == WATCH && !ONES && (BLOCK_N == 64 || BLOCK_N == 128)),
              "scores.cuh");
static_assert(!ONES || DV == 64, "the block of ones is the second panel of V");

/* P V of a block is issued behind Q K^T of the next (DELAYED), or, where registers are too few to
 * keep P beside S, or calls are short, 16 keys at a time as soon as their exponentials are there, P
 * a ring of two: other blocks of the SM have work for the tensor cores meanwhile, and the code,
 * which a short call waits for, is half as long. */
static constexpr bool DELAYED = WARPGROUPS < 4 && (BLOCKS_PER_SM == 1 || OFFSET != WATCH);
static constexpr int P_PIECES = DELAYED ? BLOCK_N / 16 : 2;
/* Short calls read K and V once or twice: there is no use in keeping them in the L2 longest. */
[[maybe_unused]] static constexpr uint64_t KV_POLICY =
    BLOCKS_PER_SM > 1 && !DELAYED ? EVICT_NORMAL : EVICT_LAST;
/* Where a score raises its row's top, O shrinks once P V of the block before has ended, and the
 * exponentials need not wait for that. The factors take registers, which not all rows have. */
static constexpr bool SHRINKS_LATE =
    DELAYED && OFFSET != KEEP && (WARPGROUPS == 2 ? DV <= 192 : BLOCK_N <= 80);
/* Q of a tile can arrive while another is computed: its release may wait for the end of a loop. */
[[maybe_unused]] static constexpr bool Q_AHEAD = DELAYED && Q_SLOTS >= 2 * WARPGROUPS;
/* Two or three warpgroups take turns at Q K^T; four find their rhythm alone. */
static constexpr bool TURNS = WARPGROUPS == 2 || WARPGROUPS == 3;

/* Registers a thread: the launch gives all threads the same, the warpgroups then exchange them; the
 * pool is the number of threads times what the launch gave. (256 threads cannot hold all registers
 * of an SM: those leave half of them.) */
static constexpr int THREADS = 128 * (WARPGROUPS + 1);
static constexpr int SHARES = WARPGROUPS == 1 && BLOCKS_PER_SM == 1 ? 2 : BLOCKS_PER_SM;
static constexpr int POOL = 65536 / SHARES / THREADS / 8 * 8 * (WARPGROUPS + 1);
static constexpr int MMA_REGISTERS = VARIANT_MMA_REGISTERS;
static constexpr int PRODUCER_REGISTERS = POOL - WARPGROUPS * MMA_REGISTERS;
static_assert(PRODUCER_REGISTERS >= 24, "the pool is too small");

/* O leaves through shared memory where there is room for that. */
static constexpr bool STAGED = VARIANT_STAGED;

static constexpr int LOADERS = STRIDED ? 32 : 1; /* threads that bring Q, K, V, each */
/* Threads of a warpgroup that hand back what was loaded: one, where wgmma alone has read it; where
 * threads have too, or where a stage's tag soon has a successor, each speaks for itself. */
static constexpr int RELEASERS = STRIDED || SLICES || (GENERAL && DV > 128) ? 128 : 1;
static constexpr int READERS = 128 * WARPGROUPS + 2 * LOADERS; /* of an item; K's and V's loaders */

/* ---- shared memory: panels of 64 columns, 128 bytes a row, swizzled, each on 1024 bytes -------*/

template <int COLUMNS>
static constexpr int panels = (COLUMNS + 63) / 64;
static constexpr int PANEL_Q = 64 * 128, PANEL_N = BLOCK_N * 128;
static constexpr int Q_BYTES = PANEL_Q * panels<D>;
static constexpr int O_BYTES = 16 * 128; /* a panel of a warp's rows */
static constexpr int K_BYTES = PANEL_N * panels<D>, V_BYTES = PANEL_N * panels<DV>;
#if IS_RAW
static constexpr int RING = 4, RAW_BYTES = DV > 128 ? 15360 : 17408; /* raw.cuh */
#endif

#if VARIANT_GENERAL
/* Loops for one change of scores alone, where registers and the time to compile them allow. */
static constexpr bool SPECIAL = !STRIDED && DV <= 128;
#include "scores.cuh"
#endif

/* What the scheduler tells the others about a tile. */
struct work_tile {
    int32_t b, h, row;   /* batch, query head, first query row */
    int32_t h_k;         /* key head */
    fa_lengths lengths;  /* of this sequence */
    int32_t q, k;        /* packed: its first rows in the arrays; else 0 */
    int32_t rows, keys;  /* rows to store, padding included; keys up to the array's end */
    int32_t boxed;       /* rows that may leave in boxes of 16, which only the array's end clips */
    int32_t begin, end;  /* key blocks that some row sees */
    int32_t left, right; /* how many of them, from either side, not every row sees whole */
    fa_interval visible; /* keys that some row of the sequence sees */
    fa_interval some[WARPGROUPS], whole[WARPGROUPS]; /* keys that one row, that all rows see */
    int32_t skip[WARPGROUPS]; /* blocks in front of the first that a row sees; all, if none does */
    int32_t masked[WARPGROUPS]; /* those, that one, and all up to the last that not all see whole */
    int32_t warpgroups;         /* bit set of those that compute it */
    int32_t watch;              /* the offset is neither kept nor followed */
    float sink;                 /* one more score of every row; -inf: none */
    int32_t last;               /* there is no tile, and there will be no more */
#if VARIANT_GENERAL
    score_tile score;
#endif
};

struct smem_layout {
    uint8_t q[Q_SLOTS][Q_BYTES]; /* a warpgroup's, in their turn */
    uint8_t k[STAGES][K_BYTES];
    uint8_t v[STAGES][V_BYTES];
#if VARIANT_GENERAL
    uint8_t mask[WARPGROUPS][MASK_BYTES];
#endif
    uint8_t o[STAGED ? 4 * WARPGROUPS : 1][STAGED ? panels<DV> : 1][STAGED ? O_BYTES : 16];
#if IS_RAW
    alignas(128) uint8_t raw[2][RAW_BYTES]; /* rows of V, of K, as they lie in memory */
    uint64_t raw_full[2][RING];
#endif
    uint8_t ones[ONES ? PANEL_N : 16]; /* 64 more columns of V: O's column 64 becomes the row sum */
    uint64_t q_full[Q_SLOTS], q_empty[Q_SLOTS];
    uint64_t k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
    uint64_t tile_full[TILE_SLOTS], tile_empty[TILE_SLOTS];
    work_tile tiles[TILE_SLOTS];
    uint32_t again[TILE_SLOTS]; /* the votes: bit w, warpgroup w could not keep its offset */
#if VARIANT_GENERAL
    uint32_t tags[STAGES]; /* of a bool mask: which block of K is in a stage, and who sees it */
    uint64_t mask_full[WARPGROUPS], mask_empty[WARPGROUPS];
    uint4 columns[WARPGROUPS][4]; /* keys of a block that some row of a tile's quarter sees */
#endif
};
static_assert(offsetof(smem_layout, o) % 1024 == 0, "the copy engine's pattern");
#if VARIANT_GENERAL
static_assert(offsetof(smem_layout, mask) % 1024 == 0, "the copy engine's pattern");
#endif
static_assert(!ONES || offsetof(smem_layout, ones) % 1024 == 0, "wgmma's pattern");
static constexpr int SMEM_BYTES = sizeof(smem_layout) + 1024; /* room to align the base */
static_assert(SMEM_BYTES <= 227 * 1024, "a block has no more");

#if IS_STRIDED
typedef fa_tensor array;
#else
typedef CUtensorMap array; /* {columns, rows, heads, batches} */
#endif

struct kernel_args {
    array q, k, v, out_map;
#if !IS_STRIDED
    array tails[3];     /* of q, k, v: the last panel's columns, where they are fewer than 64 */
    int32_t columns[3]; /* that are loaded, in units of 16 bytes */
#endif
    fa_tensor out;
    fa_schedule schedule;
    fa_packed packed;
    fa_varlen varlen;
    fa_masks masks;
    int32_t sq, sk, hq;
    fa_divisor by_hq, by_group; /* query heads; those that share a key head */
    uint32_t descriptor_high;   /* of wgmma's operands */
    int32_t watch;              /* 1: keep and follow no offset anywhere */
    int32_t reads;              /* the arguments alone do not describe a tile */
    int32_t ahead;              /* items that a block may have claimed, at most ITEMS */
    int32_t moves[4][2]; /* q, k, v, out, heads and batches: 0 where the stride is; else 1, or of
                          * slices' heads the stride itself */
#if HAS_SLICES
    int32_t d; /* of Q and K: columns that are not cleared */
#endif
    float scale; /* times log2(e) */
    float slack; /* softmax_slack of it */
    float *lse;  /* (b, hq, sq), strides in elements; NULL: not wanted */
    int64_t lse_stride[3];
    const float *sink; /* (hq,), or NULL */
    int64_t sink_stride;
#if VARIANT_GENERAL
    int32_t b;
    score_args scores;
#endif
};

/* A ring of stages; the parity flips each time around. */
struct cursor {
    int stage;
    uint32_t parity;
};
DEVICE void advance(cursor &c) {
    bool wrap = ++c.stage == STAGES;
    c.stage = wrap ? 0 : c.stage;
    c.parity ^= wrap;
}

/* This thread has read item n for the last time. */
DEVICE void leave_tile(smem_layout &smem, int32_t n) {
    mbarrier_arrive(smem_address(&smem.tile_empty[n % TILE_SLOTS]));
}

#include "visibility.cuh"
#include "producers.cuh"
#include "attend.cuh"

/* ---- an MMA warpgroup -------------------------------------------------------------------------*/

DEVICE void consume(const kernel_args &a, smem_layout &smem, int warpgroup) {
    cursor kv = {0, 0};
    rows_state st = {};
    softmax_start(st.softmax);
    close_rows(st, output_rows{});
    if (warpgroup == WARPGROUPS - 1) pass_turn(warpgroup); /* the first turn is warpgroup 0's */
    for (int32_t n = 0;; ++n) {
        const work_tile &t = smem.tiles[n % TILE_SLOTS];
        mbarrier_wait(smem_address(&smem.tile_full[n % TILE_SLOTS]), n / TILE_SLOTS & 1);
        const int32_t place = n * WARPGROUPS + warpgroup, slot = place % Q_SLOTS;
        int32_t last = uniform(t.last), blocks = uniform(t.end - t.begin);

        /* The tile before ends in passing if there is a block for it before its V is needed. */
#if VARIANT_GENERAL
        uint32_t tag = blocks ? read_tag(a, smem, t, kv, 0, warpgroup) : 0;
        bool next = st.held && blocks && tag_visibility(tag, warpgroup) != NONE;
#else
        const int32_t skip = uniform(t.skip[warpgroup]), masked = uniform(t.masked[warpgroup]);
        bool next = DELAYED && st.held && skip < masked && skip < STAGES;
        const int32_t watch = REDOES ? uniform(t.watch) : 1;
#endif
        if (DELAYED && st.open && !next) finish_tile(a, smem, n - 1, st, warpgroup);
        if (last) { /* the copy engine may not have read all that has been stored */
            if (STAGED && threadIdx.x % 32 == 0) cp_async_bulk_wait_group_read();
            return;
        }
        const uint64_t q = q_descriptor(a, smem, slot);
        const uint32_t q_empty = smem_address(&smem.q_empty[slot]);
        mbarrier_wait(smem_address(&smem.q_full[slot]), place / Q_SLOTS & 1);
#if HAS_SLICES
        const int32_t begin = t.h * a.moves[0][0] % FA_SLICE;
        clear_columns<64>(smem.q[slot], begin, begin + a.d, a.columns[0], warpgroup);
#endif
        if (blocks == 0) { /* all warps have met this Q, or one could miss two of its phases */
            bar_sync(1 + warpgroup, 128);
            release(q_empty);
        }
        if (REDOES && uniform(t.warpgroups) == 0) { /* nobody's rows: there is nothing to end */
            leave_tile(smem, n);
            continue;
        }

#if VARIANT_GENERAL
        for (int32_t i = 0; blocks;) {
            const int32_t key = (int32_t)(tag >> TAG_BLOCK) * BLOCK_N;
            const uint32_t q_done = tag & TAG_LAST ? q_empty : 0;
            const enum visibility seen = tag_visibility(tag, warpgroup);
            const bool cut = seen == PART, holes = tag & TAG_HOLES;
            if (seen == NONE) {
                finish_pv(a, st, smem);
                pass_mask_tiles(a.scores, mask_tile_of(smem, kv, warpgroup));
                pass(smem, kv, q_done, warpgroup);
            } else if (next) {
                attend<NEXT, true, WATCH>(a, smem, n, st, kv, q, q_done, key, cut, st.fresh,
                                          warpgroup, holes);
                next = false;
            } else if (!st.held) {
                attend<ALONE, true, WATCH>(a, smem, n, st, kv, q, q_done, key, cut, st.fresh,
                                           warpgroup, holes);
            } else if (SPECIAL && a.scores.only == WORDS && !holes) {
                tag = attend_words(a, smem, n, st, kv, q, q_empty, tag, warpgroup);
            } else if (SPECIAL && a.scores.only && a.scores.only != WORDS && !cut) {
                i += attend_whole(a, smem, n, st, kv, q, q_empty, i, key, warpgroup);
                if (i == t.end - t.begin) break;
                tag = interval_tag(t, i, warpgroup);
                continue;
            } else {
                attend<BEHIND, true, WATCH>(a, smem, n, st, kv, q, q_done, key, cut, st.fresh,
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
            enum visibility seen = i < skip ? NONE : visibility_of(t, block, warpgroup);
            bool cut = seen == PART;
            if (seen == NONE) {
                if (!next) finish_pv(a, st, smem);
                pass(smem, kv, q_done, warpgroup);
            } else if (next) {
                attend<NEXT, true, WATCH>(a, smem, n, st, kv, q, q_done, key, cut, st.fresh,
                                          warpgroup);
                next = false;
            } else if (DELAYED && !st.held) {
                attend<ALONE, true, WATCH>(a, smem, n, st, kv, q, q_done, key, cut, st.fresh,
                                           warpgroup);
            } else if (OFFSET == KEEP && !watch) {
                attend<BEHIND, true, KEEP>(a, smem, n, st, kv, q, q_done, key, cut, st.fresh,
                                           warpgroup);
            } else {
                attend<BEHIND, true, WATCH>(a, smem, n, st, kv, q, q_done, key, cut, st.fresh,
                                            warpgroup);
            }
        }
        const bool late = Q_AHEAD && i < blocks;
        const int32_t second = uniform(DELAYED && st.fresh ? i : -1); /* its P V is the first's */
        if (!watch)
            for (; i < blocks; ++i)
                attend<BEHIND, false, OFFSET>(a, smem, n, st, kv, q,
                                              !Q_AHEAD && i == blocks - 1 ? q_empty : 0, 0, false,
                                              i == second, warpgroup);
        else
            for (; i < blocks; ++i)
                attend<BEHIND, false, WATCH>(a, smem, n, st, kv, q,
                                             !Q_AHEAD && i == blocks - 1 ? q_empty : 0, 0, false,
                                             i == second, warpgroup);
        if (late) release(q_empty);
#endif
        st.open = true;
        if (!DELAYED) finish_tile(a, smem, n, st, warpgroup);
    }
}

/* ---- the kernel -------------------------------------------------------------------------------*/

__global__ void __launch_bounds__(THREADS, SHARES)
    VARIANT_NAME(const __grid_constant__ kernel_args a) {
    extern __shared__ uint8_t raw[];
    smem_layout &smem = *(smem_layout *)(raw + (-smem_address(raw) & 1023));
    if (threadIdx.x == 0) {
#if !IS_STRIDED
        prefetch_tensormap(&a.q);
        prefetch_tensormap(&a.k);
        prefetch_tensormap(&a.v);
#endif
        for (int i = 0; i < Q_SLOTS; ++i) {
            mbarrier_init(smem_address(&smem.q_full[i]), LOADERS);
            mbarrier_init(smem_address(&smem.q_empty[i]), RELEASERS);
        }
        for (int i = 0; i < TILE_SLOTS; ++i) {
            mbarrier_init(smem_address(&smem.tile_full[i]), 1);
            mbarrier_init(smem_address(&smem.tile_empty[i]), READERS);
            smem.again[i] = 0;
        }
        for (int i = 0; i < STAGES; ++i) {
            mbarrier_init(smem_address(&smem.k_full[i]), LOADERS);
            mbarrier_init(smem_address(&smem.v_full[i]), LOADERS);
            mbarrier_init(smem_address(&smem.k_empty[i]), WARPGROUPS * RELEASERS);
            mbarrier_init(smem_address(&smem.v_empty[i]), WARPGROUPS * RELEASERS);
        }
#if IS_RAW
        for (int i = 0; i < 2 * RING; ++i) mbarrier_init(smem_address(&smem.raw_full[0][i]), 1);
#endif
#if VARIANT_GENERAL
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
    bool wider = STRIDED; /* than the heads are: no load touches those columns */
#if !IS_STRIDED
    wider = a.columns[1] < D || a.columns[2] < DV;
#endif
    if (wider) {
        for (int i = threadIdx.x; i < (int)offsetof(smem_layout, o) / 16; i += THREADS)
            ((uint4 *)&smem)[i] = make_uint4(0, 0, 0, 0);
        fence_proxy_async();
    }
    __syncthreads();
    wait_for_stream();

    int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
    if (warpgroup == WARPGROUPS) {
        setmaxnreg_dec<PRODUCER_REGISTERS>();
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

#include "fwd_launch.cuh"
