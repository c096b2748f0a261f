/* sparsek_means.h - the gradient of SparseK over the prefixes of one stream, by range sums.
 *
 * As tau never falls, the rows in which a key's gate is between 0 and 1 are one run, found by two
 * searches in tau; so a key takes the rows' means from their prefix sums, and what a row has cut
 * costs nothing. The sums are in float64.
 */
#ifndef FASTATTN_CPU_SPARSEK_MEANS_H
#define FASTATTN_CPU_SPARSEK_MEANS_H

#include "sparsek_stream.h"

/* Rows begin <= i < end. */
typedef struct run {
    int32_t begin, end;
} run;

/* What one stream needs. */
typedef struct scratch {
    int is_double; /* the arithmetic of gates */
    double k;
    double *z;     /* (sk) */
    double *dz;    /* (sk) */
    double *tau;   /* (sq) */
    double *means; /* (sq + 1): the sum of a row's dp over I; then that of the means before it */
    int32_t *size; /* (sq + 1): of I; a difference first, then the sum of those before */
    run *runs;     /* (sk) */
} scratch;

static inline int scratch_start(scratch *s, int is_double, double k, int64_t sq, int64_t sk) {
    s->is_double = is_double, s->k = k;
    const size_t n = (size_t)sk + 1, m = (size_t)sq + 1;
    s->z = malloc(n * sizeof *s->z), s->dz = malloc(n * sizeof *s->dz);
    s->tau = malloc(m * sizeof *s->tau), s->means = malloc(m * sizeof *s->means);
    s->size = malloc(m * sizeof *s->size), s->runs = malloc(n * sizeof *s->runs);
    return s->z && s->dz && s->tau && s->means && s->size && s->runs;
}

static inline void scratch_end(scratch *s) {
    free(s->z), free(s->dz), free(s->tau), free(s->means), free(s->size), free(s->runs);
}

static inline double gate(const scratch *s, double z, double tau) {
    return s->is_double ? gate_f64(z, tau, s->k) : gate_f32((float)z, (float)tau, s->k);
}

static inline int is_inside(const scratch *s, double z, double tau) {
    const double p = gate(s, z, tau);
    return p > 0 && p < 1; /* a NaN is not */
}

static inline void put(void *to, fa_dtype dtype, int64_t at, double x) {
    switch (dtype) {
        case FA_F64:
            ((double *)to)[at] = x;
            break;
        case FA_F32:
            ((float *)to)[at] = (float)x;
            break;
        case FA_F16:
            ((uint16_t *)to)[at] = fa_float_to_f16((float)x);
            break;
        default:
            ((uint16_t *)to)[at] = fa_float_to_bf16((float)x);
    }
}

/* The first row from `begin` on, before `end`, whose gate of z is at most p, or below it; gates
 * fall from row to row. */
static inline int32_t search_rows(const scratch *s, double z, run rows, double p, int below) {
    while (rows.begin < rows.end) {
        const int32_t middle = rows.begin + (rows.end - rows.begin) / 2;
        const double g = gate(s, z, s->tau[middle]);
        if (below ? g < p : g <= p)
            rows.end = middle;
        else
            rows.begin = middle + 1;
    }
    return rows.begin;
}

/* The rows before the first whose tau is NaN. */
static inline int32_t count_rows(const scratch *s, const fa_lengths *n) {
    int32_t rows = 0;
    while (rows < n->sq && !isnan(s->tau[rows])) rows++;
    return rows;
}

/* The run of each key, and so the size of each row's I. */
static inline void find_runs(scratch *s, const fa_lengths *n, int32_t rows) {
    memset(s->size, 0, ((size_t)rows + 1) * sizeof *s->size);
    for (int32_t j = n->k_start; j < n->sk; j++) {
        run all = {fa_rows_seeing_some(*n, (fa_interval){j, j + 1}).begin, rows};
        if (all.begin > rows) all.begin = rows;
        s->runs[j].begin = search_rows(s, s->z[j], all, 1, 1);
        s->runs[j].end = search_rows(s, s->z[j], all, 0, 0);
        s->size[s->runs[j].begin]++, s->size[s->runs[j].end]--;
    }
    for (int32_t i = 0; i < rows; i++) s->size[i + 1] += s->size[i];
}

/* dz, the sums of each key's dp, less the means of the rows of its run; s->means has the sums. */
static inline void take_means(scratch *s, const fa_lengths *n, int32_t rows) {
    double before = 0;
    for (int32_t i = 0; i < rows; i++) {
        const double sum = s->means[i];
        s->means[i] = before;
        if (s->size[i]) before += sum / s->size[i];
    }
    s->means[rows] = before;
    for (int32_t j = n->k_start; j < n->sk; j++)
        s->dz[j] -= s->means[s->runs[j].end] - s->means[s->runs[j].begin];
}

#endif
