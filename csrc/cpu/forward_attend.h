/* forward_attend.h - a panel meets the keys of a block: scores, probabilities, and the sums of
 * values; forward_kernel.h includes it once per instance.
 */
/* Of a panel whose rows see less the earlier they are, along a diagonal: how many of a block's n
 * keys the rows of each vector see, in all. */
FA_FAST void find_ends(const panel *p, int begin, int n, int nv, int *ends) {
    for (int j = 0; j < nv; j++) {
        const int left = p->count - j * LANES, last = left < LANES ? left - 1 : LANES - 1;
        const int seen = (int)p->end[j][last] - begin;
        ends[j] = seen < 0 ? 0 : seen < n ? seen : n;
    }
}

/* S^T of some keys from key i on, for the vectors from `from` on; returns the next key. */
FA_FAST int score_some(const context *c, const panel *p, const block *keys, int first, int i, int n,
                       int from, int nv, vec *top) {
    const int64_t asks = keys->k_ahead.bytes | keys->v_ahead.bytes, row = keys->k_row;
    const unit *k = keys->k + first * row;
    const int height = HEIGHT(nv - from);
    vec *s = c->s;
    if (n >= height) { /* at the end some of the last keys once more */
        if (i > n - height) i = n - height;
        if (nv <= 2 && asks) /* of more vectors memory is not the limit */
            for (int j = i; j < i + height; j++) fetch_both(keys, first + j);
        score(s + i * nv, top, height, from, nv, p->q, k + i * row, row, c->units);
        return i + height;
    }
    if (height > 4 && n >= 4) { /* one key after the other waits for each sum */
        if (i > n - 4) i = n - 4;
        score(s + i * nv, top, 4, from, nv, p->q, k + i * row, row, c->units);
        return i + 4;
    }
    score(s + i * nv, top, 1, from, nv, p->q, k + i * row, row, c->units);
    return i + 1;
}

/* S^T of the keys [begin, begin + n) of a block, and the maxima. What a vector's rows do not see is
 * mostly left out, and any number. */
FA_FAST void score_keys(const context *c, const panel *p, const block *keys, int begin, int n,
                        int nv, const int *ends, vec *top) {
    const int first = begin - keys->begin;
    for (int j = 0; j < nv; j++) top[j] = splat(-(real)INFINITY);
    for (int i = 0, from = 0; i < n;) {
        while (from < nv - 1 && ends[from] <= i) from++;
        if (nv == 1 || from == 0)
            i = score_some(c, p, keys, first, i, n, 0, nv, top);
        else if (nv == 2 || from == 1)
            i = score_some(c, p, keys, first, i, n, 1, nv, top);
        else if (nv == 3 || from == 2)
            i = score_some(c, p, keys, first, i, n, 2, nv, top);
        else
            i = score_some(c, p, keys, first, i, n, 3, nv, top);
    }
}

/* One panel meets the keys [begin, end) of one block. */
FA_FAST void attend(const context *c, panel *p, const block *keys, int begin, int end, int nv) {
    const int n = end - begin, height = HEIGHT(nv);
    int ends[NV];
    vec *s = c->s, top[NV], alpha[NV];
    find_ends(p, begin, n, nv, ends);
    score_keys(c, p, keys, begin, n, nv, ends, top);
    if (c->kept) {
        gate_scores(c, p, s, top, begin, n, nv);
    } else if (c->changed || c->bias || begin < p->all.begin || end > p->all.end) {
        if (c->bias) read_bias(c, p, begin, n);
        change(c, p, s, top, begin, n, nv, ends);
    }

    for (int j = 0; j < nv; j++) {
        const vec top_j = max_(top[j], p->m[j]);
        const vec m = pick(top_j == -(real)INFINITY, (vec){0}, top_j); /* 2^(-inf - 0) is 0 */
        vec l = {0};
        alpha[j] = power(c->score_base, p->m[j] - m);
        for (int chain = 0, stop; chain < ends[j]; chain = stop) {
            stop = chain + CHAIN - (begin + chain) % CHAIN; /* the same for every panel */
            if (stop > ends[j]) stop = ends[j];
            vec sum = {0};
            for (int i = chain; i < stop; i += STEP) {
                vec x = power(c->score_base, s[i * nv + j] - m);
                sum += x;
                vec y = {0};
                if (FA_PAIRS && i + 1 < stop)
                    sum += y = power(c->score_base, s[(i + 1) * nv + j] - m);
                s[i / STEP * nv + j] = pair(x, y);
            }
            l += sum;
        }
        p->l[j] = fma_(p->l[j], alpha[j], l);
        p->m[j] = top_j;
    }
    if (c->p->dropout.p > 0) drop(c, p, s, begin, n, nv);
    if (c->kept) gate_weights(c, p, s, begin, n, nv);

    const unit *v = keys->v + (begin - keys->begin) / STEP * keys->v_row;
    const int dv = c->p->what.dv;
    for (int j = 0; j < nv; j++) ends[j] = (ends[j] + STEP - 1) / STEP;
    for (int i = 0; i < dv;) {
        if (dv - i >= height) {
            collect(p->o + i * nv, alpha, height, nv, s, v + i, keys->v_row, ends);
            i += height;
        } else {
            collect(p->o + i * nv, alpha, 1, nv, s, v + i, keys->v_row, ends);
            i++;
        }
    }
}

/* The same with the number of vectors known to the compiler. */
static __attribute__((noinline)) void attend_panel(const context *c, panel *p, const block *keys,
                                                   int begin, int end) {
    switch (p->nv) {
        case 1:
            attend(c, p, keys, begin, end, 1);
            break;
        case 2:
            attend(c, p, keys, begin, end, 2);
            break;
        case 3:
            attend(c, p, keys, begin, end, 3);
            break;
#if FA_VECTORS == 4
        case 4:
            attend(c, p, keys, begin, end, 4);
            break;
#endif
    }
}
