/* check_pages.c - the table of a cache's pages: that it names those that there are, and gives new
 * keys pages of their own. On a GPU only the kernels see it, and clamp.
 */
#include <stdlib.h>

#include "check_array.h"
#include "mask.h"

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
