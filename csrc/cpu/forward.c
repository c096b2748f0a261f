/* forward.c - attention on the CPU: shares out blocks of rows among threads.
 *
 * Stop 5 of 6, through cpu.c. Next: run_rows() in csrc/cpu/forward_kernel.h, in vectors of simd.h;
 * this file compiles it for every level.
 */
#include "groups.h"
#include "pool.h"

/* lse of a row, where it is wanted. */
static void write_lse(const fa_what *what, const fa_group *g, fa_row row, double value) {
    const int64_t h = g->h + row.head, s = (int64_t)g->sequence.q + row.row;
    if (what->lse.data) put_lse(&what->lse, what->dtype, element(&what->lse, g->b, h, s), value);
}

#define FA_KERNEL "forward_kernel.h"
#include "levels.h"

static const fa_cpu_kernel *const kernels[][FA_DTYPE_COUNT] = FA_KERNELS;

const fa_cpu_kernel *fa_forward_kernel(fa_level level, fa_dtype dtype) {
    return kernels[level][dtype];
}

/* A call is cut into strips of one group, mostly a panel of rows each. Threads draw them, several
 * at once that share what is read of K and V, fewer towards the end, so that no thread waits long
 * for the last one. Where sequences are packed, a strip is `rows` rows of the packed axis and takes
 * the blocks that start there: the work is shared out by what there is, whatever the sequences'
 * lengths. A group is one head where that has rows enough by itself. */
typedef struct call {
    const fa_params *p;
    const fa_cpu_kernel *kernel;
    int rows;               /* that run() takes at once */
    int strip, most;        /* rows in a strip; strips, or splits, in a draw */
    int threads;            /* that draw */
    int heads;              /* of a group */
    int64_t length;         /* rows of a group: `heads` times sq, or total_q */
    int64_t strips, in_all; /* of a group; of all groups */
    int splits;   /* of the keys of a strip, at most: 1, or a draw is one split of one strip */
    char *states; /* [group][strip][split], state bytes each */
    size_t state;
    atomic_int *done; /* [group][strip]: splits that are there */
    atomic_llong next;
} call;

/* Rows without a key: 0, and for lse -inf or the sink. */
void fa_empty_rows(const fa_params *p, const fa_group *g, int64_t first, int64_t end,
                   const float *sink) {
    const fa_what *what = &p->what;
    const int64_t size = fa_dtype_size(what->dtype);
    for (int64_t at = first; at < end; at++) {
        const fa_row row = find_row(g, at);
        const int64_t h = g->h + row.head, s = (int64_t)g->sequence.q + row.row;
        char *to = (char *)what->out.data + element(&what->out, g->b, h, s) * size;
        if (what->out.stride[3] == 1)
            memset(to, 0, (size_t)(what->dv * size));
        else
            for (int64_t i = 0; i < what->dv; i++)
                memset(to + i * what->out.stride[3] * size, 0, (size_t)size);
        write_lse(what, g, row, sink ? sink[h * p->scores.sink_stride] : -INFINITY);
    }
}

/* Rows first .. end - 1 of one group. */
static void run_block(const call *c, const fa_group *g, int64_t first, int64_t end, void *memory) {
    int64_t valid = (int64_t)g->sequence.lengths.sq * g->heads;
    valid = valid < first ? first : valid < end ? valid : end;
    if (first < valid && row_keys(g, first).begin < row_keys(g, valid - 1).end)
        c->kernel->run(c->p, g, first, (int)(valid - first), memory);
    else
        fa_empty_rows(c->p, g, first, valid, c->p->scores.sink);
    fa_empty_rows(c->p, g, valid, end, NULL);
}

/* Sequence b and the heads from h on; the one past the last has the packed rows of none. */
static inline fa_group find_group(const call *c, int64_t b, int64_t h) {
    const fa_what *what = &c->p->what;
    const fa_varlen *v = &c->p->varlen;
    fa_group g = {.sequence.q_end = v->total_q, .b = b, .h = h, .heads = c->heads};
    if (b < what->b)
        g.sequence = v->cu_k ? fa_find_sequence(v, &c->p->masks, b, what->sq, what->sk)
                             : fa_find_cached(v, &c->p->masks, b, what->sq, what->sk);
    else
        g.sequence.q = fa_first_row(v->cu_q, v->cu_q_stride, b, v->total_q);
    return g;
}

/* The blocks that start in the rows begin .. end - 1 of the packed axis. */
static void run_packed(const call *c, int64_t h, int64_t begin, int64_t end, void *memory) {
    const fa_what *what = &c->p->what;
    const fa_varlen *v = &c->p->varlen;
    int64_t low = 0, high = what->b; /* finds the first sequence that starts in these rows */
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (fa_first_row(v->cu_q, v->cu_q_stride, middle, v->total_q) * (int64_t)c->heads < begin)
            low = middle + 1;
        else
            high = middle;
    }
    /* The one before may reach into them; the one past the last is the rows of none. */
    for (int64_t b = low ? low - 1 : 0; b <= what->b; b++) {
        const fa_group g = find_group(c, b, h);
        const int64_t start = (int64_t)g.sequence.q * c->heads;
        const int64_t length = (int64_t)g.sequence.q_end * c->heads - start;
        if (start >= end) break;
        const int64_t stop = end - start < length ? end - start : length;
        int64_t first = start < begin ? (begin - start + c->rows - 1) / c->rows * c->rows : 0;
        for (; first < stop; first += c->rows)
            run_block(c, &g, first, length - first < c->rows ? length : first + c->rows, memory);
    }
}

/* Rows first .. end - 1 of one group, or of the packed axis. */
static void run_strips(const call *c, int64_t b, int64_t h, int64_t first, int64_t end,
                       void *memory) {
    if (c->p->varlen.cu_q) {
        run_packed(c, h, first, end, memory);
        return;
    }
    const fa_group g = find_group(c, b, h);
    run_block(c, &g, first, end, memory);
}

/* One split of one strip. Who computes the last one of a strip joins them. */
static void run_part(const call *c, int64_t at, void *memory) {
    const int64_t part = at / c->splits, strip = part % c->strips, group = part / c->strips;
    const int64_t of_a_sequence = c->p->what.hq / c->heads;
    const fa_group g = find_group(c, group / of_a_sequence, group % of_a_sequence * c->heads);
    const int64_t length = (int64_t)(g.sequence.q_end - g.sequence.q) * c->heads;
    int64_t first = strip * c->rows, end = first + c->rows;
    int64_t valid = (int64_t)g.sequence.lengths.sq * c->heads;
    if (first > length) first = length;
    if (end > length || strip == c->strips - 1) end = length;
    if (valid > end) valid = end;
    const int split = (int)(at % c->splits), count = (int)(valid - first);
    fa_interval splits = {0, 0};
    if (count > 0 && row_keys(&g, first).begin < row_keys(&g, valid - 1).end)
        splits = find_splits(&g, first, count);
    if (splits.end - splits.begin <= 1) {
        if (split == 0) run_block(c, &g, first, end, memory);
        return;
    }
    if (split < splits.begin || split >= splits.end) return;
    char *states = c->states + part * c->splits * c->state;
    c->kernel->split(c->p, &g, first, count, split, memory, states + split * c->state);
    if (atomic_fetch_add(&c->done[part], 1) + 1 < splits.end - splits.begin) return;
    c->kernel->join(c->p, &g, first, count, splits.begin, splits.end, memory, states, c->state);
    fa_empty_rows(c->p, &g, valid, end, NULL);
}

/* The next strips, from *at on; returns how many. */
static int64_t draw(call *c, int64_t *at) {
    long long from = atomic_load_explicit(&c->next, memory_order_relaxed);
    for (;;) {
        const int64_t left = c->in_all - from;
        if (left <= 0) return 0;
        int64_t n = left / (4 * c->threads) + 1;
        if (n > c->most) n = c->most;
        if (c->splits == 1 && c->strips > 1 && n > c->strips - from % c->strips)
            n = c->strips - from % c->strips;
        *at = from;
        if (atomic_compare_exchange_weak_explicit(&c->next, &from, from + n, memory_order_relaxed,
                                                  memory_order_relaxed))
            return n;
    }
}

static void work(void *argument) {
    call *c = argument;
    const fa_what *what = &c->p->what;
    char small[1 << 16]; /* a tiny call does without malloc */
    size_t bytes = c->kernel->scratch(c->p, c->rows) + 63;
    char *memory = bytes <= sizeof small ? small : malloc(bytes);
    if (!memory) return; /* the other threads do the work */
    char *aligned = memory + (-(uintptr_t)memory & 63);
    for (int64_t at = 0, n; (n = draw(c, &at)) > 0;) {
        if (c->splits > 1) {
            while (n-- > 0) run_part(c, at++, aligned);
            continue;
        }
        for (int64_t end = at + n, more; at < end; at += more) { /* group by group */
            const int64_t head = at / c->strips * c->heads, strip = at % c->strips;
            more = c->strips - strip < end - at ? c->strips - strip : end - at;
            /* Last rows first: under a causal mask they see most, and short work at the end evens
             * out. */
            const int64_t first = (c->strips - strip - more) * c->strip;
            const int64_t past = (c->strips - strip) * c->strip;
            run_strips(c, head / what->hq, head % what->hq, first,
                       past < c->length ? past : c->length, aligned);
        }
    }
    if (memory != small) free(memory);
}

/* Neighbouring query heads whose key head and value head are the same: of the numbers of those
 * that share the one and that share the other, the greatest common divisor. */
static int heads_that_share(const fa_what *what) {
    int a = what->hq / what->hk, b = what->hq / what->hv;
    while (b) {
        const int rest = a % b;
        a = b, b = rest;
    }
    return a;
}

/* Where there are few groups, of few rows, threads share out their keys too. Without memory for
 * that they do not. */
static void split_keys(call *c, int64_t groups, int keys, int threads) {
    const fa_what *what = &c->p->what;
    const int64_t splits = (keys + FA_SPLIT_KEYS - 1) / FA_SPLIT_KEYS;
    const int64_t strips = ((int64_t)c->heads * what->sq + c->rows - 1) / c->rows;
    if (c->p->varlen.cu_q) groups += what->hq / c->heads; /* the rows of none */
    c->splits = 1;
    if (threads == 1 || what->sq > FA_SPLIT_ROWS || splits <= 1 || !strips) return;
    const int64_t parts = groups * strips, most = splits < FA_SPLITS ? splits : FA_SPLITS;
    const size_t state = c->kernel->state(c->p, c->rows);
    if (parts >= 16 * threads || (size_t)(parts * most) > FA_SPLIT_BYTES / state) return;
    c->done = calloc((size_t)parts, sizeof *c->done);
    c->states = c->done ? aligned_alloc(64, (size_t)(parts * most) * state) : NULL;
    if (!c->states) return;
    c->splits = (int)most, c->state = state;
    c->strips = strips, c->most = 8; /* neighbours: what a split asks for ahead is the thread's */
    c->in_all = parts * most;
}

/* How the rows are cut. */
static void cut_rows(call *c, int64_t groups, int threads) {
    const int lanes = c->kernel->lanes, packed = c->p->varlen.cu_q != NULL;
    c->strip = packed || c->rows < c->kernel->strip ? c->rows : c->kernel->strip;
    c->strips = (c->length + c->strip - 1) / c->strip;
    while (threads > 1 && c->strip > lanes && groups * c->strips < 4 * threads) {
        c->strip -= lanes;
        c->strips = (c->length + c->strip - 1) / c->strip;
    }
    c->most = (c->rows + c->strip - 1) / c->strip;
    c->rows = packed ? c->strip : c->most * c->strip;
    if (c->strips == 1) c->most = 64;
    c->in_all = groups * c->strips;
}

fa_status fa_cpu_forward(const fa_params *p, fa_level level, fa_error *error) {
    const fa_what *what = &p->what;
    const int packed = p->varlen.cu_q != NULL;
    call c = {.p = p, .kernel = kernels[level][what->dtype]};
    const int64_t heads = packed ? what->hq : (int64_t)what->b * what->hq;
    c.length = packed ? p->varlen.total_q : what->sq;
    if (heads == 0 || c.length == 0) return FA_OK;
    c.heads = what->sq < c.kernel->rows ? heads_that_share(what) : 1;
    c.length *= c.heads;
    const int64_t groups = heads / c.heads, longest = (int64_t)c.heads * (what->sq ? what->sq : 1);
    const int lanes = c.kernel->lanes;
    const int keys = p->varlen.cu_k && p->varlen.total_k < what->sk ? p->varlen.total_k : what->sk;
    /* Below some 40 us of work waking a thread costs more than it brings. */
    const double products = (double)groups * c.length * keys * (what->d + what->dv);
    const int threads = products < 2e6 ? 1 : fa_pool_threads();
    c.rows = longest < c.kernel->rows ? ((int)longest + lanes - 1) / lanes * lanes : c.kernel->rows;
    /* Fewer rows of great heads: they are to stay in the cache, and to have memory at all. */
    while (c.rows > lanes && (int64_t)c.rows * (what->d + (int64_t)what->dv) > 1 << 18)
        c.rows = (c.rows / 2 + lanes - 1) / lanes * lanes;
    split_keys(&c, packed ? groups * what->b : groups, keys, threads);
    if (c.splits == 1) cut_rows(&c, groups, threads);
    c.threads = c.in_all < threads ? (int)c.in_all : threads;
    fa_pool_run(c.threads, work, &c);
    free(c.states);
    free(c.done);
    if (atomic_load(&c.next) < c.in_all) { /* no thread had memory */
        snprintf(error->text, sizeof error->text, "no memory for the CPU backend's scratch");
        return FA_MEMORY;
    }
    return FA_OK;
}
