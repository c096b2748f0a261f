/* backward_tasks.h - what the CPU's backward pass is cut into, of keys and of lists of them. */
#ifndef FASTATTN_CPU_BACKWARD_TASKS_H
#define FASTATTN_CPU_BACKWARD_TASKS_H

#include "groups.h"

typedef struct fa_tile_size {
    int keys, rows;
} fa_tile_size;

/* A block of keys of the query heads h .. h + heads - 1, to which whole key and value heads belong.
 */
typedef struct fa_keys {
    fa_sequence sequence;
    int64_t n, h; /* of the sequence; the first head */
    int heads;
    int begin, end; /* keys of the sequence */
    void *sums;     /* of dq, [heads][sums_rows][d in whole vectors]; NULL: they are made in dq */
    int64_t sums_rows;
    /* Of each head's blocks of rows, turn_row blocks apart, the number of the block of keys whose
     * part of dq comes next. NULL: there is one thread. */
    atomic_int *turns;
    int64_t turn_row;
} fa_keys;

/* A tile of dmask, and all that is summed for it. */
typedef struct fa_mask_tile {
    struct {
        int64_t begin, end;
    } n, h;
    fa_interval rows, keys;
} fa_mask_tile;

/* A block of queries with its list, of the heads of a group. */
typedef struct fa_list_task {
    fa_group group;
    fa_listed *listed;
    void *dk, *dv;   /* sums for each key of the sequence, [d or dv in whole vectors] numbers */
    double *entries; /* of each entry of the list what is added to its gate's gradient, or to its
                      * mass; NULL: neither is wanted */
    double *sinks;   /* of each head of the group the same of its sink; or NULL */
    int is_mass;     /* p alone is summed, to entries */
    /* Of keys that SparseK keeps, or NULL: of each of the sequence's keys, and of its rows, what is
     * added to the sums of the gradients of gates that are neither 0 nor 1. */
    double *of_keys, *of_rows;
} fa_list_task;

/* Keys whose sums are done: to dk and dv, all parts of them in order. */
typedef struct fa_rows_task {
    int64_t n, hk; /* of the sequence; the key head */
    int64_t k;     /* first row of the sequence's in k */
    int begin, end;
    const void *dk, *dv; /* the first part's; or NULL */
    int parts;
    int64_t apart; /* bytes */
} fa_rows_task;

typedef struct fa_backward_kernel {
    int number, lanes; /* bytes of a number; numbers in a vector */
    fa_tile_size (*size)(const fa_what *what);
    size_t (*bytes)(const fa_backward *b); /* of memory */
    void (*keys)(const fa_backward *b, const fa_keys *task, void *memory);
    void (*mask)(const fa_backward *b, const fa_mask_tile *task, void *memory);
    void (*sink)(const fa_backward *b, int64_t h, void *memory);
    /* NULL with pairs. */
    size_t (*list_bytes)(const fa_backward *b, const fa_lists *lists);
    void (*lists)(const fa_backward *b, const fa_list_task *task, void *memory);
    void (*add_rows)(const fa_backward *b, const fa_rows_task *task, void *memory);
} fa_backward_kernel;

/* backward.c */
const fa_backward_kernel *fa_backward_kernel_of(fa_level level, fa_dtype dtype);

/* Rows begin .. end - 1 of a head -> 0. */
static inline void fa_clear_rows(const fa_tensor *t, fa_dtype type, int64_t b, int64_t h,
                                 int64_t begin, int64_t end) {
    const int64_t size = fa_dtype_size(type);
    for (int64_t s = begin; s < end; s++) {
        char *to = (char *)t->data + element(t, b, h, s) * size;
        if (t->stride[3] == 1)
            memset(to, 0, (size_t)(t->shape[3] * size));
        else
            for (int64_t i = 0; i < t->shape[3]; i++)
                memset(to + i * t->stride[3] * size, 0, (size_t)size);
    }
}

static inline void fa_clear_tensor(const fa_tensor *t, fa_dtype type) {
    for (int64_t b = 0; t->data && b < t->shape[0]; b++)
        for (int64_t h = 0; h < t->shape[1]; h++) fa_clear_rows(t, type, b, h, 0, t->shape[2]);
}

#endif
