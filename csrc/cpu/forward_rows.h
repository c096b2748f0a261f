/* forward_rows.h - from the caller's arrays to the panels and blocks of forward_kernel.h, which
 * includes it once per instance, and back.
 */
/* Where the arrays of a group lie. */
static void open_group(context *c, const fa_params *p, const fa_group *g) {
    const fa_what *what = &p->what;
    const fa_sequence sequence = g->sequence;
    const int64_t size = fa_dtype_size(what->dtype), b = g->b, h = g->h;
    const int64_t of_keys = p->pages.table ? 0 : b;
    const int64_t hk = h / (what->hq / what->hk), hv = h / (what->hq / what->hv);
    c->p = p;
    c->group = g;
    c->q = (const char *)what->q.data + element(&what->q, b, h, sequence.q) * size;
    c->k = (const char *)what->k.data + element(&what->k, of_keys, hk, sequence.k) * size;
    c->v = (const char *)what->v.data + element(&what->v, of_keys, hv, sequence.k) * size;
    c->out = (char *)what->out.data + element(&what->out, b, h, sequence.q) * size;
}

/* How they are read, and its scores made. */
static void open_scores(context *c) {
    const fa_params *p = c->p;
    const fa_what *what = &p->what;
    const fa_scores *scores = &p->scores;
    const int native = FA_PAIRS || (what->dtype == (DOUBLE ? FA_F64 : FA_F32));
    c->few = c->group->sequence.lengths.sq <= FEW && c->group->sequence.lengths.sk >= FEW_KEYS;
    c->seed = p->dropout.p > 0 ? fa_dropout_seed(&p->dropout) : 0;
    c->bias = NULL;
    c->gates = NULL, c->key_gate = 0, c->kept = NULL;
    c->mask = scores->mask.data;
    if (c->mask)
        c->mask += (c->group->b * scores->mask.stride[0] + c->group->h * scores->mask.stride[1]) *
                   fa_dtype_size(scores->mask_dtype);
    c->unit_k = native && (what->k.stride[3] == 1 || what->d == 1) && what->d % STEP == 0 &&
                what->k.stride[2] % STEP == 0;
    c->unit_v = native && (what->v.stride[3] == 1 || what->dv == 1) && !FA_PAIRS;
    if (c->few) { /* which reads whole vectors */
        c->unit_k = c->unit_k && what->d % (LANES * STEP) == 0;
        c->unit_v = c->unit_v && what->dv % LANES == 0;
    }
    c->zip_v = FA_PAIRS && c->few && what->v.stride[3] == 1 && what->dv % LANES == 0;
    c->units = (what->d + STEP - 1) / STEP;
    /* A scale that makes 0 of all scores is left to change(), too; one that leaves only the
     * greatest brings none to infinity. */
    const double greatest = DOUBLE ? 1e300 : 1e30;
    const double size_of_scale =
        fabs(what->scale) < greatest ? fabs(what->scale) : greatest; /* no call of fmin() */
    c->changed = scores->softcap > 0 || scores->alibi_slopes ||
                 (c->mask && scores->mask_dtype != FA_BOOL) || !(size_of_scale > 1e-30);
    c->scale = (real)copysign(size_of_scale, what->scale);
    c->sign = !c->changed && what->scale < 0 ? -1 : 1;
    c->nats = c->changed ? 1 : c->scale * c->sign;
    c->score_base = base_of(c->changed ? FA_LOG2E : size_of_scale * FA_LOG2E);
    c->e_squared = base_of(2 * FA_LOG2E);
    if (scores->softcap > 0)
        c->softcap =
            (real)(DOUBLE ? scores->softcap : fmin(fmax(scores->softcap, FLT_MIN), FLT_MAX));
}

/* No key was met yet. */
static void clear_panel(const context *c, panel *p) {
    memset(p->o, 0,
           (size_t)whole(c->p->what.dv) * (p->few ? p->few : p->nv * LANES) * sizeof(real));
    for (int j = 0; j < p->nv; j++) {
        p->m[j] = splat(-(real)INFINITY);
        p->l[j] = (vec){0};
    }
}

/* Rows first .. first + count - 1 in lanes: Q transposed (but few), the interval of each. */
static void open_panel(const context *c, panel *p, int64_t first, int count) {
    const fa_what *what = &c->p->what;
    const fa_scores *scores = &c->p->scores;
    const fa_group *g = c->group;
    const int64_t *stride = scores->alibi_stride;
    const int64_t size = fa_dtype_size(what->dtype);
    const int64_t width = whole(c->units);
    p->count = count;
    p->nv = (count + LANES - 1) / LANES;
    fa_interval top = row_keys(g, first), bottom = row_keys(g, first + count - 1);
    p->any = (fa_interval){top.begin, bottom.end};
    p->all = (fa_interval){bottom.begin, top.end};
    p->few = c->few;
    while (c->few && p->few < count) p->few *= 2;
    clear_panel(c, p);
    for (int j = 0; j < p->nv; j++) {
        p->slope[j] = (vec){0};
        for (int i = 0; i < LANES; i++) {
            const int n = p->few ? i % p->few : j * LANES + i;
            const fa_row row = find_row(g, first + (n < count ? n : count - 1));
            real *to = p->few ? (real *)p->q + n * width : c->rows + i * width;
            p->row[j * LANES + i] = row;
            p->begin[j][i] = p->end[j][i] = p->position[j][i] = 0;
            if (n >= count) { /* of one panel such rows lie side by side */
                if (p->few || n == count)
                    memset(to, 0, (size_t)(width * (p->few ? 1 : LANES - i)) * sizeof(real));
                continue;
            }
            const fa_interval keys = fa_row_interval(g->sequence.lengths, row.row);
            p->begin[j][i] = keys.begin;
            p->end[j][i] = keys.end;
            p->position[j][i] = fa_row_position(g->sequence.lengths, row.row);
            if (scores->alibi_slopes)
                p->slope[j][i] =
                    scores->alibi_slopes[g->b * stride[0] + (g->h + row.head) * stride[1]];
            const char *from = c->q + row_offset(&what->q, row) * size;
            if (p->few) memset(to, 0, (size_t)width * sizeof(real));
            read_units(to, from, what->dtype, what->q.stride[3], what->d);
            if (c->sign != 1) multiply_units(to, c->sign, what->d);
        }
        for (int i = 0; i < c->units && !p->few; i += LANES)
            transpose((real *)(p->q + i * p->nv + j), p->nv * LANES, c->rows + i, width);
    }
}

/* Divides by the sums, the sink's term included, and writes out and lse. */
static void close_panel(const context *c, panel *p) {
    const fa_what *what = &c->p->what;
    const fa_scores *scores = &c->p->scores;
    const int64_t width = whole(what->dv);
    const int drops = c->p->dropout.p > 0;
    const real gain = drops ? (real)c->p->dropout.gain : 1;
    for (int j = 0; j < p->nv; j++) {
        vec m = p->m[j] * c->nats, l = p->l[j], weight = splat(1);
        const ivec empty = l == 0; /* the largest score gives 1, so 0 means that all are -inf */
        if (scores->sink) {
            vec sink;
            for (int i = 0; i < LANES; i++)
                sink[i] =
                    scores->sink[(c->group->h + p->row[j * LANES + i].head) * scores->sink_stride];
            vec top = max_(m, sink), finite = pick(top == -(real)INFINITY, (vec){0}, top);
            weight = power(base_of(FA_LOG2E), m - finite);
            l = l * weight +
                power(base_of(FA_LOG2E), pick(sink == finite, (vec){0}, sink - finite));
            m = top;
        }
        const ivec zero = empty | (ivec)(splat(gain) == 0); /* also of an infinite value */
        weight *= gain / l;
        for (int i = 0; i < what->dv; i++) {
            vec *o = p->o + i * p->nv + j;
            *o = pick(zero, (vec){0}, *o * weight);
        }
        for (int i = 0; i < what->dv; i += LANES)
            transpose(c->rows + i, width, (real *)(p->o + i * p->nv + j), p->nv * LANES);
        const vec lse = m + log2_(l) * (real)FA_LN2; /* where all are -inf: the sink, or -inf */
        for (int i = 0; i < LANES && j * LANES + i < p->count; i++) {
            const fa_row row = p->row[j * LANES + i];
            write_row(c->out + row_offset(&what->out, row) * fa_dtype_size(what->dtype),
                      what->dtype, what->out.stride[3], c->rows + i * width, what->dv);
            write_lse(what, c->group, row, lse[i]);
        }
    }
}

/* Where a key's row of K, or of V, lies. */
FA_FAST const char *key_row(const context *c, const char *from, const fa_tensor *t, int key) {
    return from + key_place(&c->p->pages, t, c->group->b, key) * fa_dtype_size(c->p->what.dtype);
}

/* Whether a block's rows lie a stride apart. */
static int is_one_piece(const fa_pages *pages, const block *keys) {
    return !pages->table || keys->begin / pages->size == (keys->end - 1) / pages->size;
}

/* Where small pages hold a key's row, which is asked for when the row that is KEYS before is read:
 * it comes from anywhere. */
FA_FAST const char *page_row(const context *c, const char *from, const fa_tensor *t, int key) {
    const int next = key + KEYS;
    if (next < c->group->sequence.lengths.sk && t->stride[3] == 1)
        fetch(key_row(c, from, t, next), t->shape[3] * fa_dtype_size(c->p->what.dtype));
    return key_row(c, from, t, key);
}

/* What comes after the rows of a block that are read, in the caller's K or V. */
static ahead look_ahead(const context *c, const block *keys, const char *from, const fa_tensor *t,
                        int is_packed) {
    const fa_lengths n = c->group->sequence.lengths;
    const int64_t size = fa_dtype_size(c->p->what.dtype);
    const int left = n.sk - keys->end, count = keys->end - keys->begin;
    const int fetches = t->stride[3] == 1 && is_one_piece(&c->p->pages, keys);
    if (left <= 0 && count <= AHEAD) return (ahead){0}; /* all are read at once */
    return (ahead){.rows = key_row(c, from, t, keys->begin),
                   .next = key_row(c, from, t, left > 0 ? keys->end : keys->begin),
                   .stride = t->stride[2] * size,
                   .bytes = fetches ? t->shape[3] * size : 0,
                   .count = count,
                   .more = left < KEYS ? left : KEYS,
                   .by = is_packed ? count : AHEAD};
}

/* Points a block at its K and V, packed where they cannot be read in place. Values that no row sees
 * (keys below `visible`, or not `seen`) become 0: their probability is 0, and 0 * NaN is not. */
static void load_block(const context *c, block *keys, int visible, const uint8_t *seen) {
    const fa_what *what = &c->p->what;
    const int64_t size = fa_dtype_size(what->dtype);
    const int n = keys->end - keys->begin, dv = what->dv;
    const int whole_rows = is_one_piece(&c->p->pages, keys);
    const char *k = key_row(c, c->k, &what->k, keys->begin);
    const char *v = key_row(c, c->v, &what->v, keys->begin);
    const int packs_k = !c->unit_k || !whole_rows || (c->gates && c->key_gate);
    keys->k_ahead = look_ahead(c, keys, c->k, &what->k, packs_k);
    keys->k = (const unit *)k;
    keys->k_row = what->k.stride[2] / STEP;
    if (packs_k) {
        keys->k = (const unit *)c->k_packed;
        keys->k_row = whole(c->units);
        for (int i = 0; i < n; i++) {
            real *to = c->k_packed + i * keys->k_row;
            if (c->units < keys->k_row) memset(to + keys->k_row - LANES, 0, sizeof(vec));
            const char *x = whole_rows ? k + i * what->k.stride[2] * size
                                       : page_row(c, c->k, &what->k, keys->begin + i);
            read_units(to, x, what->dtype, what->k.stride[3], what->d);
            if (c->gates && c->key_gate)
                multiply_units(to, (real)c->gates[(keys->begin + i) / c->p->pages.size], what->d);
        }
    }
    const int hides = seen || (visible > keys->begin && (visible - keys->begin) % STEP);
    keys->zipped = c->zip_v && whole_rows && !hides && n % STEP == 0 ? what->v.stride[2] : 0;
    const int packs_v = !keys->zipped && (!c->unit_v || seen || !whole_rows || c->gates);
    keys->v_ahead = look_ahead(c, keys, c->v, &what->v, packs_v);
    keys->v = (const unit *)v;
    keys->v_row = what->v.stride[2];
    if (packs_v) {
        keys->v = (const unit *)c->v_packed;
        keys->v_row = whole(dv);
        for (int i = 0; i < n; i += STEP) {
            const char *x = v + i * what->v.stride[2] * size, *y = x + what->v.stride[2] * size;
            if (!whole_rows) {
                x = page_row(c, c->v, &what->v, keys->begin + i);
                y = STEP == 2 && i + 1 < n ? page_row(c, c->v, &what->v, keys->begin + i + 1)
                                           : NULL;
            }
            if (keys->begin + i < visible || (seen && !seen[i])) x = NULL;
            if (i + 1 == n || (seen && !seen[i + 1])) y = NULL;
            real *to = c->v_packed + i / STEP * keys->v_row;
            if (dv < keys->v_row) memset(to + keys->v_row - LANES, 0, sizeof(vec));
            read_step(to, x, y, what->dtype, what->v.stride[3], dv);
            if (c->gates && x)
                multiply_units(to, (real)c->gates[(keys->begin + i) / c->p->pages.size], dv);
        }
    }
}

/* Their output is the key's value, and their lse the score. */
static void one_key(const context *c, int64_t first, int count, void *memory) {
    const fa_what *what = &c->p->what;
    const int64_t size = fa_dtype_size(what->dtype), start = c->group->sequence.lengths.k_start;
    const int width = whole(what->d), packed = what->v.stride[3] == 1 && what->out.stride[3] == 1;
    const char *k = key_row(c, c->k, &what->k, (int)start);
    const char *v = key_row(c, c->v, &what->v, (int)start);
    real *key = memory, *row = key + width; /* scratch has LANES of them */
    if (width) {                            /* what is behind the last columns */
        memset(row - LANES, 0, LANES * sizeof(real));
        memset(row + width - LANES, 0, LANES * sizeof(real));
    }
    read_row(key, k, what->dtype, what->k.stride[3], what->d);
    for (int64_t at = first; at < first + count; at++) {
        const fa_row to = find_row(c->group, at);
        const char *q = c->q + row_offset(&what->q, to) * size;
        char *out = c->out + row_offset(&what->out, to) * size;
        vec sum = {0};
        read_row(row, q, what->dtype, what->q.stride[3], what->d);
        for (int j = 0; j < width; j += LANES) {
            vec x, y;
            memcpy(&x, row + j, sizeof x);
            memcpy(&y, key + j, sizeof y);
            sum = fma_(x, y, sum);
        }
        real s = 0;
        for (int j = 0; j < LANES; j++) s += sum[j];
        s *= (real)what->scale;
        const real nothing = s == -(real)INFINITY ? 0 : s - s; /* 0, or NaN */
        if (nothing != 0 || s == -(real)INFINITY)
            for (int j = 0; j < what->dv; j++)
                write_row(out + j * what->out.stride[3] * size, what->dtype, 1, &nothing, 1);
        else if (packed)
            memcpy(out, v, (size_t)(what->dv * size));
        else
            for (int64_t j = 0; j < what->dv; j++)
                memcpy(out + j * what->out.stride[3] * size, v + j * what->v.stride[3] * size,
                       (size_t)size);
        write_lse(what, c->group, to, s + nothing);
    }
}
