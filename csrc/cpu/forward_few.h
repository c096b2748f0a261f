/* forward_few.h - few rows of a head, and many keys: a panel whose vectors do not hold rows alone.
 * forward_kernel.h includes it once per instance.
 *
 * With R rows (a power of two, LANES / 2 at most) a panel holds
 *
 *     Q [R][d]      S^T [key][R]      O [R][dv]
 *
 * so that a lane is a unit of d in the first product, a key of one row in the softmax, a column of
 * V in the second, and none is idle. A group of keys is what one vector holds, or with FA_PAIRS
 * two: the even keys, then the odd ones. In sums each row meets each key in the same order,
 * whatever R is: which rows share a panel changes no bit.
 */
/* Lane i of the result: the sum over the lanes of a[i]. */
FA_FAST vec sum_lanes(vec *a) {
    ivec low, high;
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
        low[i] = i / 2 + i % 2 * LANES;
        high[i] = low[i] + LANES / 2;
    }
#pragma GCC unroll 4
    for (int half = LANES / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < half; i++)
            a[i] = __builtin_shuffle(a[i], a[i + half], low) +
                   __builtin_shuffle(a[i], a[i + half], high);
    }
    return a[0];
}

/* How far one key's lanes of S^T are from the first of its vector, in keys. */
FA_FAST ivec keys_of_lanes(int R) {
    ivec keys;
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) keys[i] = i / R * STEP;
    return keys;
}

/* The cache lines of a row of memory that is read soon. */
FA_FAST void fetch(const char *row, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at, 0, 2);
}

/* The row to ask for when row `at` of a block is read. */
FA_FAST void fetch_row(const ahead *a, int at) {
    const int here = at + a->by, next = here - a->count;
    if (next < a->more)
        fetch(next < 0 ? a->rows + here * a->stride : a->next + next * a->stride, a->bytes);
}

FA_FAST void fetch_both(const block *keys, int at) {
    fetch_row(&keys->k_ahead, at);
    fetch_row(&keys->v_ahead, at);
}

/* One vector of S^T: `key` is its first, n the keys of the block. */
FA_FAST vec score_few(const context *c, const panel *p, const block *keys, int key, int n, int R) {
    const int width = whole(c->units) / LANES;
    vec sums[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES / R; i++) {
        const int at =
            key + i * STEP < n ? key + i * STEP : n - 1; /* what is past them is hidden */
        const unit *k = keys->k + at * keys->k_row;
        fetch_row(&keys->k_ahead, at);
        vec acc[LANES];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) acc[r] = (vec){0};
        for (int u = 0; u < width; u++) {
            vec x;
            memcpy(&x, k + u * LANES, sizeof x);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) acc[r] = dot(p->q[r * width + u], x, acc[r]);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) sums[i * R + r] = acc[r];
    }
    return sum_lanes(sums);
}

/* The mask's block as S^T lies; of a bool mask 1 or 0. */
static void read_bias_few(const context *c, const panel *p, int begin, int n, int R) {
    const fa_tensor *mask = &c->p->scores.mask;
    const fa_dtype type = c->p->scores.mask_dtype;
    const int64_t size = fa_dtype_size(type), stride = mask->stride[3];
    real *to = (real *)c->bias;
    for (int r = 0; r < R; r++) {
        const char *from = c->mask + (row_offset(mask, p->row[r]) + begin * stride) * size;
        fetch(from + KEYS * stride * size, stride == 1 ? n * size : 0);
        read_row(c->rows, from, type, stride, n);
        for (int i = 0; i < n; i++) {
            const int group = i / (LANES / R * STEP), key = i % (LANES / R * STEP);
            to[(group * STEP + key % STEP) * LANES + key / STEP * R + r] = c->rows[i];
        }
    }
}

/* change() of such a panel. */
FA_FAST void change_few(const context *c, const panel *p, vec *s, vec *top, int begin, int vectors,
                        int R) {
    const ivec lanes = keys_of_lanes(R);
    *top = splat(-(real)INFINITY);
    for (int i = 0; i < vectors; i++) {
        const ivec key = lanes + (FA_INT)(begin + i / STEP * (LANES / R * STEP) + i % STEP);
        const vec bias = c->bias ? c->bias[i] : (vec){0};
        s[i] = change_score(c, p, 0, s[i], bias, bias != 0, key);
        s[i] = pick((p->begin[0] <= key) & (p->end[0] > key), s[i], splat(-(real)INFINITY));
        *top = max_(s[i], *top);
    }
}

/* Probabilities of the scores, and their sum in each lane of a row. As many sums as there are lanes
 * are made of each row, and added a power of two apart, the nearest first. */
FA_FAST vec weigh_few(const context *c, vec *s, vec m, int vectors, int R) {
    vec sums[LANES];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) sums[r] = (vec){0};
    for (int i = 0; i < vectors; i += R * STEP) {
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const int at = i + r * STEP;
            if (at >= vectors) break;
            const vec x = power(c->score_base, s[at] - m);
            vec y = {0};
            sums[r] += x;
            if (FA_PAIRS) sums[r] += y = power(c->score_base, s[at + STEP - 1] - m);
            s[at / STEP] = pair(x, y);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
        for (int distance = R; distance < LANES; distance *= 2)
            sums[r] += across(sums[r], distance);
    }
#pragma GCC unroll 4
    for (int apart = 1; apart < R; apart *= 2) {
#pragma GCC unroll 8
        for (int r = 0; r < R; r += 2 * apart) sums[r] += sums[r + apart];
    }
    return sums[0];
}

/* drop() of such a panel: element by element. */
static __attribute__((noinline)) void drop_few(const context *c, const panel *p, int begin, int n) {
    const uint32_t threshold = c->p->dropout.threshold;
    const int32_t b = (int32_t)(c->p->dropout.first_b + c->group->b), h = (int32_t)c->group->h;
    const size_t size = sizeof(real) / STEP;
    for (int r = 0; r < p->count; r++) {
        for (int at = begin / 8 * 8; at < begin + n; at += 8) {
            const fa_random bits =
                fa_dropout_bits(c->seed, b, h + p->row[r].head, p->row[r].row, at / 8);
            for (int i = 0; i < 8; i++) {
                const int key = at + i - begin;
                if (key < 0 || key >= n || (bits.word[i / 2] >> 16 * (i % 2) & 0xffff) >= threshold)
                    continue;
                const int64_t unit = (int64_t)(key / STEP) * p->few + r;
                memset((char *)c->s + (unit * STEP + key % STEP) * size, 0, size);
            }
        }
    }
}

/* O of `wide` vectors of columns: rescaled, and P V added. */
FA_FAST void collect_few(vec *o, int width, vec alpha, int wide, int R, const unit *p,
                         const block *keys, int column, int first, int steps) {
    vec acc[8 * LANES];
#pragma GCC unroll 32
    for (int i = 0; i < wide * R; i++) acc[i] = (vec){0};
    for (int step = first; step < steps; step++) {
        const unit *row = keys->v + step * keys->v_row + column * LANES;
        for (int i = 0; i < STEP && column == 0; i++) fetch_row(&keys->v_ahead, step * STEP + i);
        vec x[8];
        if (FA_PAIRS && keys->zipped)
            zip(x, keys->v, step, keys->zipped, column * LANES, wide);
        else
#pragma GCC unroll 8
            for (int j = 0; j < wide; j++) memcpy(&x[j], row + j * LANES, sizeof x[j]);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const vec y = (vec)(p[step * R + r] - (ivec){0});
#pragma GCC unroll 8
            for (int j = 0; j < wide; j++) acc[r * wide + j] = dot(y, x[j], acc[r * wide + j]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
        for (int j = 0; j < wide; j++)
            o[r * width + j] = fma_(o[r * width + j], splat(alpha[r]), acc[r * wide + j]);
    }
}

/* attend() of such a panel. Values before the key `visible` are not read. */
FA_FAST void attend_few(const context *c, panel *p, const block *keys, int visible, int R) {
    const int n = keys->end - keys->begin, group = LANES / R * STEP;
    const int vectors = (n + group - 1) / group * STEP;
    vec *s = c->s, top = splat(-(real)INFINITY);
    for (int i = 0; i < vectors; i++) {
        s[i] = score_few(c, p, keys, i / STEP * group + i % STEP, n, R);
        top = max_(s[i], top);
    }
    if (c->changed || c->bias || keys->begin < p->all.begin || keys->begin + n > p->all.end ||
        n % group) {
        if (c->bias) read_bias_few(c, p, keys->begin, n, R);
        change_few(c, p, s, &top, keys->begin, vectors, R);
    }
#pragma GCC unroll 4
    for (int distance = R; distance < LANES; distance *= 2) top = max_(top, across(top, distance));
    top = max_(top, p->m[0]);
    const vec m = pick(top == -(real)INFINITY, (vec){0}, top);
    const vec alpha = power(c->score_base, p->m[0] - m);
    const vec l = weigh_few(c, s, m, vectors, R);
    p->l[0] = fma_(p->l[0], alpha, l);
    p->m[0] = top;
    if (c->p->dropout.p > 0) drop_few(c, p, keys->begin, n);

    const int first = visible > keys->begin ? (visible - keys->begin) / STEP : 0;
    const int steps = (n + STEP - 1) / STEP, width = whole(c->p->what.dv) / LANES;
    const int most = FA_ACCUMULATORS / R < 8 ? FA_ACCUMULATORS / R : 8;
    const unit *weights = (const unit *)s;
    int i = 0;
#define COLUMNS(wide)                                    \
    for (; wide <= most && width - i >= wide; i += wide) \
    collect_few(p->o + i, width, alpha, wide, R, weights, keys, i, first, steps)
    COLUMNS(8);
    COLUMNS(4);
    COLUMNS(2);
    COLUMNS(1);
#undef COLUMNS
}

/* The same with the number of rows known to the compiler. */
static __attribute__((noinline)) void attend_few_rows(const context *c, panel *p, const block *keys,
                                                      int visible) {
    switch (p->few) {
        case 1:
            attend_few(c, p, keys, visible, 1);
            break;
        case 2:
            if (LANES >= 4) attend_few(c, p, keys, visible, 2);
            break;
        case 4:
            if (LANES >= 8) attend_few(c, p, keys, visible, 4);
            break;
        case 8:
            if (LANES >= 16) attend_few(c, p, keys, visible, 8);
            break;
    }
}

/* O and Q of few rows lie as rows do; what ends a run takes O^T. */
static void turn_few(const context *c, panel *p) {
    const int width = whole(c->p->what.dv);
    memcpy(c->rows, p->o, (size_t)p->few * width * sizeof(real));
    memset(c->rows + p->few * width, 0, (size_t)(LANES - p->few) * width * sizeof(real));
    for (int i = 0; i < width; i += LANES)
        transpose((real *)p->o + i * LANES, LANES, c->rows + i, width);
}
