/* sparsek_attention.c - attention to the keys that SparseK keeps, on the CPU: first tau of every
 * row and the end of every key's run, in one pass over each head's scores; then blocks of queries
 * with the keys that they keep, as lists (sparse.c).
 */
#include "pool.h"
#include "sparsek_stream.h"

typedef struct call {
    const fa_sparsek_attention *r;
    int64_t streams;
    atomic_llong next;
    atomic_int failed;
} call;

/* ---- the kept keys, the least on top ---- */

typedef struct entry {
    double z; /* +inf for a NaN */
    int32_t key;
} entry;

typedef struct kept {
    entry *x;
    int64_t n, room;
} kept;

/* Of equal scores that of the higher key. */
static int is_less(entry a, entry b) { return a.z < b.z || (a.z == b.z && a.key > b.key); }

/* 0: no memory. */
static int kept_push(kept *k, entry e) {
    if (k->n == k->room) {
        const int64_t room = k->room ? 2 * k->room : 256;
        entry *x = realloc(k->x, (size_t)room * sizeof *x);
        if (!x) return 0;
        k->x = x, k->room = room;
    }
    int64_t at = k->n++;
    for (; at && is_less(e, k->x[(at - 1) / 2]); at = (at - 1) / 2) k->x[at] = k->x[(at - 1) / 2];
    k->x[at] = e;
    return 1;
}

static entry kept_pop(kept *k) {
    const entry top = k->x[0], e = k->x[--k->n];
    int64_t at = 0;
    for (int64_t child; (child = 2 * at + 1) < k->n; at = child) {
        if (child + 1 < k->n && is_less(k->x[child + 1], k->x[child])) child++;
        if (!is_less(k->x[child], e)) break;
        k->x[at] = k->x[child];
    }
    k->x[at] = e;
    return top;
}

/* ---- one stream ---- */

static void put_tau(const fa_sparsek_attention *r, int64_t at, double tau) {
    if (r->forward.what.dtype == FA_F64)
        ((double *)r->tau.data)[at] = tau;
    else
        ((float *)r->tau.data)[at] = (float)tau;
}

/* Whether a key's gate is not 0, or a NaN, by the bits of tau. */
static int has_gate(const fa_sparsek_attention *r, double z, double tau) {
    const int is_double = r->forward.what.dtype == FA_F64;
    return !((is_double ? gate_f64(z, tau, r->k) : gate_f32((float)z, (float)tau, r->k)) <= 0);
}

/* A candidate more, before row i; tau: of those before. 0: no memory. */
static int keep(const fa_sparsek_attention *r, kept *k, int32_t *ends, int32_t key, double z,
                int32_t i, double tau) {
    const entry e = {isnan(z) ? INFINITY : z, key};
    if (z == -INFINITY) return 1;
    if (r->keep_all) { /* tau only rises */
        if (!has_gate(r, z, tau)) return 1;
    } else if (k->n == r->kept) { /* full: the least of all leaves */
        if (!k->n || is_less(e, k->x[0])) return 1;
        ends[kept_pop(k).key * r->ends.stride[2]] = i;
    }
    return kept_push(k, e);
}

/* Sequence b, key head h. 0: no memory. */
static int run_stream(const fa_sparsek_attention *r, int64_t b, int64_t h) {
    const fa_params *p = &r->forward;
    const fa_masks masks = fa_candidate_masks(&p->masks, r->window);
    const fa_sequence sequence = fa_find_sequence(&p->varlen, &masks, b, p->what.sq, p->what.sk);
    const fa_lengths n = sequence.lengths;
    const int64_t of_b = p->varlen.cu_q ? 0 : b, gap = r->ends.stride[2];
    const char *scores = (const char *)r->scores.data +
                         element(&r->scores, of_b, h, sequence.k) * fa_dtype_size(r->scores_dtype);
    int32_t *ends = (int32_t *)r->ends.data + element(&r->ends, of_b, h, sequence.k);
    stream s = stream_start(r->k);
    kept k = {NULL, 0, 0};
    int32_t j = n.k_start;
    int fine = 1;
    for (int32_t i = 0; i < n.sq && fine; i++) {
        for (const int32_t last = fa_row_interval(n, i).end; j < last && fine; j++) {
            const double z = score(scores, r->scores_dtype, j * r->scores.stride[2]);
            fine = keep(r, &k, ends, j, z, i, s.tau) && stream_add(&s, z);
        }
        while (r->keep_all && k.n && !has_gate(r, k.x[0].z, s.tau))
            ends[kept_pop(&k).key * gap] = i;
        put_tau(r, element(&r->tau, of_b, h, sequence.q + (int64_t)i), s.tau);
    }
    for (int64_t e = 0; e < k.n; e++) ends[k.x[e].key * gap] = n.sq;
    stream_end(&s);
    free(k.x);
    return fine;
}

/* What rows that are padding have, and keys that none keeps. */
static void clear(const fa_sparsek_attention *r, int64_t b, int64_t h) {
    const double tau = stream_start(r->k).tau;
    for (int64_t i = 0; i < r->tau.shape[2]; i++) put_tau(r, element(&r->tau, b, h, i), tau);
    for (int64_t j = 0; j < r->ends.shape[2]; j++)
        ((int32_t *)r->ends.data)[element(&r->ends, b, h, j)] = 0;
}

static void run_streams(void *context) {
    call *c = context;
    const int64_t hk = c->r->forward.what.hk;
    int64_t at;
    while ((at = atomic_fetch_add_explicit(&c->next, 1, memory_order_relaxed)) < c->streams)
        if (!run_stream(c->r, at / hk, at % hk)) atomic_store(&c->failed, 1);
}

fa_status fa_cpu_sparsek_attention(const fa_sparsek_attention *r, fa_level level, fa_error *error) {
    const fa_what *w = &r->forward.what;
    call c = {.r = r, .streams = r->scores.shape[1] ? (int64_t)w->b * w->hk : 0};
    for (int64_t b = 0; b < r->tau.shape[0]; b++)
        for (int64_t h = 0; h < r->tau.shape[1]; h++) clear(r, b, h);
    const double scores = (double)c.streams * w->sk;
    const int threads = scores < 2e3 ? 1 : fa_pool_threads();
    fa_pool_run(c.streams < threads ? (int)c.streams : threads, run_streams, &c);
    fa_status status = atomic_load(&c.failed) ? FA_MEMORY : fa_cpu_kept(r, level);
    if (status == FA_MEMORY)
        snprintf(error->text, sizeof error->text, "no memory for the CPU backend's scratch");
    return status;
}
