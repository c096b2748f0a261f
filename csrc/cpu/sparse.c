/* sparse.c - attention to lists of keys on the CPU: blocks of queries are shared out among threads.
 *
 * What is computed is in forward_lists.h, of lists that lists.c has read.
 */
#include "groups.h"
#include "kept.h"
#include "pool.h"

enum { QUERIES = 64, BLOCKS = 8 }; /* that a thread draws at once, of single rows; of kept keys */

typedef struct call {
    const fa_sparse *s;
    const fa_sparsek_attention *selection; /* instead of lists; or NULL */
    fa_params p;
    const fa_cpu_kernel *kernel;
    int heads;           /* of a group, which shares its lists */
    int rows, draw;      /* that the kernel takes at once; blocks of queries in a draw */
    int64_t *first;      /* of each packed sequence its first block of queries */
    int64_t draws, most; /* of a group, at most; of all */
    atomic_llong next;
} call;

int64_t *fa_first_blocks(const fa_params *p, const fa_lists *lists) {
    int64_t *first = calloc((size_t)p->what.b + 1, sizeof *first);
    for (int64_t b = 0; first && p->varlen.cu_q && b < p->what.b; b++) {
        const fa_sequence s = fa_find_sequence(&p->varlen, &p->masks, b, p->what.sq, p->what.sk);
        first[b + 1] = first[b] + fa_q_blocks(lists, s.q_end - s.q);
    }
    return first;
}

fa_group fa_listed_group(const fa_params *p, const fa_lists *lists, int64_t b, int64_t h,
                         fa_listed *l) {
    const fa_what *w = &p->what;
    const int heads = w->hq / w->hk;
    fa_group g = {.sequence.q_end = p->varlen.total_q, .b = b, .h = h * heads, .heads = heads};
    l->lengths = l->window = g.sequence.lengths;
    if (b == w->b) {
        g.sequence.q = fa_first_row(p->varlen.cu_q, p->varlen.cu_q_stride, b, p->varlen.total_q);
        return g;
    }
    g.sequence = fa_find_sequence(&p->varlen, &p->masks, b, w->sq, w->sk);
    l->lengths = l->window = g.sequence.lengths;
    if (lists->has_window)
        l->window = fa_find_sequence(&p->varlen, &lists->window, b, w->sq, w->sk).lengths;
    return g;
}

/* One block of queries. */
static void run_block(const call *c, const fa_group *g, fa_listed *l, int64_t block, void *memory) {
    const fa_lists *lists = &c->s->lists;
    const int64_t rows = g->sequence.q_end - g->sequence.q, begin = block * lists->q_block;
    const int64_t end = rows - begin < lists->q_block ? rows : begin + lists->q_block;
    const int64_t sq = g->sequence.lengths.sq, valid = sq < begin ? begin : sq < end ? sq : end;
    fa_read_list(l, &c->p, g->b, g->h / g->heads, c->first[g->b] + block, (int32_t)begin,
                 (int32_t)valid);
    for (int64_t at = begin * g->heads; at < valid * g->heads; at += c->rows) {
        const int64_t left = valid * g->heads - at;
        c->kernel->lists(&c->p, g, l, at, (int)(left < c->rows ? left : c->rows), memory);
    }
    fa_empty_rows(&c->p, g, valid * g->heads, end * g->heads, NULL);
}

static void run_draw(const call *c, int64_t at, fa_listed *l, void *memory) {
    const int64_t group = at / c->draws, hk = c->p.what.hk;
    const fa_group g = fa_listed_group(&c->p, &c->s->lists, group / hk, group % hk, l);
    /* The last come first: under a causal mask they see most. */
    const int64_t first = (c->draws - 1 - at % c->draws) * c->draw;
    if (g.b == c->p.what.b) {
        if (first == 0)
            fa_empty_rows(&c->p, &g, 0, (int64_t)(g.sequence.q_end - g.sequence.q) * g.heads, NULL);
        return;
    }
    const int64_t blocks = fa_q_blocks(&c->s->lists, g.sequence.q_end - g.sequence.q);
    for (int64_t n = first; n < first + c->draw && n < blocks; n++) run_block(c, &g, l, n, memory);
}

static void work(void *argument) {
    call *c = argument;
    fa_params p = c->p;
    p.what.sk = FA_MAX_LENGTH; /* columns may be more than keys */
    const size_t scratch = (c->kernel->scratch(&p, c->rows) + 63) / 64 * 64;
    const size_t of_lists = (fa_list_bytes(&c->s->lists) + 63) / 64 * 64;
    char *memory =
        malloc(scratch + of_lists + 64 + (c->selection ? fa_kept_bytes(c->selection) : 0));
    if (!memory) return; /* the other threads do the work */
    char *aligned = memory + (-(uintptr_t)memory & 63);
    fa_listed l;
    fa_kept kept;
    fa_open_lists(&l, &c->s->lists, aligned + scratch);
    if (c->selection) {
        fa_open_kept(&kept, c->selection, aligned + scratch + of_lists);
        l.kept = &kept;
    }
    for (int64_t at; (at = atomic_fetch_add(&c->next, 1)) < c->most;) run_draw(c, at, &l, aligned);
    free(memory);
}

static fa_status run(call *c, fa_level level) {
    const fa_lists *lists = &c->s->lists;
    fa_what *w = &c->p.what;
    const int packed = c->p.varlen.cu_q != NULL;
    if (w->hq == 0 || w->q.shape[2] == 0 || (!packed && w->b == 0)) return FA_OK;
    /* Gates multiply numbers, not pairs of bfloat16. */
    if ((lists->gate.data || c->selection) && level == FA_AVX512_BF16) level = FA_AVX512;
    c->kernel = fa_forward_kernel(level, w->dtype);
    c->first = fa_first_blocks(&c->p, lists);
    if (!c->first) return FA_MEMORY;
    const int64_t longest = packed && c->p.varlen.total_q < w->sq ? c->p.varlen.total_q : w->sq;
    c->heads = w->hq / w->hk;
    c->rows = c->kernel->rows;
    while (c->rows > c->kernel->lanes && (int64_t)c->rows * (w->d + (int64_t)w->dv) > 1 << 18)
        c->rows = (c->rows / 2 + c->kernel->lanes - 1) / c->kernel->lanes * c->kernel->lanes;
    c->draw = c->selection ? BLOCKS : lists->q_block == 1 ? QUERIES : 1;
    c->draws = (fa_q_blocks(lists, (int32_t)longest) + c->draw - 1) / c->draw;
    if (c->draws == 0) c->draws = 1;
    c->most = ((int64_t)w->b + packed) * w->hk * c->draws;
    const double keys = c->selection ? w->sk : (double)lists->entries.shape[3] * lists->k_block;
    const int threads =
        keys * w->q.shape[2] * w->b * w->hq * (w->d + w->dv) < 2e6 && !lists->has_window
            ? 1
            : fa_pool_threads();
    fa_pool_run(c->most < threads ? (int)c->most : threads, work, c);
    free(c->first);
    return atomic_load(&c->next) < c->most ? FA_MEMORY : FA_OK; /* no thread had memory */
}

fa_status fa_cpu_kept(const fa_sparsek_attention *r, fa_level level) {
    const fa_sparse s = {.forward = r->forward, .lists = fa_kept_lists(r)};
    call c = {.s = &s, .selection = r, .p = r->forward};
    return run(&c, level);
}

fa_status fa_cpu_sparse(const fa_sparse *s, fa_level level, fa_error *error) {
    fa_sparse own = *s;
    fa_what *w = &own.forward.what;
    const int64_t b = w->q.shape[0], h = w->q.shape[1], rows = w->q.shape[2];
    void *lse = NULL;
    fa_status status = FA_OK;
    if (s->mass.data && !w->lse.data) {
        lse = malloc((size_t)(b * h * rows) * sizeof(double) + 1);
        w->lse = (fa_tensor){lse, {b, h, rows, 1}, {h * rows, rows, 1, 0}};
        if (!lse) status = FA_MEMORY;
    }
    call c = {.s = &own, .p = own.forward};
    if (status == FA_OK) status = run(&c, level);
    if (status == FA_OK && s->mass.data) status = fa_cpu_mass(&own, level, error);
    free(lse);
    if (status == FA_MEMORY)
        snprintf(error->text, sizeof error->text, "no memory for the CPU backend's scratch");
    return status;
}
