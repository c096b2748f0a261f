/* groups.h - which rows the CPU's forward takes together, and how their keys are split. */
#ifndef FASTATTN_CPU_GROUPS_H
#define FASTATTN_CPU_GROUPS_H

#include "cpu.h"
#include "kept.h"

/* Query heads that share the keys and values of one sequence. Their rows are one list, in which
 * the heads alternate, so that along it the ends of what a row sees never decrease. */
typedef struct fa_group {
    fa_sequence sequence;
    int64_t b, h; /* h: the first of `heads` */
    int heads;
} fa_group;

/* Row `at` of a group's list: row `row` of the sequence, of head h + `head`. */
typedef struct fa_row {
    int head, row;
} fa_row;

static inline fa_row find_row(const fa_group *g, int64_t at) {
    if (g->heads == 1) return (fa_row){0, (int)at}; /* a division is 5 % of a row of one key */
    return (fa_row){(int)(at % g->heads), (int)(at / g->heads)};
}

static inline fa_interval row_keys(const fa_group *g, int64_t at) {
    return fa_row_interval(g->sequence.lengths, find_row(g, at).row);
}

/* Where a row starts, in elements from row 0 of the first head on. */
static inline int64_t row_offset(const fa_tensor *t, fa_row row) {
    return row.head * t->stride[1] + row.row * t->stride[2];
}

/* Keys in a split. Where a sequence has few rows its keys are split: by its own lengths, so that
 * neither other sequences nor the threads change a bit. There are 64 splits at most. */
enum { FA_SPLIT_ROWS = 64, FA_SPLIT_KEYS = 1024, FA_SPLITS = 64, FA_SPLIT_BYTES = 1 << 26 };

static inline int fa_split_keys(fa_lengths n) {
    const int units = (n.sk + FA_SPLIT_KEYS - 1) / FA_SPLIT_KEYS;
    if (n.sq > FA_SPLIT_ROWS) return FA_MAX_LENGTH + 1;
    return units ? (units + FA_SPLITS - 1) / FA_SPLITS * FA_SPLIT_KEYS : FA_SPLIT_KEYS;
}

/* The splits that rows of a group, which see some key, see some of. */
static inline fa_interval find_splits(const fa_group *g, int64_t first, int count) {
    const int keys = fa_split_keys(g->sequence.lengths);
    if (g->sequence.lengths.sk <= keys) return (fa_interval){0, 1}; /* mostly: no divisions */
    return (fa_interval){row_keys(g, first).begin / keys,
                         (row_keys(g, first + count - 1).end - 1) / keys + 1};
}

/* One level and dtype of the forward pass. */
typedef struct fa_cpu_kernel {
    int lanes, strip, rows; /* rows in a vector, in a strip; the most that run() takes at once */
    size_t (*scratch)(const fa_params *p, int rows);
    size_t (*state)(const fa_params *p, int rows); /* of one split, at most */
    void (*run)(const fa_params *p, const fa_group *g, int64_t first, int count, void *memory);
    void (*split)(const fa_params *p, const fa_group *g, int64_t first, int count, int split,
                  void *memory, void *state);
    void (*join)(const fa_params *p, const fa_group *g, int64_t first, int count, int begin,
                 int end, void *memory, void *states, size_t bytes);
    void (*lists)(const fa_params *p, const fa_group *g, fa_listed *l, int64_t first, int count,
                  void *memory);
} fa_cpu_kernel;

/* forward.c */
const fa_cpu_kernel *fa_forward_kernel(fa_level level, fa_dtype dtype);
/* Rows without a key: 0, and for lse -inf or the sink. */
void fa_empty_rows(const fa_params *p, const fa_group *g, int64_t first, int64_t end,
                   const float *sink);

/* sparse.c: of each packed sequence the first block of queries; the caller frees them. */
int64_t *fa_first_blocks(const fa_params *p, const fa_lists *lists);
/* Sequence b and the query heads that share key head h; the sequence past the last has the packed
 * rows of none. */
fa_group fa_listed_group(const fa_params *p, const fa_lists *lists, int64_t b, int64_t h,
                         fa_listed *l);

#endif
