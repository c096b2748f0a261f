/* backward_products.h - what a block of rows adds to the gradients; included by backward_kernel.h
 * once per instance.
 */
/* P and dS of a panel -> pairs along the rows, in their place; and of dS pairs along the keys. Its
 * rows become an even number: those added see nothing of the panel. */
static void pack_panel(const backward *c, tile *r, int p) {
    const int width = width_of(c->s, p), nv = width / LANES;
    fa_row_range *rows = &r->some[p];
    real *s = panel(c->s, p), *t = panel(c->t, p);
    const int added[2] = {rows->begin % 2 ? --rows->begin : -1, rows->end % 2 ? rows->end++ : -1};
    for (int n = 0; n < 2; n++) {
        if (added[n] < 0) continue;
        memset(s + added[n] * width, 0, (size_t)width * sizeof(real));
        memset(t + added[n] * width, 0, (size_t)width * sizeof(real));
    }
    for (int i = rows->begin; i < rows->end; i += 2) {
        const vec *x = (const vec *)(s + i * width), *y = (const vec *)(t + i * width);
        vec *to = (vec *)(s + i / 2 * width);
        for (int j = 0; j < nv && c->wants_dv; j++) to[j] = pair(x[j], x[j + nv]);
        to = (vec *)(t + i / 2 * width);
        vec *first = (vec *)place(c->ds, i, p * WIDTH / 2);
        vec *second = (vec *)place(c->ds, i + 1, p * WIDTH / 2);
        for (int j = 0; j < nv && c->wants_ds; j += 2) {
            const int last = j + 1 == nv;
            const vec a = y[j], b = last ? (vec){0} : y[j + 1];
            const vec d = y[j + nv], e = last ? (vec){0} : y[j + 1 + nv];
            to[j] = pair(a, d);
            if (!last) to[j + 1] = pair(b, e);
            first[j / 2] = narrow(a, b);
            second[j / 2] = narrow(d, e);
        }
    }
}

/* A row of the next block comes from the L3 or further: it is asked for while this one's elements
 * are worked on. */
FA_FAST void fetch_next(const backward *c, int64_t h, int row) {
    const fa_what *what = &c->p->what;
    const fa_tensor *of[] = {&what->q, &c->b->dout, &what->out, &c->b->dq};
    if (row >= c->sequence.lengths.sq) return;
    for (int n = 0; n < 4; n++) {
        const char *from = row_of(c, of[n], h, row);
        const int64_t bytes = from ? of[n]->shape[3] * fa_dtype_size(what->dtype) : 0;
        for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(from + line, 0, 2);
    }
}

/* The first row of a tile, from begin to end, that sees one of these keys. */
static int first_row(const backward *c, const tile *r, int key, int last_key, int begin, int end) {
    const fa_row_range rows =
        fa_rows_seeing_some(c->sequence.lengths, (fa_interval){key, last_key});
    return fa_clamp(rows.begin - r->first, begin, end);
}

/* P and dS of a block of rows. */
static void fill_tile(const backward *c, tile *r, int raw) {
    load_rows(c, r);
    for (int p = 0; p < panels(c->s); p++) {
        const int width = width_of(c->s, p), key = c->begin + p * WIDTH;
        const fa_interval block = {key, key + width};
        r->some[p] = fa_rows_seeing_some(c->sequence.lengths, block);
        r->all[p] = fa_rows_seeing_all(c->sequence.lengths, block);
        for (int n = 0; n < 2; n++) { /* counted from `first` on */
            fa_row_range *rows = n ? &r->all[p] : &r->some[p];
            rows->begin = fa_clamp(rows->begin - r->first, r->begin, r->end);
            rows->end = fa_clamp(rows->end - r->first, r->begin, r->end);
        }
        const int begin = r->some[p].begin, end = r->some[p].end;
        real *s = panel(c->s, p), *t = panel(c->t, p);
        if (begin == end) continue;
        /* Along a diagonal fewer vectors of keys for the first rows, whose other numbers are any.
         */
        for (int i = begin, nv = 1, stop; i < end; i = stop, nv++) {
            const int seen = nv * LANES < width ? nv * LANES : width;
            stop = seen < width ? first_row(c, r, key + seen, key + width, i, end) : end;
            product(s + i * width, width, 0, seen, panel(c->kt, p), width, c->q, 0, c->q.columns, i,
                    stop);
            if (c->wants_ds)
                product(t + i * width, width, 0, seen, panel(c->vt, p), width, c->g, 0,
                        c->g.columns, i, stop);
        }
        ivec at = {0};
        for (int j = 0; j < LANES; j++) at[j] = key + j;
        for (int i = begin; i < end; i++) {
            vec *x = (vec *)(s + i * width), *y = (vec *)(t + i * width);
            if (p == 0) fetch_next(c, r->h, r->first + c->size.rows + i);
            const int cuts = i < r->all[p].begin || i >= r->all[p].end || is_coarse(c, i);
            if (!c->changed && !raw && width == WIDTH && !cuts) {
                weigh(c, x, y, NV, i, (fa_interval){0, 0}, at, 0);
                continue;
            }
            const fa_interval keys = fa_row_interval(c->sequence.lengths, r->first + i);
            if (c->changed || raw)
                change(c, r, i, keys, key, (real *)x, (real *)y, width, raw);
            else
                weigh(c, x, y, width / LANES, i, keys, at, 1);
        }
        if (STEP == 2 && !raw) pack_panel(c, r, p);
    }
}

/* m += B' A for the keys of each panel of B: P' dO, or dS' Q. Of a panel that not all of its rows
 * see whole, some keys at a time, each with the rows from the first that sees one. */
static void add_to_keys(const backward *c, const tile *r, matrix m, matrix a, matrix b) {
    for (int p = 0; p < panels(b); p++) {
        const fa_row_range some = r->some[p], all = r->all[p];
        const int left = b.columns - p * WIDTH, across = width_of(b, p), end = some.end / STEP;
        const int count = left < across ? left : across;
        const int cuts = all.begin > some.begin, most = cuts ? PART : count;
        for (int at = 0; at < count; at += most) {
            const int key = c->begin + p * WIDTH + at, keys = count - at < most ? count - at : most;
            const int first = cuts ? first_row(c, r, key, key + keys, some.begin, some.end) : 0;
            const int begin = (cuts ? first : some.begin) / STEP;
            for (int j = 0; j < panels(m) && begin < end; j++) {
                const int width = width_of(m, j);
                transposed_product(panel(m, j) + (p * WIDTH + at) * width, width,
                                   panel(a, j) + begin * width, panel(b, p) + begin * across + at,
                                   across, keys, end - begin);
            }
        }
    }
}

/* dQ += dS K, row by row where the keys of this task are not the first that a row sees, and set
 * where they are. Rows that see no key of a later task are done. */
static void add_to_rows(const backward *c, const fa_keys *task, const tile *r) {
    const fa_tensor *dq = &c->b->dq;
    const fa_dtype type = c->p->what.dtype;
    const int64_t n = c->p->varlen.cu_q ? 0 : c->n, columns = whole(c->k.columns);
    char *to = (char *)dq->data +
               element(dq, n, r->h, c->sequence.q + (int64_t)r->first) * fa_dtype_size(type);
    real *sums = (real *)to;
    int64_t row = dq->stride[2];
    if (task->sums) {
        row = columns;
        sums = (real *)task->sums +
               ((r->h - task->h) * task->sums_rows + r->first) * columns; /* [head][row][d] */
    }
    int fresh = r->begin; /* rows from here on have no sum yet */
    const fa_lengths lengths = c->sequence.lengths;
    while (fresh < r->end && fa_row_interval(lengths, r->first + fresh).begin < c->begin) fresh++;
    for (int i = r->begin, stop; i < r->end; i = stop) {
        int begin = panels(c->t), end = 0; /* panels, then columns of dS, that these rows see */
        stop = i < fresh ? fresh : r->end;
        for (int p = 0; p < panels(c->t); p++) {
            const fa_row_range some = r->some[p];
            if (some.begin <= i && i < some.end) begin = begin < p ? begin : p, end = p + 1;
            if (some.begin > i && some.begin < stop) stop = some.begin;
            if (some.end > i && some.end < stop) stop = some.end;
        }
        begin *= WIDTH / STEP, end *= WIDTH / STEP;
        if (fa_row_interval(lengths, r->first + i).end < c->end && stop > i + PART) stop = i + PART;
        const int seen = fa_row_interval(lengths, r->first + stop - 1).end - c->begin;
        if (end > units_of(seen)) end = units_of(seen);
        if (end > c->ds.columns) end = c->ds.columns;
        for (int j = 0; j < panels(c->k) && begin < end; j++)
            product(sums + i * row + j * WIDTH, row, i < fresh, width_of(c->k, j), panel(c->k, j),
                    width_of(c->k, j), c->ds, begin, end, i, stop);
    }
    for (int i = r->begin; i < r->end && task->sums; i++)
        if (fa_row_interval(lengths, r->first + i).end <= c->end)
            write_row(to + i * dq->stride[2] * fa_dtype_size(type), type, dq->stride[3],
                      sums + i * row, c->k.columns);
}
