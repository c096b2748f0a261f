/* backward_rows.h - from the caller's keys and rows to the matrices of backward_kernel.h, which
 * includes it once per instance, and back.
 */
/* n elements of a row -> row `row` of a matrix of units, and zeros behind them. NULL: zeros. */
static void read_panels(matrix m, int row, const char *from, fa_dtype type, int64_t stride, int n) {
    const int64_t size = fa_dtype_size(type);
    for (int p = 0; p < panels(m); p++) {
        const int width = width_of(m, p), left = n - p * WIDTH * STEP;
        real *to = panel(m, p) + (int64_t)row * width;
        if (!from || left < width * STEP) memset(to + width - LANES, 0, LANES * sizeof(real));
        if (from)
            read_units(to, from + p * WIDTH * STEP * stride * size, type, stride,
                       left < width * STEP ? left : width * STEP);
        else
            memset(to, 0, (size_t)width * sizeof(real));
    }
}

/* Two rows -> row `step` of a matrix of pairs, and zeros behind them. NULL: zeros. */
static void zip_panels(matrix m, int step, const char *const rows[2], fa_dtype type,
                       int64_t stride) {
    for (int p = 0; p < panels(m); p++) {
        const int width = width_of(m, p), left = m.columns - p * WIDTH;
        const int64_t at = p * WIDTH * stride * fa_dtype_size(type);
        real *to = panel(m, p) + (int64_t)step * width;
        if (left < width) memset(to + width - LANES, 0, LANES * sizeof(real));
        read_step(to, rows[0] ? rows[0] + at : NULL, rows[1] ? rows[1] + at : NULL, type, stride,
                  left < width ? left : width);
    }
}

static void write_panels(char *to, fa_dtype type, int64_t stride, matrix m, int row) {
    for (int p = 0; p < panels(m); p++) {
        const int width = width_of(m, p), left = m.columns - p * WIDTH;
        write_row(to + p * WIDTH * stride * fa_dtype_size(type), type, stride,
                  panel(m, p) + (int64_t)row * width, left < width ? left : width);
    }
}

/* ---- keys ---- */

/* Which keys of the block some row sees, of the `heads` query heads from h on. */
static void seen_keys(const backward *c, int64_t h, int heads) {
    const fa_scores *scores = &c->p->scores;
    const fa_lengths lengths = c->sequence.lengths;
    const int hides = scores->mask.data && scores->mask_dtype == FA_BOOL;
    int left = 0;
    for (int i = 0; i < c->end - c->begin; i++) {
        const fa_row_range rows =
            fa_rows_seeing_some(lengths, (fa_interval){c->begin + i, c->begin + i + 1});
        c->seen[i] = rows.begin < rows.end;
        if (c->seen[i] && hides) c->seen[i] = 2, left++; /* nobody yet */
    }
    const int64_t *stride = scores->mask.stride;
    const fa_row_range rows = fa_rows_seeing_some(lengths, (fa_interval){c->begin, c->end});
    for (int head = 0; head < heads && left; head++) {
        for (int row = rows.begin; row < rows.end && left; row++) {
            const uint8_t *from = (const uint8_t *)scores->mask.data + c->n * stride[0] +
                                  (h + head) * stride[1] + row * stride[2];
            fa_interval keys = fa_row_interval(lengths, row);
            if (keys.begin < c->begin) keys.begin = c->begin;
            if (keys.end > c->end) keys.end = c->end;
            for (int j = keys.begin; j < keys.end; j++)
                if (c->seen[j - c->begin] == 2 && from[j * stride[3]])
                    c->seen[j - c->begin] = 1, left--;
        }
    }
    for (int i = 0; i < c->end - c->begin; i++) c->seen[i] = c->seen[i] == 1;
}

/* The block's rows of K or V, transposed -> to, by way of `by`; and with pairs -> zipped, where
 * that is not NULL. Those that no row sees count as zeros, for 0 * NaN is not. */
static void load_key_rows(const backward *c, matrix to, real *by, const matrix *zipped,
                          const fa_tensor *t, int64_t head) {
    const fa_dtype type = c->p->what.dtype;
    const int64_t at = c->sequence.k + (int64_t)c->begin;
    const char *from = (const char *)t->data +
                       element(t, c->p->varlen.cu_q ? 0 : c->n, head, at) * fa_dtype_size(type);
    const int d = (int)t->shape[3], count = whole(c->end - c->begin);
    const matrix rows = {by, c->dk.rows, units_of(d)};
    for (int i = 0; i < count; i += STEP) {
        const char *row[2];
        for (int j = 0; j < STEP; j++) {
            const int sees = i + j < c->end - c->begin && c->seen[i + j];
            row[j] = sees ? from + (i + j) * t->stride[2] * fa_dtype_size(type) : NULL;
            read_panels(rows, i + j, row[j], type, t->stride[3], d);
        }
        if (STEP == 2 && zipped) zip_panels(*zipped, i / 2, row, type, t->stride[3]);
    }
    transpose_matrix(to, rows, count);
}

/* Pairs of K, and V, lie where their gradients will until they are transposed. */
static void load_keys(const backward *c, int64_t h, int heads, int sees) {
    const fa_what *what = &c->p->what;
    if (sees) {
        seen_keys(c, h, heads);
        load_key_rows(c, c->kt, STEP == 2 ? c->dk.data : c->k.data, &c->k, &what->k,
                      h / (what->hq / what->hk));
    }
    memset(c->dk.data, 0, (size_t)whole(c->dk.columns) * c->dk.rows * sizeof(real));
}

static void load_values(const backward *c, int64_t h, int heads, int sees) {
    const fa_what *what = &c->p->what;
    if (sees && c->wants_ds) {
        seen_keys(c, h, heads);
        load_key_rows(c, c->vt, c->dv.data, NULL, &what->v, h / (what->hq / what->hv));
    }
    memset(c->dv.data, 0, (size_t)whole(c->dv.columns) * c->dv.rows * sizeof(real));
}

/* The sums of the block's keys -> dk or dv. */
static void sum_keys(const backward *c, const fa_tensor *t, matrix m, int64_t head) {
    if (!t->data) return;
    const fa_dtype type = c->p->what.dtype;
    const int64_t at = c->sequence.k + (int64_t)c->begin;
    char *to =
        (char *)t->data + element(t, c->p->varlen.cu_q ? 0 : c->n, head, at) * fa_dtype_size(type);
    for (int i = 0; i < c->end - c->begin; i++)
        write_panels(to + i * t->stride[2] * fa_dtype_size(type), type, t->stride[3], m, i);
}

/* ---- rows ---- */

/* Whether a row sees a key. What it sees through a bool mask shows in lse, but for a sink. */
static int is_alive(const backward *c, int64_t h, int row, double lse) {
    const fa_scores *scores = &c->p->scores;
    const fa_interval keys = fa_row_interval(c->sequence.lengths, row);
    if (keys.begin == keys.end || lse == -INFINITY) return 0;
    if (!scores->sink || !scores->mask.data || scores->mask_dtype != FA_BOOL) return 1;
    const int64_t *stride = scores->mask.stride;
    const uint8_t *from =
        (const uint8_t *)scores->mask.data + c->n * stride[0] + h * stride[1] + row * stride[2];
    for (int j = keys.begin; j < keys.end; j++)
        if (from[j * stride[3]]) return 1;
    return 0;
}

/* One number of lse, or of dlse, which may be absent. */
static real read_lse(const backward *c, const fa_tensor *t, int64_t h, int row) {
    const int64_t n = c->p->varlen.cu_q ? 0 : c->n, s = c->sequence.q + (int64_t)row;
    if (!t->data) return 0;
    const int64_t at = element(t, n, h, s);
    return c->p->what.dtype == FA_F64 ? (real)((const double *)t->data)[at]
                                      : (real)((const float *)t->data)[at];
}

/* Row `row` of head h of a tensor like q or out; NULL: there is no tensor. */
static const char *row_of(const backward *c, const fa_tensor *t, int64_t h, int row) {
    const int64_t n = c->p->varlen.cu_q ? 0 : c->n, s = c->sequence.q + (int64_t)row;
    if (!t->data) return NULL;
    return (const char *)t->data + element(t, n, h, s) * fa_dtype_size(c->p->what.dtype);
}

/* out . dout of a row. */
static real out_dout(const backward *c, int64_t h, int row, int i) {
    const fa_what *what = &c->p->what;
    const fa_tensor *dout = &c->b->dout, *out = &what->out;
    const int64_t size = fa_dtype_size(what->dtype);
    const char *x = row_of(c, out, h, row), *y = row_of(c, dout, h, row);
    vec sum = {0};
    for (int at = 0; y && at < what->dv; at += WIDTH) {
        const int left = what->dv - at, n = left < WIDTH ? left : WIDTH;
        vec a[NV], b[NV];
        const vec *g = STEP == 1 ? (const vec *)place(c->g, i, at) : b; /* there already */
        if (n % LANES) a[n / LANES] = b[n / LANES] = (vec){0};
        read_row((real *)a, x + at * out->stride[3] * size, what->dtype, out->stride[3], n);
        if (STEP == 2)
            read_row((real *)b, y + at * dout->stride[3] * size, what->dtype, dout->stride[3], n);
        for (int j = 0; j < whole(n) / LANES; j++) sum = fma_(a[j], g[j], sum);
    }
#pragma GCC unroll 4
    for (int n = 0; n < 4; n++)
        if (1 << n < LANES) sum += across(sum, 1 << n);
    return sum[0];
}

/* The row first + i of a tile -> row i of q and g, and its lse and delta. In a row that sees
 * nothing P and dS are 0. */
static void load_one(const backward *c, int64_t h, int row, int i, real lse, int alive) {
    const fa_what *what = &c->p->what;
    const fa_tensor *dout = &c->b->dout;
    const char *q = alive ? row_of(c, &what->q, h, row) : NULL;
    const char *g = alive ? row_of(c, dout, h, row) : NULL;
    read_panels(c->q, i, q, what->dtype, what->q.stride[3], what->d);
    read_panels(c->g, i, g, what->dtype, dout->stride[3], what->dv);
    const real delta = alive ? out_dout(c, h, row, i) - read_lse(c, &c->b->dlse, h, row) : 0;
    c->delta[i] = c->changed ? delta : delta * c->scale;
    c->lse[i] = alive ? lse : (real)INFINITY;
}

static int load_row(const backward *c, const tile *r, int i) {
    const int row = r->first + i;
    const real lse = read_lse(c, &c->p->what.lse, r->h, row);
    const int alive = is_alive(c, r->h, row, lse);
    load_one(c, r->h, row, i, lse, alive);
    return alive;
}

/* All rows of a tile, and with pairs two and two of them zipped. */
static void load_rows(const backward *c, const tile *r) {
    const fa_what *what = &c->p->what;
    const fa_tensor *dout = &c->b->dout;
    for (int i = r->begin / STEP * STEP; i < r->end; i += STEP) {
        const char *q[2] = {NULL}, *g[2] = {NULL};
        for (int j = 0; j < STEP; j++) {
            if (i + j < r->begin || i + j >= r->end || !load_row(c, r, i + j)) continue;
            q[j] = row_of(c, &what->q, r->h, r->first + i + j);
            g[j] = row_of(c, dout, r->h, r->first + i + j);
        }
        if (STEP == 1) continue;
        zip_panels(c->q_steps, i / 2, q, what->dtype, what->q.stride[3]);
        zip_panels(c->g_steps, i / 2, g, what->dtype, dout->stride[3]);
    }
}
