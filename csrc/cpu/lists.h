/* lists.h - a list of key blocks as the kernels meet it: in passes, each of which is a matrix of
 * columns, of which every row of the block of queries sees an interval.
 *
 *   - blocks that every row sees whole come first, as they stand in the list;
 *   - the others are sorted, so that what a row sees of them is an interval, too. One that is
 *     named again comes in a pass of its own;
 *   - a window that is united with the list takes its keys out of it, and stands at the end: of
 *     the sorted blocks a row meets the keys left of its window, then those right of it.
 */
#ifndef FASTATTN_CPU_LISTS_H
#define FASTATTN_CPU_LISTS_H

#include "cpu.h"

typedef enum fa_side { FA_WHOLE, FA_LEFT, FA_RIGHT, FA_WINDOW } fa_side;

typedef struct fa_kept fa_kept; /* kept.h */

typedef struct fa_pass {
    fa_side side;
    const int32_t *blocks;  /* the key blocks whose columns follow one another; NULL: columns are
                             * the keys themselves */
    const int32_t *entries; /* where each block stands in the list */
    const double *gates;    /* of each; NULL: 1 */
    int32_t count;          /* of blocks */
    int32_t columns;
    const fa_kept *kept; /* that these blocks, of a key each, are; or NULL */
} fa_pass;

/* Some blocks, in memory for all entries of a list. */
typedef struct fa_some {
    int32_t *blocks, *entries;
    double *gates;
    int32_t count;
} fa_some;

/* A block of queries, and what it lists. */
typedef struct fa_listed {
    const fa_lists *lists;
    fa_lengths lengths, window; /* what its rows see at most; what is united with the list */
    int32_t first, end;         /* rows, all within lengths.sq */
    fa_some whole, layer;
    int64_t *cut;              /* sorted: block << 32 | entry */
    int32_t cut_count, layers; /* most times that one of them is named */
    int32_t step;              /* passes so far, empty ones too */
    const char *gate;          /* of its first entry, or NULL */
    fa_dtype gate_type;
    fa_kept *kept; /* whose keys the list is instead; or NULL */
} fa_listed;

/* Memory for lists of this request. */
size_t fa_list_bytes(const fa_lists *lists);
void fa_open_lists(fa_listed *l, const fa_lists *lists, void *memory);

/* The rows [first, end) of sequence b, which are the block `block` of queries of all that `lists`
 * has, for key head h. l->lengths and l->window are the sequence's. */
void fa_read_list(fa_listed *l, const fa_params *p, int64_t b, int64_t h, int64_t block,
                  int32_t first, int32_t end);

/* The passes, from the first on after l->step = 0; 0: there is no further one. */
int fa_next_pass(fa_listed *l, fa_pass *pass);

/* The columns of a pass that a row sees. Both ends never decrease in the row. */
fa_interval fa_pass_columns(const fa_listed *l, const fa_pass *pass, int32_t row);

/* The key that a column is. */
static inline int32_t fa_key_of(const fa_pass *pass, int32_t k_block, int32_t column) {
    if (!pass->blocks) return column;
    return pass->blocks[column / k_block] * k_block + column % k_block;
}

#endif
