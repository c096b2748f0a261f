/* backward_rows.h - from the caller's keys and rows to the matrices of backward_kernel.h, which
 * includes it once per instance, and back.
 */
/* n elements of a row -> row `row` of a matrix, and zeros behind them. NULL: zeros. */
static void read_panels(matrix m, int row, const char *from, fa_dtype type, int64_t stride) {
    const int64_t size = fa_dtype_size(type);
    for (int p = 0; p < panels(m); p++) {
        const int width = width_of(m, p), left = m.columns - p * WIDTH;
        real *to = panel(m, p) + (int64_t)row * width;
        if (!from || left < width) memset(to + width - LANES, 0, LANES * sizeof(real));
        if (from)
            read_row(to, from + p * WIDTH * stride * size, type, stride,
                     left < width ? left : width);
        else
            memset(to, 0, (size_t)width * sizeof(real));
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

/* The block's rows of K or V -> m. Those that no row sees count as zeros, for 0 * NaN is not. */
static void load_key_rows(const backward *c, matrix m, const fa_tensor *t, int64_t head) {
    const fa_dtype type = c->p->what.dtype;
    const int64_t at = c->sequence.k + (int64_t)c->begin;
    const char *from = (const char *)t->data +
                       element(t, c->p->varlen.cu_q ? 0 : c->n, head, at) * fa_dtype_size(type);
    for (int i = 0; i < whole(c->end - c->begin); i++) {
        const int sees = i < c->end - c->begin && c->seen[i];
        read_panels(m, i, sees ? from + i * t->stride[2] * fa_dtype_size(type) : NULL, type,
                    t->stride[3]);
    }
}

static void load_keys(const backward *c, int64_t h, int heads, int sees) {
    const fa_what *what = &c->p->what;
    memset(c->dk.data, 0, (size_t)whole(c->dk.columns) * c->dk.rows * sizeof(real));
    if (!sees) return;
    seen_keys(c, h, heads);
    load_key_rows(c, c->k, &what->k, h / (what->hq / what->hk));
    transpose_matrix(c->kt, c->k, whole(c->end - c->begin));
}

/* V lies in dV's place until it is transposed. */
static void load_values(const backward *c, int64_t h, int heads, int sees) {
    const fa_what *what = &c->p->what;
    if (sees && c->wants_ds) {
        seen_keys(c, h, heads);
        load_key_rows(c, c->dv, &what->v, h / (what->hq / what->hv));
        transpose_matrix(c->vt, c->dv, whole(c->end - c->begin));
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
    const fa_dtype type = c->p->what.dtype == FA_F64 ? FA_F64 : FA_F32;
    const int64_t n = c->p->varlen.cu_q ? 0 : c->n, s = c->sequence.q + (int64_t)row;
    real x = 0;
    if (t->data)
        read_row(&x, (const char *)t->data + element(t, n, h, s) * fa_dtype_size(type), type, 1, 1);
    return x;
}

/* Row `row` of head h -> row i of q and g, and its lse and delta. In a row that sees nothing P and
 * dS are 0. */
static void load_row(const backward *c, int64_t h, int row, int i) {
    const fa_what *what = &c->p->what;
    const fa_backward *b = c->b;
    const fa_dtype type = what->dtype;
    const int64_t size = fa_dtype_size(type), n = c->p->varlen.cu_q ? 0 : c->n;
    const int64_t s = c->sequence.q + (int64_t)row;
#define ROW(t) ((const char *)(t).data + element(&(t), n, h, s) * fa_dtype_size(type))
    const real lse = read_lse(c, &what->lse, h, row);
    const int alive = is_alive(c, h, row, lse);
    read_panels(c->q, i, alive ? ROW(what->q) : NULL, type, what->q.stride[3]);
    read_panels(c->g, i, alive && b->dout.data ? ROW(b->dout) : NULL, type, b->dout.stride[3]);
    vec sum = {0};
    for (int p = 0; alive && p < panels(c->g); p++) {
        const int width = width_of(c->g, p), left = what->dv - p * WIDTH;
        const vec *g = (const vec *)(panel(c->g, p) + i * width);
        vec out[NV] = {{0}};
        read_row((real *)out, ROW(what->out) + p * WIDTH * what->out.stride[3] * size, type,
                 what->out.stride[3], left < width ? left : width);
        for (int j = 0; j < width / LANES; j++) sum = fma_(out[j], g[j], sum);
    }
    real delta = alive ? -read_lse(c, &b->dlse, h, row) : 0;
    for (int j = 0; j < LANES; j++) delta += sum[j];
    c->delta[i] = c->changed ? delta : delta * c->scale;
    c->lse[i] = alive ? lse : (real)INFINITY;
#undef ROW
}
