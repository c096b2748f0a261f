/* kept.h - the keys that SparseK keeps for the rows of a block of queries: found by the end of each
 * key's run, not listed for each row.
 */
#ifndef FASTATTN_CPU_KEPT_H
#define FASTATTN_CPU_KEPT_H

#include "lists.h"

enum { FA_KEPT_ROWS = 64 }; /* of a block of queries */

/* Of the keys, ascending, each that some row of the block keeps. */
struct fa_kept {
    const fa_sparsek_attention *r;
    fa_lengths lengths; /* of the candidates */
    const char *tau;    /* of row 0 */
    const char *scores; /* of the sequence's key 0 */
    const int32_t *ends;
    int32_t *keys, *begin, *end; /* rows begin .. end - 1 keep it */
    double *z;                   /* its score */
    int32_t count;
    int64_t b, h;
    int32_t next; /* row: the block that starts there carries on with these keys */
};

size_t fa_kept_bytes(const fa_sparsek_attention *r);
void fa_open_kept(fa_kept *kept, const fa_sparsek_attention *r, void *memory);

/* Those of the rows [first, end) of sequence b, key head h; quick where the rows before were read
 * last. */
void fa_read_kept(fa_kept *kept, int64_t b, int64_t h, int32_t first, int32_t end);

double fa_kept_tau(const fa_kept *kept, int32_t row);

/* Of all groups' kept keys: the sums of the gradients of gates that are neither 0 nor 1. */
typedef struct fa_gate_sums {
    double *of_keys, *of_rows; /* [group][part][keys], [group][rows] */
    int64_t keys, rows;
    int parts;
} fa_gate_sums;

/* 0: no memory. */
int fa_open_gate_sums(fa_gate_sums *sums, int64_t groups);
/* du of sequence n, key head h. 0: no memory. */
int fa_put_dscores(const fa_sparsek_attention_backward *b, const fa_gate_sums *sums, int64_t n,
                   int64_t h);

/* The request as one of lists that are empty, with the window united. */
fa_lists fa_kept_lists(const fa_sparsek_attention *r);

#endif
