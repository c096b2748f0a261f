/* backward_kept.h - the gates of keys that SparseK keeps, each row by its own tau, and their
 * gradients; included by backward_kernel.h once per instance, but not with pairs.
 */
/* Of a tile's columns and its rows. */
typedef struct kept_tile {
    vec z[FA_KEYS / LANES];                            /* scores of the columns */
    ivec begin[FA_KEYS / LANES], end[FA_KEYS / LANES]; /* rows that keep them */
    vec sums[FA_KEYS / LANES]; /* of the gradients of gates that are neither 0 nor 1 */
    real tau[FA_ROWS];
    int row[FA_ROWS];
} kept_tile;

/* The columns from c->begin on. */
static void open_kept_columns(const backward *c, const fa_kept *kept, kept_tile *t) {
    for (int i = 0; i < whole(c->end - c->begin); i++) {
        const int j = i / LANES, lane = i % LANES, at = c->begin + i, is_one = at < c->end;
        t->z[j][lane] = is_one ? (real)kept->z[at] : 0;
        t->begin[j][lane] = is_one ? kept->begin[at] : 0;
        t->end[j][lane] = is_one ? kept->end[at] : 0;
        t->sums[j] = (vec){0};
    }
}

/* How many columns a row keeps, 2 for more. */
static int count_kept(const fa_kept *kept, int row) {
    int n = 0;
    for (int32_t i = 0; i < kept->count && n < 2; i++)
        n += row >= kept->begin[i] && row < kept->end[i];
    return n;
}

/* The only column that a row keeps; none: an empty interval. */
static fa_interval only_column(const fa_kept *kept, int row) {
    for (int32_t i = 0; i < kept->count; i++)
        if (row >= kept->begin[i] && row < kept->end[i]) return (fa_interval){i, i + 1};
    return (fa_interval){0, 0};
}

/* S and dP of row i in a panel, whose first vector of columns is `first`, -> P and dS, times the
 * gates as the products take them. */
static void weigh_kept(const backward *c, const fa_list_task *task, kept_tile *k, const tile *r,
                       int i, fa_interval keys, int first, vec *s, vec *t, int width) {
    const vec tau = splat(k->tau[i]), one = splat(1), zero = {0};
    const int n = width / LANES, key = c->begin + first * LANES, several = c->several[i];
    const int key_gate = task->listed->lists->key_gate;
    vec gate[NV], dp[NV], product[NV], sum = {0};
    ivec at = {0};
    for (int j = 0; j < LANES; j++) at[j] = key + j;
    for (int j = 0; j < n; j++) {
        const vec z = k->z[first + j];
        gate[j] =
            pick(z == (real)INFINITY, pick(tau == tau, one, tau), min_(one, max_(zero, z - tau)));
        dp[j] = t[j], product[j] = s[j];
        t[j] = gate[j] * dp[j];
        if (key_gate) s[j] = gate[j] * product[j];
    }
    if (c->changed)
        change(c, r, i, keys, key, (real *)s, (real *)t, width, 0);
    else
        weigh(c, s, t, n, i, keys, at, !several || is_coarse(c, i));
    for (int j = 0; j < n; j++) {
        const FA_INT row = k->row[i];
        const ivec seen = (k->begin[first + j] <= row) & (k->end[first + j] > row);
        const vec p = pick(seen, s[j], zero), ds = pick(seen, t[j], zero);
        vec dg = p * dp[j];
        if (key_gate) dg = fma_(ds, product[j], dg);
        dg = pick(seen & (gate[j] > 0) & (gate[j] < 1), dg, zero);
        k->sums[first + j] += dg, sum += dg;
        s[j] = pick(seen, p * gate[j], zero);
        t[j] = key_gate ? pick(seen, ds * gate[j], zero) : ds;
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++)
        if (1 << j < LANES) sum += across(sum, 1 << j);
    task->of_rows[k->row[i]] += sum[0];
}

/* What the columns' sums are added to. */
static void add_kept_columns(const backward *c, const fa_list_task *task, const kept_tile *t) {
    for (int i = 0; i < c->end - c->begin; i++)
        task->of_keys[task->listed->kept->keys[c->begin + i]] += t->sums[i / LANES][i % LANES];
}
