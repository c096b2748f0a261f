/* forward_attend.h - a panel meets the keys of a block: scores, probabilities, and the sums of
 * values; forward_kernel.h includes it once per instance.
 */
/* S^T of the keys [begin, begin + n) of a block, and the maxima. */
FA_FAST void score_keys(const context *c, const panel *p, const block *keys, int begin, int n,
                        int nv, vec *top) {
    const int height = HEIGHT(nv), first = begin - keys->begin;
    const int64_t asks = keys->k_ahead.bytes | keys->v_ahead.bytes, row = keys->k_row;
    const unit *k = keys->k + first * row;
    vec *s = c->s;
    for (int j = 0; j < nv; j++) top[j] = splat(-(real)INFINITY);
    for (int i = 0; i < n;) {
        if (n >= height) { /* at the end some of the last keys once more */
            if (i > n - height) i = n - height;
            if (nv <= 2 && asks) /* of more vectors memory is not the limit */
                for (int j = i; j < i + height; j++) fetch_both(keys, first + j);
            score(s + i * nv, top, height, nv, p->q, k + i * row, row, c->units);
            i += height;
        } else if (height > 4 && n >= 4) { /* one key after the other waits for each sum */
            if (i > n - 4) i = n - 4;
            score(s + i * nv, top, 4, nv, p->q, k + i * row, row, c->units);
            i += 4;
        } else {
            score(s + i * nv, top, 1, nv, p->q, k + i * row, row, c->units);
            i++;
        }
    }
}

/* One panel meets the keys [begin, end) of one block. */
FA_FAST void attend(const context *c, panel *p, const block *keys, int begin, int end, int nv) {
    const int n = end - begin, height = HEIGHT(nv);
    vec *s = c->s, top[NV], alpha[NV];
    score_keys(c, p, keys, begin, n, nv, top);
    if (c->changed || c->bias || begin < p->all.begin || end > p->all.end) {
        if (c->bias) read_bias(c, p, begin, n);
        change(c, p, s, top, begin, n, nv);
    }

    for (int j = 0; j < nv; j++) {
        const vec top_j = max_(top[j], p->m[j]);
        const vec m = pick(top_j == -(real)INFINITY, (vec){0}, top_j); /* 2^(-inf - 0) is 0 */
        vec l = {0};
        alpha[j] = power(c->score_base, p->m[j] - m);
        for (int chain = 0, stop; chain < n; chain = stop) {
            stop = chain + CHAIN - (begin + chain) % CHAIN; /* the same for every panel */
            if (stop > n) stop = n;
            vec sum = {0};
            for (int i = chain; i < stop; i += STEP) {
                vec x = power(c->score_base, s[i * nv + j] - m);
                sum += x;
                vec y = {0};
                if (FA_PAIRS && i + 1 < n) sum += y = power(c->score_base, s[(i + 1) * nv + j] - m);
                s[i / STEP * nv + j] = pair(x, y);
            }
            l += sum;
        }
        p->l[j] = fma_(p->l[j], alpha[j], l);
        p->m[j] = top_j;
    }
    if (c->p->dropout.p > 0) drop(c, p, s, begin, n, nv);

    const unit *v = keys->v + (begin - keys->begin) / STEP * keys->v_row;
    const int steps = (n + STEP - 1) / STEP, dv = c->p->what.dv;
    for (int i = 0; i < dv;) {
        if (dv - i >= height) {
            collect(p->o + i * nv, alpha, height, nv, s, v + i, keys->v_row, steps);
            i += height;
        } else {
            collect(p->o + i * nv, alpha, 1, nv, s, v + i, keys->v_row, steps);
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
