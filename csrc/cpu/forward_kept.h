/* forward_kept.h - the gates of keys that SparseK keeps, each row by its own tau; forward_kernel.h
 * includes it once per instance. A panel's `position` is then its rows' numbers.
 */
/* Of column `key` in the rows of the panel's vector j. A score of +inf has a gate of 1, or NaN. */
FA_FAST vec gate_at(const context *c, const panel *p, int j, int key) {
    const real z = (real)c->kept->z[key];
    const vec tau = p->tau[j];
    if (z == (real)INFINITY) return pick(tau == tau, splat(1), tau);
    return min_(splat(1), max_(splat(0), z - tau));
}

/* Which of these rows keep it. */
FA_FAST ivec keeps(const context *c, const panel *p, int j, int key) {
    const FA_INT from = c->kept->begin[key], to = c->kept->end[key];
    return (p->position[j] >= from) & (p->position[j] < to);
}

/* Hides keys from the rows that do not keep them, and changes the scores; the maxima anew. */
static __attribute__((noinline)) void gate_scores(const context *c, const panel *p, vec *s,
                                                  vec *top, int begin, int n, int nv) {
    const vec hidden = splat(-(real)INFINITY);
    for (int j = 0; j < nv; j++) top[j] = hidden;
    for (int i = 0; i < n; i++)
        for (int j = 0; j < nv; j++) {
            vec x = s[i * nv + j];
            if (c->key_gate) x *= gate_at(c, p, j, begin + i);
            if (c->changed) x = change_score(c, p, j, x, (vec){0}, (ivec){0}, (ivec){0});
            x = pick(keeps(c, p, j, begin + i), x, hidden);
            s[i * nv + j] = x;
            top[j] = max_(x, top[j]);
        }
}

/* Multiplies the probabilities by the gates. */
static __attribute__((noinline)) void gate_weights(const context *c, const panel *p, vec *s,
                                                   int begin, int n, int nv) {
    for (int i = 0; i < n; i++)
        for (int j = 0; j < nv; j++) {
            const vec x = s[i * nv + j] * gate_at(c, p, j, begin + i);
            s[i * nv + j] = pick(keeps(c, p, j, begin + i), x, (vec){0});
        }
}
