/* sparsek_backward.c - the gradient of the SparseK operator on the CPU.
 *
 * As tau never falls, the rows in which a key's gate is between 0 and 1 are one run, found by two
 * searches in tau; so a key takes the rows' means from their prefix sums, and what is cut from a
 * list costs nothing. The sums are in float64.
 */
#include "sparsek_stream.h"

#include "pool.h"

typedef struct call {
    const fa_sparsek_backward *b;
    int64_t streams;
    atomic_llong next;
    atomic_int failed;
} call;

/* Rows begin <= i < end. */
typedef struct run {
    int32_t begin, end;
} run;

/* What one stream needs. */
typedef struct scratch {
    double *z;     /* (sk) */
    double *dz;    /* (sk) */
    double *tau;   /* (sq) */
    double *means; /* (sq + 1): of a row's dp over I; then the sum of those before */
    int32_t *size; /* (sq + 1): of I; a difference first, then the sum of those before */
    run *runs;     /* (sk) */
} scratch;

static int scratch_start(scratch *s, int64_t sq, int64_t sk) {
    const size_t n = (size_t)sk + 1, m = (size_t)sq + 1;
    s->z = malloc(n * sizeof *s->z), s->dz = malloc(n * sizeof *s->dz);
    s->tau = malloc(m * sizeof *s->tau), s->means = malloc(m * sizeof *s->means);
    s->size = malloc(m * sizeof *s->size), s->runs = malloc(n * sizeof *s->runs);
    return s->z && s->dz && s->tau && s->means && s->size && s->runs;
}

static void scratch_end(scratch *s) {
    free(s->z), free(s->dz), free(s->tau), free(s->means), free(s->size), free(s->runs);
}

static double gate(const fa_sparsek *r, double z, double tau) {
    return r->dtype == FA_F64 ? gate_f64(z, tau, r->k) : gate_f32((float)z, (float)tau, r->k);
}

static int is_inside(const fa_sparsek *r, double z, double tau) {
    const double p = gate(r, z, tau);
    return p > 0 && p < 1; /* a NaN is not */
}

static double real_at(const fa_sparsek *r, const void *x, int64_t at) {
    return r->dtype == FA_F64 ? ((const double *)x)[at] : ((const float *)x)[at];
}

static void put(void *to, fa_dtype dtype, int64_t at, double x) {
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

/* ---- one stream ---- */

static void whole_row(const fa_sparsek_backward *b, int64_t number, scratch *s, int32_t n) {
    const fa_sparsek *r = &b->forward;
    const int64_t at = fa_stream_place(r, &b->dgates, number);
    double sum = 0;
    int64_t inside = 0;
    for (int32_t j = 0; j < n; j++) {
        if (!is_inside(r, s->z[j], s->tau[0])) continue;
        s->dz[j] = real_at(r, b->dgates.data, at + j * b->dgates.column);
        sum += s->dz[j], inside++;
    }
    for (int32_t j = 0; j < n; j++)
        if (is_inside(r, s->z[j], s->tau[0])) s->dz[j] -= sum / (double)inside;
}

/* The first row from `begin` on, before `end`, whose gate of z is at most p, or below it; gates
 * fall from row to row. */
static int32_t find_row(const fa_sparsek *r, const double *tau, double z, run rows, double p,
                        int below) {
    while (rows.begin < rows.end) {
        const int32_t middle = rows.begin + (rows.end - rows.begin) / 2;
        const double g = gate(r, z, tau[middle]);
        if (below ? g < p : g <= p)
            rows.end = middle;
        else
            rows.begin = middle + 1;
    }
    return rows.begin;
}

/* The run of each key, and so the size of each row's I. rows: those without a NaN. */
static void find_runs(const fa_sparsek *r, const fa_lengths *n, scratch *s, int32_t rows) {
    memset(s->size, 0, ((size_t)rows + 1) * sizeof *s->size);
    for (int32_t j = n->k_start; j < n->sk; j++) {
        run all = {fa_rows_seeing_some(*n, (fa_interval){j, j + 1}).begin, rows};
        if (all.begin > rows) all.begin = rows;
        s->runs[j].begin = find_row(r, s->tau, s->z[j], all, 1, 1);
        s->runs[j].end = find_row(r, s->tau, s->z[j], all, 0, 0);
        s->size[s->runs[j].begin]++, s->size[s->runs[j].end]--;
    }
    for (int32_t i = 0; i < rows; i++) s->size[i + 1] += s->size[i];
}

static void many_rows(const fa_sparsek_backward *b, int64_t number, scratch *s,
                      const fa_lengths *n) {
    const fa_sparsek *r = &b->forward;
    const int64_t lists = fa_stream_place(r, &r->key_lists, number);
    const int64_t given = fa_stream_place(r, &b->dgates, number);
    int32_t rows = 0;
    double before = 0;
    while (rows < n->sq && !isnan(s->tau[rows])) rows++;
    find_runs(r, n, s, rows);
    for (int32_t i = 0; i < rows; i++) {
        const int32_t *keys = (const int32_t *)r->key_lists.data + lists + i * r->key_lists.row;
        double sum = 0;
        for (int32_t e = 0; e < r->kept && s->size[i]; e++) {
            const int32_t j = keys[e * r->key_lists.column];
            if (j < 0 || j >= r->sk || !is_inside(r, s->z[j], s->tau[i])) continue;
            const double dp =
                real_at(r, b->dgates.data, given + i * b->dgates.row + e * b->dgates.column);
            s->dz[j] += dp;
            sum += dp;
        }
        s->means[i] = before;
        if (s->size[i]) before += sum / s->size[i];
    }
    s->means[rows] = before;
    for (int32_t j = n->k_start; j < n->sk; j++)
        s->dz[j] -= s->means[s->runs[j].end] - s->means[s->runs[j].begin];
}

static int run_stream(const fa_sparsek_backward *b, int64_t number) {
    const fa_sparsek *r = &b->forward;
    const int64_t scores = fa_stream_place(r, &r->scores, number);
    const int64_t tau = fa_stream_place(r, &r->tau, number);
    const int64_t to = fa_stream_place(r, &b->dscores, number);
    scratch s;
    const int fine = scratch_start(&s, r->sq, r->sk);
    if (fine) {
        for (int32_t j = 0; j < r->sk; j++) {
            s.z[j] = score(r->scores.data, r->dtype, scores + j * r->scores.column);
            s.dz[j] = 0;
        }
        for (int32_t i = 0; i < r->sq; i++)
            s.tau[i] = real_at(r, r->tau.data, tau + i * r->tau.row);
        if (r->has_lists) {
            const fa_lengths n = fa_sequence_lengths(&r->masks, number / r->shape[1], r->sq, r->sk);
            many_rows(b, number, &s, &n);
        } else {
            whole_row(b, number, &s, count_candidates(r, number));
        }
        for (int32_t j = 0; j < r->sk; j++)
            put(b->dscores.data, r->dtype, to + j * b->dscores.column, s.dz[j]);
    }
    scratch_end(&s);
    return fine;
}

static void run_streams(void *context) {
    call *c = context;
    int64_t at;
    while ((at = atomic_fetch_add_explicit(&c->next, 1, memory_order_relaxed)) < c->streams)
        if (!run_stream(c->b, at)) atomic_store(&c->failed, 1);
}

fa_status fa_cpu_sparsek_backward(const fa_sparsek_backward *b, fa_error *error) {
    const fa_sparsek *r = &b->forward;
    call c = {.b = b, .streams = count_streams(r)};
    const double read = (double)c.streams * (r->sk + (double)r->sq * (r->kept + 1));
    fa_pool_run(read < 2e4 ? 1 : fa_pool_threads(), run_streams, &c);
    if (!atomic_load(&c.failed)) return FA_OK;
    snprintf(error->text, sizeof error->text, "no memory for the CPU backend's scratch");
    return FA_MEMORY;
}
