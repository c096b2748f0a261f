/* backward_scores.h - from S and dP to P and dS, element by element; included by backward_kernel.h
 * once per instance.
 */
/* exp(x - lse), which is at most 1, though lse is rounded. Of a row that sees one key the weight is
 * 1: lse is not that exact where scores are great. (dead rows: 0) */
FA_FAST vec weight(const backward *c, vec x_less_lse, int i, int alone) {
    if (!alone) return power(c->e, min_(splat(0), x_less_lse));
    return splat(c->lse[i] == (real)INFINITY ? 0 : 1 + (c->lse[i] - c->lse[i]));
}

static int is_alone(const backward *c, int i, fa_interval keys) {
    return keys.end - keys.begin == 1 && !c->p->scores.sink && !(c->several && c->several[i]);
}

/* Whether scores are so great that an ulp of lse changes P by 1e-3. There the scaled score is
 * rounded as lse is: of a row's greatest nothing is then left but what lse has beyond it. */
FA_FAST int is_coarse(const backward *c, int i) {
    const real limit = DOUBLE ? 0x1p42 : 0x1p13;
    return c->lse[i] > limit || c->lse[i] < -limit;
}

/* S and dP of one row's vectors in a panel -> P and dS, where nothing changes the scores. As in the
 * forward the scaled score is not rounded: P is off by what lse is, the same factor for the whole
 * row, of which ds sums to 0 as it should. */
FA_FAST void weigh(const backward *c, vec *s, vec *t, int nv, int i, fa_interval keys, ivec key,
                   int cuts) {
    const vec lse = splat(c->lse[i]), delta = splat(c->delta[i]), scale = splat(c->scale);
    const int alone = cuts && is_alone(c, i, keys), coarse = cuts && is_coarse(c, i);
#pragma GCC unroll 4
    for (int j = 0; j < nv; j++, key += LANES) {
        const vec scaled = s[j] * scale; /* rounded */
        const vec x = coarse ? scaled - lse : exponent(c->nats, s[j], -lse);
        vec p = weight(c, x, i, alone), ds = {0};
        if (c->wants_ds) ds = p * fma_(t[j], scale, -delta);
        if (cuts) {
            const ivec visible = (key >= (FA_INT)keys.begin) & (key < (FA_INT)keys.end);
            p = pick(visible, p, (vec){0});
            ds = pick(visible, ds, (vec){0});
        }
        s[j] = p;
        if (c->wants_ds) t[j] = ds;
    }
}

/* c * tanh(x / c), as the forward has it, and in *slope the tangent there. */
FA_FAST vec cap(const backward *c, vec x, vec *slope) {
    const vec y = x / c->softcap;
    const ivec far = max_(y, -y) < (real)(DOUBLE ? 0x1p-28 : 0x1p-13);
    const vec t = tanh_(c->e_squared, y);
    *slope = fma_(-t, t, splat(1));
    return pick(far, x, t * c->softcap);
}

/* What dropout multiplies P by: the gain or 0, for `width` keys from `key` on, a multiple of 8. */
static void drop(const backward *c, int64_t h, int row, int key, int width, real *gain) {
    const fa_dropout *d = &c->p->dropout;
    fa_random bits[WIDTH / 8];
    for (int i = 0; i < width / 8; i++)
        bits[i] = fa_dropout_counter((int32_t)(d->first_b + c->n), (int32_t)h, row, key / 8 + i);
    fa_philox(bits, width / 8, (uint32_t)c->seed, (uint32_t)((uint64_t)c->seed >> 32));
    for (int j = 0; j < width; j++)
        gain[j] = fa_dropout_keeps(d->threshold, bits[j / 8], j % 8) ? (real)d->gain : 0;
}

/* The same where something changes the scores. `raw`: t becomes ds itself. */
static void change(const backward *c, const tile *rows, int i, fa_interval keys, int key, real *s,
                   real *t, int width, int raw) {
    const fa_scores *scores = &c->p->scores;
    const int64_t *stride = scores->mask.stride, *slopes = scores->alibi_stride;
    const int row = rows->first + i, masked = scores->mask.data != NULL;
    const int last = c->sequence.lengths.sk, end = key + width < last ? key + width : last;
    vec bias[NV] = {{0}}, gain[NV];
    if (masked)
        read_row((real *)bias,
                 (const char *)scores->mask.data +
                     (c->n * stride[0] + rows->h * stride[1] + row * stride[2] + key * stride[3]) *
                         fa_dtype_size(scores->mask_dtype),
                 scores->mask_dtype, stride[3], end - key);
    if (c->p->dropout.p > 0) drop(c, rows->h, row, key, (width + 7) / 8 * 8, (real *)gain);
    const ivec position = fa_row_position(c->sequence.lengths, row) - (ivec){0};
    const real steep = scores->alibi_slopes
                           ? (real)scores->alibi_slopes[c->n * slopes[0] + rows->h * slopes[1]]
                           : 0;
    ivec at = {0};
    for (int j = 0; j < LANES; j++) at[j] = key + j;
    for (int j = 0; j < width / LANES; j++, at += LANES) {
        vec x = ((vec *)s)[j] * c->scale, dp = ((vec *)t)[j], tangent = splat(1);
        ivec visible = (at >= (FA_INT)keys.begin) & (at < (FA_INT)keys.end);
        if (scores->softcap > 0) x = cap(c, x, &tangent);
        if (masked && scores->mask_dtype != FA_BOOL) x += bias[j];
        if (masked && scores->mask_dtype == FA_BOOL) visible &= (ivec)(bias[j] != 0);
        if (scores->alibi_slopes) {
            const vec distance = __builtin_convertvector(position - at, vec);
            x -= max_(distance, -distance) * steep;
        }
        if (c->rounds || is_coarse(c, i))
            x -= c->lse[i];
        else
            x = exponent(c->nats, ((vec *)s)[j], -splat(c->lse[i]));
        const vec p = pick(visible, weight(c, x, i, is_alone(c, i, keys)), (vec){0});
        vec pz = p;
        if (c->p->dropout.p > 0) {
            pz = pick(gain[j] == 0, (vec){0}, p * gain[j]);
            dp = pick(gain[j] == 0, (vec){0}, dp * gain[j]);
        }
        const vec ds = p * (dp - c->delta[i]);
        ((vec *)s)[j] = pz; /* what is hidden may be any bits */
        if (c->wants_ds || raw)
            ((vec *)t)[j] = pick(visible, raw ? ds : ds * tangent * c->scale, (vec){0});
    }
}
