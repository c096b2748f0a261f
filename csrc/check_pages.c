/* check_pages.c - keys in a cache: its shape, and the table of its pages, which names those that
 * there are and gives new keys pages of their own. On a GPU only the kernels see it, and clamp.
 */
#include "check_pages.h"

#include <stdlib.h>

#include "mask.h"
#include "views.h"

fa_status fa_check_caches(const fa_request *r, const fa_array *table, int paged, fa_error *error) {
    static const char *const dimensions[2][2] = {
        {"(b_cache, hk, s_max, d)", "(b_cache, s_max, hk, d)"},
        {"(num_pages, hk, page_size, d)", "(num_pages, page_size, hk, d)"}};
    const int axis = fa_key_axis(r);
    const char *const wanted = dimensions[paged][r->layout == FA_BSHD];
    TRY(fa_check_rank(r->k, 4, wanted, error));
    TRY(fa_check_rank(r->v, 4, wanted, error));
    TRY(fa_check_equal(r->v, r->v->shape[0], paged ? "num_pages" : "b_cache", r->k, r->k->shape[0],
                       error));
    TRY(fa_check_equal(r->v, r->v->shape[axis], paged ? "page_size" : "s_max", r->k,
                       r->k->shape[axis], error));
    TRY(fa_check_range(r->k, r->k->shape[0], paged ? "num_pages" : "b_cache", 0, INT32_MAX, error));
    TRY(fa_check_range(r->k, r->k->shape[axis], paged ? "page_size" : "s_max", paged, FA_MAX_LENGTH,
                       error));
    if (!table)
        return fa_check_equal(r->k, r->k->shape[0], "b_cache", fa_batch_of(r), fa_batch(r), error);
    TRY(fa_check_dtype(table, fa_int32, NULL, error));
    TRY(fa_check_rank(table, paged ? 2 : 1, paged ? "(b, pages)" : "(b,)", error));
    TRY(fa_check_equal(table, table->shape[0], "b", fa_batch_of(r), fa_batch(r), error));
    return fa_check_place(table, r->q, error);
}

fa_status fa_count_room(const fa_request *r, const fa_array *page_table, int64_t *room,
                        fa_error *error) {
    *room = r->k->shape[fa_key_axis(r)];
    if (page_table &&
        (__builtin_mul_overflow(*room, page_table->shape[1], room) || *room > FA_MAX_LENGTH))
        return fa_fail(error, FA_VALUE, "`%s` must name at most %d keys of a sequence",
                       page_table->name, FA_MAX_LENGTH);
    if (!r->k->shape[0] && fa_batch(r)) *room = 0; /* there is no page */
    return FA_OK;
}

fa_request fa_gather(const fa_request *r, int64_t sk, fa_array *k, fa_array *v) {
    const int axis = fa_key_axis(r);
    const fa_array *const from[2] = {r->k, r->v};
    fa_array *const to[2] = {k, v};
    fa_request gathered = *r;
    for (int i = 0; i < 2; i++) {
        *to[i] = *from[i];
        to[i]->shape[0] = fa_batch(r), to[i]->shape[axis] = sk;
        if (!r->cu_q) continue;
        to[i]->ndim = 3; /* (total_k, hk, d) */
        to[i]->shape[0] = sk;
        to[i]->shape[1] = from[i]->shape[3 - axis], to[i]->shape[2] = from[i]->shape[3];
    }
    gathered.k = k, gathered.v = v, gathered.max_sk = sk;
    if (r->cu_q) gathered.layout = FA_BSHD;
    gathered.page_table = NULL;
    return gathered;
}

/* Pages that hold the keys [begin, end) of sequence b; they are written to `pages` if not NULL. */
static fa_status check_range(const fa_kvcache *c, const fa_array *table, int64_t b, int64_t begin,
                             int64_t end, int32_t *pages, int64_t *count, fa_error *error) {
    const fa_pages *p = &c->forward.pages;
    for (int64_t column = begin / p->size; column * p->size < end && begin < end; column++) {
        const int32_t page = p->table[b * p->stride[0] + column * p->stride[1]];
        if (page < 0 || page >= p->count)
            return fa_fail(error, FA_VALUE,
                           "`%s` must name %s from 0 to %d, got %d for key %lld of sequence %lld",
                           table->name, table->ndim == 2 ? "pages" : "entries", p->count - 1, page,
                           (long long)(column * p->size), (long long)b);
        if (pages) pages[(*count)++] = page;
    }
    return FA_OK;
}

static int compare(const void *a, const void *b) {
    const int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    return (x > y) - (x < y);
}

/* On the CPU: the pages that are read, by what the rows see, and those that are written, which no
 * other sequence writes. What else the table holds is not looked at. */
static fa_status check_pages(const fa_kvcache *c, const fa_array *table, int32_t *written,
                             fa_error *error) {
    const fa_what *w = &c->forward.what;
    int64_t count = 0;
    for (int64_t b = 0; b < w->b; b++) {
        const int32_t before = fa_keys_before(c, b), keys = before + c->s_new;
        fa_masks masks = c->forward.masks;
        masks.k_lengths = &keys, masks.k_lengths_stride = 0;
        const fa_lengths n = fa_find_cached(&c->forward.varlen, &masks, b, w->sq, w->sk).lengths;
        if (n.sq)
            TRY(check_range(c, table, b, fa_row_interval(n, 0).begin,
                            fa_row_interval(n, n.sq - 1).end, NULL, NULL, error));
        TRY(check_range(c, table, b, before, keys, written, &count, error));
    }
    qsort(written, (size_t)count, sizeof *written, compare);
    for (int64_t i = 1; i < count; i++)
        if (written[i] == written[i - 1])
            return fa_fail(error, FA_VALUE,
                           "`%s` must give new keys %s of their own, got %d for two sequences, or "
                           "twice",
                           table->name, table->ndim == 2 ? "pages" : "entries", written[i]);
    return FA_OK;
}

fa_status fa_check_pages(const fa_array *table, const fa_array *keys, int axis, fa_kvcache *c,
                         fa_error *error) {
    fa_pages *p = &c->forward.pages;
    if (!c->forward.what.sk) return FA_OK; /* no keys, no pages */
    p->table = table->data;
    p->size = (int32_t)keys->shape[axis];
    p->count = (int32_t)keys->shape[0];
    for (int i = 0; i < table->ndim; i++)
        p->stride[i] = table->shape[i] == 1 ? 0 : table->stride[i];
    if (table->device_type != FA_CPU) return FA_OK;
    const size_t most = (size_t)c->forward.what.b * (size_t)(c->s_new / p->size + 2);
    int32_t *written = malloc(most * sizeof *written);
    if (!written) return fa_fail(error, FA_MEMORY, "no memory to check `%s`", table->name);
    const fa_status status = check_pages(c, table, written, error);
    free(written);
    return status;
}

fa_status fa_check_paged(const fa_request *r, fa_plan *plan, fa_error *error) {
    fa_kvcache c;
    fa_array k, v;
    int64_t room;
    fa_clear(&c, sizeof c);
    TRY(fa_check_rank(r->cu_q, 1, "(b + 1,)", error));
    TRY(fa_check_range(r->cu_q, r->cu_q->shape[0], "b + 1", 1, INT32_MAX, error));
    TRY(fa_check_caches(r, r->page_table, 1, error));
    TRY(fa_count_room(r, r->page_table, &room, error));
    if (r->max_sk < 0 || r->max_sk > room)
        return fa_fail(error, FA_VALUE,
                       "`max_seqlen_k` must be from 0 to the %lld keys that `%s` has room for, got "
                       "%lld",
                       (long long)room, r->page_table->name, (long long)r->max_sk);
    const fa_request gathered = fa_gather(r, r->max_sk, &k, &v);
    TRY(fa_check_attention(&gathered, plan, error));
    c.forward = plan->params;
    fa_bind(&c.forward.what.k, r->k, r->layout);
    fa_bind(&c.forward.what.v, r->v, r->layout);
    TRY(fa_check_pages(r->page_table, r->k, fa_key_axis(r), &c, error));
    plan->params = c.forward;
    return FA_OK;
}
