/* sparsek.c - the SparseK operator on the CPU: gates of whole rows, or lists of the greatest keys
 * for every prefix of a stream. tau is sparsek_stream.h's.
 *
 * Threads share out streams, and where there are few the rows of each: such a part follows its
 * stream from the first key on, which is cheap beside writing lists, so that the bits of a row
 * depend on its candidates alone.
 */
#include "sparsek_stream.h"

#include "pool.h"

typedef struct call {
    const fa_sparsek *r;
    int64_t streams, parts; /* parts of the rows of each */
    atomic_llong next;
    atomic_int failed;
} call;

static const void *scores_of(const fa_sparsek *r, int64_t stream) {
    const int64_t at = fa_stream_place(r, &r->scores, stream);
    return (const char *)r->scores.data + at * fa_dtype_size(r->dtype);
}

/* Element (stream, row, 0) of tau, gates or lists. */
static void *row_of(const fa_sparsek *r, const fa_streams *a, int64_t size, int64_t stream,
                    int64_t row) {
    return (char *)a->data + (fa_stream_place(r, a, stream) + row * a->row) * size;
}

static int64_t real_size(const fa_sparsek *r) { return r->dtype == FA_F64 ? 8 : 4; }

static void put_tau(const fa_sparsek *r, int64_t stream, int64_t row, double tau) {
    void *to = row_of(r, &r->tau, real_size(r), stream, row);
    if (r->dtype == FA_F64)
        *(double *)to = tau;
    else
        *(float *)to = (float)tau;
}

/* ---- whole rows ---- */

static int run_row(const fa_sparsek *r, int64_t number) {
    const void *x = scores_of(r, number);
    const int64_t step = r->scores.column, gap = r->gates.column;
    const int32_t n = count_candidates(r, number);
    stream s = stream_start(r->k);
    int fine = 1;
    for (int32_t j = 0; j < n && fine; j++) fine = stream_add(&s, score(x, r->dtype, j * step));
    const double tau = s.tau;
    stream_end(&s);
    if (!fine) return 0;
    put_tau(r, number, 0, tau);
    void *gates = row_of(r, &r->gates, real_size(r), number, 0);
    for (int32_t j = 0; j < r->sk; j++) {
        const double z = j < n ? score(x, r->dtype, j * step) : -INFINITY;
        if (r->dtype == FA_F64)
            ((double *)gates)[j * gap] = gate_f64(z, tau, r->k);
        else
            ((float *)gates)[j * gap] = gate_f32((float)z, (float)tau, r->k);
    }
    return 1;
}

/* ---- lists ---- */

/* The greatest keys so far, in the order of their numbers: a new one comes last. Between two rows
 * there may be twice as many, among them those that have become too small. */
typedef struct kept {
    int32_t *keys;
    double *z; /* +inf for a NaN */
    int32_t n, room;
    double floor; /* what is not above it is none of them */
    heap sorted;  /* scratch */
} kept;

static void drop_one(kept *t) {
    double least[8];
    int32_t at = 0;
    for (int l = 0; l < 8; l++) least[l] = INFINITY;
    for (; at + 8 <= t->n; at += 8)
        for (int l = 0; l < 8; l++) least[l] = t->z[at + l] < least[l] ? t->z[at + l] : least[l];
    for (; at < t->n; at++) least[0] = t->z[at] < least[0] ? t->z[at] : least[0];
    for (int l = 1; l < 8; l++) least[0] = least[l] < least[0] ? least[l] : least[0];
    while (t->z[--at] > least[0]) continue; /* the last one of equals */
    const size_t after = (size_t)(--t->n - at);
    memmove(t->keys + at, t->keys + at + 1, after * sizeof *t->keys);
    memmove(t->z + at, t->z + at + 1, after * sizeof *t->z);
    t->floor = least[0];
}

/* 0: no memory. */
static int drop_many(kept *t) {
    t->sorted.n = 0;
    for (int32_t i = 0; i < t->n; i++)
        if (!heap_push(&t->sorted, t->z[i])) return 0;
    while (t->sorted.n > t->room) t->floor = heap_pop(&t->sorted);
    int32_t equal = t->room, n = 0; /* how many stay that are as the greatest dropped one */
    for (int32_t i = 0; i < t->n; i++) equal -= t->z[i] > t->floor;
    for (int32_t i = 0; i < t->n; i++) {
        if (t->z[i] < t->floor || (t->z[i] == t->floor && equal-- <= 0)) continue;
        t->keys[n] = t->keys[i], t->z[n++] = t->z[i];
    }
    t->n = n;
    return 1;
}

/* Leaves as many as a list takes. 0: no memory. */
static int drop(kept *t) {
    if (t->n == t->room + 1) drop_one(t);
    return t->n <= t->room || drop_many(t);
}

static int keep(kept *t, int32_t key, double z) {
    if (isnan(z)) z = INFINITY;
    if (z <= t->floor || !t->room) return 1;
    t->keys[t->n] = key, t->z[t->n++] = z;
    return t->n < 2 * t->room || drop(t);
}

/* room: of a list. 0: no memory. */
static int kept_start(kept *t, int32_t room) {
    const size_t most = 2 * (size_t)room + 1;
    *t = (kept){.room = room, .floor = -INFINITY};
    t->keys = malloc(most * sizeof *t->keys);
    t->z = malloc(most * sizeof *t->z);
    return t->keys && t->z;
}

static void kept_end(kept *t) {
    free(t->keys);
    free(t->z);
    free(t->sorted.x);
}

static void put_list(const fa_sparsek *r, int64_t number, int64_t row, const kept *t, double tau) {
    int32_t *keys = row_of(r, &r->key_lists, sizeof *keys, number, row);
    void *gates = row_of(r, &r->gates, real_size(r), number, row);
    const int64_t step = r->key_lists.column, gap = r->gates.column;
    for (int32_t e = 0; e < r->kept; e++) keys[e * step] = e < t->n ? t->keys[e] : FA_NO_KEY;
    if (r->dtype == FA_F64)
        for (int32_t e = 0; e < r->kept; e++)
            ((double *)gates)[e * gap] = e < t->n ? gate_f64(t->z[e], tau, r->k) : 0;
    else
        for (int32_t e = 0; e < r->kept; e++)
            ((float *)gates)[e * gap] = e < t->n ? gate_f32((float)t->z[e], (float)tau, r->k) : 0;
    put_tau(r, number, row, tau);
}

/* The rows from begin on, up to end. */
static int run_rows(const fa_sparsek *r, int64_t number, int32_t begin, int32_t end) {
    const void *x = scores_of(r, number);
    const int64_t b = number / r->shape[1];
    const fa_lengths n = fa_sequence_lengths(&r->masks, b, r->sq, r->sk);
    const kept none = {.n = 0};
    kept t;
    stream s = stream_start(r->k);
    int32_t j = n.k_start;
    int fine = kept_start(&t, r->kept < r->sk ? r->kept : r->sk);
    for (int32_t i = begin; i < end && fine; i++) {
        for (const int32_t last = fa_row_interval(n, i).end; j < last && fine; j++) {
            const double z = score(x, r->dtype, j * r->scores.column);
            fine = keep(&t, j, z) && stream_add(&s, z);
        }
        fine = fine && drop(&t);
        if (fine && i < n.sq) put_list(r, number, i, &t, s.tau);
        if (i >= n.sq) put_list(r, number, i, &none, stream_start(r->k).tau);
    }
    stream_end(&s);
    kept_end(&t);
    return fine;
}

/* ---- the work of all threads ---- */

static void run_units(void *context) {
    call *c = context;
    const fa_sparsek *r = c->r;
    int64_t at;
    while ((at = atomic_fetch_add_explicit(&c->next, 1, memory_order_relaxed)) <
           c->streams * c->parts) {
        const int64_t number = at / c->parts, part = at % c->parts;
        const int32_t begin = (int32_t)(r->sq * part / c->parts);
        const int32_t end = (int32_t)(r->sq * (part + 1) / c->parts);
        if (!(r->has_lists ? run_rows(r, number, begin, end) : run_row(r, number)))
            atomic_store(&c->failed, 1);
    }
}

fa_status fa_cpu_sparsek(const fa_sparsek *r, fa_error *error) {
    call c = {.r = r, .streams = count_streams(r), .parts = 1};
    const double written = (double)c.streams * r->sq * (r->has_lists ? r->kept + 1 : r->sk);
    const int threads = written + (double)c.streams * r->sk < 2e4 ? 1 : fa_pool_threads();
    if (r->has_lists && c.streams && c.streams < threads) {
        c.parts = (threads + c.streams - 1) / c.streams;
        if (c.parts > r->sq) c.parts = r->sq;
    }
    fa_pool_run(threads, run_units, &c);
    if (!atomic_load(&c.failed)) return FA_OK;
    snprintf(error->text, sizeof error->text, "no memory for the CPU backend's scratch");
    return FA_MEMORY;
}
