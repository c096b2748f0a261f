/* backward_mask.h - dmask, by a pass of its own over the tiles, and dsink; included by
 * backward_kernel.h once per instance.
 */
/* ds of a tile -> the tile of dmask, row by row or all rows into one. */
static void add_to_mask(const backward *c, const tile *r, int one_row) {
    for (int p = 0; p < panels(c->t); p++) {
        const int width = width_of(c->t, p), across = width_of(c->sum, p);
        for (int i = r->some[p].begin; i < r->some[p].end; i++) {
            const vec *from = (const vec *)(panel(c->t, p) + i * width);
            vec *to = (vec *)(panel(c->sum, p) + (one_row ? 0 : i) * across);
            for (int j = 0; j < width / LANES; j++) to[j] += from[j];
        }
    }
}

/* One tile of dmask: the sum of ds over all sequences, heads, rows and keys that it stands for. */
static void run_mask(const fa_backward *b, const fa_mask_tile *task, void *memory) {
    const fa_params *p = &b->forward;
    const fa_what *what = &p->what;
    backward c;
    open_backward(&c, b, memory);
    const int one_row = b->dmask.shape[2] == 1, one_key = b->dmask.shape[3] == 1;
    const int keys = task->keys.end - task->keys.begin;
    c.sum.columns = keys < c.size.keys ? keys : c.size.keys;
    memset(c.sum.data, 0, (size_t)c.sum.rows * whole(c.sum.columns) * sizeof(real));
    for (int64_t n = task->n.begin; n < task->n.end; n++) {
        const fa_sequence sequence = fa_find_sequence(&p->varlen, &p->masks, n, what->sq, what->sk);
        for (int64_t h = task->h.begin; h < task->h.end; h++)
            for (int at = task->keys.begin; at < task->keys.end; at += c.size.keys) {
                const int end = fa_clamp(at + c.size.keys, at, sequence.lengths.sk);
                if (at >= end) break;
                set_keys(&c, &sequence, n, at, end);
                load_keys(&c, h, 1, 1);
                load_values(&c, h, 1, 1);
                for (int row = task->rows.begin; row < task->rows.end; row += c.size.rows) {
                    tile r = open_tile(&c, h, row);
                    fill_tile(&c, &r, 1);
                    add_to_mask(&c, &r, one_row);
                }
            }
    }
    const fa_dtype type = p->scores.mask_dtype;
    const fa_tensor *t = &b->dmask;
    char *to = (char *)t->data +
               (element(t, task->n.begin, task->h.begin, task->rows.begin) * fa_dtype_size(type));
    to += task->keys.begin * t->stride[3] * fa_dtype_size(type);
    for (int i = 0; i < (one_row ? 1 : task->rows.end - task->rows.begin); i++) {
        char *row = to + i * t->stride[2] * fa_dtype_size(type);
        if (!one_key) {
            write_panels(row, type, t->stride[3], c.sum, i);
            continue;
        }
        real sum = 0;
        for (int j = 0; j < c.sum.columns; j++)
            sum += panel(c.sum, j / WIDTH)[i * width_of(c.sum, j / WIDTH) + j % WIDTH];
        write_row(row, type, 1, &sum, 1);
    }
}

/* dsink of head h: minus the sum of exp(sink - lse) delta. */
static void run_sink(const fa_backward *b, int64_t h, void *memory) {
    const fa_params *p = &b->forward;
    const double sink = p->scores.sink[h * p->scores.sink_stride];
    double sum = 0;
    backward c;
    open_backward(&c, b, memory);
    c.scale = 1; /* delta itself */
    for (c.n = 0; c.n < p->what.b; c.n++) {
        c.sequence = fa_find_sequence(&p->varlen, &p->masks, c.n, p->what.sq, p->what.sk);
        for (int row = 0; row < c.sequence.lengths.sq; row++) {
            const double lse = read_lse(&c, &p->what.lse, h, row);
            const double dlse = read_lse(&c, &b->dlse, h, row);
            load_row(&c, &(tile){.h = h, .first = row}, 0);
            const double delta = c.lse[0] == (real)INFINITY ? -dlse : (double)c.delta[0];
            if (lse != -INFINITY) sum -= exp(sink - lse) * delta;
        }
    }
    b->dsink[h * b->dsink_stride] = (float)sum;
}
