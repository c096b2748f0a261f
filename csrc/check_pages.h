/* check_pages.h - keys in a cache, as attention_kvcache and attention_varlen have them. */
#ifndef FASTATTN_CHECK_PAGES_H
#define FASTATTN_CHECK_PAGES_H

#include "check_array.h"

/* The axis of a cache, or of new keys, that counts keys. */
static inline int fa_key_axis(const fa_request *r) { return r->layout == FA_BSHD ? 1 : 2; }

/* How many sequences there are, and the argument that says it. */
static inline int64_t fa_batch(const fa_request *r) {
    return r->cu_q ? r->cu_q->shape[0] - 1 : r->q->shape[0];
}
static inline const fa_array *fa_batch_of(const fa_request *r) { return r->cu_q ? r->cu_q : r->q; }

/* The shapes of the caches, k and v, and of what says where in them a sequence is: a table of pages
 * if paged, else of one entry each, or NULL. */
fa_status fa_check_caches(const fa_request *r, const fa_array *table, int paged, fa_error *error);

/* The keys that a sequence has room for; page_table may be NULL. */
fa_status fa_count_room(const fa_request *r, const fa_array *page_table, int64_t *room,
                        fa_error *error);

/* The request as if its keys were gathered into k and v: sk of each sequence, or where queries are
 * packed sk for all. */
fa_request fa_gather(const fa_request *r, int64_t sk, fa_array *k, fa_array *v);

/* The table into the request, whose lengths are those before the new keys. axis: of `keys`, in
 * their shape. On the CPU the pages that are read, by what the rows see, exist, and so do those
 * that are written, each in one place; what else the table holds is not looked at. */
fa_status fa_check_pages(const fa_array *table, const fa_array *keys, int axis, fa_kvcache *c,
                         fa_error *error);

/* fa_check_attention() of attention_varlen with a page_table. */
fa_status fa_check_paged(const fa_request *r, fa_plan *plan, fa_error *error);

#endif
