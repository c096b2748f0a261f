/* backward_kernel.h - the algorithm of the CPU's backward pass, once per instance (see simd.h).
 * Included without a guard.
 *
 * A task is a block of keys of the heads that share them. It meets their query rows block by block,
 * in order, and computes P and dS anew:
 *
 *     S = Q K'    dP = dO V'    P = exp(S - lse)    dS = P (dP - delta)
 *     dV += P' dO               dK += dS' Q         dQ += dS K
 *
 * five products of matrices, of which all but the elements of P and dS are multiply-adds: with n =
 * 5 d for each element, of 2 to a cycle, beside some 20 other instructions. A block of 128 keys and
 * 128 rows of d = 128 needs 0.6 MB, in the L2; of it a panel of A (16 KB) lies in the L1 while a
 * product goes through the rows of B. From outside come Q, dO, out and dQ, once per block of keys.
 *
 * dK and dV are the task's own. dQ is a sum over tasks, in the order of the blocks of keys: a task
 * waits with a block of rows until the task before it has added its part.
 */
#include "simd.h"
#include "rows.h"
#include "units.h"
#include "matrix.h"

#ifndef FASTATTN_CPU_BACKWARD_KERNEL_H
#define FASTATTN_CPU_BACKWARD_KERNEL_H

#define add_columns FN(add_columns)
#define add_kept_columns FN(add_kept_columns)
#define add_mass FN(add_mass)
#define add_parts FN(add_parts)
#define add_rows FN(add_rows)
#define add_sinks FN(add_sinks)
#define add_to_keys FN(add_to_keys)
#define add_to_mask FN(add_to_mask)
#define add_to_rows FN(add_to_rows)
#define add_to_sums FN(add_to_sums)
#define backward FN(backward)
#define cap FN(cap)
#define change FN(change)
#define column_row FN(column_row)
#define count_seen FN(count_seen)
#define count_kept FN(count_kept)
#define drop FN(drop)
#define fetch_next FN(fetch_next)
#define fill_listed FN(fill_listed)
#define fill_tile FN(fill_tile)
#define first_row FN(first_row)
#define gate_of FN(gate_of)
#define is_alive FN(is_alive)
#define is_alone FN(is_alone)
#define kept_tile FN(kept_tile)
#define lay_out FN(lay_out)
#define list_bytes FN(list_bytes)
#define listed_rows FN(listed_rows)
#define load_columns FN(load_columns)
#define load_key_rows FN(load_key_rows)
#define load_keys FN(load_keys)
#define load_one FN(load_one)
#define load_row FN(load_row)
#define load_rows FN(load_rows)
#define load_values FN(load_values)
#define multiply_by_row FN(multiply_by_row)
#define only_column FN(only_column)
#define open_kept_columns FN(open_kept_columns)
#define open_backward FN(open_backward)
#define open_listed FN(open_listed)
#define open_tile FN(open_tile)
#define out_dout FN(out_dout)
#define pack_panel FN(pack_panel)
#define read_lse FN(read_lse)
#define read_panels FN(read_panels)
#define row_of FN(row_of)
#define run_columns FN(run_columns)
#define run_keys FN(run_keys)
#define run_lists FN(run_lists)
#define run_mask FN(run_mask)
#define run_sink FN(run_sink)
#define scratch FN(scratch)
#define seen_keys FN(seen_keys)
#define set_keys FN(set_keys)
#define sum_keys FN(sum_keys)
#define tile FN(tile)
#define tile_size FN(tile_size)
#define is_coarse FN(is_coarse)
#define weigh FN(weigh)
#define weigh_kept FN(weigh_kept)
#define weight FN(weight)
#define write_panels FN(write_panels)
#define zip_panels FN(zip_panels)

/* Rows or keys at a time where a block's edge is a diagonal: whole register tiles. */
#define PART (3 * HIGH)

enum { FA_KEYS = 128, FA_ROWS = 128, FA_PANELS = FA_KEYS / 8 }; /* most of a tile */

#endif

/* What all blocks of a task share. */
typedef struct backward {
    const fa_backward *b;
    const fa_params *p;
    fa_sequence sequence;
    int64_t n;      /* of the sequence */
    int begin, end; /* keys */
    fa_tile_size size;
    int changed, rounds; /* change() is needed; it rounds scores before lse is subtracted */
    int wants_ds, wants_dv;
    real scale, softcap;
    base nats, e, e_squared; /* nats: the scale, in two parts */
    int64_t seed;
    matrix k, kt, vt, dk, dv, q, g, s, t; /* g: rows of dout. s, t: S and dP, then P and dS */
    matrix q_steps, g_steps, ds; /* q, g and dS for products over rows, and over keys: the same
                                  * matrices, but for pairs */
    matrix sum;                  /* of a tile of dmask */
    real *lse, *delta;      /* of a block's rows; delta times the scale where nothing is changed */
    uint8_t *seen;          /* keys that some row of the sequence sees */
    const uint8_t *several; /* of lists: rows of a block that see more than one key; else NULL */
} backward;

/* Rows that meet the keys of a task. */
typedef struct tile {
    int64_t h;
    int first, begin, end; /* rows: of the block; that see some key, from `first` on */
    /* Rows that see some, and all, of a panel's keys, from `first` on. */
    fa_row_range some[FA_PANELS], all[FA_PANELS];
} tile;

#include "backward_rows.h"
#include "backward_scores.h"
#include "backward_products.h"

/* ---- tasks ---- */

/* Of a block: fewer keys and rows of great heads, so that all of it stays in the L2. */
static fa_tile_size tile_size(const fa_what *what) {
    const int64_t d = whole(what->d), dv = whole(what->dv), room = 700000 / (int)sizeof(real);
    fa_tile_size size = {FA_KEYS, FA_ROWS};
    for (int n = 0; n < 8; n++) {
        if (size.keys * (3 * d + 2 * dv + 2 * size.rows) + size.rows * (d + dv) <= room) break;
        if (n % 2 == 0 && size.keys > WIDTH)
            size.keys /= 2;
        else if (size.rows > 16)
            size.rows /= 2;
    }
    return size;
}

/* The scratch of one thread, carved from `memory` (NULL: only counted). Returns its bytes. */
static size_t lay_out(backward *c, char *memory) {
    const fa_what *what = &c->b->forward.what;
    const int d = what->d, dv = what->dv;
    /* A packed sequence may have more keys than it says, and a mask more than the sequence. */
    const int packed = c->b->forward.varlen.total_k, most = packed > what->sk ? packed : what->sk;
    const int keys = whole(most < c->size.keys ? most : c->size.keys);
    const int rows = STEP * units_of(what->sq < c->size.rows ? what->sq : c->size.rows);
    size_t used = 0;
#define CARVE(m, height, width)                                                        \
    do {                                                                               \
        (m).rows = height, (m).columns = width;                                        \
        (m).data = memory ? (real *)(memory + used) : NULL;                            \
        used += ((size_t)(m).rows * whole((m).columns) * sizeof(real) + 63) / 64 * 64; \
    } while (0)
    matrix numbers, seen;
    CARVE(c->k, keys / STEP, d);
    CARVE(c->kt, whole(units_of(d)), keys);
    CARVE(c->vt, whole(units_of(dv)), keys);
    CARVE(c->dk, keys, d);
    CARVE(c->dv, keys, dv);
    CARVE(c->q, rows, units_of(d));
    CARVE(c->g, rows, units_of(dv));
    CARVE(c->s, rows, keys);
    CARVE(c->t, rows, keys);
    c->q_steps = c->q, c->g_steps = c->g, c->ds = c->t;
    if (STEP == 2) {
        CARVE(c->q_steps, rows / 2, d);
        CARVE(c->g_steps, rows / 2, dv);
        CARVE(c->ds, rows, keys / 2);
    }
    CARVE(c->sum, rows, c->b->dmask.data ? keys : 0);
    CARVE(numbers, 2, rows);
    CARVE(seen, 1, keys);
#undef CARVE
    c->lse = numbers.data;
    c->delta = numbers.data + rows;
    c->seen = (uint8_t *)seen.data;
    return used;
}

static size_t scratch(const fa_backward *b) {
    backward c = {.b = b, .size = tile_size(&b->forward.what)};
    return lay_out(&c, NULL);
}

static void open_backward(backward *c, const fa_backward *b, void *memory) {
    const fa_params *p = &b->forward;
    const fa_scores *scores = &p->scores;
    *c = (backward){.b = b, .p = p, .size = tile_size(&p->what)};
    c->changed =
        scores->softcap > 0 || scores->alibi_slopes || scores->mask.data || p->dropout.p > 0;
    c->rounds = scores->softcap > 0 || scores->alibi_slopes ||
                (scores->mask.data && scores->mask_dtype != FA_BOOL);
    c->wants_ds = b->dq.data || b->dk.data || b->dmask.data;
    c->wants_dv = b->dv.data && b->dout.data;
    /* As the forward has them, so that scores get the same bits. */
    c->scale = (real)copysign(fmin(fabs(p->what.scale), DOUBLE ? 1e300 : 1e30), p->what.scale);
    c->nats = base_of(c->scale);
    c->softcap = (real)(DOUBLE ? scores->softcap : fmin(fmax(scores->softcap, FLT_MIN), FLT_MAX));
    c->e = base_of(FA_LOG2E);
    c->e_squared = base_of(2 * FA_LOG2E);
    c->seed = p->dropout.p > 0 ? fa_dropout_seed(&p->dropout) : 0;
    lay_out(c, memory);
}

/* The keys begin .. end - 1 of sequence n. */
static void set_keys(backward *c, const fa_sequence *sequence, int64_t n, int begin, int end) {
    c->sequence = *sequence;
    c->n = n;
    c->begin = begin, c->end = end;
    c->s.columns = c->t.columns = c->kt.columns = c->vt.columns = end - begin;
    c->ds.columns = units_of(end - begin);
}

/* The rows of head h in the block from `first` on that see some of the keys. */
static tile open_tile(const backward *c, int64_t h, int first) {
    fa_row_range rows = fa_rows_seeing_some(c->sequence.lengths, (fa_interval){c->begin, c->end});
    tile r = {.h = h, .first = first};
    r.begin = fa_clamp(rows.begin - first, 0, c->size.rows);
    r.end = fa_clamp(rows.end - first, 0, c->size.rows);
    return r;
}

static void run_keys(const fa_backward *b, const fa_keys *task, void *memory) {
    const fa_what *what = &b->forward.what;
    const int of_k = what->hq / what->hk, of_v = what->hq / what->hv;
    backward c;
    open_backward(&c, b, memory);
    set_keys(&c, &task->sequence, task->n, task->begin, task->end);
    const fa_row_range rows =
        fa_rows_seeing_some(c.sequence.lengths, (fa_interval){c.begin, c.end});
    const int sees = rows.begin < rows.end;
    for (int64_t h = task->h; h < task->h + task->heads; h++) {
        if (h % of_k == 0) load_keys(&c, h, of_k, sees);
        if (h % of_v == 0) load_values(&c, h, of_v, sees);
        for (int first = rows.begin / c.size.rows * c.size.rows; first < rows.end && sees;
             first += c.size.rows) {
            tile r = open_tile(&c, h, first);
            fill_tile(&c, &r, 0);
            if (c.wants_dv) add_to_keys(&c, &r, c.dv, c.g_steps, c.s);
            if (b->dk.data) add_to_keys(&c, &r, c.dk, c.q_steps, c.t);
            if (!b->dq.data) continue;
            fa_wait_turn(task, h, first / c.size.rows, c.size);
            add_to_rows(&c, task, &r);
            fa_end_turn(task, h, first / c.size.rows, c.size);
        }
        if ((h + 1) % of_k == 0) sum_keys(&c, &b->dk, c.dk, h / of_k);
        if ((h + 1) % of_v == 0) sum_keys(&c, &b->dv, c.dv, h / of_v);
    }
}

#include "backward_mask.h"
#if FA_PAIRS
static const fa_backward_kernel FN(kernel) = {sizeof(real), LANES,    tile_size, scratch,
                                              run_keys,     run_mask, run_sink};
#else
#include "backward_kept.h"
#include "backward_lists.h"
static const fa_backward_kernel FN(kernel) = {sizeof(real), LANES,    tile_size, scratch,
                                              run_keys,     run_mask, run_sink,  list_bytes,
                                              run_lists,    add_rows};
#endif

#undef FA_NAME
#undef FA_REAL
#undef FA_INT
