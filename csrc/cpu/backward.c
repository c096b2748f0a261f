/* backward.c - the CPU's backward pass: shares out blocks of keys among threads.
 *
 * What is computed is in backward_kernel.h; this file compiles it for every level.
 */
#include "backward_tasks.h"

#include <sched.h>

#include "pool.h"

/* Waits until the blocks of keys before this one have added their part of dq to a block of rows.
 * Tasks are drawn in order, so that the one before is done or another thread is at it. */
static void fa_wait_turn(const fa_keys *task, int64_t h, int block, fa_tile_size size) {
    if (!task->turns || task->begin == 0) return;
    const fa_interval before = {task->begin - size.keys, task->begin};
    const fa_row_range rows = fa_rows_seeing_some(task->sequence.lengths, before);
    const int begin = block * size.rows, end = begin + size.rows;
    if (rows.begin == rows.end || rows.end <= begin || rows.begin >= end) return;
    atomic_int *turn = &task->turns[(h - task->h) * task->turn_row + block];
    for (int n = 0; atomic_load_explicit(turn, memory_order_acquire) != task->begin / size.keys;
         n++)
        if (n > 1000) sched_yield();
}

static void fa_end_turn(const fa_keys *task, int64_t h, int block, fa_tile_size size) {
    if (task->turns)
        atomic_store_explicit(&task->turns[(h - task->h) * task->turn_row + block],
                              task->begin / size.keys + 1, memory_order_release);
}

#define FA_KERNEL "backward_kernel.h"
#include "levels.h"

static const fa_backward_kernel *const kernels[][FA_DTYPE_COUNT] = FA_KERNELS;

const fa_backward_kernel *fa_backward_kernel_of(fa_level level, fa_dtype dtype) {
    return kernels[level][dtype];
}

/* ---- one call ---- */

/* Tasks are drawn in order: of `live` groups of heads at a time, the first block of keys of each,
 * then the second, so that threads meet in one group's dq only where there are fewer groups. */
typedef struct call {
    const fa_backward *b;
    const fa_backward_kernel *kernel;
    fa_tile_size size;
    int heads; /* query heads of a group: the fewest to which whole key and value heads belong */
    int64_t per_sequence, groups; /* groups of a sequence; in all */
    int64_t blocks;               /* blocks of keys of a group, at most */
    int64_t live;                 /* groups at a time */
    int threads;
    char *sums; /* of dq of the live groups; NULL: made in dq */
    int64_t sums_bytes, sums_rows;
    atomic_int *turns;
    atomic_llong *done; /* of each live group: tasks, those before it included */
    int64_t turn_row;
    fa_mask_tile grid; /* of dmask: tiles along each axis are its `end`s */
    atomic_llong next;
    int64_t in_all;
    void (*task)(struct call *c, int64_t at, void *memory);
} call;

/* The rows of sequence n (past the last: the rows of none), and how many keys lie there. */
static fa_sequence find(const fa_params *p, int64_t n, int *keys) {
    const fa_what *what = &p->what;
    const fa_varlen *v = &p->varlen;
    fa_sequence s = {.q_end = v->total_q};
    *keys = what->sk;
    if (n < what->b) s = fa_find_sequence(v, &p->masks, n, what->sq, what->sk);
    if (!v->cu_q) return s;
    if (n == what->b) {
        s.q = fa_first_row(v->cu_q, v->cu_q_stride, n, v->total_q);
        s.k = fa_first_row(v->cu_k, v->cu_k_stride, n, v->total_k);
        *keys = v->total_k - s.k;
    } else {
        *keys = fa_clamp(v->cu_k[(n + 1) * v->cu_k_stride], s.k, v->total_k) - s.k;
    }
    return s;
}

/* dq of rows that see no key, whose sums no task makes. */
static void clear_rows_without_keys(const fa_backward *b, const fa_keys *task) {
    const fa_lengths lengths = task->sequence.lengths;
    const fa_row_range rows = fa_rows_seeing_some(lengths, (fa_interval){0, lengths.sk});
    const int64_t n = b->forward.varlen.cu_q ? 0 : task->n, q = task->sequence.q;
    const fa_dtype type = b->forward.what.dtype;
    for (int64_t h = task->h; b->dq.data && h < task->h + task->heads; h++) {
        fa_clear_rows(&b->dq, type, n, h, q, q + rows.begin);
        fa_clear_rows(&b->dq, type, n, h, q + rows.end, task->sequence.q_end);
    }
}

static void run_block(call *c, int64_t at, void *memory) {
    const int64_t together = c->live * c->blocks, slot = at % c->live;
    const int64_t group = at / together * c->live + slot, block = at % together / c->live;
    int keys;
    if (group >= c->groups) return;
    /* Those that had the sums before are to be done. */
    if (c->done)
        for (int n = 0;
             atomic_load_explicit(&c->done[slot], memory_order_acquire) < at / together * c->blocks;
             n++)
            if (n > 1000) sched_yield();
    fa_keys task = {.n = group / c->per_sequence, .heads = c->heads};
    task.h = group % c->per_sequence * c->heads;
    task.sequence = find(&c->b->forward, task.n, &keys);
    task.begin = (int)(block * c->size.keys);
    task.end = keys < task.begin + c->size.keys ? keys : task.begin + c->size.keys;
    task.turn_row = c->turn_row;
    if (c->turns) {
        const int packed = c->b->forward.varlen.cu_q != NULL;
        const int64_t before = packed ? task.sequence.q / c->size.rows + task.n : 0;
        const int64_t head = (packed ? 0 : task.n * c->b->forward.what.hq) + task.h;
        task.turns = c->turns + head * c->turn_row + before;
    }
    if (c->sums) task.sums = c->sums + slot * c->sums_bytes;
    task.sums_rows = c->sums_rows;
    if (block == 0) clear_rows_without_keys(c->b, &task);
    if (task.begin < task.end) c->kernel->keys(c->b, &task, memory);
    if (c->done) atomic_fetch_add_explicit(&c->done[slot], 1, memory_order_release);
}

static void run_mask_tile(call *c, int64_t at, void *memory) {
    const fa_what *what = &c->b->forward.what;
    const int64_t *shape = c->b->dmask.shape;
    fa_mask_tile t;
    const int64_t keys = at % c->grid.keys.end, rest = at / c->grid.keys.end;
    const int64_t rows = rest % c->grid.rows.end, head = rest / c->grid.rows.end;
    t.h.begin = head % shape[1], t.h.end = shape[1] == 1 ? what->hq : t.h.begin + 1;
    t.n.begin = head / shape[1], t.n.end = shape[0] == 1 ? what->b : t.n.begin + 1;
    t.rows.begin = (int)(rows * c->size.rows);
    t.rows.end = shape[2] == 1 ? what->sq : fa_clamp(t.rows.begin + c->size.rows, 0, what->sq);
    t.keys.begin = (int)(keys * c->size.keys);
    t.keys.end = shape[3] == 1 ? what->sk : fa_clamp(t.keys.begin + c->size.keys, 0, what->sk);
    c->kernel->mask(c->b, &t, memory);
}

static void run_one_sink(call *c, int64_t at, void *memory) { c->kernel->sink(c->b, at, memory); }

static void work(void *argument) {
    call *c = argument;
    char small[16384]; /* a tiny call does without malloc */
    size_t bytes = c->kernel->bytes(c->b) + 63;
    char *memory = bytes <= sizeof small ? small : malloc(bytes);
    if (!memory) return; /* the other threads do the work */
    char *aligned = memory + (-(uintptr_t)memory & 63);
    for (int64_t at;
         (at = atomic_fetch_add_explicit(&c->next, 1, memory_order_relaxed)) < c->in_all;)
        c->task(c, at, aligned);
    if (memory != small) free(memory);
}

/* Runs `task` for 0 .. in_all - 1, in order. */
static fa_status share(call *c, int64_t in_all, void (*task)(call *, int64_t, void *)) {
    c->in_all = in_all, c->task = task;
    atomic_store(&c->next, 0);
    if (in_all > 0) fa_pool_run(in_all < c->threads ? (int)in_all : c->threads, work, c);
    return atomic_load(&c->next) < in_all ? FA_MEMORY : FA_OK; /* no thread had memory */
}

/* dq, dk and dv. */
static fa_status run_gradients(call *c) {
    const fa_backward *b = c->b;
    const fa_params *p = &b->forward;
    const fa_what *what = &p->what;
    const int packed = p->varlen.cu_q != NULL;
    const int of_k = what->hq / what->hk, of_v = what->hq / what->hv;
    c->heads = of_k;
    while (c->heads % of_v) c->heads += of_k;
    c->per_sequence = what->hq / c->heads;
    c->groups = (what->b + packed) * c->per_sequence;
    int longest = 0, keys;
    for (int64_t n = 0; n < what->b + packed; n++) {
        find(p, n, &keys);
        if (keys > longest) longest = keys;
        if (!packed) break;
    }
    c->blocks = longest ? (longest + c->size.keys - 1) / c->size.keys : 1;
    c->live = c->groups < c->threads ? c->groups : c->threads;

    const int64_t lanes = c->kernel->lanes, d = (what->d + lanes - 1) / lanes * lanes;
    const int native = c->kernel->number == fa_dtype_size(what->dtype) && b->dq.stride[3] == 1;
    c->turn_row = (packed ? p->varlen.total_q : what->sq) / c->size.rows + 1 + packed * what->b;
    const int64_t rows = c->threads > 1 && c->blocks > 1 && b->dq.data
                             ? c->turn_row * (packed ? 1 : what->b) * what->hq
                             : 0;
    if (b->dq.data && (!native || d != what->d)) {
        c->sums_rows = packed && p->varlen.total_q < what->sq ? p->varlen.total_q : what->sq;
        c->sums_bytes = (int64_t)c->kernel->number * c->sums_rows * d * c->heads;
        const int64_t room = 1 + ((int64_t)c->threads * 3 << 20) / (c->sums_bytes + 1);
        if (room < c->live) c->live = room;
    }
    char *memory = NULL;
    const size_t turns = (size_t)rows * sizeof *c->turns;
    const size_t done = c->sums_bytes ? (size_t)c->live * sizeof *c->done : 0;
    if (turns + done + (size_t)c->sums_bytes) {
        memory = malloc(done + turns + (size_t)(c->sums_bytes * c->live) + 64);
        if (!memory) return FA_MEMORY;
        memset(memory, 0, done + turns);
        if (done) c->done = (atomic_llong *)memory;
        if (turns) c->turns = (atomic_int *)(memory + done);
        if (c->sums_bytes) {
            c->sums = memory + done + turns;
            c->sums += -(uintptr_t)c->sums & 63;
        }
    }
    const int64_t chunks = (c->groups + c->live - 1) / c->live;
    const fa_status status = share(c, chunks * c->live * c->blocks, run_block);
    free(memory);
    return status;
}

fa_status fa_cpu_backward(const fa_backward *b, fa_level level, fa_error *error) {
    const fa_what *what = &b->forward.what;
    const double products = 2.5 * what->b * what->hq * what->sq * what->sk * (what->d + what->dv);
    call c = {.b = b,
              .kernel = kernels[level][what->dtype],
              .threads = products < 2e6 ? 1 : fa_pool_threads()};
    c.size = c.kernel->size(what);
    if (what->hq == 0 || what->b == 0 || what->sq == 0) {
        fa_clear_tensor(&b->dq, what->dtype), fa_clear_tensor(&b->dk, what->dtype),
            fa_clear_tensor(&b->dv, what->dtype);
        if (b->dmask.data) fa_clear_tensor(&b->dmask, b->forward.scores.mask_dtype);
        for (int64_t h = 0; b->dsink && h < what->hq; h++) b->dsink[h * b->dsink_stride] = 0;
        return FA_OK;
    }
    fa_status status = FA_OK;
    if (b->dq.data || b->dk.data || b->dv.data) status = run_gradients(&c);
    if (status == FA_OK && b->dmask.data) {
        const int64_t *shape = b->dmask.shape;
        c.grid.keys.end = shape[3] == 1 ? 1 : (int)((shape[3] + c.size.keys - 1) / c.size.keys);
        c.grid.rows.end = shape[2] == 1 ? 1 : (int)((shape[2] + c.size.rows - 1) / c.size.rows);
        status = share(&c, shape[0] * shape[1] * c.grid.rows.end * c.grid.keys.end, run_mask_tile);
    }
    if (status == FA_OK && b->dsink) status = share(&c, what->hq, run_one_sink);
    if (status != FA_OK)
        snprintf(error->text, sizeof error->text, "no memory for the CPU backend's scratch");
    return status;
}
