/* forward_runs.h - a run: rows of one group, and the keys that they see, split by split.
 * forward_kernel.h includes it once per instance.
 *
 * A state is m, l and O of every panel of a run, over the keys of one or more splits. Each split
 * starts from nothing; their states are added in order, by whichever threads they were computed.
 */
static size_t state_bytes(const fa_params *p, int rows) {
    const size_t vectors = (size_t)(rows + FEW - 1) / FEW * (size_t)(p->what.dv + 2);
    return (vectors * sizeof(vec) + 63) / 64 * 64;
}

/* Room for `rows` rows of any sequence, and for what their keys up to a split's end gave. */
static size_t scratch_bytes(const fa_params *p, int rows) {
    context many = {.few = 0}, few = {.few = 1};
    const size_t a = lay_out(&many, NULL, &p->what, p->scores.mask.data != NULL, rows);
    if (p->what.sk < FEW_KEYS) return a;
    const size_t b = lay_out(&few, NULL, &p->what, p->scores.mask.data != NULL, rows);
    return (a > b ? a : b) + state_bytes(p, rows);
}

/* Adds what the panels hold to a state; `first`: that becomes the state. */
static void fold(const context *c, real *state, int first) {
    const int dv = c->p->what.dv;
    vec *to = (vec *)state;
    for (int i = 0; i < c->count; i++) {
        const panel *p = &c->panels[i];
        vec *m = to, *l = m + p->nv, *o = l + p->nv;
        for (int j = 0; j < p->nv; j++) {
            const vec old = first ? splat(-(real)INFINITY) : m[j], top = max_(p->m[j], old);
            const vec zero = pick(top == -(real)INFINITY, (vec){0}, top);
            const vec a = power(c->score_base, old - zero);
            const vec b = power(c->score_base, p->m[j] - zero);
            m[j] = top;
            l[j] = first ? p->l[j] : fma_(l[j], a, p->l[j] * b);
            for (int n = j; n < dv * p->nv; n += p->nv)
                o[n] = first ? p->o[n] : fma_(o[n], a, p->o[n] * b);
        }
        to = o + dv * p->nv;
    }
}

/* The panels hold a state. */
static void take(const context *c, const real *state) {
    const int dv = c->p->what.dv;
    const vec *from = (const vec *)state;
    for (int i = 0; i < c->count; i++) {
        panel *p = &c->panels[i];
        memcpy(p->m, from, p->nv * sizeof(vec));
        memcpy(p->l, from + p->nv, p->nv * sizeof(vec));
        memcpy(p->o, from + 2 * p->nv, (size_t)dv * p->nv * sizeof(vec));
        from += (dv + 2) * p->nv;
    }
}

/* Rows first .. first + count - 1 (at most 128, all within the sequence's length) of one group.
 * Returns the scratch that is left. */
static char *open_rows(context *c, const fa_params *p, const fa_group *g, int64_t first, int count,
                       char *memory) {
    open_group(c, p, g);
    open_scores(c);
    memory += lay_out(c, memory, &p->what, c->mask != NULL, count);
    const int size = c->few ? FEW : PANEL;
    for (int i = 0; i < c->count; i++)
        open_panel(c, &c->panels[i], first + i * size,
                   count - i * size < size ? count - i * size : size);
    return memory;
}

/* All panels meet a block of keys, of which those before `visible` are not seen. */
static void meet_block(context *c, const block *keys, int visible) {
    for (int i = 0; i < c->count; i++) {
        panel *rows = &c->panels[i];
        if (rows->few) {
            attend_few_rows(c, rows, keys, visible);
            continue;
        }
        int low = rows->any.begin > keys->begin ? rows->any.begin / STEP * STEP : keys->begin;
        int high = rows->any.end < keys->end ? rows->any.end : keys->end;
        if (low < high) attend_panel(c, rows, keys, low, high);
    }
}

/* These rows meet the keys of [from, to) that they see. Blocks start at multiples of KEYS, chains
 * of additions at multiples of CHAIN, wherever the rows' keys do: how rows are grouped, and so how
 * many threads there are and how many sequences, changes no bit. */
static void attend_keys(context *c, int64_t first, int count, int from, int to) {
    const int hides = c->mask && c->p->scores.mask_dtype == FA_BOOL;
    int begin = row_keys(c->group, first).begin, end = row_keys(c->group, first + count - 1).end;
    if (begin < from) begin = from;
    if (end > to) end = to;
    const int start = c->few ? begin / (LANES * STEP) * (LANES * STEP) : begin / STEP * STEP;
    for (int at = begin / KEYS * KEYS; at < end; at += KEYS) {
        block keys = {.begin = at > begin ? at : start, .end = at + KEYS < end ? at + KEYS : end};
        uint8_t seen[KEYS];
        const int n = keys.end - keys.begin;
        const int sees = hides ? see(c, first, count, &keys, seen) : n;
        if (sees == 0) continue;
        load_block(c, &keys, begin, sees < n ? seen : NULL);
        meet_block(c, &keys, begin);
    }
    for (int i = 0; i < c->count; i++)
        if (c->few) turn_few(c, &c->panels[i]);
}

static void run_rows(const fa_params *p, const fa_group *g, int64_t first, int count,
                     void *memory) {
    const fa_lengths lengths = g->sequence.lengths;
    context c;
    if (has_one_key(p, lengths)) {
        open_group(&c, p, g);
        one_key(&c, first, count, memory);
        return;
    }
    real *state = (real *)open_rows(&c, p, g, first, count, memory);
    const int keys = fa_split_keys(lengths);
    const fa_interval splits = find_splits(g, first, count);
    for (int split = splits.begin; split < splits.end; split++) {
        attend_keys(&c, first, count, split * keys, (split + 1) * keys);
        if (splits.end - splits.begin == 1) break;
        fold(&c, state, split == splits.begin);
        if (split + 1 < splits.end)
            for (int i = 0; i < c.count; i++) clear_panel(&c, &c.panels[i]);
        else
            take(&c, state);
    }
    for (int i = 0; i < c.count; i++) close_panel(&c, &c.panels[i]);
}

/* The state of one split, which some of the rows see. */
static void run_split(const fa_params *p, const fa_group *g, int64_t first, int count, int split,
                      void *memory, void *state) {
    const int keys = fa_split_keys(g->sequence.lengths);
    context c;
    open_rows(&c, p, g, first, count, memory);
    attend_keys(&c, first, count, split * keys, (split + 1) * keys);
    fold(&c, state, 1);
}

/* Output and lse, of the splits begin .. end - 1, whose states lie `bytes` apart. */
static void join_splits(const fa_params *p, const fa_group *g, int64_t first, int count, int begin,
                        int end, void *memory, void *states, size_t bytes) {
    context c;
    open_rows(&c, p, g, first, count, memory);
    for (int split = begin + 1; split < end; split++) {
        take(&c, (real *)((char *)states + split * bytes));
        fold(&c, (real *)((char *)states + begin * bytes), 0);
    }
    take(&c, (real *)((char *)states + begin * bytes));
    for (int i = 0; i < c.count; i++) close_panel(&c, &c.panels[i]);
}
