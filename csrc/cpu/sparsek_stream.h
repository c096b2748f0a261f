/* sparsek_stream.h - the threshold tau of the SparseK operator over the growing prefixes of one
 * line of scores, in memory of the present support.
 *
 * tau never falls, so a key passes at most twice from one set to the next: `ones`, whose gate is 1
 * (z - 1 > tau); `some`, whose gate is between 0 and 1; and the dropped, of which only the greatest
 * is remembered. Each set is a heap with the least on top, which is what passes first: amortised
 * O(log(support)) a key, whatever the scores.
 */
#ifndef FASTATTN_CPU_SPARSEK_STREAM_H
#define FASTATTN_CPU_SPARSEK_STREAM_H

#include "cpu.h"

/* ---- a heap of numbers, the least on top ---- */

typedef struct heap {
    double *x;
    int64_t n, room;
} heap;

/* 0: no memory. */
static inline int heap_push(heap *h, double z) {
    if (h->n == h->room) {
        const int64_t room = h->room ? 2 * h->room : 256;
        double *x = realloc(h->x, (size_t)room * sizeof *x);
        if (!x) return 0;
        h->x = x, h->room = room;
    }
    int64_t at = h->n++;
    for (; at && h->x[(at - 1) / 2] > z; at = (at - 1) / 2) h->x[at] = h->x[(at - 1) / 2];
    h->x[at] = z;
    return 1;
}

static inline double heap_pop(heap *h) {
    const double top = h->x[0], z = h->x[--h->n];
    int64_t at = 0;
    for (int64_t child; (child = 2 * at + 1) < h->n; at = child) {
        if (child + 1 < h->n && h->x[child + 1] < h->x[child]) child++;
        if (h->x[child] >= z) break;
        h->x[at] = h->x[child];
    }
    h->x[at] = z;
    return top;
}

static inline double heap_top(const heap *h) { return h->n ? h->x[0] : INFINITY; }

/* ---- the stream ---- */

typedef struct stream {
    heap ones, some;
    double k;    /* less one for each score of +inf so far; 0 or less: nothing else is kept */
    double tau;  /* of the keys so far; of float64 arithmetic, whatever the dtype */
    double last; /* the greatest that was dropped */
    /* The sum of z - base over `some`, and what its roundings lost. Near the base, which follows
     * the scores, it has the digits that a sum of z itself would lose. */
    double base, sum, lost;
} stream;

static inline stream stream_start(double k) {
    return (stream){.k = k, .tau = k > 0 ? -INFINITY : INFINITY, .last = -INFINITY};
}

static inline void stream_end(stream *s) {
    free(s->ones.x);
    free(s->some.x);
}

static inline void stream_sum(stream *s, double x) {
    const double sum = s->sum + x, added = sum - s->sum;
    s->lost += (s->sum - (sum - added)) + (x - added);
    s->sum = sum;
}

static inline int stream_push_some(stream *s, double z) {
    if (!s->some.n) s->base = z, s->sum = s->lost = 0;
    stream_sum(s, z - s->base);
    return heap_push(&s->some, z);
}

/* What is in `some` lies within 1 of its least, and will have left when that is 1 higher: so each
 * key is summed once more at most. */
static inline void stream_move_base(stream *s, double base) {
    s->base = base, s->sum = s->lost = 0;
    for (int64_t i = 0; i < s->some.n; i++) stream_sum(s, s->some.x[i] - base);
}

/* Where the line that f is between the breakpoints around tau reaches k. */
static inline double stream_reach(stream *s) {
    const double c = heap_top(&s->some), n = (double)s->some.n;
    if (c - s->base > 1) stream_move_base(s, c);
    const double above = (s->sum - n * (c - s->base)) + s->lost; /* sum of z - c */
    return c + (above + ((double)s->ones.n - s->k)) / n;
}

/* Moves tau up to where f is k, f being k or more at tau. 0: no memory. */
static inline int stream_advance(stream *s) {
    for (;;) {
        const double least = heap_top(&s->some), first = heap_top(&s->ones) - 1;
        const double end = least < first ? least : first; /* the next breakpoint */
        if (s->some.n) {
            const double tau = stream_reach(s);
            if (tau < end) {
                if (tau > s->tau) s->tau = tau;
                return 1;
            }
        } else if ((double)s->ones.n <= s->k) {
            /* Less than k: fewer candidates than that, or a rounding; there is no plateau. */
            const double middle = 0.5 * first + 0.5 * s->last;
            if ((double)s->ones.n == s->k && middle > s->tau) s->tau = middle;
            return 1;
        }
        s->tau = end;
        while (heap_top(&s->some) <= end) {
            s->last = heap_pop(&s->some);
            stream_sum(s, s->base - s->last);
        }
        while (s->ones.n && heap_top(&s->ones) - 1 <= end)
            if (!stream_push_some(s, heap_pop(&s->ones))) return 0;
    }
}

/* One more candidate, or none where it is -inf. 0: no memory. */
static inline int stream_add(stream *s, double z) {
    if (z == -INFINITY || isnan(s->tau)) return 1;
    if (isnan(z)) {
        s->tau = NAN;
        return 1;
    }
    if (z == INFINITY) s->k -= 1;
    if (s->k <= 0) s->tau = INFINITY;
    if (s->tau == INFINITY) return 1;
    if (z < INFINITY) {
        const int added = z - 1 > s->tau ? heap_push(&s->ones, z)
                          : z > s->tau   ? stream_push_some(s, z)
                                         : (s->last = z > s->last ? z : s->last, 1);
        if (!added) return 0;
    }
    return stream_advance(s);
}

/* ---- gates ---- */

/* Of a score by its row's tau, in the arithmetic of tau's dtype, which is what the backward pass
 * computes once more; k: the request's. */
static inline float gate_f32(float z, float tau, double k) {
    const float p = z - tau;
    if (isinf(z) && !isnan(tau)) return z > 0 && k > 0;
    if (z == -INFINITY) return 0;
    return p < 0 ? 0 : p > 1 ? 1 : p;
}

static inline double gate_f64(double z, double tau, double k) {
    const double p = z - tau;
    if (isinf(z) && !isnan(tau)) return z > 0 && k > 0;
    if (z == -INFINITY) return 0;
    return p < 0 ? 0 : p > 1 ? 1 : p;
}

/* Score j of a stream, whose first is at x. */
static inline double score(const void *x, fa_dtype dtype, int64_t at) {
    switch (dtype) {
        case FA_F64:
            return ((const double *)x)[at];
        case FA_F32:
            return ((const float *)x)[at];
        case FA_F16:
            return fa_f16_to_float(((const uint16_t *)x)[at]);
        default:
            return fa_bf16_to_float(((const uint16_t *)x)[at]);
    }
}

/* ---- a request ---- */

static inline int64_t count_streams(const fa_sparsek *r) {
    int64_t n = 1;
    for (int32_t i = 0; i < r->lead; i++) n *= r->shape[i];
    return n;
}

/* How many scores of a stream are candidates, where there are no lists. */
static inline int32_t count_candidates(const fa_sparsek *r, int64_t stream) {
    const int32_t *n = r->lengths.data;
    return n ? fa_clamp(n[fa_stream_place(r, &r->lengths, stream)], 0, r->sk) : r->sk;
}

#endif
