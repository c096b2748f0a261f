/* backward_lists.h - the gradients of a block of queries with its list, pass by pass (lists.h);
 * included by backward_kernel.h once per instance, but not with pairs.
 *
 * As many columns as a tile has are gathered, times their gates, and meet all rows of the block, of
 * all heads of the group. Their dK and dV are then complete for this list, and are added to the
 * sums of their keys; dQ is once all passes are through. With K' = g K and V' = g V the gradient of
 * a gate is that of V' times v, and with key_gate that of K' times k.
 */
/* Rows of the group's list from `first` on, and the columns that each sees. */
typedef struct listed_rows {
    tile tile;
    fa_interval keys[FA_ROWS];
    uint8_t several[FA_ROWS]; /* sees more than one key in all */
    kept_tile *kept;          /* of keys that SparseK keeps; else NULL */
} listed_rows;

static size_t list_bytes(const fa_backward *b, const fa_lists *lists) {
    const fa_what *what = &b->forward.what;
    backward c = {.b = b, .size = tile_size(what)};
    const size_t rows = (size_t)lists->q_block * (size_t)(what->hq / what->hk);
    return lay_out(&c, NULL) + rows * (size_t)whole(what->d) * sizeof(real);
}

/* How many columns each row of the block sees, 2 for more. */
static void count_seen(fa_listed *l, uint8_t *seen) {
    fa_pass pass;
    memset(seen, 0, FA_ROWS);
    for (l->step = 0; fa_next_pass(l, &pass);)
        for (int row = l->first; row < l->end; row++) {
            const fa_interval keys = fa_pass_columns(l, &pass, row);
            const int more = pass.kept ? count_kept(pass.kept, row) : keys.end - keys.begin;
            const int n = seen[row - l->first] + more;
            seen[row - l->first] = (uint8_t)(n < 2 ? n : 2);
        }
}

/* The gate of column i of those that are loaded. */
static real gate_of(const backward *c, const fa_listed *l, const fa_pass *pass, int i) {
    return pass->gates ? (real)pass->gates[(c->begin + i) / l->lists->k_block] : 1;
}

/* Where column i has its row of a tensor like k. */
static const char *column_row(const backward *c, const fa_list_task *task, const fa_pass *pass,
                              const fa_tensor *t, int i) {
    const int64_t n = c->p->varlen.cu_q ? 0 : c->n, h = task->group.h / task->group.heads;
    const int key = fa_key_of(pass, task->listed->lists->k_block, c->begin + i);
    return (const char *)t->data +
           element(t, n, h, c->sequence.k + (int64_t)key) * fa_dtype_size(c->p->what.dtype);
}

/* The columns' rows of K or V, times their gates -> rows, and transposed -> to. */
static void load_columns(const backward *c, const fa_list_task *task, const fa_pass *pass,
                         const fa_tensor *t, matrix rows, matrix to, int is_gated) {
    const int count = c->end - c->begin;
    for (int i = 0; i < whole(count); i++) {
        const char *from = i < count ? column_row(c, task, pass, t, i) : NULL;
        read_panels(rows, i, from, c->p->what.dtype, t->stride[3], rows.columns);
        if (!is_gated || !pass->gates || !from) continue;
        const real gate = gate_of(c, task->listed, pass, i);
        for (int p = 0; p < panels(rows); p++)
            for (int j = 0; j < width_of(rows, p); j++) *(place(rows, i, p * WIDTH) + j) *= gate;
    }
    transpose_matrix(to, rows, whole(count));
}

/* The rows that see some of the columns, with what the tile needs of them. */
static void open_listed(const backward *c, const fa_list_task *task, const fa_pass *pass,
                        const uint8_t *seen, int first, int last, listed_rows *l) {
    const int64_t start = (int64_t)task->listed->first * task->group.heads;
    const int n = last - first < c->size.rows ? last - first : c->size.rows;
    fa_interval keys = {0, 0};
    int before = -1;
    l->tile = (tile){.first = first, .begin = n, .end = 0};
    for (int i = 0; i < n; i++) {
        const int row = find_row(&task->group, start + first + i).row;
        if (row != before) keys = fa_pass_columns(task->listed, pass, before = row);
        if (pass->kept && seen[row - task->listed->first] < 2) keys = only_column(pass->kept, row);
        l->keys[i] = keys;
        if (pass->kept) l->kept->row[i] = row, l->kept->tau[i] = (real)fa_kept_tau(pass->kept, row);
        if (keys.begin >= c->end || keys.end <= c->begin || keys.begin == keys.end) continue;
        if (i < l->tile.begin) l->tile.begin = i;
        l->tile.end = i + 1;
    }
    for (int i = l->tile.begin; i < l->tile.end; i++) {
        const fa_row at = find_row(&task->group, start + first + i);
        const int64_t h = task->group.h + at.head;
        const real lse = read_lse(c, &c->p->what.lse, h, at.row);
        const int sees = seen[at.row - task->listed->first];
        l->several[i] = sees > 1;
        load_one(c, h, at.row, i, lse, sees && lse != -(real)INFINITY);
    }
}

/* P and dS of a tile; 0 in the rows of a panel that see nothing of it. */
static void fill_listed(const backward *c, const fa_list_task *task, listed_rows *l) {
    tile *r = &l->tile;
    for (int p = 0; p < panels(c->s); p++) {
        const int width = width_of(c->s, p), key = c->begin + p * WIDTH;
        int begin = r->begin, end = r->end;
        while (begin < end && l->keys[begin].end <= key) begin++;
        while (begin < end && l->keys[end - 1].begin >= key + width) end--;
        r->some[p] = (fa_row_range){begin, end};
        real *s = panel(c->s, p), *t = panel(c->t, p);
        for (int i = r->begin; i < r->end; i++) {
            if (i == begin) i = end;
            if (i >= r->end) break;
            memset(t + i * width, 0, (size_t)width * sizeof(real));
        }
        if (begin == end) continue;
        product(s + begin * width, width, 0, width, panel(c->kt, p), width, c->q, 0, c->q.columns,
                begin, end);
        if (c->wants_ds)
            product(t + begin * width, width, 0, width, panel(c->vt, p), width, c->g, 0,
                    c->g.columns, begin, end);
        ivec at = {0};
        for (int j = 0; j < LANES; j++) at[j] = key + j;
        for (int i = begin; i < end; i++) {
            vec *x = (vec *)(s + i * width), *y = (vec *)(t + i * width);
            const fa_interval keys = l->keys[i];
            const int cuts = keys.begin > key || keys.end < key + width || is_coarse(c, i);
            if (l->kept)
                weigh_kept(c, task, l->kept, r, i, keys, p * WIDTH / LANES, x, y, width);
            else if (c->changed)
                change(c, r, i, keys, key, (real *)x, (real *)y, width, 0);
            else if (width == WIDTH && !cuts)
                weigh(c, x, y, NV, i, keys, at, 0);
            else
                weigh(c, x, y, width / LANES, i, keys, at, 1);
        }
    }
}

/* P of a tile, summed over its rows, to the entries' mass. */
static void add_mass(const backward *c, const fa_list_task *task, const fa_pass *pass,
                     const tile *r) {
    const int size = task->listed->lists->k_block;
    for (int p = 0; p < panels(c->s); p++)
        for (int j = 0; j < width_of(c->s, p) && c->begin + p * WIDTH + j < c->end; j++) {
            double sum = 0;
            for (int i = r->some[p].begin; i < r->some[p].end; i++)
                sum += panel(c->s, p)[i * width_of(c->s, p) + j];
            task->entries[pass->entries[(c->begin + p * WIDTH + j) / size]] += sum;
        }
}

/* Row i of a matrix times a number, added to the sums of a key. */
static void add_to_sums(real *sums, matrix m, int i, real gate) {
    for (int p = 0; p < panels(m); p++) {
        const vec *from = (const vec *)place(m, i, p * WIDTH);
        vec *to = (vec *)(sums + p * WIDTH);
        for (int j = 0; j < width_of(m, p) / LANES; j++) to[j] += from[j] * gate;
    }
}

/* The product of row i of a matrix and a row of the caller's. by: a matrix as wide, whose row 0 is
 * free. */
static double multiply_by_row(const backward *c, matrix m, int i, matrix by, const char *from,
                              int64_t stride) {
    double sum = 0;
    read_panels(by, 0, from, c->p->what.dtype, stride, m.columns);
    for (int p = 0; p < panels(m); p++) {
        const real *x = place(m, i, p * WIDTH), *y = place(by, 0, p * WIDTH);
        vec lanes = {0};
        for (int j = 0; j < width_of(m, p); j += LANES)
            lanes = fma_(*(const vec *)(x + j), *(const vec *)(y + j), lanes);
        for (int j = 0; j < LANES; j++) sum += lanes[j];
    }
    return sum;
}

/* What the columns' keys and entries get of this list. */
static void add_columns(const backward *c, const fa_list_task *task, const fa_pass *pass) {
    const fa_listed *l = task->listed;
    const fa_what *what = &c->p->what;
    const int64_t d = whole(what->d), dv = whole(what->dv), size = l->lists->k_block;
    for (int i = 0; i < c->end - c->begin; i++) {
        const int key = fa_key_of(pass, (int)size, c->begin + i);
        const real gate = gate_of(c, l, pass, i);
        if (task->dk)
            add_to_sums((real *)task->dk + key * d, c->dk, i, l->lists->key_gate ? gate : 1);
        if (task->dv) add_to_sums((real *)task->dv + key * dv, c->dv, i, gate);
        if (!task->entries || !pass->entries) continue;
        double *to = &task->entries[pass->entries[(c->begin + i) / size]];
        if (c->wants_dv)
            *to += multiply_by_row(c, c->dv, i, c->g, column_row(c, task, pass, &what->v, i),
                                   what->v.stride[3]);
        if (l->lists->key_gate)
            *to += multiply_by_row(c, c->dk, i, c->q, column_row(c, task, pass, &what->k, i),
                                   what->k.stride[3]);
    }
}

/* The columns begin .. end - 1 of a pass meet all rows. */
static void run_columns(backward *c, const fa_list_task *task, const fa_pass *pass,
                        const uint8_t *seen, int begin, int end, real *sums) {
    const fa_what *what = &c->p->what;
    const int rows = (task->listed->end - task->listed->first) * task->group.heads;
    const int count = whole(end - begin), d = whole(what->d);
    const int wants_dk = task->dk || (task->entries && task->listed->lists->key_gate);
    listed_rows l;
    kept_tile kept;
    l.kept = pass->kept ? &kept : NULL;
    c->several = l.several;
    set_keys(c, &task->group.sequence, task->group.b, begin, end);
    c->k.rows = c->dk.rows = c->dv.rows = count;
    if (pass->kept) open_kept_columns(c, pass->kept, &kept);
    load_columns(c, task, pass, &what->k, c->k, c->kt, task->listed->lists->key_gate);
    if (c->wants_ds)
        load_columns(c, task, pass, &what->v, (matrix){c->dv.data, count, what->dv}, c->vt, 1);
    memset(c->dk.data, 0, (size_t)count * (size_t)d * sizeof(real));
    memset(c->dv.data, 0, (size_t)count * (size_t)whole(what->dv) * sizeof(real));
    for (int first = 0; first < rows; first += c->size.rows) {
        open_listed(c, task, pass, seen, first, rows, &l);
        const tile *r = &l.tile;
        if (r->begin >= r->end) continue;
        fill_listed(c, task, &l);
        if (task->is_mass) {
            add_mass(c, task, pass, r);
            continue;
        }
        if (c->wants_dv) add_to_keys(c, r, c->dv, c->g, c->s);
        if (wants_dk) add_to_keys(c, r, c->dk, c->q, c->t);
        for (int j = 0; j < panels(c->k) && c->b->dq.data; j++)
            product(sums + (int64_t)(first + r->begin) * d + j * WIDTH, d, 1, width_of(c->k, j),
                    panel(c->k, j), width_of(c->k, j), c->t, 0, c->t.columns, r->begin, r->end);
    }
    if (!task->is_mass) add_columns(c, task, pass);
    if (pass->kept) add_kept_columns(c, task, &kept);
}

/* What the sinks of the group's heads get of the block's rows. */
static void add_sinks(backward *c, const fa_list_task *task, const uint8_t *seen) {
    const fa_scores *scores = &c->p->scores;
    const int changed = c->changed;
    c->changed = 1; /* delta itself */
    for (int row = task->listed->first; row < task->listed->end; row++)
        for (int head = 0; head < task->group.heads; head++) {
            const int64_t h = task->group.h + head;
            const real lse = read_lse(c, &c->p->what.lse, h, row);
            const int alive = seen[row - task->listed->first] > 0;
            load_one(c, h, row, 0, lse, alive);
            const double delta =
                alive ? (double)c->delta[0] : -(double)read_lse(c, &c->b->dlse, h, row);
            if (lse != -(real)INFINITY)
                task->sinks[head] -=
                    exp((double)scores->sink[h * scores->sink_stride] - (double)lse) * delta;
        }
    c->changed = changed;
}

static void run_lists(const fa_backward *b, const fa_list_task *task, void *memory) {
    const fa_what *what = &b->forward.what;
    fa_listed *list = task->listed;
    const int rows = (list->end - list->first) * task->group.heads, d = whole(what->d);
    uint8_t seen[FA_ROWS];
    backward c;
    fa_pass pass;
    open_backward(&c, b, memory);
    real *sums = (real *)((char *)memory + lay_out(&c, memory));
    c.sequence = task->group.sequence, c.n = task->group.b;
    c.wants_ds = !task->is_mass;
    c.wants_dv = (task->dv || (task->entries && !task->is_mass)) && b->dout.data;
    count_seen(list, seen);
    if (task->sinks) add_sinks(&c, task, seen);
    if (b->dq.data) memset(sums, 0, (size_t)rows * (size_t)d * sizeof(real));
    for (list->step = 0; fa_next_pass(list, &pass);) {
        if (task->is_mass && !pass.entries) continue;
        const int begin = fa_pass_columns(list, &pass, list->first).begin;
        const int end = fa_pass_columns(list, &pass, list->end - 1).end;
        for (int at = begin; at < end; at += c.size.keys)
            run_columns(&c, task, &pass, seen, at, end - at < c.size.keys ? end : at + c.size.keys,
                        sums);
    }
    for (int i = 0; i < rows && b->dq.data; i++) {
        const fa_row at = find_row(&task->group, (int64_t)list->first * task->group.heads + i);
        char *to = (char *)(uintptr_t)row_of(&c, &b->dq, task->group.h + at.head, at.row);
        write_row(to, what->dtype, b->dq.stride[3], sums + (int64_t)i * d, what->d);
    }
}

/* The sums of keys, over all parts -> a tensor's rows. */
static void add_parts(const fa_rows_task *task, const fa_tensor *t, fa_dtype type, const void *from,
                      real *row) {
    const int n = (int)t->shape[3], width = whole(n);
    for (int j = task->begin; j < task->end && from; j++) {
        memcpy(row, (const real *)from + (int64_t)j * width, (size_t)width * sizeof(real));
        for (int part = 1; part < task->parts; part++) {
            const real *more = (const real *)((const char *)from + part * task->apart);
            for (int i = 0; i < width; i++) row[i] += more[(int64_t)j * width + i];
        }
        char *to =
            (char *)t->data + element(t, task->n, task->hk, task->k + j) * fa_dtype_size(type);
        write_row(to, type, t->stride[3], row, n);
    }
}

static void add_rows(const fa_backward *b, const fa_rows_task *task, void *memory) {
    add_parts(task, &b->dk, b->forward.what.dtype, task->dk, memory);
    add_parts(task, &b->dv, b->forward.what.dtype, task->dv, memory);
}
