/* cpu_naive.h - attention and its gradients by naive loops in float64, for cpu_driver.c.
 *
 * They read the contract (fastattn.h) alone and share no code with the backend.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "fastattn.h"

/* ---- elements ---- */

static double half_value(uint16_t h) {
    int32_t exponent = h >> 10 & 31, fraction = h & 1023;
    if (exponent == 31) return fraction ? NAN : h & 0x8000 ? -INFINITY : INFINITY;
    double size = exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24);
    return h & 0x8000 ? -size : size;
}

static double get(const void *data, fa_dtype type, int64_t at) {
    uint32_t word;
    float f;
    switch (type) {
        case FA_F64:
            return ((const double *)data)[at];
        case FA_F32:
            return ((const float *)data)[at];
        case FA_F16:
            return half_value(((const uint16_t *)data)[at]);
        case FA_BF16:
            word = (uint32_t)((const uint16_t *)data)[at] << 16;
            memcpy(&f, &word, 4);
            return f;
        default:
            return ((const uint8_t *)data)[at];
    }
}

/* Of value() or -inf, which no dtype has to round. */
static void put(void *data, fa_dtype type, int64_t at, double x) {
    float f = (float)x;
    uint32_t word;
    memcpy(&word, &f, 4);
    int32_t exponent = (int32_t)(word >> 23 & 255) - 112; /* as half counts it; value()'s fit */
    uint32_t half = x == 0     ? 0
                    : isinf(x) ? 31 << 10
                               : (uint32_t)exponent << 10 | (word >> 13 & 1023);
    if (type == FA_F64) ((double *)data)[at] = x;
    if (type == FA_F32) ((float *)data)[at] = f;
    if (type == FA_BF16) ((uint16_t *)data)[at] = (uint16_t)(word >> 16);
    if (type == FA_F16) ((uint16_t *)data)[at] = (uint16_t)(half | (word >> 16 & 0x8000));
    if (type == FA_BOOL) ((uint8_t *)data)[at] = x != 0;
}

static int64_t offset(const fa_tensor *t, int64_t b, int64_t h, int64_t s, int64_t c) {
    return b * t->stride[0] + h * t->stride[1] + s * t->stride[2] + c * t->stride[3];
}

static int64_t count(const fa_tensor *t) {
    return t->shape[0] * t->shape[1] * t->shape[2] * t->shape[3];
}

/* The elements in order, freed by the caller; zeros where there is no array. */
static double *dense(const fa_tensor *t, fa_dtype type) {
    const int64_t n = count(t);
    double *x = calloc((size_t)n + 1, sizeof *x);
    for (int64_t i = 0; i < n && t->data; ++i) {
        int64_t c = i % t->shape[3], row = i / t->shape[3];
        int64_t s = row % t->shape[2], h = row / t->shape[2] % t->shape[1];
        x[i] = get(t->data, type, offset(t, row / t->shape[2] / t->shape[1], h, s, c));
    }
    return x;
}

/* ---- the forward pass ---- */

/* A request, and its arrays in order. */
typedef struct naive {
    const fa_params *p;
    double *q, *k, *v;
} naive;

static naive naive_open(const fa_params *p) {
    const fa_what *w = &p->what;
    return (naive){p, dense(&w->q, w->dtype), dense(&w->k, w->dtype), dense(&w->v, w->dtype)};
}
static void naive_close(naive *n) { free(n->q), free(n->k), free(n->v); }

/* A row of d elements at (b, h, i) of a dense array with `heads` heads of s rows. */
static double *row_of(double *x, int64_t b, int64_t h, int64_t i, int64_t heads, int64_t s,
                      int64_t d) {
    return x + ((b * heads + h) * s + i) * d;
}
static double *q_row(const naive *n, int64_t b, int64_t h, int64_t i) {
    const fa_what *w = &n->p->what;
    return row_of(n->q, b, h, i, w->hq, w->sq, w->d);
}
static double *k_row(const naive *n, double *x, int64_t b, int64_t h, int64_t j) {
    const fa_what *w = &n->p->what;
    return row_of(x, b, h / (w->hq / w->hk), j, w->hk, w->sk, w->d);
}
static double *v_row(const naive *n, double *x, int64_t b, int64_t h, int64_t j) {
    const fa_what *w = &n->p->what;
    return row_of(x, b, h / (w->hq / w->hv), j, w->hv, w->sk, w->dv);
}

static double dot(const double *x, const double *y, int32_t n) {
    double sum = 0;
    for (int32_t c = 0; c < n; ++c) sum += x[c] * y[c];
    return sum;
}

static int32_t length_of(const int32_t *lengths, int64_t b, int32_t otherwise) {
    return lengths ? lengths[b] : otherwise;
}

/* The final score, -inf where row i may not see key j; *slope is what it grows by with q.k. */
static double score(const naive *n, int64_t b, int64_t h, int64_t i, int64_t j, double *slope) {
    const fa_what *w = &n->p->what;
    const fa_masks *m = &n->p->masks;
    const fa_scores *s = &n->p->scores;
    int64_t sq = length_of(m->q_lengths, b, w->sq), sk = length_of(m->k_lengths, b, w->sk);
    int64_t at = i + (m->flags & FA_HAS_OFFSET ? m->offset : sk - sq);
    if (m->q_offset) at = i + m->q_offset[b];
    if (j >= sk || j < length_of(m->k_start, b, 0)) return -INFINITY;
    if (m->flags & FA_HAS_LEFT && j < at - m->left) return -INFINITY;
    if (m->flags & FA_HAS_RIGHT && j > at + m->right) return -INFINITY;

    double x = w->scale * dot(q_row(n, b, h, i), k_row(n, n->k, b, h, j), w->d);
    *slope = w->scale;
    if (s->softcap > 0) {
        double t = tanh(x / s->softcap);
        x = s->softcap * t, *slope *= 1 - t * t;
    }
    if (s->mask.data) {
        double mask = get(s->mask.data, s->mask_dtype, offset(&s->mask, b, h, i, j));
        x = s->mask_dtype != FA_BOOL ? x + mask : mask != 0 ? x : -INFINITY;
    }
    if (s->alibi_slopes) x -= s->alibi_slopes[h] * fabs((double)(at - j));
    return x;
}

/* A row's softmax: weights of its sk keys, their slopes, and its lse. */
static double naive_weights(const naive *n, int64_t b, int64_t h, int64_t i, double *p,
                            double *slope) {
    const fa_what *w = &n->p->what;
    double sink = n->p->scores.sink ? n->p->scores.sink[h] : -INFINITY, top = sink;
    memset(p, 0, sizeof *p * (size_t)w->sk);
    if (i >= length_of(n->p->masks.q_lengths, b, w->sq)) return -INFINITY;
    for (int64_t j = 0; j < w->sk; ++j) top = fmax(top, p[j] = score(n, b, h, i, j, &slope[j]));
    double sum = isinf(top) ? 1 : exp(sink - top);
    for (int64_t j = 0; j < w->sk; ++j) sum += p[j] = isinf(top) ? 0 : exp(p[j] - top);
    for (int64_t j = 0; j < w->sk; ++j) p[j] /= sum;
    return isinf(top) ? -INFINITY : top + log(sum);
}

/* One row: what it is in out, and returns its lse. */
static double naive_row(const naive *n, int64_t b, int64_t h, int64_t i, double *out) {
    const fa_what *w = &n->p->what;
    double *p = malloc(sizeof *p * 2 * (size_t)(w->sk + 1));
    const double lse = naive_weights(n, b, h, i, p, p + w->sk);
    memset(out, 0, sizeof *out * (size_t)w->dv);
    for (int64_t j = 0; j < w->sk; ++j)
        for (int32_t c = 0; c < w->dv; ++c) out[c] += p[j] * v_row(n, n->v, b, h, j)[c];
    free(p);
    return lse;
}

/* ---- the backward pass ---- */

enum { DQ, DK, DV, DMASK, DSINK, GRADIENTS };

/* Each gradient, and the sum of its terms' absolute values: what its error is measured by. */
typedef struct sums {
    double *value[GRADIENTS], *size[GRADIENTS];
} sums;

static void add(const sums *s, int which, int64_t at, double x, double size) {
    s->value[which][at] += x;
    s->size[which][at] += size;
}

/* One row's part of all of them. dout and dlse in order, either may be all zeros. */
static void naive_backward_row(const naive *n, int64_t b, int64_t h, int64_t i, const double *dout,
                               double dlse, const fa_tensor *dmask, const sums *s) {
    const fa_what *w = &n->p->what;
    double *p = malloc(sizeof *p * 4 * (size_t)(w->sk + 1));
    double *slope = p + w->sk, *dp = slope + w->sk, *dp_size = dp + w->sk;
    double delta = -dlse, delta_size = fabs(dlse);
    const double lse = naive_weights(n, b, h, i, p, slope);
    for (int64_t j = 0; j < w->sk && !isinf(lse); ++j) {
        const double *v = v_row(n, n->v, b, h, j);
        dp[j] = dot(dout, v, w->dv), dp_size[j] = 0;
        for (int32_t c = 0; c < w->dv; ++c) dp_size[j] += fabs(dout[c] * v[c]);
        delta += p[j] * dp[j], delta_size += p[j] * dp_size[j];
    }
    for (int64_t j = 0; j < w->sk && !isinf(lse); ++j) {
        if (p[j] == 0) continue;
        const double *q = q_row(n, b, h, i), *k = k_row(n, n->k, b, h, j);
        const double ds = p[j] * (dp[j] - delta), size = p[j] * (dp_size[j] + delta_size);
        const int64_t of_q = q - n->q, of_k = k - n->k, of_v = v_row(n, n->v, b, h, j) - n->v;
        for (int32_t c = 0; c < w->d; ++c) {
            add(s, DQ, of_q + c, ds * slope[j] * k[c], fabs(size * slope[j] * k[c]));
            add(s, DK, of_k + c, ds * slope[j] * q[c], fabs(size * slope[j] * q[c]));
        }
        for (int32_t c = 0; c < w->dv; ++c)
            add(s, DV, of_v + c, p[j] * dout[c], fabs(p[j] * dout[c]));
        if (!dmask->data) continue;
        const int64_t *m = dmask->shape;
        const int64_t at = (b % m[0] * m[1] + h % m[1]) * m[2] + i % m[2];
        add(s, DMASK, at * m[3] + j % m[3], ds, size);
    }
    if (n->p->scores.sink && !isinf(lse)) {
        double weight = exp(n->p->scores.sink[h] - lse);
        add(s, DSINK, h, -weight * delta, weight * delta_size);
    }
    free(p);
}
