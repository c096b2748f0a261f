/* forward_kernel.h - the CPU's attention, once per instance (see simd.h): stop 6 of 6.
 * Included without a guard.
 *
 * Online softmax over blocks of keys. The lanes of every vector are query rows, of one head or of
 * several that share the keys, so all that a row carries - its maximum, its sum, its interval - is
 * one lane, and no step adds across lanes. A panel of up to NV * LANES rows holds
 *
 *     Q^T [d][row]      S^T [key][row]      O^T [dv][row]
 *
 * and both products are the same loop: vectors of rows times one broadcast number of K or V, which
 * are therefore read as they lie, without packing, where they lie well.
 *
 *     S^T[key] = sum over d    Q^T[d]   * K[key][d]
 *     O^T[dv]  = sum over keys P^T[key] * V[key][dv]
 *
 * Few rows of a head do not fill vectors: forward_few.h has panels of another kind for them.
 *
 * With FA_PAIRS a step is a pair of bfloat16 (vdpbf16ps): Q and K pair up along d, P and V along
 * keys.
 */
#include "simd.h"
#include "rows.h"
#include "units.h"

#ifndef FASTATTN_CPU_FORWARD_KERNEL_H
#define FASTATTN_CPU_FORWARD_KERNEL_H

#define ahead FN(ahead)
#define attend FN(attend)
#define attend_few FN(attend_few)
#define attend_few_rows FN(attend_few_rows)
#define attend_keys FN(attend_keys)
#define attend_panel FN(attend_panel)
#define attend_pass FN(attend_pass)
#define block FN(block)
#define cap FN(cap)
#define change FN(change)
#define change_few FN(change_few)
#define change_score FN(change_score)
#define close_panel FN(close_panel)
#define clear_panel FN(clear_panel)
#define collect FN(collect)
#define collect_few FN(collect_few)
#define context FN(context)
#define drop FN(drop)
#define drop_few FN(drop_few)
#define fetch FN(fetch)
#define fetch_both FN(fetch_both)
#define fetch_row FN(fetch_row)
#define find_ends FN(find_ends)
#define fold FN(fold)
#define gate_at FN(gate_at)
#define gate_scores FN(gate_scores)
#define gate_weights FN(gate_weights)
#define has_one_key FN(has_one_key)
#define is_one_piece FN(is_one_piece)
#define join_splits FN(join_splits)
#define key_row FN(key_row)
#define keys_of_lanes FN(keys_of_lanes)
#define lay_out FN(lay_out)
#define load_block FN(load_block)
#define look_ahead FN(look_ahead)
#define meet_block FN(meet_block)
#define multiply FN(multiply)
#define one_key FN(one_key)
#define open_group FN(open_group)
#define open_panel FN(open_panel)
#define open_pass FN(open_pass)
#define open_rows FN(open_rows)
#define open_scores FN(open_scores)
#define page_row FN(page_row)
#define panel FN(panel)
#define read_bias FN(read_bias)
#define read_bias_few FN(read_bias_few)
#define keeps FN(keeps)
#define run_lists FN(run_lists)
#define run_rows FN(run_rows)
#define run_split FN(run_split)
#define score FN(score)
#define score_few FN(score_few)
#define score_keys FN(score_keys)
#define score_some FN(score_some)
#define scratch_bytes FN(scratch_bytes)
#define see FN(see)
#define state_bytes FN(state_bytes)
#define sum_lanes FN(sum_lanes)
#define take FN(take)
#define turn_few FN(turn_few)
#define weigh_few FN(weigh_few)
#define whole FN(whole)

/* In a block, at most: twice as many are 1 % faster where S^T still lies in the L1 with them. */
#define KEYS (FA_BYTES == 64 ? 64 : 128)
#define CHAIN 16             /* probabilities added up in a row */
#define PRODUCTS 64          /* of a score added up in a row, see score() */
#define NV FA_VECTORS        /* in a panel, at most; so many fit the registers */
#define PANEL (NV * LANES)   /* rows in a panel */
#define PANELS (128 / PANEL) /* that share a packed block */
#define FEW (LANES / 2)      /* rows in a panel of few */
#define FEW_KEYS 16          /* with fewer, few rows are faster in vectors of rows, too */
#define AHEAD 24             /* rows of K and V that are asked for before they are read */
/* Of the register tile: with `nv` vectors of rows, so many numbers of K or V. */
#define HEIGHT(nv) (FA_ACCUMULATORS / (nv) < 8 ? FA_ACCUMULATORS / (nv) : 8)

#endif

typedef struct panel {
    vec *q;           /* [units of d][nv] */
    vec *o;           /* [dv][nv], not yet divided by l */
    vec m[NV], l[NV]; /* maximum m of the scores, sum of exp(s - m) */
    /* Of each row; begin = end in the lanes past the last row. */
    ivec begin[NV], end[NV], position[NV];
    vec slope[NV];
    vec tau[NV];          /* of keys that SparseK keeps */
    fa_interval any, all; /* keys that some row, and that every row sees */
    fa_row row[PANEL];    /* the last one in the lanes past it */
    int count, nv;        /* rows, vectors of rows */
    int few;              /* 0, or forward_few.h's R: lane i is row i % few */
} panel;

/* What all blocks of a run share. */
typedef struct context {
    const fa_params *p;
    const fa_group *group;
    const char *q, *k, *v, *mask; /* of this sequence and the group's first head, from row 0 on */
    char *out;
    int64_t seed;
    int unit_k, unit_v; /* K and V can be read in place */
    int zip_v;          /* V can, where pairs are zipped as they are read */
    int units;          /* units of d */
    int few;            /* the rows of each head are few */
    /* As they come from Q K a score counts |scale|, with the scale's sign multiplied into Q. Where
     * softcap, a float mask or ALiBi changes them, change() brings them to 1. */
    int changed;
    real scale, sign, nats;     /* nats: what a score counts in the end */
    base score_base, e_squared; /* e^nats; e^2 for tanh */
    real softcap;
    panel *panels;
    int count;     /* of them */
    vec *s, *bias; /* [KEYS][NV]: scores, then probabilities; the mask's block */
    real *rows;    /* [LANES][longest row], to transpose from and to */
    real *k_packed, *v_packed;
    const double *gates; /* of lists: of each page, by which its values are multiplied, */
    int key_gate;        /* and its keys; NULL: 1 */
    const fa_kept *kept; /* of keys that SparseK keeps: their gates, of each row; else NULL */
} context;

/* Rows of K, or of V, in the caller's arrays. Rows that are read in place are asked for AHEAD of
 * that; where a block is packed, all of its rows are read at once, and the next block's are. */
typedef struct ahead {
    const char *rows, *next; /* of this block, of the next one */
    int64_t stride, bytes;   /* from row to row; of a row, 0: it is not asked for */
    int count, more;         /* rows of this block, of the next one */
    int by;                  /* how far ahead */
} ahead;

/* A block of keys, and where its K and V are. */
typedef struct block {
    int begin, end;
    const unit *k, *v;
    int64_t k_row, v_row; /* units from key to key, from step to step */
    int64_t zipped; /* elements from row to row of V where pairs are zipped as they are read */
    ahead k_ahead, v_ahead;
} block;

static int whole(int n) { return (n + LANES - 1) / LANES * LANES; }

#include "forward_products.h"
#include "forward_scores.h"
#include "forward_kept.h"
#include "forward_few.h"
#include "forward_attend.h"
#include "forward_rows.h"

/* The scratch of one thread, carved from `memory` (NULL: only counted). Returns its bytes. */
static size_t lay_out(context *c, char *memory, const fa_what *what, int masked, int rows) {
    const int units = (what->d + STEP - 1) / STEP, keys = what->sk < KEYS ? whole(what->sk) : KEYS;
    const int size = c->few ? FEW : PANEL; /* rows in a panel */
    int longest = whole(what->d > what->dv ? what->d : what->dv);
    if (longest < KEYS) longest = KEYS;
    size_t used = 0;
#define CARVE(pointer, type, numbers)                              \
    do {                                                           \
        if (memory) pointer = (void *)(memory + used);             \
        used += ((size_t)(numbers) * sizeof(type) + 63) / 64 * 64; \
    } while (0)
    c->count = (rows + size - 1) / size;
    CARVE(c->panels, panel, c->count);
    for (int i = 0, first = 0; first < rows; i++, first += size) {
        const int wide = rows - first < size ? whole(rows - first) : whole(size);
        CARVE(c->panels[i].q, real, (size_t)whole(units) * wide);
        CARVE(c->panels[i].o, real, (size_t)whole(what->dv) * wide);
    }
    const int wide = rows < PANEL ? whole(rows) : PANEL;
    CARVE(c->s, real, keys * wide);
    if (masked) CARVE(c->bias, real, keys * wide);
    CARVE(c->rows, real, (size_t)longest * LANES);
    CARVE(c->k_packed, real, (size_t)whole(units) * keys);
    CARVE(c->v_packed, real, (size_t)whole(what->dv) * keys);
    return used;
}

/* Whether all rows of a sequence have one key, see it, and nothing changes its weight. (All: a
 * row's bits must not depend on which others are in its task.) */
static int has_one_key(const fa_params *p, fa_lengths lengths) {
    const fa_scores *scores = &p->scores;
    const double scale = fabs(p->what.scale);
    if (lengths.sk - lengths.k_start != 1) return 0;
    if (scores->mask.data || scores->sink || scores->alibi_slopes || scores->softcap > 0) return 0;
    return p->dropout.p == 0 && scale > 1e-30 && scale < 1e30 &&
           fa_row_interval(lengths, 0).end > lengths.k_start &&
           fa_row_interval(lengths, lengths.sq - 1).begin == lengths.k_start;
}

#include "forward_runs.h"
#include "forward_lists.h"

static const fa_cpu_kernel FN(kernel) = {LANES,         PANEL,       PANELS * PANEL,
                                         scratch_bytes, state_bytes, run_rows,
                                         run_split,     join_splits, run_lists};

#undef FA_NAME
#undef FA_REAL
#undef FA_INT
