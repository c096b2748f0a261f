/* cpu_driver.c - the CPU backend against a naive loop, without Python: any architecture that a C
 * compiler has, natively (tests/test_cpu_driver.py) or in an emulator (.ci/run).
 *
 *     cc -std=c11 -O2 -Icsrc -o driver tests/cpu_driver.c csrc/cpu/?*.c -lm -lpthread && ./driver
 *
 * Fills fa_params by hand, as check_attention.c would, for random shapes and features in every
 * dtype; the naive loop reads the contract (fastattn.h) alone and shares no code with the backend.
 * Dropout, whose bits are defined by code, and packed sequences are the Python tests' business.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fastattn.h"

static uint64_t state;

static uint32_t bits(void) { /* splitmix64 */
    uint64_t x = state += 0x9E3779B97F4A7C15u;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return (uint32_t)(x >> 32);
}
static int32_t below(int32_t n) { return (int32_t)(bits() % (uint32_t)n); }
static int32_t chance(int32_t percent) { return below(100) < percent; }

/* Between -2 and 2, on a grid that every dtype holds: inputs are the same in each. */
static double value(void) { return below(65) / 16.0 - 2; }

/* ---- elements ---- */

static double half_value(uint16_t h) {
    int32_t exponent = h >> 10 & 31, fraction = h & 1023;
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

/* Dense (b, h, s, d), or as (b, s, h, d) lies, between other bytes; freed by the caller. */
static fa_tensor make(fa_dtype type, int64_t b, int64_t h, int64_t s, int64_t d) {
    int64_t row = d + below(4), heads = chance(50) ? h : 0;
    fa_tensor t = {NULL, {b, h, s, d}, {h * s * row, s * row, row, 1}};
    if (heads) t.stride[1] = row, t.stride[2] = heads * row;
    int64_t count = b * h * s * row;
    t.data = malloc((size_t)(count ? count * 8 : 8));
    for (int64_t i = 0; i < count; ++i) put(t.data, type, i, value());
    for (int32_t i = 0; i < 4; ++i)
        if (t.shape[i] == 1) t.stride[i] = 0;
    return t;
}

/* ---- the naive loop ---- */

static int32_t length_of(const int32_t *lengths, int64_t b, int32_t otherwise) {
    return lengths ? lengths[b] : otherwise;
}

/* The final score, -inf where row i may not see key j. */
static double score(const fa_params *p, int64_t b, int64_t h, int64_t i, int64_t j) {
    const fa_what *w = &p->what;
    const fa_masks *m = &p->masks;
    const fa_scores *s = &p->scores;
    int64_t sq = length_of(m->q_lengths, b, w->sq), sk = length_of(m->k_lengths, b, w->sk);
    int64_t at = i + (m->flags & FA_HAS_OFFSET ? m->offset : sk - sq);
    if (m->q_offset) at = i + m->q_offset[b];
    if (j >= sk || j < length_of(m->k_start, b, 0)) return -INFINITY;
    if (m->flags & FA_HAS_LEFT && j < at - m->left) return -INFINITY;
    if (m->flags & FA_HAS_RIGHT && j > at + m->right) return -INFINITY;

    double x = 0;
    for (int32_t c = 0; c < w->d; ++c)
        x += get(w->q.data, w->dtype, offset(&w->q, b, h, i, c)) *
             get(w->k.data, w->dtype, offset(&w->k, b, h / (w->hq / w->hk), j, c));
    x *= w->scale;
    if (s->softcap > 0) x = s->softcap * tanh(x / s->softcap);
    if (s->mask.data) {
        double mask = get(s->mask.data, s->mask_dtype, offset(&s->mask, b, h, i, j));
        x = s->mask_dtype != FA_BOOL ? x + mask : mask != 0 ? x : -INFINITY;
    }
    if (s->alibi_slopes) x -= s->alibi_slopes[h] * fabs((double)(at - j));
    return x;
}

/* One row: what it is in out, and returns its lse. */
static double naive_row(const fa_params *p, int64_t b, int64_t h, int64_t i, double *out) {
    const fa_what *w = &p->what;
    memset(out, 0, sizeof *out * (size_t)w->dv);
    if (i >= length_of(p->masks.q_lengths, b, w->sq)) return -INFINITY;
    double sink = p->scores.sink ? p->scores.sink[h] : -INFINITY, top = sink;
    for (int64_t j = 0; j < w->sk; ++j) top = fmax(top, score(p, b, h, i, j));
    if (isinf(top)) return -INFINITY;
    double sum = exp(sink - top);
    for (int64_t j = 0; j < w->sk; ++j) {
        double weight = exp(score(p, b, h, i, j) - top);
        sum += weight;
        for (int32_t c = 0; c < w->dv; ++c)
            out[c] +=
                weight * get(w->v.data, w->dtype, offset(&w->v, b, h / (w->hq / w->hv), j, c));
    }
    for (int32_t c = 0; c < w->dv; ++c) out[c] /= sum;
    return top + log(sum);
}

/* ---- one case ---- */

static int32_t *some(int32_t b, int32_t least, int32_t most) {
    int32_t *numbers = malloc(sizeof *numbers * (size_t)b);
    for (int32_t i = 0; i < b; ++i) numbers[i] = least + below(most - least + 1);
    return numbers;
}

static float *some_floats(int32_t n) {
    float *numbers = malloc(sizeof *numbers * (size_t)n);
    for (int32_t i = 0; i < n; ++i) numbers[i] = (float)value();
    return numbers;
}

static void choose_masks(fa_params *p) {
    const fa_what *w = &p->what;
    fa_masks *m = &p->masks;
    if (chance(40)) m->flags |= FA_HAS_RIGHT, m->right = chance(60) ? 0 : below(9) - 3;
    if (chance(25)) m->flags |= FA_HAS_LEFT, m->left = below(w->sk + 3);
    if (chance(20)) m->flags |= FA_HAS_OFFSET, m->offset = below(2 * w->sk + 1) - w->sk;
    if (chance(20)) m->q_lengths = some(w->b, 0, w->sq), m->q_lengths_stride = 1;
    if (chance(20)) m->k_lengths = some(w->b, 0, w->sk), m->k_lengths_stride = 1;
    if (chance(15)) m->q_offset = some(w->b, -w->sq, w->sk), m->q_offset_stride = 1;
    if (!m->k_lengths && chance(20)) m->k_start = some(w->b, 0, w->sk), m->k_start_stride = 1;
}

static void choose_scores(fa_params *p) {
    static const fa_dtype types[] = {FA_BOOL, FA_F32, FA_F16, FA_BF16, FA_F64};
    const fa_what *w = &p->what;
    fa_scores *s = &p->scores;
    if (chance(25)) s->softcap = 1 + below(20);
    if (chance(20)) s->alibi_slopes = some_floats(w->hq), s->alibi_stride[1] = 1;
    if (chance(25)) s->sink = some_floats(w->hq), s->sink_stride = 1;
    if (!chance(40)) return;
    s->mask_dtype = types[below(5)];
    s->mask = make(s->mask_dtype, w->b, w->hq, w->sq, w->sk);
    for (int64_t i = 0; i < (int64_t)w->b * w->hq * w->sq * w->sk; ++i) /* any element */
        if (s->mask_dtype != FA_BOOL && chance(20)) put(s->mask.data, s->mask_dtype, i, -INFINITY);
    for (int32_t i = 0; i < 3; ++i)
        if (chance(30)) s->mask.stride[i] = 0; /* broadcast */
}

/* Largest error allowed in out and lse: the dtype's unit (P and out are rounded to it) times what
 * values of at most 2, and sums of at most a thousand float32 products, make of it. */
static double allowed(fa_dtype type) {
    return type == FA_F64 ? 1e-12 : type == FA_F32 ? 2e-5 : type == FA_F16 ? 4e-3 : 3e-2;
}

/* Returns the number of wrong elements. */
static int32_t run(fa_dtype type, int32_t number) {
    static const int32_t heads[][3] = {{1, 1, 1}, {4, 2, 2}, {6, 3, 2}, {5, 1, 1}, {3, 3, 3}};
    static const int32_t sizes[] = {1, 3, 8, 16, 31, 64, 80, 128, 160, 257};
    state = (uint64_t)number;
    fa_params p = {.where.device_type = FA_CPU};
    fa_what *w = &p.what;
    const int32_t *h = heads[below(5)];
    w->dtype = type;
    w->b = 1 + below(3), w->hq = h[0], w->hk = h[1], w->hv = h[2];
    w->sq = 1 + below(chance(50) ? 6 : 70), w->sk = 1 + below(chance(30) ? 6 : 150);
    w->d = sizes[below(10)], w->dv = chance(50) ? w->d : sizes[below(10)];
    w->scale = chance(10) ? -0.2 : 1 / sqrt(w->d);
    w->q = make(type, w->b, w->hq, w->sq, w->d);
    w->k = make(type, w->b, w->hk, w->sk, w->d);
    w->v = make(type, w->b, w->hv, w->sk, w->dv);
    w->out = make(type, w->b, w->hq, w->sq, w->dv);
    w->lse = make(type == FA_F64 ? FA_F64 : FA_F32, w->b, w->hq, w->sq, 1);
    choose_masks(&p);
    choose_scores(&p);

    int32_t wrong = 0;
    fa_error error = {""};
    double out[257], worst = 0;
    fa_choice choice;
    if (fa_cpu.forward->reject(&p, &choice, &error) != FA_OK ||
        fa_cpu.forward->run(&p, &choice, NULL, &error) != FA_OK)
        wrong = 1;
    for (int64_t row = 0; row < (int64_t)w->b * w->hq * w->sq && !wrong; ++row) {
        int64_t i = row % w->sq, head = row / w->sq % w->hq, b = row / w->sq / w->hq;
        double lse = naive_row(&p, b, head, i, out), difference;
        for (int32_t c = 0; c <= w->dv; ++c) {
            double want = c < w->dv ? out[c] : lse;
            double got = c < w->dv ? get(w->out.data, type, offset(&w->out, b, head, i, c))
                                   : get(w->lse.data, type == FA_F64 ? FA_F64 : FA_F32,
                                         offset(&w->lse, b, head, i, 0));
            difference = got == want ? 0 : fabs(got - want);
            if (!(difference <= worst)) worst = difference;
            wrong += !(difference <= allowed(type) * fmax(1, c < w->dv ? 1 : fabs(want)));
        }
    }
    if (wrong)
        printf(
            "case %d, dtype %d: b %d heads %d %d %d sq %d sk %d d %d dv %d flags %u: %d wrong, "
            "worst %g %s\n",
            number, type, w->b, w->hq, w->hk, w->hv, w->sq, w->sk, w->d, w->dv, p.masks.flags,
            wrong, worst, error.text);
    void *memory[] = {w->q.data,
                      w->k.data,
                      w->v.data,
                      w->out.data,
                      w->lse.data,
                      p.scores.mask.data,
                      (void *)p.masks.q_lengths,
                      (void *)p.masks.k_lengths,
                      (void *)p.masks.k_start,
                      (void *)p.masks.q_offset,
                      (void *)p.scores.alibi_slopes,
                      (void *)p.scores.sink};
    for (size_t i = 0; i < sizeof memory / sizeof *memory; ++i) free(memory[i]);
    return wrong;
}

/* ./driver [cases per dtype, 40] */
int main(int count, char **words) {
    static const fa_dtype types[] = {FA_F64, FA_F32, FA_F16, FA_BF16};
    int32_t cases = count > 1 ? atoi(words[1]) : 40, failed = 0;
    for (int32_t t = 0; t < 4; ++t)
        for (int32_t n = 0; n < cases; ++n) failed += run(types[t], n) != 0;
    printf("level %s: %d passed, %d failed\n", fa_cpu_level(), 4 * cases - failed, failed);
    return failed != 0 || cases < 1;
}
