/* check_kvcache.c - attention_kvcache: from its arrays and options to one fa_kvcache, or one
 * sentence. All of it before the first write: a call that raises has changed no cache.
 *
 * A sequence's keys, gathered, are what fa_check_attention() sees as k and v; here is what they are
 * gathered from, and what is written there.
 */
#include "check_pages.h"
#include "mask.h"
#include "views.h"

enum { MAX_READ = 12 };

/* What a call reads but for the caches. */
static void list_read(const fa_request *r, const fa_kvcache_request *q,
                      const fa_array *read[MAX_READ]) {
    const fa_array *const all[MAX_READ] = {r->q,       r->cu_q,       q->k_new,        q->v_new,
                                           q->lengths, q->page_table, q->batch_idx,    q->cos,
                                           q->sin,     r->k_start,    r->alibi_slopes, r->sink};
    memcpy(read, all, sizeof all);
}

/* Packed or not; what else there is to say of cu_seqlens_q is fa_check_varlen()'s. */
static fa_status check_queries(const fa_request *r, fa_error *error) {
    if (!r->cu_q)
        return fa_check_rank(r->q, 4, r->layout == FA_BSHD ? "(b, sq, hq, d)" : "(b, hq, sq, d)",
                             error);
    TRY(fa_check_rank(r->q, 3, "(total_q, hq, d)", error));
    TRY(fa_check_rank(r->cu_q, 1, "(b + 1,)", error));
    return fa_check_range(r->cu_q, r->cu_q->shape[0], "b + 1", 1, INT32_MAX, error);
}

/* New keys and values, both or none; how many of them. */
static fa_status count_new(const fa_request *r, const fa_kvcache_request *q, int32_t *s_new,
                           fa_error *error) {
    const fa_array *const of[2] = {q->k_new, q->v_new};
    const int axis = fa_key_axis(r);
    if (!of[0] && !of[1]) return FA_OK;
    if (!of[0] || !of[1])
        return fa_fail(error, FA_VALUE, "`k` and `v` must come together, got `%s` alone",
                       of[0] ? "k" : "v");
    for (int i = 0; i < 2; i++)
        TRY(fa_check_rank(of[i], 4,
                          r->layout == FA_BSHD ? "(b, s_new, hk, d)" : "(b, hk, s_new, d)", error));
    TRY(fa_check_range(of[0], of[0]->shape[axis], "s_new", 0, FA_MAX_LENGTH, error));
    *s_new = (int32_t)of[0]->shape[axis];
    return FA_OK;
}

/* They are like the caches, which have been checked, and go into the request. */
static fa_status check_new(const fa_request *r, const fa_kvcache_request *q, fa_kvcache *c,
                           fa_error *error) {
    const fa_array *const of[2] = {q->k_new, q->v_new}, *const into[2] = {r->k, r->v};
    fa_tensor *const to[2] = {&c->k_new, &c->v_new};
    for (int i = 0; i < 2 && of[i]; i++) {
        int64_t shape[4] = {fa_batch(r), into[i]->shape[1], into[i]->shape[2], into[i]->shape[3]};
        shape[fa_key_axis(r)] = c->s_new;
        TRY(fa_check_shape(of[i], 4, shape, error));
        TRY(fa_check_dtype(of[i], r->q->dtype, r->q, error));
        TRY(fa_check_place(of[i], r->q, error));
        fa_bind(to[i], of[i], r->layout);
    }
    return FA_OK;
}

/* Of numbers of keys that were there before; on a GPU only the kernels see an array, and clamp. */
static fa_status check_lengths(const fa_request *r, const fa_kvcache_request *q, int64_t room,
                               fa_kvcache *c, fa_error *error) {
    fa_masks *m = &c->forward.masks;
    const int64_t most = room - c->s_new, b = fa_batch(r);
    if (most < 0)
        return fa_fail(error, FA_VALUE,
                       "`%s` must have s_new of at most the %lld keys of `%s`, got %d",
                       q->k_new->name, (long long)room, r->k->name, c->s_new);
    if (!q->lengths) {
        if (0 <= q->length && q->length <= most) return FA_OK;
        return fa_fail(
            error, FA_VALUE,
            "`cache_seqlens` must be from 0 to %lld (room for %lld keys, %d of them new), "
            "got %lld",
            (long long)most, (long long)room, c->s_new, (long long)q->length);
    }
    TRY(fa_check_vector(q->lengths, r->q, fa_int32, b, (const void **)&m->k_lengths,
                        &m->k_lengths_stride, error));
    for (int64_t i = 0; i < b && r->q->device_type == FA_CPU; i++) {
        const int32_t length = m->k_lengths[i * m->k_lengths_stride];
        if (length < 0 || length > most)
            return fa_fail(
                error, FA_VALUE,
                "`%s` must be from 0 to %lld (room for %lld keys, %d of them new), got %d "
                "for sequence %lld",
                q->lengths->name, (long long)most, (long long)room, c->s_new, length, (long long)i);
    }
    return FA_OK;
}

/* The most positions that a sequence has, keys and rows of q; on a GPU, that it may have. */
static int64_t last_position(const fa_kvcache *c) {
    const fa_params *p = &c->forward;
    const fa_what *w = &p->what;
    int64_t most = 0;
    if (p->where.device_type != FA_CPU) return w->sk;
    for (int64_t b = 0; b < w->b; b++) {
        const int32_t sq = fa_find_cached(&p->varlen, &p->masks, b, w->sq, w->sk).lengths.sq;
        const int32_t rows = c->rotary.advances ? sq : sq > 0;
        const int64_t end = fa_keys_before(c, b) + (rows > c->s_new ? rows : c->s_new);
        if (end > most) most = end;
    }
    return most;
}

static fa_status check_rotary(const fa_request *r, const fa_kvcache_request *q, fa_kvcache *c,
                              fa_error *error) {
    const fa_array *const tables[2] = {q->cos, q->sin};
    fa_rotary *rotary = &c->rotary;
    char got[32];
    if (!q->cos && !q->sin) return FA_OK;
    if (!q->cos || !q->sin)
        return fa_fail(error, FA_VALUE,
                       "`rotary_cos` and `rotary_sin` must come together, got `%s` alone",
                       (q->cos ? q->cos : q->sin)->name);
    if (!q->k_new)
        return fa_fail(error, FA_VALUE, "`%s` must be None without new `k`, got an array",
                       q->cos->name);
    for (int i = 0; i < 2; i++) {
        const fa_array *a = tables[i];
        rotary->dtype = fa_contract_dtype(a->dtype);
        if (rotary->dtype != FA_F32 && rotary->dtype != c->forward.what.dtype)
            return fa_fail(error, FA_TYPE, "`%s` must be float32 or of `%s`'s dtype, got %s",
                           a->name, r->q->name, fa_dtype_name(a->dtype, got));
        TRY(fa_check_dtype(a, q->cos->dtype, q->cos, error));
        TRY(fa_check_rank(a, 2, "(s_max, rotary_dim / 2)", error));
        TRY(fa_check_place(a, r->q, error));
        TRY(fa_check_range(a, a->shape[1], "rotary_dim / 2", 0, c->forward.what.d / 2, error));
        TRY(fa_check_shape(a, 2, q->cos->shape, error));
    }
    fa_bind(&rotary->cos, q->cos, FA_BHSD);
    fa_bind(&rotary->sin, q->sin, FA_BHSD);
    rotary->interleaved = q->interleaved;
    rotary->advances = (c->forward.masks.flags & (FA_HAS_LEFT | FA_HAS_RIGHT)) != 0;
    const int64_t positions = last_position(c);
    if (q->cos->shape[0] < positions)
        return fa_fail(error, FA_VALUE,
                       "`%s` must have at least %lld rows, one for each position, got %lld",
                       q->cos->name, (long long)positions, (long long)q->cos->shape[0]);
    return FA_OK;
}

/* The caches, which share no element with what else the call has. Each other they may: values can
 * be a part of the keys. */
static fa_status check_written(const fa_request *r, const fa_kvcache_request *q, fa_error *error) {
    const fa_array *const caches[2] = {r->k, r->v}, *read[MAX_READ];
    if (!q->k_new) return FA_OK;
    list_read(r, q, read);
    for (int i = 0; i < 2; i++)
        TRY(fa_check_written(caches[i], 4, caches[i]->shape, r->q, MAX_READ, read, error));
    return FA_OK;
}

fa_status fa_check_kvcache_out(const fa_request *r, const fa_kvcache_request *q,
                               const fa_plan *plan, const fa_array *out, fa_error *error) {
    const fa_array *read[MAX_READ + 2];
    list_read(r, q, read);
    read[MAX_READ] = r->k, read[MAX_READ + 1] = r->v;
    return fa_check_written(out, plan->out_ndim, plan->out_shape, r->q, MAX_READ + 2, read, error);
}

void fa_expect_kvcache(const fa_plan *plan, const int64_t mass_shape[3], int wants_mass,
                       fa_kvcache *c) {
    c->forward.what.out = plan->params.what.out;
    c->forward.what.lse = plan->params.what.lse;
    if (wants_mass) fa_expect_lse(&c->mass, 3, mass_shape);
}

fa_status fa_check_kvcache(const fa_request *r, const fa_kvcache_request *q, fa_plan *plan,
                           fa_kvcache *c, int64_t mass_shape[3], fa_error *error) {
    const int axis = fa_key_axis(r);
    const fa_array *table = q->page_table ? q->page_table : q->batch_idx;
    fa_clear(c, sizeof *c);
    TRY(check_queries(r, error));
    TRY(fa_check_caches(r, table, q->page_table != NULL, error));
    if (q->page_table && q->batch_idx)
        return fa_fail(error, FA_VALUE, "`%s` must be None with `%s`, got both", q->batch_idx->name,
                       table->name);
    TRY(count_new(r, q, &c->s_new, error));
    int64_t room;
    TRY(fa_count_room(r, q->page_table, &room, error));
    TRY(check_lengths(r, q, room, c, error));
    const fa_masks lengths = c->forward.masks;

    fa_array k, v;
    const int64_t sk = q->lengths ? room : q->length + c->s_new;
    const fa_request gathered = fa_gather(r, sk, &k, &v);
    TRY(fa_check_attention(&gathered, plan, error));

    c->forward = plan->params;
    c->forward.masks.k_lengths = lengths.k_lengths;
    c->forward.masks.k_lengths_stride = lengths.k_lengths_stride;
    fa_bind(&c->forward.what.k, r->k, r->layout);
    fa_bind(&c->forward.what.v, r->v, r->layout);
    TRY(check_new(r, q, c, error));
    mass_shape[0] = fa_batch(r), mass_shape[1] = r->k->shape[3 - axis], mass_shape[2] = room;
    TRY(check_rotary(r, q, c, error));
    if (table) TRY(fa_check_pages(table, r->k, axis, c, error));
    return check_written(r, q, error);
}
