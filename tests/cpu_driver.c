/* cpu_driver.c - the CPU backend against a naive loop, without Python: any architecture that a C
 * compiler has, natively (tests/test_cpu_driver.py) or in an emulator (.ci/run).
 *
 *     cc -std=c11 -O2 -Icsrc -o driver tests/cpu_driver.c csrc/cpu/?*.c -lm -lpthread && ./driver
 *
 * Fills fa_params and fa_backward by hand, as check_attention.c would, for random shapes and
 * features in every dtype, and compares with the naive loops of cpu_naive.h.
 * Dropout, whose bits are defined by code, and packed sequences are the Python tests' business.
 */
#include <stdio.h>

#include "cpu_naive.h"

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
 * values of at most 2, and sums of at most a thousand float32 products, make of it. Of a gradient,
 * for each unit of the absolute sum of its terms. */
static double allowed(fa_dtype type) {
    return type == FA_F64 ? 1e-12 : type == FA_F32 ? 2e-5 : type == FA_F16 ? 4e-3 : 3e-2;
}

static fa_dtype lse_type(fa_dtype type) { return type == FA_F64 ? FA_F64 : FA_F32; }

typedef struct tally {
    int32_t wrong;
    double worst;
} tally;

static void compare(tally *t, double got, double want, double most) {
    const double difference = got == want ? 0 : fabs(got - want);
    if (!(difference <= t->worst)) t->worst = difference;
    t->wrong += !(difference <= most);
}

static tally run_forward(const fa_params *p, fa_error *error) {
    const fa_what *w = &p->what;
    const fa_dtype type = w->dtype;
    tally t = {0, 0};
    fa_choice choice;
    if (fa_cpu.forward->reject(p, &choice, error) != FA_OK ||
        fa_cpu.forward->run(p, &choice, NULL, error) != FA_OK)
        return (tally){1, 0};
    naive n = naive_open(p);
    for (int64_t row = 0; row < (int64_t)w->b * w->hq * w->sq; ++row) {
        int64_t i = row % w->sq, h = row / w->sq % w->hq, b = row / w->sq / w->hq;
        double out[257], lse = naive_row(&n, b, h, i, out);
        compare(&t, get(w->lse.data, lse_type(type), offset(&w->lse, b, h, i, 0)), lse,
                allowed(type) * fmax(1, fabs(lse)));
        for (int32_t c = 0; c < w->dv; ++c)
            compare(&t, get(w->out.data, type, offset(&w->out, b, h, i, c)), out[c], allowed(type));
    }
    naive_close(&n);
    return t;
}

/* An array to be written: NaN in every float dtype before. */
static fa_tensor make_poisoned(fa_dtype type, const int64_t shape[4]) {
    fa_tensor t = make(type, shape[0], shape[1], shape[2], shape[3]);
    for (int64_t i = 0; i < count(&t); ++i) {
        int64_t c = i % shape[3], row = i / shape[3], h = row / shape[2] % shape[1];
        int64_t at = offset(&t, row / shape[2] / shape[1], h, row % shape[2], c);
        memset((char *)t.data + at * fa_dtype_size(type), 0xff, (size_t)fa_dtype_size(type));
    }
    return t;
}

/* Which gradients, of what; the caller frees the arrays. */
static void choose_backward(fa_backward *g) {
    const fa_what *w = &g->forward.what;
    const fa_scores *s = &g->forward.scores;
    if (chance(80)) g->dout = make(w->dtype, w->b, w->hq, w->sq, w->dv);
    if (!g->dout.data || chance(40)) g->dlse = make(lse_type(w->dtype), w->b, w->hq, w->sq, 1);
    if (chance(80)) g->dq = make_poisoned(w->dtype, w->q.shape);
    if (chance(80)) g->dk = make_poisoned(w->dtype, w->k.shape);
    if (chance(80)) g->dv = make_poisoned(w->dtype, w->v.shape);
    if (s->mask.data && s->mask_dtype != FA_BOOL && chance(80)) {
        int64_t shape[4];
        for (int i = 0; i < 4; ++i) /* a mask of one element, or one that was expanded */
            shape[i] = i < 3 && !s->mask.stride[i] && chance(70) ? 1 : s->mask.shape[i];
        g->dmask = make_poisoned(s->mask_dtype, shape);
    }
    if (s->sink && chance(80)) {
        g->dsink = malloc(sizeof *g->dsink * 2 * (size_t)w->hq);
        g->dsink_stride = 1 + below(2);
    }
    g->deterministic = chance(50);
}

/* The naive loops' gradients of all rows. */
static sums naive_backward(const naive *n, const fa_backward *g) {
    const fa_what *w = &g->forward.what;
    const int64_t mask = g->dmask.data ? count(&g->dmask) : 0;
    const int64_t sizes[] = {count(&w->q), count(&w->k), count(&w->v), mask, w->hq};
    sums s;
    for (int which = 0; which < GRADIENTS; ++which) {
        s.value[which] = calloc((size_t)sizes[which] + 1, sizeof(double));
        s.size[which] = calloc((size_t)sizes[which] + 1, sizeof(double));
    }
    for (int64_t row = 0; row < (int64_t)w->b * w->hq * w->sq; ++row) {
        int64_t i = row % w->sq, h = row / w->sq % w->hq, b = row / w->sq / w->hq;
        double dout[257] = {0}, dlse = 0;
        for (int32_t c = 0; c < w->dv && g->dout.data; ++c)
            dout[c] = get(g->dout.data, w->dtype, offset(&g->dout, b, h, i, c));
        if (g->dlse.data)
            dlse = get(g->dlse.data, lse_type(w->dtype), offset(&g->dlse, b, h, i, 0));
        naive_backward_row(n, b, h, i, dout, dlse, &g->dmask, &s);
    }
    return s;
}

static tally run_backward(const fa_params *p, fa_error *error) {
    fa_backward g = {.forward = *p};
    const fa_dtype type = p->what.dtype;
    tally t = {0, 0};
    fa_choice choice;
    choose_backward(&g);
    if (fa_cpu.backward->reject(&g, &choice, error) != FA_OK ||
        fa_cpu.backward->run(&g, &choice, NULL, error) != FA_OK)
        t.wrong = 1;
    naive n = naive_open(p);
    sums s = naive_backward(&n, &g);
    const fa_tensor *const made[] = {&g.dq, &g.dk, &g.dv, &g.dmask};
    for (int which = 0; which < DSINK && !t.wrong; ++which) {
        const fa_dtype its = which == DMASK ? p->scores.mask_dtype : type;
        double *got = dense(made[which], its), unit = fmax(allowed(type), allowed(its));
        const double least = type == FA_F16 || its == FA_F16 ? 1.2e-7 : 1e-37; /* that is kept */
        for (int64_t i = 0; i < count(made[which]) && made[which]->data; ++i) {
            const double size = s.size[which][i]; /* 0 is exact */
            compare(&t, got[i], s.value[which][i], size > 0 ? unit * size + least : 0);
        }
        free(got);
    }
    for (int32_t h = 0; h < p->what.hq && g.dsink && !t.wrong; ++h)
        compare(&t, g.dsink[h * g.dsink_stride], s.value[DSINK][h],
                fmax(allowed(type), allowed(FA_F32)) * s.size[DSINK][h]);
    for (int which = 0; which < GRADIENTS; ++which) free(s.value[which]), free(s.size[which]);
    naive_close(&n);
    void *memory[] = {g.dout.data, g.dlse.data,  g.dq.data, g.dk.data,
                      g.dv.data,   g.dmask.data, g.dsink};
    for (size_t i = 0; i < sizeof memory / sizeof *memory; ++i) free(memory[i]);
    return t;
}

static void choose_what(fa_what *w, fa_dtype type) {
    static const int32_t heads[][3] = {{1, 1, 1}, {4, 2, 2}, {6, 3, 2}, {5, 1, 1}, {3, 3, 3}};
    static const int32_t sizes[] = {1, 3, 8, 16, 31, 64, 80, 128, 160, 257};
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
    w->lse = make(lse_type(type), w->b, w->hq, w->sq, 1);
}

/* Whether one case is right, forward and backward. */
static int32_t run(fa_dtype type, int32_t number) {
    state = (uint64_t)number;
    fa_params p = {.where.device_type = FA_CPU};
    fa_what *w = &p.what;
    fa_error error = {""};
    choose_what(w, type);
    choose_masks(&p);
    choose_scores(&p);
    tally out = run_forward(&p, &error), gradients = {0, 0};
    if (!out.wrong) gradients = run_backward(&p, &error);
    if (out.wrong || gradients.wrong)
        printf(
            "case %d, dtype %d: b %d heads %d %d %d sq %d sk %d d %d dv %d flags %u: %d wrong in "
            "out, worst %g; %d in gradients, worst %g %s\n",
            number, type, w->b, w->hq, w->hk, w->hv, w->sq, w->sk, w->d, w->dv, p.masks.flags,
            out.wrong, out.worst, gradients.wrong, gradients.worst, error.text);
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
    return !out.wrong && !gradients.wrong;
}

/* ./driver [cases per dtype, 40] */
int main(int count, char **words) {
    static const fa_dtype types[] = {FA_F64, FA_F32, FA_F16, FA_BF16};
    int32_t cases = count > 1 ? atoi(words[1]) : 40, failed = 0;
    for (int32_t t = 0; t < 4; ++t)
        for (int32_t n = 0; n < cases; ++n) failed += !run(types[t], n);
    printf("level %s: %d passed, %d failed\n", fa_cpu_level(), 4 * cases - failed, failed);
    return failed != 0 || cases < 1;
}
