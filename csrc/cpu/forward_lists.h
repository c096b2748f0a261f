/* forward_lists.h - rows that meet the keys of a list, pass by pass (lists.h), gathered as pages
 * are. forward_kernel.h includes it once per instance.
 *
 * A gate multiplies values as they are packed, and with key_gate keys: a product of float32 and
 * wider numbers. With pairs of bfloat16 there is none.
 */
/* What the rows of a panel see of a pass, in columns. */
static void open_pass(panel *p, const fa_listed *l, const fa_pass *pass) {
    fa_interval keys = {0, 0};
    int before = -1; /* neighbouring lanes may be heads of one row */
    for (int j = 0; j < p->nv; j++)
        for (int i = 0; i < LANES; i++) {
            const int n = p->few ? i % p->few : j * LANES + i, row = p->row[j * LANES + i].row;
            if (row != before) keys = fa_pass_columns(l, pass, before = row);
            p->begin[j][i] = n < p->count ? keys.begin : 0;
            p->end[j][i] = n < p->count ? keys.end : 0;
            if (!pass->kept) continue;
            p->position[j][i] = n < p->count ? row : -1;
            p->tau[j][i] = (real)fa_kept_tau(pass->kept, row);
        }
    const fa_interval top = fa_pass_columns(l, pass, p->row[0].row);
    const fa_interval bottom = fa_pass_columns(l, pass, p->row[p->count - 1].row);
    p->any = (fa_interval){top.begin, bottom.end};
    p->all = (fa_interval){bottom.begin, top.end};
}

/* The rows of all panels meet the columns of a pass. */
static void attend_pass(context *c, fa_params *p, fa_group *g, const fa_listed *l,
                        const fa_pass *pass) {
    for (int i = 0; i < c->count; i++) open_pass(&c->panels[i], l, pass);
    p->pages.table = pass->blocks;
    g->sequence.lengths.sk = pass->columns;
    c->gates = pass->gates, c->kept = pass->kept;
    const int begin = c->panels[0].any.begin, end = c->panels[c->count - 1].any.end;
    const int start = c->few ? begin / (LANES * STEP) * (LANES * STEP) : begin / STEP * STEP;
    for (int at = begin / KEYS * KEYS; at < end; at += KEYS) {
        block keys = {.begin = at > begin ? at : start, .end = at + KEYS < end ? at + KEYS : end};
        load_block(c, &keys, begin, NULL);
        meet_block(c, &keys, begin);
    }
}

/* Rows first .. first + count - 1 of a group, all of the block of queries that l has read. */
static void run_lists(const fa_params *p, const fa_group *g, fa_listed *l, int64_t first, int count,
                      void *memory) {
    fa_params params = *p;
    fa_group group = *g;
    fa_what *what = &params.what;
    const int size = l->lists->k_block;
    context c;
    fa_pass pass;
    open_group(&c, &params, &group);
    what->k.stride[0] = size * what->k.stride[2], what->v.stride[0] = size * what->v.stride[2];
    params.pages = (fa_pages){.stride = {0, 1}, .size = size, .count = FA_MAX_LENGTH};
    /* Of these rows, and as many columns as there may be, memory is laid out. */
    group.sequence.lengths.sq = count, group.sequence.lengths.sk = what->sk = FA_MAX_LENGTH;
    open_scores(&c);
    c.key_gate = l->lists->key_gate;
    if (l->kept) c.few = 0; /* rows have gates of their own */
    lay_out(&c, memory, what, 0, count);
    const int most = c.few ? FEW : PANEL;
    for (int i = 0; i < c.count; i++)
        open_panel(&c, &c.panels[i], first + i * most,
                   count - i * most < most ? count - i * most : most);
    for (l->step = 0; fa_next_pass(l, &pass);) attend_pass(&c, &params, &group, l, &pass);
    for (int i = 0; i < c.count; i++) {
        if (c.few) turn_few(&c, &c.panels[i]);
        close_panel(&c, &c.panels[i]);
    }
}
