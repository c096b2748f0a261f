/* cpu.c - the CPU backend: chooses the vector level, shares out blocks of rows among threads,
 * merges.
 *
 * Stop 5 of 6. Next: run_rows() in csrc/cpu/kernel.h, in vectors of simd.h; this file compiles it
 * for every level.
 */
#define _GNU_SOURCE
#include <float.h>
#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "half.h"
#include "pool.h"
#include "fastattn.h"
#include "mask.h"
#include "philox.h"
#include "support.h"

#define FA_LOG2E 1.44269504088896340736
#define FA_LN2 0.69314718055994530942
#define FA_FAST static inline __attribute__((always_inline))
#define FA_JOIN_(a, b) a##_##b
#define FA_JOIN(a, b) FA_JOIN_(a, b)

/* Element (b, h, s, 0) of a tensor, in elements. */
static int64_t element(const fa_tensor *t, int64_t b, int64_t h, int64_t s) {
    return b * t->stride[0] + h * t->stride[1] + s * t->stride[2];
}

/* Element `at` of lse: float64 where the arrays are, else float32. */
static void put_lse(const fa_tensor *lse, fa_dtype type, int64_t at, double value) {
    if (type == FA_F64)
        ((double *)lse->data)[at] = value;
    else
        ((float *)lse->data)[at] = (float)value;
}

/* ---- the levels ---- */

/* Query heads that share the keys and values of one sequence. Their rows are one list, in which
 * the heads alternate, so that along it the ends of what a row sees never decrease. */
typedef struct fa_group {
    fa_sequence sequence;
    int64_t b, h; /* h: the first of `heads` */
    int heads;
} fa_group;

/* Row `at` of a group's list: row `row` of the sequence, of head h + `head`. */
typedef struct fa_row {
    int head, row;
} fa_row;

static fa_row find_row(const fa_group *g, int64_t at) {
    if (g->heads == 1) return (fa_row){0, (int)at}; /* a division is 5 % of a row of one key */
    return (fa_row){(int)(at % g->heads), (int)(at / g->heads)};
}

static fa_interval row_keys(const fa_group *g, int64_t at) {
    return fa_row_interval(g->sequence.lengths, find_row(g, at).row);
}

/* Where a row starts, in elements from row 0 of the first head on. */
static int64_t row_offset(const fa_tensor *t, fa_row row) {
    return row.head * t->stride[1] + row.row * t->stride[2];
}

/* lse of a row, where it is wanted. */
static void write_lse(const fa_what *what, const fa_group *g, fa_row row, double value) {
    const int64_t h = g->h + row.head, s = (int64_t)g->sequence.q + row.row;
    if (what->lse.data) put_lse(&what->lse, what->dtype, element(&what->lse, g->b, h, s), value);
}

typedef struct fa_cpu_kernel {
    int lanes, strip, rows; /* rows in a vector, in a strip; the most that run() takes at once */
    size_t (*scratch)(const fa_params *p, int rows);
    void (*run)(const fa_params *p, const fa_group *g, int64_t first, int count, void *memory);
} fa_cpu_kernel;

#define FA_LEVEL portable /* 16-byte vectors: SSE2, NEON, or whatever gcc makes of them */
#define FA_BYTES 16
#define FA_X86 0
#define FA_VECTORS 3
#define FA_ACCUMULATORS 12
#include "level.h"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define FA_LEVEL avx2
#define FA_BYTES 32
#define FA_X86 256
#define FA_VECTORS 3
#define FA_ACCUMULATORS 12
#include "level.h"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#define FA_LEVEL avx512
#define FA_BYTES 64
#define FA_X86 512
#define FA_VECTORS 4
#define FA_ACCUMULATORS 16
#include "level.h"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#define FA_NAME bf16_avx512_bf16
#define FA_REAL float
#define FA_INT int32_t
#define FA_PAIRS 1
#define FA_BYTES 64
#define FA_X86 512
#define FA_VECTORS 4
#define FA_ACCUMULATORS 16
#include "kernel.h"
#pragma GCC pop_options
#endif

typedef struct level {
    const char *name;
    int (*here)(void);               /* whether this machine has it, and all before it */
    const char *kernels[5];          /* names, by dtype */
    const fa_cpu_kernel *by_type[5]; /* float16, and mostly bfloat16, run the float32 kernel */
} level;

static int has_portable(void) { return 1; }

#if defined(__x86_64__)
static int has_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
}

static int has_avx512(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

static int has_avx512_bf16(void) { return __builtin_cpu_supports("avx512bf16"); }
#endif

/* clang-format off */
#define LEVEL(name, f64, f32, bf16)                                                            \
    {#name,                                                                                    \
     has_##name,                                                                               \
     {NULL, "cpu_" #name "_f64", "cpu_" #name "_f32", "cpu_" #name "_f16", "cpu_" #name "_bf16"}, \
     {NULL, &kernel_##f64, &kernel_##f32, &kernel_##f32, &kernel_##bf16}}
/* clang-format on */

static const level levels[] = {
    LEVEL(portable, f64_portable, f32_portable, f32_portable),
#if defined(__x86_64__)
    LEVEL(avx2, f64_avx2, f32_avx2, f32_avx2),
    LEVEL(avx512, f64_avx512, f32_avx512, f32_avx512),
    LEVEL(avx512_bf16, f64_avx512, f32_avx512, bf16_avx512_bf16),
#endif
};

static pthread_once_t level_once = PTHREAD_ONCE_INIT;
static const level *chosen = &levels[0];

/* The highest level that this machine has. FASTATTN_CPU_LEVEL names a lower one, for tests. */
static void choose_level(void) {
    const int count = sizeof levels / sizeof *levels;
    int highest = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
#endif
    while (highest + 1 < count && levels[highest + 1].here()) highest++;
    const char *wanted = getenv("FASTATTN_CPU_LEVEL");
    for (int i = 0; wanted && i < highest; i++)
        if (strcmp(wanted, levels[i].name) == 0) highest = i;
    chosen = &levels[highest];
}

static const level *the_level(void) {
    pthread_once(&level_once, choose_level);
    return chosen;
}

const char *fa_cpu_level(void) { return the_level()->name; }

int32_t fa_cpu_threads(void) { return fa_pool_threads(); }

void fa_cpu_set_threads(const int32_t *n) {
    char unused[160];
    fa_pool_threads(); /* the setup comes first, or it would undo this */
    atomic_store(&fa_pool_size, n ? *n : fa_pool_default(unused, sizeof unused));
}

const char *fa_cpu_warning(void) {
    fa_pool_threads();
    return fa_pool_warning;
}

/* ---- one call ---- */

/* A call is cut into strips of one group, mostly a panel of rows each. Threads draw them, several
 * at once that share what is read of K and V, fewer towards the end, so that no thread waits long
 * for the last one. Where sequences are packed, a strip is `rows` rows of the packed axis and takes
 * the blocks that start there: the work is shared out by what there is, whatever the sequences'
 * lengths. A group is one head where that has rows enough by itself. */
typedef struct call {
    const fa_params *p;
    const fa_cpu_kernel *kernel;
    int rows;               /* that run() takes at once */
    int strip, most;        /* rows in a strip; strips in a draw */
    int threads;            /* that draw */
    int heads;              /* of a group */
    int64_t length;         /* rows of a group: `heads` times sq, or total_q */
    int64_t strips, in_all; /* of a group; of all groups */
    atomic_llong next;
} call;

/* Rows without a key: 0, and for lse -inf or the sink. */
static void empty_rows(const fa_params *p, const fa_group *g, int64_t first, int64_t end,
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
        empty_rows(c->p, g, first, valid, c->p->scores.sink);
    empty_rows(c->p, g, valid, end, NULL);
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
        fa_group g = {.sequence.q_end = v->total_q, .b = b, .h = h, .heads = c->heads};
        if (b < what->b)
            g.sequence = fa_find_sequence(v, &c->p->masks, b, what->sq, what->sk);
        else
            g.sequence.q = fa_first_row(v->cu_q, v->cu_q_stride, b, v->total_q);
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
    const fa_what *what = &c->p->what;
    if (c->p->varlen.cu_q) {
        run_packed(c, h, first, end, memory);
        return;
    }
    const fa_group g = {
        .b = b,
        .h = h,
        .heads = c->heads,
        .sequence = fa_find_sequence(&c->p->varlen, &c->p->masks, b, what->sq, what->sk)};
    run_block(c, &g, first, end, memory);
}

/* The next strips, from *at on; returns how many. */
static int64_t draw(call *c, int64_t *at) {
    long long from = atomic_load_explicit(&c->next, memory_order_relaxed);
    for (;;) {
        const int64_t left = c->in_all - from;
        if (left <= 0) return 0;
        int64_t n = left / (4 * c->threads) + 1;
        if (n > c->most) n = c->most;
        if (c->strips > 1 && n > c->strips - from % c->strips) n = c->strips - from % c->strips;
        *at = from;
        if (atomic_compare_exchange_weak_explicit(&c->next, &from, from + n, memory_order_relaxed,
                                                  memory_order_relaxed))
            return n;
    }
}

static void work(void *argument) {
    call *c = argument;
    const fa_what *what = &c->p->what;
    char small[16384]; /* a tiny call does without malloc */
    size_t bytes = c->kernel->scratch(c->p, c->rows) + 63;
    char *memory = bytes <= sizeof small ? small : malloc(bytes);
    if (!memory) return; /* the other threads do the work */
    char *aligned = memory + (-(uintptr_t)memory & 63);
    for (int64_t at = 0, n; (n = draw(c, &at)) > 0;) {
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

static fa_status run_forward(const fa_params *p, const fa_choice *choice, void *workspace,
                             fa_error *error) {
    const fa_what *what = &p->what;
    const level *at = choice->variant;
    (void)workspace;
    const int packed = p->varlen.cu_q != NULL;
    call c = {.p = p, .kernel = at->by_type[what->dtype]};
    const int64_t heads = packed ? what->hq : (int64_t)what->b * what->hq;
    c.length = packed ? p->varlen.total_q : what->sq;
    if (heads == 0 || c.length == 0) return FA_OK;
    c.heads = what->sq < c.kernel->rows ? heads_that_share(what) : 1;
    c.length *= c.heads;
    const int64_t groups = heads / c.heads, longest = (int64_t)c.heads * (what->sq ? what->sq : 1);
    const int lanes = c.kernel->lanes;
    const int keys = packed && p->varlen.total_k < what->sk ? p->varlen.total_k : what->sk;
    /* Below some 40 us of work waking a thread costs more than it brings. */
    const double products = (double)groups * c.length * keys * (what->d + what->dv);
    const int threads = products < 2e6 ? 1 : fa_pool_threads();
    c.rows = longest < c.kernel->rows ? ((int)longest + lanes - 1) / lanes * lanes : c.kernel->rows;
    /* Fewer rows of great heads: they are to stay in the cache, and to have memory at all. */
    while (c.rows > lanes && (int64_t)c.rows * (what->d + (int64_t)what->dv) > 1 << 18)
        c.rows = (c.rows / 2 + lanes - 1) / lanes * lanes;
    c.strip = packed || c.rows < c.kernel->strip ? c.rows : c.kernel->strip;
    c.strips = (c.length + c.strip - 1) / c.strip;
    while (threads > 1 && c.strip > lanes && groups * c.strips < 4 * threads) {
        c.strip -= lanes;
        c.strips = (c.length + c.strip - 1) / c.strip;
    }
    c.most = (c.rows + c.strip - 1) / c.strip;
    c.rows = packed ? c.strip : c.most * c.strip;
    if (c.strips == 1) c.most = 64;
    c.in_all = groups * c.strips;
    c.threads = c.in_all < threads ? (int)c.in_all : threads;
    fa_pool_run(c.threads, work, &c);
    if (atomic_load(&c.next) < c.in_all) { /* no thread had memory */
        snprintf(error->text, sizeof error->text, "no memory for the CPU backend's scratch");
        return FA_MEMORY;
    }
    return FA_OK;
}

/* ---- the operations: support.c declares what they take, and they take all of it ---- */

static fa_status find_device(const fa_where *where, const void **device, fa_error *why) {
    (void)where, (void)why;
    *device = NULL;
    return FA_OK;
}

static fa_status reject_forward(const fa_params *p, fa_choice *choice, fa_error *why) {
    (void)p, (void)why;
    choice->variant = the_level();
    return FA_OK;
}

static const char *name_forward(const fa_params *p, const fa_choice *choice) {
    return ((const level *)choice->variant)->kernels[p->what.dtype];
}

static int64_t no_workspace(const fa_params *p, const fa_choice *choice) {
    (void)p, (void)choice;
    return 0;
}

static const fa_forward_op forward = {FA_CPU_FORWARD, reject_forward, name_forward, no_workspace,
                                      run_forward};

/* ---- merging ---- */

/* lse of part i of row (b, h, s); -inf where it is empty, which some call +inf. */
static double part_lse(const fa_merge *m, int i, int64_t b, int64_t h, int64_t s) {
    const fa_tensor *t = &m->lses[i];
    const int64_t at = element(t, b, h, s);
    const double lse =
        m->dtype == FA_F64 ? ((const double *)t->data)[at] : ((const float *)t->data)[at];
    return lse == INFINITY ? -INFINITY : lse;
}

/* One row: out = sum of w_i out_i / sum of w_i with w_i = exp(lse_i - the largest). Empty parts are
 * not read. */
static void merge_row(const fa_merge *m, int64_t b, int64_t h, int64_t s, double *sum,
                      double *row) {
    const int dv = (int)m->out.shape[3];
    const int64_t size = fa_dtype_size(m->dtype);
    double top = -INFINITY, total = 0;
    for (int i = 0; i < m->n; i++) {
        const double lse = part_lse(m, i, b, h, s);
        if (lse > top) top = lse; /* not a NaN, whose own weight will be one: the row is NaN */
    }
    memset(sum, 0, (size_t)dv * sizeof *sum);
    for (int i = 0; i < m->n; i++) {
        const double lse = part_lse(m, i, b, h, s);
        if (lse == -INFINITY) continue;
        double weight =
            power_f64_portable(base_of_f64_portable(FA_LOG2E), (vec_f64_portable){lse - top})[0];
        total += weight;
        read_row_f64_portable(row,
                              (const char *)m->outs[i].data + element(&m->outs[i], b, h, s) * size,
                              m->dtype, m->outs[i].stride[3], dv);
        for (int j = 0; j < dv; j++) sum[j] += weight * row[j];
    }
    float *single = (float *)row; /* write_row of the float kernel for all but float64 */
    for (int j = 0; j < dv; j++) sum[j] = total == 0 ? 0 : sum[j] / total;
    void *out = (char *)m->out.data + element(&m->out, b, h, s) * size;
    if (m->dtype == FA_F64) {
        write_row_f64_portable(out, m->dtype, m->out.stride[3], sum, dv);
    } else {
        for (int j = 0; j < dv; j++) single[j] = (float)sum[j];
        write_row_f32_portable(out, m->dtype, m->out.stride[3], single, dv);
    }
    double lse =
        total == 0 ? -INFINITY : top + log2_f64_portable((vec_f64_portable){total, 1})[0] * FA_LN2;
    put_lse(&m->lse, m->dtype, element(&m->lse, b, h, s), lse);
}

static fa_status reject_merge(const fa_merge *m, fa_choice *choice, fa_error *why) {
    (void)m, (void)why;
    choice->variant = NULL; /* there is one */
    return FA_OK;
}

static const char *name_merge(const fa_merge *m, const fa_choice *choice) {
    (void)m, (void)choice;
    return "cpu_merge";
}

static int64_t no_merge_workspace(const fa_merge *m, const fa_choice *choice) {
    (void)m, (void)choice;
    return 0;
}

static fa_status run_merge(const fa_merge *m, const fa_choice *choice, void *workspace,
                           fa_error *error) {
    (void)choice, (void)workspace;
    double *memory = malloc(2 * sizeof(double) * (size_t)(m->out.shape[3] + 1));
    if (!memory) {
        snprintf(error->text, sizeof error->text, "no memory for the CPU backend's scratch");
        return FA_MEMORY;
    }
    for (int64_t b = 0; b < m->out.shape[0]; b++)
        for (int64_t h = 0; h < m->out.shape[1]; h++)
            for (int64_t s = 0; s < m->out.shape[2]; s++)
                merge_row(m, b, h, s, memory, memory + m->out.shape[3]);
    free(memory);
    return FA_OK;
}

static const fa_merge_op merge = {FA_CPU_MERGE, reject_merge, name_merge, no_merge_workspace,
                                  run_merge};

const fa_backend fa_cpu = {"cpu", FA_CPU, find_device, &forward, NULL, &merge};
