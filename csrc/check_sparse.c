/* check_sparse.c - attention_sparse: the lists of keys and their gates, after the checks of
 * attention, as one fa_lists. With validate it is the only check that reads them.
 */
#include "check_sparse.h"

#include <stdlib.h>

#include "check_attention.h"
#include "mask.h"

/* One of the sizes that a block may have. */
static fa_status check_block(const char *name, int64_t size, const int16_t *sizes, const char *rule,
                             int32_t *to, fa_error *error) {
    for (; *sizes; sizes++)
        if (size == *sizes) {
            *to = (int32_t)size;
            return FA_OK;
        }
    return fa_fail(error, FA_VALUE, "`%s` must be %s, got %lld", name, rule, (long long)size);
}

/* The blocks of queries of all sequences. On a GPU only the kernels know, and clamp. */
static int64_t count_blocks(const fa_plan *plan, const fa_lists *l) {
    const fa_what *w = &plan->params.what;
    const fa_varlen *v = &plan->params.varlen;
    int64_t n = 0;
    if (!v->cu_q) return fa_q_blocks(l, w->sq);
    if (plan->params.where.device_type != FA_CPU) return 0;
    for (int64_t b = 0; b < w->b; b++)
        n += fa_q_blocks(l, v->cu_q[(b + 1) * v->cu_q_stride] - v->cu_q[b * v->cu_q_stride]);
    return n;
}

/* A size that broadcasts to `most`. */
static fa_status check_broadcast(const fa_array *a, const char *letter, int64_t size, int64_t most,
                                 fa_error *error) {
    if (size == 1 || size == most) return FA_OK;
    return fa_fail(error, FA_VALUE, "`%s` must have %s = %lld or 1, got %lld", a->name, letter,
                   (long long)most, (long long)size);
}

/* (b or 1, hk or 1, q blocks, L), without b where sequences are packed. like: whose L it has, or
 * NULL: of counts, which have none. */
static fa_status check_list(const fa_request *r, const fa_array *a, const fa_plan *plan,
                            const fa_lists *l, const fa_array *like, fa_tensor *to,
                            fa_error *error) {
    static const char *const dimensions[2][2] = {
        {"(b or 1, hk or 1, q blocks)", "(b or 1, hk or 1, q blocks, L)"},
        {"(hk or 1, q blocks)", "(hk or 1, q blocks, L)"}};
    const fa_what *w = &plan->params.what;
    const int packed = r->cu_q != NULL, has_length = like != NULL;
    const int32_t heads = packed ? 0 : 1;
    TRY(fa_check_rank(a, 3 - packed + has_length, dimensions[packed][has_length], error));
    TRY(fa_check_place(a, r->q, error));
    if (!packed) TRY(check_broadcast(a, "b", a->shape[0], w->b, error));
    TRY(check_broadcast(a, "hk", a->shape[heads], w->hk, error));
    const int64_t blocks = count_blocks(plan, l), given = a->shape[heads + 1];
    if (packed ? given < blocks : given != blocks)
        return fa_fail(error, FA_VALUE,
                       "`%s` must have %s%lld blocks of q_block = %d queries, got %lld", a->name,
                       packed ? "at least " : "", (long long)blocks, l->q_block, (long long)given);
    fa_array four = {.data = a->data, .ndim = 4, .shape = {1, 1, 1, 1}};
    for (int32_t i = 0; i < a->ndim; i++)
        four.shape[i + packed] = a->shape[i], four.stride[i + packed] = a->stride[i];
    fa_bind(to, &four, FA_BHSD);
    if (like)
        TRY(fa_check_equal(a, a->shape[heads + 2], "L", like, like->shape[like->ndim - 1], error));
    return FA_OK;
}

static fa_status check_ints(const fa_array *a, fa_error *error) {
    char got[32], mend[80];
    if (!memcmp(&a->dtype, &fa_int32, sizeof fa_int32)) return FA_OK;
    return fa_fail(error, FA_TYPE, "`%s` must be int32, got %s%s", a->name,
                   fa_dtype_name(a->dtype, got), fa_size_mend(a, fa_int32, mend));
}

/* The keys that are united with the lists: attention's, with another window. */
static fa_status check_union(const fa_request *r, const fa_sparse_request *q, const fa_plan *plan,
                             fa_lists *l, fa_error *error) {
    fa_masks *m = &l->window;
    const int64_t most = FA_MAX_SHIFT;
    l->has_window = q->has_window;
    if (!q->has_window) return FA_OK;
    *m = plan->params.masks;
    m->left = (int32_t)(q->left < -most ? -most : q->left > most ? most : q->left);
    m->right = (int32_t)(q->right < -most ? -most : q->right > most ? most : q->right);
    if (q->has_left && q->has_right && (int64_t)m->left + m->right < 0)
        return fa_fail(error, FA_VALUE,
                       "`window_union` (%lld, %lld) sees no key; unbounded is None",
                       (long long)q->left, (long long)q->right);
    if (r->causal && (!q->has_right || m->right > 0)) m->right = 0;
    m->flags = (m->flags & FA_HAS_OFFSET) | (q->has_left ? FA_HAS_LEFT : 0) |
               (q->has_right || r->causal ? FA_HAS_RIGHT : 0);
    return FA_OK;
}

/* ---- validate ---- */

/* One list, of a sequence with so many key blocks. seen: a mark for each of them, all other than
 * `mark`. */
static fa_status validate_list(const fa_sparse_request *q, const fa_lists *l, const int64_t at[3],
                               int64_t blocks, int32_t *seen, int32_t mark, fa_error *error) {
    const fa_tensor *t = &l->entries, *c = &l->counts;
    int64_t length = t->shape[3];
    if (c->data) {
        length = ((const int32_t *)
                      c->data)[at[0] * c->stride[0] + at[1] * c->stride[1] + at[2] * c->stride[2]];
        if (length < 0 || length > t->shape[3])
            return fa_fail(error, FA_VALUE,
                           "`%s` must be from 0 to L = %lld, got %lld for block %lld of queries",
                           q->counts->name, (long long)t->shape[3], (long long)length,
                           (long long)at[2]);
    }
    const int32_t *entries = (const int32_t *)t->data + at[0] * t->stride[0] +
                             at[1] * t->stride[1] + at[2] * t->stride[2];
    for (int64_t i = 0; i < length; i++) {
        const int64_t n = entries[i * t->stride[3]];
        if (n == -1) continue;
        if (n < 0 || n >= blocks)
            return fa_fail(error, FA_VALUE,
                           "`%s` must hold -1, or blocks of keys from 0 to %lld, got %lld for "
                           "block %lld of queries",
                           q->entries->name, (long long)blocks - 1, (long long)n, (long long)at[2]);
        if (seen[n] == mark)
            return fa_fail(error, FA_VALUE,
                           "`%s` must not name a block of keys twice, got %lld again for block "
                           "%lld of queries",
                           q->entries->name, (long long)n, (long long)at[2]);
        seen[n] = mark;
    }
    return FA_OK;
}

static fa_status validate_lists(const fa_sparse_request *q, const fa_plan *plan, const fa_lists *l,
                                int32_t *seen, fa_error *error) {
    const fa_params *p = &plan->params;
    const fa_what *w = &p->what;
    int64_t first = 0;
    int32_t mark = 0;
    for (int64_t b = 0; b < w->b; b++) {
        const fa_sequence s = fa_find_sequence(&p->varlen, &p->masks, b, w->sq, w->sk);
        const int32_t rows = fa_q_blocks(l, s.q_end - s.q), sk = s.lengths.sk;
        for (int64_t h = 0; h < w->hk; h++)
            for (int32_t m = 0; m < rows; m++) {
                const int64_t at[3] = {p->varlen.cu_q ? 0 : b, h, first + m};
                if (mark == INT32_MAX) return FA_OK; /* more lists than any memory has */
                TRY(validate_list(q, l, at, sk / l->k_block + (sk % l->k_block > 0), seen, ++mark,
                                  error));
            }
        if (p->varlen.cu_q) first += rows;
    }
    return FA_OK;
}

static fa_status validate(const fa_request *r, const fa_sparse_request *q, const fa_plan *plan,
                          const fa_lists *l, fa_error *error) {
    if (r->q->device_type != FA_CPU || l->entries.data == FA_TO_COME)
        return fa_fail(error, FA_UNSUPPORTED,
                       "`validate` must be False on a GPU and where a program is recorded: it "
                       "reads the lists");
    int32_t *seen = calloc((size_t)plan->params.what.sk + 1, sizeof *seen);
    if (!seen) return fa_fail(error, FA_MEMORY, "no memory to validate `%s`", q->entries->name);
    const fa_status status = validate_lists(q, plan, l, seen, error);
    free(seen);
    return status;
}

/* ---- all of it ---- */

/* Stretches a dimension of 1 in b and hk, whose stride is 0. */
static void stretch(fa_tensor *t, const fa_what *w, int packed) {
    fa_stretch(&t->shape[0], packed ? 1 : w->b);
    fa_stretch(&t->shape[1], w->hk);
}

fa_status fa_check_lists(const fa_request *r, const fa_sparse_request *q, const fa_plan *plan,
                         fa_lists *l, fa_error *error) {
    static const int16_t rows[] = {1, 64, 128, 0}, keys[] = {1, 16, 32, 64, 128, 0};
    const fa_what *w = &plan->params.what;
    const int packed = r->cu_q != NULL;
    fa_clear(l, sizeof *l);
    TRY(check_block("q_block", q->q_block, rows, "1, 64 or 128", &l->q_block, error));
    TRY(check_block("k_block", q->k_block, keys, "1, 16, 32, 64 or 128", &l->k_block, error));
    TRY(check_ints(q->entries, error));
    const int64_t length = q->entries->ndim ? q->entries->shape[q->entries->ndim - 1] : 0;
    TRY(fa_check_range(q->entries, length, "L", 0, FA_MAX_LENGTH / l->k_block, error));
    TRY(check_list(r, q->entries, plan, l, q->entries, &l->entries, error));
    if (q->counts) {
        TRY(check_ints(q->counts, error));
        TRY(check_list(r, q->counts, plan, l, NULL, &l->counts, error));
        stretch(&l->counts, w, packed);
    }
    if (q->gate) {
        TRY(fa_check_dtype(q->gate, fa_lse_dtype(w->dtype), NULL, error));
        TRY(check_list(r, q->gate, plan, l, q->entries, &l->gate, error));
        stretch(&l->gate, w, packed);
    }
    stretch(&l->entries, w, packed);
    l->key_gate = q->key_gate && q->gate;
    TRY(check_union(r, q, plan, l, error));
    return q->validate ? validate(r, q, plan, l, error) : FA_OK;
}

fa_status fa_check_sparse_out(const fa_request *r, const fa_sparse_request *q, const fa_plan *plan,
                              const fa_array *out, fa_error *error) {
    const fa_array *inputs[FA_MAX_INPUTS + 3];
    fa_list_inputs(r, inputs);
    inputs[FA_MAX_INPUTS] = q->entries;
    inputs[FA_MAX_INPUTS + 1] = q->counts;
    inputs[FA_MAX_INPUTS + 2] = q->gate;
    return fa_check_written(out, plan->out_ndim, plan->out_shape, r->q, FA_MAX_INPUTS + 3, inputs,
                            error);
}

void fa_expect_like(const fa_array *a, fa_tensor *to) {
    fa_array four = {.data = FA_TO_COME, .ndim = 4, .shape = {1, 1, 1, 1}};
    const int32_t from = 4 - a->ndim;
    int64_t stride = 1;
    for (int32_t i = a->ndim - 1; i >= 0; i--) {
        four.shape[from + i] = a->shape[i], four.stride[from + i] = stride;
        if (a->shape[i]) stride *= a->shape[i];
    }
    fa_bind(to, &four, FA_BHSD);
}
