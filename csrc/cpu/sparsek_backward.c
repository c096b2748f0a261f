/* sparsek_backward.c - the gradient of the SparseK operator on the CPU.
 */
#include "pool.h"
#include "sparsek_means.h"

typedef struct call {
    const fa_sparsek_backward *b;
    int64_t streams;
    atomic_llong next;
    atomic_int failed;
} call;

static double real_at(const fa_sparsek *r, const void *x, int64_t at) {
    return r->dtype == FA_F64 ? ((const double *)x)[at] : ((const float *)x)[at];
}

/* ---- one stream ---- */

static void whole_row(const fa_sparsek_backward *b, int64_t number, scratch *s, int32_t n) {
    const fa_sparsek *r = &b->forward;
    const int64_t at = fa_stream_place(r, &b->dgates, number);
    double sum = 0;
    int64_t inside = 0;
    for (int32_t j = 0; j < n; j++) {
        if (!is_inside(s, s->z[j], s->tau[0])) continue;
        s->dz[j] = real_at(r, b->dgates.data, at + j * b->dgates.column);
        sum += s->dz[j], inside++;
    }
    for (int32_t j = 0; j < n; j++)
        if (is_inside(s, s->z[j], s->tau[0])) s->dz[j] -= sum / (double)inside;
}

static void many_rows(const fa_sparsek_backward *b, int64_t number, scratch *s,
                      const fa_lengths *n) {
    const fa_sparsek *r = &b->forward;
    const int64_t lists = fa_stream_place(r, &r->key_lists, number);
    const int64_t given = fa_stream_place(r, &b->dgates, number);
    const int32_t rows = count_rows(s, n);
    find_runs(s, n, rows);
    for (int32_t i = 0; i < rows; i++) {
        const int32_t *keys = (const int32_t *)r->key_lists.data + lists + i * r->key_lists.row;
        double sum = 0;
        for (int32_t e = 0; e < r->kept && s->size[i]; e++) {
            const int32_t j = keys[e * r->key_lists.column];
            if (j < 0 || j >= r->sk || !is_inside(s, s->z[j], s->tau[i])) continue;
            const double dp =
                real_at(r, b->dgates.data, given + i * b->dgates.row + e * b->dgates.column);
            s->dz[j] += dp;
            sum += dp;
        }
        s->means[i] = sum;
    }
    take_means(s, n, rows);
}

static int run_stream(const fa_sparsek_backward *b, int64_t number) {
    const fa_sparsek *r = &b->forward;
    const int64_t scores = fa_stream_place(r, &r->scores, number);
    const int64_t tau = fa_stream_place(r, &r->tau, number);
    const int64_t to = fa_stream_place(r, &b->dscores, number);
    scratch s;
    const int fine = scratch_start(&s, r->dtype == FA_F64, r->k, r->sq, r->sk);
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
