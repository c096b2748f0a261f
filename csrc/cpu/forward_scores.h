/* forward_scores.h - what softcap, masks, ALiBi and dropout make of the scores of forward_kernel.h,
 * which includes it once per instance.
 */
/* c * tanh(x / c). A cap that is far from x leaves it as it is: tanh(y) is y (1 - y^2 / 3 ...). */
FA_FAST vec cap(const context *c, vec x) {
    const vec y = x / c->softcap;
    const ivec far = max_(y, -y) < (real)(DOUBLE ? 0x1p-28 : 0x1p-13);
    return pick(far, x, tanh_(c->e_squared, y) * c->softcap);
}

/* Everything that changes a vector of scores of rows of the panel's vector j, in the order of the
 * definition: `bias` is added, or what is not `seen` hidden. */
FA_FAST vec change_score(const context *c, const panel *p, int j, vec x, vec bias, ivec seen,
                         ivec key) {
    const fa_scores *scores = &c->p->scores;
    if (c->changed) {
        x *= c->scale;
        if (scores->softcap > 0) x = cap(c, x);
        if (scores->mask.data && scores->mask_dtype != FA_BOOL) x += bias;
        if (scores->alibi_slopes) {
            vec distance = __builtin_convertvector(p->position[j] - key, vec);
            x -= max_(distance, -distance) * p->slope[j];
        }
    }
    if (scores->mask.data && scores->mask_dtype == FA_BOOL)
        x = pick(seen, x, splat(-(real)INFINITY));
    return x;
}

/* Changes the scores, and hides keys; the maxima anew. ends: of each vector, the keys that it
 * sees. */
FA_FAST void change(const context *c, const panel *p, vec *s, vec *top, int begin, int n, int nv,
                    const int *ends) {
    const int packed = c->p->scores.mask_dtype == FA_BOOL ? (int)sizeof(real) : 1;
    const int cuts = begin < p->all.begin || begin + n > p->all.end;
    const vec hidden = splat(-(real)INFINITY);
    for (int j = 0; j < nv; j++) {
        top[j] = hidden;
        for (int i = 0; i < ends[j]; i++) {
            const FA_INT key = begin + i;
            const vec bias = c->bias ? c->bias[i / packed * nv + j] : (vec){0};
            const ivec byte = (ivec)bias & (FA_INT)(0xffull << 8 * (i % packed));
            vec x = change_score(c, p, j, s[i * nv + j], bias, byte != 0, key - (ivec){0});
            if (cuts) x = pick((p->begin[j] <= key) & (p->end[j] > key), x, hidden);
            s[i * nv + j] = x;
            top[j] = max_(x, top[j]);
        }
    }
}

/* The mask's block as S^T lies, [key][row]. Of a bool mask as many keys as a lane has bytes lie in
 * one vector. */
static void read_bias(const context *c, const panel *p, int begin, int n) {
    const fa_scores *scores = &c->p->scores;
    const fa_tensor *mask = &scores->mask;
    const int packed = scores->mask_dtype == FA_BOOL ? (int)sizeof(real) : 1;
    const int64_t size = fa_dtype_size(scores->mask_dtype), stride = mask->stride[3];
    for (int j = 0; j < p->nv; j++) {
        for (int i = 0; i < LANES; i++) {
            real *to = c->rows + i * (KEYS / packed);
            const char *from =
                c->mask + (row_offset(mask, p->row[j * LANES + i]) + begin * stride) * size;
            /* The next block's part of the row: rows lie too far apart for the hardware to see it
             * coming. */
            for (int64_t line = KEYS * size; line < 2 * KEYS * size; line += 64)
                __builtin_prefetch(from + line + 63);
            if (packed == 1)
                read_row(to, from, scores->mask_dtype, stride, n);
            else if (stride == 1)
                memcpy(to, from, (size_t)n);
            else
                for (int k = 0; k < n; k++) ((char *)to)[k] = from[k * stride];
        }
        for (int i = 0; i < n; i += LANES * packed)
            transpose((real *)(c->bias + i / packed * p->nv + j), p->nv * LANES,
                      c->rows + i / packed, KEYS / packed);
    }
}

/* Dropout: zeros among the probabilities of n keys. Of a pair of bfloat16 each half is as wide as
 * the random bits that it meets, and in the same order. */
static __attribute__((noinline)) void drop(const context *c, const panel *p, vec *s, int begin,
                                           int n, int nv) {
    const FA_INT threshold = (FA_INT)c->p->dropout.threshold;
    const int32_t b = (int32_t)(c->p->dropout.first_b + c->group->b), h = (int32_t)c->group->h;
    for (int j = 0; j < nv; j++) {
        int32_t head[LANES], row[LANES];
        for (int i = 0; i < LANES; i++) {
            head[i] = h + p->row[j * LANES + i].head;
            row[i] = p->row[j * LANES + i].row;
        }
        for (int at = begin / 8 * 8; at < begin + n; at += 8) {
            FA_INT words[4][LANES];
            for (int i = 0; i < LANES; i++) {
                fa_random bits = fa_dropout_bits(c->seed, b, head[i], row[i], at / 8);
                for (int w = 0; w < 4; w++) words[w][i] = (FA_INT)bits.word[w];
            }
            for (int w = 0; w < 4; w++) {
                ivec both;
                memcpy(&both, words[w], sizeof both);
                const ivec keeps[2] = {(both & 0xffff) >= threshold,
                                       (both >> 16 & 0xffff) >= threshold};
                const int key = at + 2 * w - begin;
                if (FA_PAIRS) {
                    vec *x = &s[key / 2 * nv + j]; /* begin is even */
                    if (key >= 0 && key < n)
                        *x = (vec)((ivec)*x & ((keeps[0] & 0xffff) | keeps[1] << 16));
                } else {
                    for (int e = 0; e < 2; e++)
                        if (key + e >= 0 && key + e < n) {
                            vec *x = &s[(key + e) * nv + j];
                            *x = (vec)((ivec)*x & keeps[e]);
                        }
                }
            }
        }
    }
}

/* Which keys of a block some row sees through the bool mask; returns how many. The rows' intervals
 * count too: a key that every row has hidden, by the one or by the other, is not read as a value.
 */
static int see(const context *c, int64_t first, int count, const block *keys, uint8_t *seen) {
    const fa_tensor *mask = &c->p->scores.mask;
    const int64_t stride = mask->stride[3];
    int n = 0;
    memset(seen, 0, KEYS);
    for (int64_t row = first; row < first + count; row++) {
        fa_interval of = row_keys(c->group, row);
        int begin = of.begin > keys->begin ? of.begin : keys->begin;
        int end = of.end < keys->end ? of.end : keys->end;
        const uint8_t *restrict from =
            (const uint8_t *)c->mask + row_offset(mask, find_row(c->group, row)) + begin * stride;
        uint8_t *restrict to = seen + (begin - keys->begin);
        if (stride == 1 && end - begin == KEYS)
            for (int i = 0; i < KEYS; i++) to[i] |= from[i];
        else
            for (int i = 0; i < end - begin; i++) to[i] |= from[i * stride];
        if ((row - first) % 16 != 15 && row + 1 < first + count) continue;
        n = 0;
        for (int i = 0; i < KEYS; i++) n += seen[i] != 0;
        if (n == keys->end - keys->begin) break; /* mostly after a few rows */
    }
    return n;
}
