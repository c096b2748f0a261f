/* sparse_backward.c - the gradients of attention to lists of keys on the CPU, and the mass that it
 * gives to the entries: by groups of heads that share their lists.
 *
 * A task is a group's blocks of queries, or where there are few groups a part of them: it adds to
 * sums of its own for every key, so that neither threads nor their order change a bit. What
 * backward_lists.h computes is in float32, or float64 where the arrays are.
 */
#include "backward_tasks.h"
#include "pool.h"

/* Groups times parts, and parts of a group, at most: each has its sums in memory. */
enum { FA_PARTS = 16, FA_PARTS_OF_GROUP = 8, FA_ROWS_OF_PART = 512, FA_KEYS_OF_TASK = 256 };

typedef struct call {
    const fa_backward *b; /* the caller's, */
    fa_backward roomy;    /* and with scratch for lists of any length */
    const fa_lists *lists;
    const fa_sparsek_attention_backward *kept; /* keys instead of lists; or NULL */
    const fa_backward_kernel *kernel;
    const fa_tensor *entries; /* dgate or mass, of data NULL where it is not wanted */
    fa_dtype entries_type;
    int is_mass;
    int64_t *first; /* blocks of queries, of packed sequences */
    int64_t groups;
    int parts, heads;
    int64_t width[2], bytes; /* numbers of a key's dk and dv; of all sums of a task */
    char *sums;              /* of each task; NULL: they are the thread's */
    double *shared;          /* [group][q block][L] where groups share entries; or NULL */
    double *sinks;           /* [task][head] or NULL */
    fa_gate_sums gates;      /* of kept keys */
    void (*task)(struct call *c, int64_t at, fa_listed *l, char *memory);
    int64_t in_all;
    size_t scratch;
    atomic_llong next;
    atomic_int failed;
} call;

static size_t whole_lines(size_t bytes) { return (bytes + 63) / 64 * 64; }

static void put_number(const fa_tensor *t, fa_dtype type, int64_t at, double x) {
    if (type == FA_F64)
        ((double *)t->data)[at] = x;
    else
        ((float *)t->data)[at] = (float)x;
}

/* Where a group's entries of a block of queries are in a tensor that may broadcast them. */
static int64_t entry_place(const call *c, int64_t b, int64_t h, int64_t block) {
    const fa_tensor *t = c->entries;
    return element(t, t->shape[0] == 1 ? 0 : b, t->shape[1] == 1 ? 0 : h, block);
}

/* ---- a group's blocks of queries ---- */

static void run_block(const call *c, fa_list_task *task, int64_t block, double *entries,
                      char *memory) {
    const fa_group *g = &task->group;
    const int64_t b = c->b->forward.varlen.cu_q ? 0 : g->b, h = g->h / g->heads;
    const int64_t length = c->lists->entries.shape[3], at = c->first[g->b] + block;
    const int64_t begin = block * c->lists->q_block, sq = g->sequence.lengths.sq;
    const int64_t end = sq - begin < c->lists->q_block ? sq : begin + c->lists->q_block;
    if (begin >= end) return;
    fa_read_list(task->listed, &c->b->forward, g->b, h, at, (int32_t)begin, (int32_t)end);
    if (c->entries->data) {
        const int64_t group = g->b * c->b->forward.what.hk + h;
        if (c->shared) entries = c->shared + (group * c->lists->entries.shape[2] + at) * length;
        memset(entries, 0, (size_t)length * sizeof *entries);
        task->entries = entries;
    }
    c->kernel->lists(&c->roomy, task, memory);
    if (!c->entries->data || c->shared) return;
    const int64_t to = entry_place(c, b, h, at);
    for (int64_t i = 0; i < length; i++)
        put_number(c->entries, c->entries_type, to + i * c->entries->stride[3], entries[i]);
}

/* Keys begin .. end - 1 of a group, of parts that are done. */
static void add_parts(const call *c, const fa_group *g, const char *sums, int begin, int end,
                      char *memory) {
    const int64_t of_dk = g->sequence.lengths.sk * c->width[0] * c->kernel->number;
    const fa_rows_task task = {
        .n = c->b->forward.varlen.cu_q ? 0 : g->b,
        .hk = g->h / g->heads,
        .k = g->sequence.k,
        .begin = begin,
        .end = end,
        .dk = c->width[0] ? sums : NULL,
        .dv = c->width[1] ? sums + whole_lines((size_t)of_dk) : NULL,
        .parts = c->parts,
        .apart = c->bytes,
    };
    c->kernel->add_rows(&c->roomy, &task, memory);
}

static void run_group(call *c, int64_t at, fa_listed *l, char *memory) {
    const fa_params *p = &c->b->forward;
    const int64_t group = at / c->parts, part = at % c->parts, hk = p->what.hk;
    char *own = memory + c->scratch;
    double *entries = (double *)(own + whole_lines(fa_list_bytes(c->lists)));
    char *sums = c->sums ? c->sums + at * c->bytes
                         : (char *)entries + whole_lines((size_t)c->lists->entries.shape[3] * 8);
    fa_list_task task = {.listed = l, .is_mass = c->is_mass};
    task.group = fa_listed_group(p, c->lists, group / hk, group % hk, l);
    const int64_t keys = task.group.sequence.lengths.sk;
    const int64_t blocks = fa_q_blocks(c->lists, task.group.sequence.lengths.sq);
    if (c->width[0]) task.dk = sums;
    if (c->width[1]) task.dv = sums + whole_lines((size_t)(keys * c->width[0] * c->kernel->number));
    if (c->sinks) task.sinks = c->sinks + at * c->heads;
    if (c->kept) task.of_keys = c->gates.of_keys + at * c->gates.keys;
    if (c->kept) task.of_rows = c->gates.of_rows + group * c->gates.rows;
    memset(sums, 0, (size_t)c->bytes);
    for (int64_t n = blocks * part / c->parts; n < blocks * (part + 1) / c->parts; n++)
        run_block(c, &task, n, entries, memory);
    if (!c->sums && c->bytes) add_parts(c, &task.group, sums, 0, (int)keys, memory);
}

/* Some keys of a group, of all its parts. */
static void run_keys(call *c, int64_t at, fa_listed *l, char *memory) {
    const fa_params *p = &c->b->forward;
    const int64_t tasks = c->in_all / c->groups, group = at / tasks, hk = p->what.hk;
    const fa_group g = fa_listed_group(p, c->lists, group / hk, group % hk, l);
    const int64_t begin = at % tasks * FA_KEYS_OF_TASK, keys = g.sequence.lengths.sk;
    const int64_t end = keys - begin < FA_KEYS_OF_TASK ? keys : begin + FA_KEYS_OF_TASK;
    if (begin < end)
        add_parts(c, &g, c->sums + group * c->parts * c->bytes, (int)begin, (int)end, memory);
}

/* du of a group. */
static void run_scores(call *c, int64_t at, fa_listed *l, char *memory) {
    (void)l, (void)memory;
    const int64_t hk = c->b->forward.what.hk;
    if (!fa_put_dscores(c->kept, &c->gates, at / hk, at % hk)) atomic_store(&c->failed, 1);
}

static void work(void *argument) {
    call *c = argument;
    const fa_sparsek_attention *selection = c->kept ? &c->kept->selection : NULL;
    const size_t own = whole_lines(fa_list_bytes(c->lists)) +
                       whole_lines((size_t)c->lists->entries.shape[3] * 8) +
                       (c->sums ? 0 : (size_t)c->bytes);
    char *memory = malloc(c->scratch + own + 128 + (selection ? fa_kept_bytes(selection) : 0));
    if (!memory) return; /* the other threads do the work */
    char *aligned = memory + (-(uintptr_t)memory & 63);
    fa_listed l;
    fa_kept kept;
    fa_open_lists(&l, c->lists, aligned + c->scratch);
    if (selection) {
        fa_open_kept(&kept, selection, aligned + c->scratch + whole_lines(own));
        l.kept = &kept;
    }
    for (int64_t at; (at = atomic_fetch_add(&c->next, 1)) < c->in_all;) c->task(c, at, &l, aligned);
    free(memory);
}

static fa_status share(call *c, int64_t in_all,
                       void (*task)(call *c, int64_t at, fa_listed *l, char *memory)) {
    const int threads = fa_pool_threads();
    c->in_all = in_all, c->task = task;
    atomic_store(&c->next, 0);
    if (in_all > 0) fa_pool_run(in_all < threads ? (int)in_all : threads, work, c);
    return atomic_load(&c->next) < in_all ? FA_MEMORY : FA_OK; /* no thread had memory */
}

/* ---- what groups share ---- */

static void sum_shared(const call *c) {
    const fa_tensor *t = c->entries;
    const int64_t b = c->groups / c->b->forward.what.hk, hk = c->b->forward.what.hk;
    const int64_t list = t->shape[2] * t->shape[3];
    for (int64_t n = 0; n < t->shape[0]; n++)
        for (int64_t h = 0; h < t->shape[1]; h++)
            for (int64_t i = 0; i < list; i++) {
                double sum = 0;
                for (int64_t of_b = t->shape[0] == 1 ? 0 : n; of_b < b; of_b++) {
                    for (int64_t of_h = t->shape[1] == 1 ? 0 : h; of_h < hk; of_h++) {
                        sum += c->shared[(of_b * hk + of_h) * list + i];
                        if (t->shape[1] != 1) break;
                    }
                    if (t->shape[0] != 1) break;
                }
                put_number(t, c->entries_type,
                           element(t, n, h, i / t->shape[3]) + i % t->shape[3] * t->stride[3], sum);
            }
}

static void sum_sinks(const call *c) {
    const fa_backward *b = c->b;
    const int64_t hk = b->forward.what.hk;
    for (int64_t h = 0; h < b->forward.what.hq; h++) {
        double sum = 0;
        for (int64_t group = h / c->heads; group < c->groups; group += hk)
            for (int part = 0; part < c->parts; part++)
                sum += c->sinks[(group * c->parts + part) * c->heads + h % c->heads];
        b->dsink[h * b->dsink_stride] = (float)sum;
    }
}

/* ---- the call ---- */

/* Parts of a group and the memory of their sums, by the request's shapes alone. */
static fa_status open_call(call *c) {
    const fa_params *p = &c->b->forward;
    const fa_what *w = &p->what;
    const int packed = p->varlen.cu_q != NULL, lanes = c->kernel->lanes;
    const int64_t keys = packed && p->varlen.total_k < w->sk ? p->varlen.total_k : w->sk;
    const int64_t rows = packed && p->varlen.total_q < w->sq ? p->varlen.total_q : w->sq;
    const fa_tensor *t = c->entries;
    c->heads = w->hq / w->hk;
    c->groups = (int64_t)w->b * w->hk;
    if (c->b->dk.data) c->width[0] = (w->d + lanes - 1) / lanes * lanes;
    if (c->b->dv.data && c->b->dout.data) c->width[1] = (w->dv + lanes - 1) / lanes * lanes;
    for (int i = 0; i < 2; i++)
        c->bytes += (int64_t)whole_lines((size_t)(keys * c->width[i] * c->kernel->number));
    int64_t parts = FA_PARTS / c->groups;
    if (parts > rows * c->heads / FA_ROWS_OF_PART) parts = rows * c->heads / FA_ROWS_OF_PART;
    c->parts = parts < 1 ? 1 : parts > FA_PARTS_OF_GROUP ? FA_PARTS_OF_GROUP : (int)parts;
    c->scratch = whole_lines(c->kernel->list_bytes(&c->roomy, c->lists));
    c->first = fa_first_blocks(p, c->lists);
    if (!c->first) return FA_MEMORY;
    if (c->parts > 1 && c->bytes) {
        c->sums = aligned_alloc(64, (size_t)(c->groups * c->parts * c->bytes));
        if (!c->sums) return FA_MEMORY;
    }
    const int shares = t->data && ((!packed && t->shape[0] != w->b) || t->shape[1] != w->hk);
    if (shares) {
        c->shared = calloc((size_t)(c->groups * c->lists->entries.shape[2]) + 1,
                           (size_t)c->lists->entries.shape[3] * sizeof(double) + 8);
        if (!c->shared) return FA_MEMORY;
    }
    if (c->kept) {
        c->gates = (fa_gate_sums){.parts = c->parts, .keys = keys, .rows = rows};
        if (!fa_open_gate_sums(&c->gates, c->groups)) return FA_MEMORY;
    }
    if (c->b->dsink) {
        c->sinks = calloc((size_t)(c->groups * c->parts * c->heads) + 1, sizeof *c->sinks);
        if (!c->sinks) return FA_MEMORY;
    }
    return FA_OK;
}

static fa_status run(call *c, fa_level level, fa_error *error) {
    const fa_backward *b = c->b;
    const fa_what *w = &b->forward.what;
    fa_status status = FA_OK;
    const fa_tensor *const written[] = {&b->dq, &b->dk, &b->dv};
    for (int i = 0; i < 3; i++) fa_clear_tensor(written[i], w->dtype);
    fa_clear_tensor(c->entries, c->entries_type);
    for (int64_t h = 0; b->dsink && h < w->hq; h++) b->dsink[h * b->dsink_stride] = 0;
    if (w->hq == 0 || w->b == 0 || w->q.shape[2] == 0) return FA_OK;
    c->roomy = *b;
    c->roomy.forward.what.sq = c->roomy.forward.what.sk = FA_MAX_LENGTH;
    c->kernel = fa_backward_kernel_of(level < FA_AVX512 ? level : FA_AVX512, w->dtype);
    status = open_call(c);
    if (status == FA_OK) status = share(c, c->groups * c->parts, run_group);
    if (status == FA_OK && c->sums) {
        const int64_t keys = b->forward.varlen.cu_q && b->forward.varlen.total_k < w->sk
                                 ? b->forward.varlen.total_k
                                 : w->sk;
        const int64_t tasks = (keys + FA_KEYS_OF_TASK - 1) / FA_KEYS_OF_TASK;
        status = share(c, c->groups * tasks, run_keys);
    }
    if (status == FA_OK && c->kept && c->kept->dscores.data) {
        status = share(c, c->groups, run_scores);
        if (atomic_load(&c->failed)) status = FA_MEMORY;
    }
    if (status == FA_OK && c->shared) sum_shared(c);
    if (status == FA_OK && c->sinks) sum_sinks(c);
    free(c->first);
    free(c->sums);
    free(c->shared);
    free(c->sinks);
    free(c->gates.of_keys);
    free(c->gates.of_rows);
    if (status == FA_MEMORY)
        snprintf(error->text, sizeof error->text, "no memory for the CPU backend's scratch");
    return status;
}

fa_status fa_cpu_sparse_backward(const fa_sparse_backward *b, fa_level level, fa_error *error) {
    call c = {.b = &b->attention,
              .lists = &b->lists,
              .entries = &b->dgate,
              .entries_type = fa_gate_dtype(b->attention.forward.what.dtype)};
    return run(&c, level, error);
}

fa_status fa_cpu_kept_backward(const fa_sparsek_attention_backward *b, fa_level level,
                               fa_error *error) {
    static const fa_tensor none = {NULL, {0}, {0}};
    const fa_lists lists = fa_kept_lists(&b->selection);
    call c = {.b = &b->attention, .lists = &lists, .kept = b, .entries = &none};
    return run(&c, level, error);
}

fa_status fa_cpu_mass(const fa_sparse *s, fa_level level, fa_error *error) {
    const fa_backward b = {.forward = s->forward};
    call c = {
        .b = &b, .lists = &s->lists, .entries = &s->mass, .entries_type = FA_F32, .is_mass = 1};
    return run(&c, level, error);
}
