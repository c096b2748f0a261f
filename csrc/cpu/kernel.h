/* kernel.h - the algorithm of the CPU backend, once per instance (see simd.h): stop 6 of 6.
 * Included without a guard.
 *
 * Online softmax over blocks of keys. The lanes of every vector are query rows, of one head or of
 * several that share the keys, so all that a row carries - its maximum, its sum, its interval - is
 * one lane, and no step adds across lanes. A panel of up to NV * LANES rows holds
 *
 *     Q^T [d][row]      S^T [key][row]      O^T [dv][row]
 *
 * and both products are the same loop: vectors of rows times one broadcast number of K or V, which
 * are therefore read as they lie, without packing, where they lie well.
 *
 *     S^T[key] = sum over d    Q^T[d]   * K[key][d]
 *     O^T[dv]  = sum over keys P^T[key] * V[key][dv]
 *
 * With FA_PAIRS a step of either sum is a pair of bfloat16 (vdpbf16ps): Q and K pair up along d, P
 * and V along keys.
 */
#include "simd.h"

#ifndef FASTATTN_CPU_KERNEL_H
#define FASTATTN_CPU_KERNEL_H

#define attend FN(attend)
#define attend_panel FN(attend_panel)
#define block FN(block)
#define cap FN(cap)
#define change FN(change)
#define close_panel FN(close_panel)
#define collect FN(collect)
#define context FN(context)
#define drop FN(drop)
#define has_one_key FN(has_one_key)
#define lay_out FN(lay_out)
#define load_block FN(load_block)
#define multiply FN(multiply)
#define one_key FN(one_key)
#define open_panel FN(open_panel)
#define panel FN(panel)
#define read_bias FN(read_bias)
#define run_rows FN(run_rows)
#define score FN(score)
#define scratch_bytes FN(scratch_bytes)
#define see FN(see)
#define whole FN(whole)

/* In a block, at most: twice as many are 1 % faster where S^T still lies in the L1 with them. */
#define KEYS (FA_BYTES == 64 ? 64 : 128)
#define CHAIN 16             /* probabilities added up in a row */
#define PRODUCTS 64          /* of a score added up in a row, see score() */
#define NV FA_VECTORS        /* in a panel, at most; so many fit the registers */
#define PANEL (NV * LANES)   /* rows in a panel */
#define PANELS (128 / PANEL) /* that share a packed block */
/* Of the register tile: with `nv` vectors of rows, so many numbers of K or V. */
#define HEIGHT(nv) (FA_ACCUMULATORS / (nv) < 8 ? FA_ACCUMULATORS / (nv) : 8)

#endif

typedef struct panel {
    vec *q;           /* [units of d][nv] */
    vec *o;           /* [dv][nv], not yet divided by l */
    vec m[NV], l[NV]; /* maximum m of the scores, sum of exp(s - m) */
    /* Of each row; begin = end in the lanes past the last row. */
    ivec begin[NV], end[NV], position[NV];
    vec slope[NV];
    fa_interval any, all; /* keys that some row, and that every row sees */
    fa_row row[PANEL];    /* the last one in the lanes past it */
    int count, nv;        /* rows, vectors of rows */
} panel;

/* What all blocks of a run share. */
typedef struct context {
    const fa_params *p;
    const fa_group *group;
    const char *q, *k, *v, *mask; /* of this sequence and the group's first head, from row 0 on */
    char *out;
    int64_t seed;
    int unit_k, unit_v; /* K and V can be read in place */
    int units;          /* units of d */
    /* As they come from Q K a score counts |scale|, with the scale's sign multiplied into Q. Where
     * softcap, a float mask or ALiBi changes them, change() brings them to 1. */
    int changed;
    real scale, sign, nats;     /* nats: what a score counts in the end */
    base score_base, e_squared; /* e^nats; e^2 for tanh */
    real softcap;
    panel panels[PANELS];
    vec *s, *bias; /* [KEYS][NV]: scores, then probabilities; the mask's block */
    real *rows;    /* [LANES][longest row], to transpose from and to */
    real *k_packed, *v_packed;
} context;

/* A block of keys, and where its K and V are. */
typedef struct block {
    int begin, end;
    const unit *k, *v;
    int64_t k_row, v_row; /* units from key to key, from step to step */
} block;

/* Rounds up to a multiple of LANES. */
static int whole(int n) { return (n + LANES - 1) / LANES * LANES; }

/* c * tanh(x / c). A cap that is far from x leaves it as it is: tanh(y) is y (1 - y^2 / 3 ...). */
FA_FAST vec cap(const context *c, vec x) {
    const vec y = x / c->softcap;
    const ivec far = max_(y, -y) < (real)(DOUBLE ? 0x1p-28 : 0x1p-13);
    return pick(far, x, tanh_(c->e_squared, y) * c->softcap);
}

/* acc[i][j] += sum over steps a[step][j] * b[i * row + step * next] */
FA_FAST void multiply(vec *acc, int height, int nv, const vec *a, const unit *b, int64_t row,
                      int64_t next, int steps) {
    for (int step = 0; step < steps; step++, a += nv, b += next) {
        vec x[NV];
#pragma GCC unroll 8
        for (int j = 0; j < nv; j++) x[j] = a[j];
#pragma GCC unroll 8
        for (int i = 0; i < height; i++) {
            vec y = (vec)(b[i * row] - (ivec){0});
#pragma GCC unroll 8
            for (int j = 0; j < nv; j++) acc[i * nv + j] = dot(x[j], y, acc[i * nv + j]);
        }
    }
}

/* S^T of `height` keys; raises `top`, the maxima. Long sums in float32 are sums of shorter ones:
 * one chain of d additions would lose more digits than the products of a BLAS do. */
FA_FAST void score(vec *s, vec *top, int height, int nv, const vec *q, const unit *k, int64_t k_row,
                   int units) {
    vec acc[8 * NV];
#pragma GCC unroll 32
    for (int i = 0; i < height * nv; i++) acc[i] = (vec){0};
    int done = 0;
    for (; units - done > PRODUCTS; done += PRODUCTS) {
        multiply(acc, height, nv, q + done * nv, k + done, k_row, 1, PRODUCTS);
#pragma GCC unroll 32
        for (int i = 0; i < height * nv; i++) {
            s[i] = done ? s[i] + acc[i] : acc[i];
            acc[i] = (vec){0};
        }
    }
    multiply(acc, height, nv, q + done * nv, k + done, k_row, 1, units - done);
#pragma GCC unroll 8
    for (int i = 0; i < height; i++) {
#pragma GCC unroll 8
        for (int j = 0; j < nv; j++) {
            vec x = acc[i * nv + j];
            if (done) x += s[i * nv + j];
            s[i * nv + j] = x;
            top[j] = max_(x, top[j]);
        }
    }
}

/* O^T of `height` columns of V: rescaled, and P V added. */
FA_FAST void collect(vec *o, const vec *alpha, int height, int nv, const vec *p, const unit *v,
                     int64_t v_row, int steps) {
    vec acc[8 * NV];
#pragma GCC unroll 32
    for (int i = 0; i < height * nv; i++) acc[i] = (vec){0};
    multiply(acc, height, nv, p, v, 1, v_row, steps);
#pragma GCC unroll 8
    for (int i = 0; i < height; i++) {
#pragma GCC unroll 8
        for (int j = 0; j < nv; j++) o[i * nv + j] = fma_(o[i * nv + j], alpha[j], acc[i * nv + j]);
    }
}

/* Everything that changes scores, in the order of the definition, and what hides keys; the maxima
 * anew. */
FA_FAST void change(const context *c, const panel *p, vec *s, vec *top, int begin, int n, int nv) {
    const fa_scores *scores = &c->p->scores;
    const int adds = scores->mask.data && scores->mask_dtype != FA_BOOL;
    const int hides = scores->mask.data && scores->mask_dtype == FA_BOOL;
    const int cuts = begin < p->all.begin || begin + n > p->all.end;
    const vec hidden = splat(-(real)INFINITY);
    for (int j = 0; j < nv; j++) top[j] = hidden;
    for (int i = 0; i < n; i++) {
        const FA_INT key = begin + i;
        for (int j = 0; j < nv; j++) {
            vec x = s[i * nv + j];
            if (c->changed) {
                x *= c->scale;
                if (scores->softcap > 0) x = cap(c, x);
                if (adds) x += c->bias[i * nv + j];
                if (scores->alibi_slopes) {
                    vec distance = __builtin_convertvector(p->position[j] - key, vec);
                    x -= max_(distance, -distance) * p->slope[j];
                }
            }
            if (hides) {
                ivec packed = (ivec)c->bias[i / (int)sizeof(real) * nv + j];
                x = pick((packed & (FA_INT)(0xffull << 8 * (i % sizeof(real)))) != 0, x, hidden);
            }
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

/* One panel meets the keys [begin, end) of one block. */
FA_FAST void attend(const context *c, panel *p, const block *keys, int begin, int end, int nv) {
    const int n = end - begin, height = HEIGHT(nv);
    const unit *k = keys->k + (begin - keys->begin) * keys->k_row;
    vec *s = c->s, top[NV], alpha[NV];
    for (int j = 0; j < nv; j++) top[j] = splat(-(real)INFINITY);
    for (int i = 0; i < n;) {
        if (n >= height) { /* at the end some of the last keys once more */
            if (i > n - height) i = n - height;
            score(s + i * nv, top, height, nv, p->q, k + i * keys->k_row, keys->k_row, c->units);
            i += height;
        } else {
            score(s + i * nv, top, 1, nv, p->q, k + i * keys->k_row, keys->k_row, c->units);
            i++;
        }
    }
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

/* Rows first .. first + count - 1 in lanes: Q transposed, O empty, the interval of each. */
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
    memset(p->o, 0, (size_t)whole(what->dv) * p->nv * sizeof(vec));
    for (int j = 0; j < p->nv; j++) {
        p->m[j] = splat(-(real)INFINITY);
        p->l[j] = p->slope[j] = (vec){0};
        for (int i = 0; i < LANES; i++) {
            const int n = j * LANES + i;
            const fa_row row = find_row(g, first + (n < count ? n : count - 1));
            real *to = c->rows + i * width;
            p->row[n] = row;
            p->begin[j][i] = p->end[j][i] = p->position[j][i] = 0;
            if (n >= count) {
                memset(to, 0, (size_t)width * sizeof(real));
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
            read_units(to, from, what->dtype, what->q.stride[3], what->d);
            if (c->sign != 1) multiply_units(to, c->sign, what->d);
        }
        for (int i = 0; i < c->units; i += LANES)
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
        vec sink = splat(-(real)INFINITY);
        const ivec empty = l == 0; /* the largest score gives 1, so 0 means that all are -inf */
        if (scores->sink) {
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
        const vec value = m + log2_(l) * (real)FA_LN2;
        for (int i = 0; i < LANES && j * LANES + i < p->count; i++) {
            const fa_row row = p->row[j * LANES + i];
            write_row(c->out + row_offset(&what->out, row) * fa_dtype_size(what->dtype),
                      what->dtype, what->out.stride[3], c->rows + i * width, what->dv);
            write_lse(what, c->group, row, empty[i] ? sink[i] : value[i]);
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

/* Points a block at its K and V, packed where they cannot be read in place. Values that no row sees
 * (keys below `visible`, or not `seen`) become 0: their probability is 0, and 0 * NaN is not. */
static void load_block(const context *c, block *keys, int visible, const uint8_t *seen) {
    const fa_what *what = &c->p->what;
    const int64_t size = fa_dtype_size(what->dtype);
    const int n = keys->end - keys->begin, dv = what->dv;
    const char *k = c->k + keys->begin * what->k.stride[2] * size;
    const char *v = c->v + keys->begin * what->v.stride[2] * size;
    keys->k = (const unit *)k;
    keys->k_row = what->k.stride[2] / STEP;
    if (!c->unit_k) {
        keys->k = (const unit *)c->k_packed;
        keys->k_row = c->units;
        for (int i = 0; i < n; i++)
            read_units(c->k_packed + (int64_t)i * c->units, k + i * what->k.stride[2] * size,
                       what->dtype, what->k.stride[3], what->d);
    }
    keys->v = (const unit *)v;
    keys->v_row = what->v.stride[2];
    if (!c->unit_v || seen) {
        keys->v = (const unit *)c->v_packed;
        keys->v_row = dv;
        for (int i = 0; i < n; i += STEP) {
            const char *x = v + i * what->v.stride[2] * size, *y = x + what->v.stride[2] * size;
            if (keys->begin + i < visible || (seen && !seen[i])) x = NULL;
            if (i + 1 == n || (seen && !seen[i + 1])) y = NULL;
            read_step(c->v_packed + (int64_t)(i / STEP) * dv, x, y, what->dtype, what->v.stride[3],
                      dv);
        }
    }
}

/* The scratch of one thread, carved from `memory` (NULL: only counted). Returns its bytes. */
static size_t lay_out(context *c, char *memory, const fa_what *what, int masked, int rows) {
    const int units = (what->d + STEP - 1) / STEP, keys = what->sk < KEYS ? whole(what->sk) : KEYS;
    int longest = whole(what->d > what->dv ? what->d : what->dv);
    if (longest < KEYS) longest = KEYS;
    size_t used = 0;
#define CARVE(pointer, numbers)                                    \
    do {                                                           \
        if (memory) pointer = (void *)(memory + used);             \
        used += ((size_t)(numbers) * sizeof(real) + 63) / 64 * 64; \
    } while (0)
    for (int i = 0, first = 0; first < rows; i++, first += PANEL) {
        const int wide = rows - first < PANEL ? whole(rows - first) : PANEL;
        CARVE(c->panels[i].q, (size_t)whole(units) * wide);
        CARVE(c->panels[i].o, (size_t)whole(what->dv) * wide);
    }
    const int wide = rows < PANEL ? whole(rows) : PANEL;
    CARVE(c->s, keys * wide);
    if (masked) CARVE(c->bias, keys * wide);
    CARVE(c->rows, (size_t)longest * LANES);
    CARVE(c->k_packed, (size_t)units * keys);
    CARVE(c->v_packed, (size_t)what->dv * keys);
    return used;
}

static size_t scratch_bytes(const fa_params *p, int rows) {
    return lay_out(NULL, NULL, &p->what, p->scores.mask.data != NULL, rows);
}

/* Whether all rows of a sequence have one key, see it, and nothing changes its weight. (All: a
 * row's bits must not depend on which others are in its task.) */
static int has_one_key(const fa_params *p, fa_lengths lengths) {
    const fa_scores *scores = &p->scores;
    const double scale = fabs(p->what.scale);
    if (lengths.sk - lengths.k_start != 1) return 0;
    if (scores->mask.data || scores->sink || scores->alibi_slopes || scores->softcap > 0) return 0;
    return p->dropout.p == 0 && scale > 1e-30 && scale < 1e30 &&
           fa_row_interval(lengths, 0).end > lengths.k_start &&
           fa_row_interval(lengths, lengths.sq - 1).begin == lengths.k_start;
}

/* Their output is the key's value, and their lse the score. */
static void one_key(const context *c, int64_t first, int count, void *memory) {
    const fa_what *what = &c->p->what;
    const int64_t size = fa_dtype_size(what->dtype), start = c->group->sequence.lengths.k_start;
    const int width = whole(what->d), packed = what->v.stride[3] == 1 && what->out.stride[3] == 1;
    const char *k = c->k + start * what->k.stride[2] * size;
    const char *v = c->v + start * what->v.stride[2] * size;
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

/* Rows first .. first + count - 1 (at most 128, all within the sequence's length) of one group. */
static void run_rows(const fa_params *p, const fa_group *g, int64_t first, int count,
                     void *memory) {
    const fa_what *what = &p->what;
    const fa_sequence sequence = g->sequence;
    const fa_scores *scores = &p->scores;
    const int64_t size = fa_dtype_size(what->dtype), b = g->b, h = g->h;
    const int64_t hk = h / (what->hq / what->hk), hv = h / (what->hq / what->hv);
    const int native = FA_PAIRS || (what->dtype == (DOUBLE ? FA_F64 : FA_F32));
    const int hides = scores->mask.data && scores->mask_dtype == FA_BOOL;
    context c;
    c.bias = NULL;
    c.p = p;
    c.group = g;
    c.q = (const char *)what->q.data + element(&what->q, b, h, sequence.q) * size;
    c.k = (const char *)what->k.data + element(&what->k, b, hk, sequence.k) * size;
    c.v = (const char *)what->v.data + element(&what->v, b, hv, sequence.k) * size;
    c.out = (char *)what->out.data + element(&what->out, b, h, sequence.q) * size;
    if (has_one_key(p, sequence.lengths)) {
        one_key(&c, first, count, memory);
        return;
    }
    c.seed = p->dropout.p > 0 ? fa_dropout_seed(&p->dropout) : 0;
    c.mask = scores->mask.data;
    if (c.mask)
        c.mask += (b * scores->mask.stride[0] + h * scores->mask.stride[1]) *
                  fa_dtype_size(scores->mask_dtype);
    c.unit_k = native && (what->k.stride[3] == 1 || what->d == 1) && what->d % STEP == 0 &&
               what->k.stride[2] % STEP == 0;
    c.unit_v = native && (what->v.stride[3] == 1 || what->dv == 1) && !FA_PAIRS;
    c.units = (what->d + STEP - 1) / STEP;
    /* A scale that makes 0 of all scores is left to change(), too; one that leaves only the
     * greatest brings none to infinity. */
    const double size_of_scale = fmin(fabs(what->scale), DOUBLE ? 1e300 : 1e30);
    c.changed = scores->softcap > 0 || scores->alibi_slopes || (c.mask && !hides) ||
                !(size_of_scale > 1e-30);
    c.scale = (real)copysign(size_of_scale, what->scale);
    c.sign = !c.changed && what->scale < 0 ? -1 : 1;
    c.nats = c.changed ? 1 : c.scale * c.sign;
    c.score_base = base_of(c.changed ? FA_LOG2E : size_of_scale * FA_LOG2E);
    c.e_squared = base_of(2 * FA_LOG2E);
    c.softcap = (real)(DOUBLE ? scores->softcap : fmin(fmax(scores->softcap, FLT_MIN), FLT_MAX));
    lay_out(&c, memory, what, c.mask != NULL, count);

    int panels = 0;
    for (int i = 0; i < count; i += PANEL, panels++)
        open_panel(&c, &c.panels[panels], first + i, count - i < PANEL ? count - i : PANEL);
    const int begin = row_keys(g, first).begin, end = row_keys(g, first + count - 1).end;
    /* Blocks start at multiples of KEYS, chains of additions at multiples of CHAIN, wherever the
     * rows' keys do: how rows are grouped, and so how many threads there are and how many
     * sequences, changes no bit. */
    for (int at = begin / KEYS * KEYS; at < end; at += KEYS) {
        block keys = {.begin = at > begin ? at : begin / STEP * STEP,
                      .end = at + KEYS < end ? at + KEYS : end};
        uint8_t seen[KEYS];
        const int n = keys.end - keys.begin;
        const int sees = hides ? see(&c, first, count, &keys, seen) : n;
        if (sees == 0) continue;
        load_block(&c, &keys, begin, sees < n ? seen : NULL);
        for (int i = 0; i < panels; i++) {
            panel *rows = &c.panels[i];
            int from = rows->any.begin > keys.begin ? rows->any.begin / STEP * STEP : keys.begin;
            int to = rows->any.end < keys.end ? rows->any.end : keys.end;
            if (from < to) attend_panel(&c, rows, &keys, from, to);
        }
    }
    for (int i = 0; i < panels; i++) close_panel(&c, &c.panels[i]);
}

static const fa_cpu_kernel FN(kernel) = {LANES, PANEL, PANELS * PANEL, scratch_bytes, run_rows};

#undef FA_NAME
#undef FA_REAL
#undef FA_INT
