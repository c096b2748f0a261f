/* kvcache.c - attention to a cache on the CPU: new keys and values are written into it, then the
 * forward pass runs on it, for few rows and for many; the mass, if it is wanted, comes last.
 */
#include "cpu.h"
#include "pool.h"

static double read_number(const void *data, int64_t at, fa_dtype type) {
    switch (type) {
        case FA_F64:
            return ((const double *)data)[at];
        case FA_F32:
            return ((const float *)data)[at];
        case FA_F16:
            return fa_f16_to_float(((const uint16_t *)data)[at]);
        default:
            return fa_bf16_to_float(((const uint16_t *)data)[at]);
    }
}

static void write_number(void *data, int64_t at, fa_dtype type, double x) {
    switch (type) {
        case FA_F64:
            ((double *)data)[at] = x;
            break;
        case FA_F32:
            ((float *)data)[at] = (float)x;
            break;
        case FA_F16:
            ((uint16_t *)data)[at] = fa_float_to_f16((float)x);
            break;
        default:
            ((uint16_t *)data)[at] = fa_float_to_bf16((float)x);
            break;
    }
}

/* n numbers, strides in elements. */
static void copy_row(char *to, int64_t to_stride, const char *from, int64_t from_stride, int n,
                     int64_t size) {
    if (to_stride == 1 && from_stride == 1)
        memcpy(to, from, (size_t)(n * size));
    else
        for (int i = 0; i < n; i++)
            memcpy(to + i * to_stride * size, from + i * from_stride * size, (size_t)size);
}

/* Turns the pairs of a row by the angles of a position. Of float32 and shorter numbers products
 * are exact in a double, so that only the end rounds. */
static void rotate(void *row, int64_t stride, fa_dtype type, const fa_rotary *r, int64_t position) {
    const int64_t pairs = r->cos.shape[3], rows = r->cos.shape[2];
    const int64_t at = position < rows ? position : rows - 1;
    const int64_t apart = r->interleaved ? 1 : pairs, step = r->interleaved ? 2 : 1;
    for (int64_t i = 0; i < pairs && rows; i++) {
        const int64_t x_at = i * step * stride, y_at = (i * step + apart) * stride;
        const double c =
            read_number(r->cos.data, at * r->cos.stride[2] + i * r->cos.stride[3], r->dtype);
        const double s =
            read_number(r->sin.data, at * r->sin.stride[2] + i * r->sin.stride[3], r->dtype);
        const double x = read_number(row, x_at, type), y = read_number(row, y_at, type);
        write_number(row, x_at, type, x * c - y * s);
        write_number(row, y_at, type, y * c + x * s);
    }
}

/* Writes new rows of K, rotated, or of V into the cache. */
static void append(const fa_kvcache *c, const fa_tensor *cache, const fa_tensor *rows,
                   const fa_rotary *rotary) {
    const fa_pages *pages = &c->forward.pages;
    const fa_dtype type = c->forward.what.dtype;
    const int64_t size = fa_dtype_size(type);
    for (int64_t b = 0; b < rows->shape[0]; b++) {
        const int32_t before = fa_keys_before(c, b);
        for (int64_t h = 0; h < rows->shape[1]; h++) {
            char *to = (char *)cache->data + element(cache, pages->table ? 0 : b, h, 0) * size;
            const char *from = (const char *)rows->data + element(rows, b, h, 0) * size;
            for (int32_t i = 0; i < c->s_new; i++) {
                char *row = to + key_place(pages, cache, b, before + i) * size;
                copy_row(row, cache->stride[3], from + i * rows->stride[2] * size, rows->stride[3],
                         (int)rows->shape[3], size);
                if (rotary) rotate(row, cache->stride[3], type, rotary, before + i);
            }
        }
    }
}

/* Sequence b: its rows of q, and what they see. */
static fa_sequence find_sequence(const fa_params *p, int64_t b) {
    return fa_find_cached(&p->varlen, &p->masks, b, p->what.sq, p->what.sk);
}

/* Q rotated, contiguous. */
static void rotate_queries(const fa_kvcache *c, fa_tensor *to) {
    const fa_what *w = &c->forward.what;
    const int64_t size = fa_dtype_size(w->dtype);
    for (int64_t b = 0; b < w->b; b++) {
        const fa_sequence n = find_sequence(&c->forward, b);
        for (int64_t h = 0; h < w->hq; h++)
            for (int64_t i = 0; i < n.lengths.sq; i++) {
                char *row = (char *)to->data + element(to, b, h, n.q + i) * size;
                copy_row(row, 1, (const char *)w->q.data + element(&w->q, b, h, n.q + i) * size,
                         w->q.stride[3], w->d, size);
                const int64_t before = fa_keys_before(c, b);
                rotate(row, 1, w->dtype, &c->rotary, before + (c->rotary.advances ? i : 0));
            }
    }
}

/* ---- the mass ---- */

enum { SUMS = 8 }; /* of a product, so that gcc can keep them in vectors */

typedef struct masses {
    const fa_params *p;
    const fa_tensor *mass;
    atomic_llong next; /* key head of a sequence, counted through; threads draw them */
} masses;

static void read_doubles(double *to, const void *from, int64_t stride, fa_dtype type, int n) {
    for (int i = 0; i < n; i++) to[i] = read_number(from, i * stride, type);
    for (int i = n; i % SUMS; i++) to[i] = 0;
}

static double multiply_rows(const double *x, const double *y, int n) {
    double sums[SUMS] = {0}, sum = 0;
    for (int i = 0; i < n; i += SUMS)
        for (int j = 0; j < SUMS; j++) sums[j] += x[i + j] * y[i + j];
    for (int j = 0; j < SUMS; j++) sum += sums[j];
    return sum;
}

/* p of a product q.k of row `row` of q, by the lse that the forward pass gave. */
static double weigh(const fa_params *p, int64_t b, int64_t h, int64_t row, int32_t key,
                    int position, double product) {
    const fa_scores *s = &p->scores;
    const fa_tensor *lse = &p->what.lse;
    const double most = p->what.dtype == FA_F64 ? 1e300 : 1e30;
    const int64_t at = element(lse, b, h, row);
    const double total =
        p->what.dtype == FA_F64 ? ((double *)lse->data)[at] : ((float *)lse->data)[at];
    double x = product * fmax(fmin(p->what.scale, most), -most);
    if (total == -INFINITY) return 0;
    if (s->softcap > 0) x = s->softcap * tanh(x / s->softcap);
    if (s->alibi_slopes)
        x -= s->alibi_slopes[b * s->alibi_stride[0] + h * s->alibi_stride[1]] *
             fabs((double)position - key);
    return exp(x - total);
}

/* One key head of one sequence; memory: of a key's row and the rows of q. */
static void sum_mass(const masses *m, int64_t b, int64_t h, double *memory) {
    const fa_params *p = m->p;
    const fa_what *w = &p->what;
    const fa_sequence sequence = find_sequence(p, b);
    const fa_lengths n = sequence.lengths;
    const int64_t size = fa_dtype_size(w->dtype), group = w->hq / w->hk;
    const int width = (w->d + SUMS - 1) / SUMS * SUMS;
    const char *k = (const char *)w->k.data + element(&w->k, p->pages.table ? 0 : b, h, 0) * size;
    double *rows = memory + width;
    for (int64_t r = 0; r < group * n.sq; r++) {
        const int64_t at = element(&w->q, b, h * group + r % group, sequence.q + r / group);
        read_doubles(rows + r * width, (const char *)w->q.data + at * size, w->q.stride[3],
                     w->dtype, w->d);
    }
    for (int32_t j = 0; j < m->mass->shape[2]; j++) {
        double sum = 0;
        const fa_row_range see = fa_rows_seeing_some(n, (fa_interval){j, j < n.sk ? j + 1 : j});
        if (see.begin < see.end)
            read_doubles(memory, k + key_place(&p->pages, &w->k, b, j) * size, w->k.stride[3],
                         w->dtype, w->d);
        for (int32_t i = see.begin; i < see.end; i++)
            for (int64_t head = 0; head < group; head++)
                sum += weigh(p, b, h * group + head, sequence.q + i, j, fa_row_position(n, i),
                             multiply_rows(memory, rows + (i * group + head) * width, width));
        ((float *)m->mass->data)[element(m->mass, b, h, j)] = (float)sum;
    }
}

static size_t mass_memory(const fa_what *w) {
    const size_t rows = 1 + (size_t)(w->hq / w->hk) * (size_t)w->sq;
    return rows * (size_t)(w->d + SUMS) * sizeof(double);
}

static void work(void *argument) {
    masses *m = argument;
    double *memory = malloc(mass_memory(&m->p->what));
    if (!memory) return; /* the other threads do the work */
    const int64_t heads = m->mass->shape[1];
    for (int64_t at; (at = atomic_fetch_add(&m->next, 1)) < m->mass->shape[0] * heads;)
        sum_mass(m, at / heads, at % heads, memory);
    free(memory);
}

/* ---- the call ---- */

/* What a call needs beside the forward pass's own, all of it before the first write. */
typedef struct room {
    int32_t *lengths; /* of the keys, the new ones included */
    void *q, *lse;
} room;

static int make_room(room *r, const fa_kvcache *c) {
    const fa_what *w = &c->forward.what;
    const size_t rows = (size_t)(w->q.shape[0] * w->q.shape[1] * w->q.shape[2]);
    const size_t q = c->rotary.cos.data ? rows * (size_t)w->d * (size_t)fa_dtype_size(w->dtype) : 0;
    r->lengths = malloc((size_t)w->b * sizeof *r->lengths + 1);
    r->q = q ? malloc(q) : NULL;
    r->lse = c->mass.data && !w->lse.data ? malloc(rows * sizeof(double) + 1) : NULL;
    return r->lengths && (r->q || !q) && (r->lse || !c->mass.data || w->lse.data);
}

static fa_status run(const fa_kvcache *c, const room *r, fa_level level, fa_error *error) {
    fa_params p = c->forward;
    fa_what *w = &p.what;
    if (c->k_new.data) {
        append(c, &w->v, &c->v_new, NULL); /* where they overlap k stays */
        append(c, &w->k, &c->k_new, c->rotary.cos.data ? &c->rotary : NULL);
    }
    w->sk = 0;
    for (int64_t b = 0; b < w->b; b++) {
        r->lengths[b] = fa_keys_before(c, b) + c->s_new;
        if (r->lengths[b] > w->sk) w->sk = r->lengths[b];
    }
    p.masks.k_lengths = r->lengths, p.masks.k_lengths_stride = 1;
    const int64_t b = w->q.shape[0], h = w->q.shape[1], s = w->q.shape[2], d = w->d;
    const int64_t apart = p.varlen.cu_q ? 0 : h * s; /* rows of sequences that are not packed */
    if (r->q) {
        fa_tensor q = {r->q, {b, h, s, d}, {apart * d, s * d, d, 1}};
        rotate_queries(c, &q);
        w->q = q;
    }
    if (r->lse) w->lse = (fa_tensor){r->lse, {b, h, s, 1}, {apart, s, 1, 0}};
    const fa_status status = fa_cpu_forward(&p, level, error);
    if (status != FA_OK || !c->mass.data) return status;
    masses m = {.p = &p, .mass = &c->mass};
    fa_pool_run(fa_pool_threads(), work, &m);
    if (atomic_load(&m.next) >= c->mass.shape[0] * c->mass.shape[1]) return FA_OK;
    snprintf(error->text, sizeof error->text, "no memory for the sums of `return_mass`");
    return FA_MEMORY;
}

fa_status fa_cpu_kvcache(const fa_kvcache *c, fa_level level, fa_error *error) {
    room r;
    fa_status status = FA_MEMORY;
    if (make_room(&r, c))
        status = run(c, &r, level, error);
    else
        snprintf(error->text, sizeof error->text, "no memory for the CPU backend's scratch");
    free(r.lengths);
    free(r.q);
    free(r.lse);
    return status;
}
