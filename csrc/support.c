/* support.c - the table of declared support, what requests ask for, and the refusals. */
#include "support.h"

#include <stdio.h>
#include <string.h>

#include "check.h"

const fa_feature fa_features[FA_FEATURE_COUNT] = {
#define FA_X(constant, name, words) {#name, words},
    FA_FEATURES(FA_X)
#undef FA_X
};

#define DTYPE(name) (1u << FA_##name)

enum { SPARSEK = FA_WINDOW | FA_Q_OFFSET | FA_LENGTHS };
enum {
    FLOATS = 1 << FA_F64 | 1 << FA_F32 | 1 << FA_F16 | 1 << FA_BF16,
    LISTED = FA_CAUSAL | FA_WINDOW | FA_Q_OFFSET | FA_LENGTHS | FA_VARLEN | FA_SOFTCAP | FA_SINK |
        FA_GQA | FA_DV | FA_LSE, /* all that attention_sparse has */
};

/* The table stands here, not beside the backends: README's matrix and the tests ask for the lines
 * of backends that this build does not have, too. */
const fa_support fa_support_table[FA_SUPPORT_COUNT] = {
    [FA_CPU_FORWARD] = {"cpu", "forward", FLOATS, FA_ALL_FEATURES, {0}, 0, FA_MAX_LENGTH},
    [FA_CPU_BACKWARD] =
        {"cpu", "backward", FLOATS, FA_ALL_FEATURES & ~FA_PAGES, {0}, 0, FA_MAX_LENGTH},
    [FA_CPU_MERGE] = {"cpu", "merge", FLOATS, 0, {0}, 0, INT32_MAX},
    [FA_CPU_KVCACHE] = {"cpu", "kvcache", FLOATS, FA_ALL_FEATURES, {0}, 0, FA_MAX_LENGTH},
    [FA_CPU_SPARSEK] = {"cpu", "sparsek", FLOATS, SPARSEK, {0}, 0, 0},
    [FA_CPU_SPARSEK_BACKWARD] = {"cpu", "sparsek_backward", FLOATS, SPARSEK, {0}, 0, 0},
    [FA_CPU_SPARSE] = {"cpu", "sparse", FLOATS, LISTED, {0}, 0, FA_MAX_LENGTH},
    [FA_CPU_SPARSE_BACKWARD] =
        {"cpu", "sparse_backward", FLOATS, LISTED | FA_DETERMINISTIC, {0}, 0, FA_MAX_LENGTH},
    [FA_CPU_SPARSEK_ATTENTION] =
        {"cpu", "sparsek_attention", FLOATS, LISTED & ~FA_CAUSAL, {0}, 0, FA_MAX_LENGTH},
    [FA_CPU_SPARSEK_ATTENTION_BACKWARD] = {"cpu",
                                           "sparsek_attention_backward",
                                           FLOATS,
                                           (LISTED & ~FA_CAUSAL) | FA_DETERMINISTIC,
                                           {0},
                                           0,
                                           FA_MAX_LENGTH},
    /* One launch for each pair of a key head and a value head: random bits count heads. */
    [FA_SM90_FORWARD] = {"sm90",
                         "forward",
                         DTYPE(F16) | DTYPE(BF16),
                         FA_ALL_FEATURES,
                         {FA_DROPOUT | FA_KV_HEADS, FA_PAGES | FA_BOOL_MASK,
                          FA_PAGES | FA_FLOAT_MASK, FA_PAGES | FA_DROPOUT, FA_PAGES | FA_KV_HEADS},
                         1,
                         256},
    [FA_SM90_BACKWARD] = {"sm90",
                          "backward",
                          DTYPE(F16) | DTYPE(BF16),
                          FA_ALL_FEATURES & ~(FA_KV_HEADS | FA_PAGES),
                          {0},
                          1,
                          256},
    [FA_SM90_MERGE] =
        {"sm90", "merge", DTYPE(F32) | DTYPE(F16) | DTYPE(BF16), 0, {0}, 0, INT32_MAX},
    [FA_SM90_KVCACHE] =
        {"sm90", "kvcache", DTYPE(F16) | DTYPE(BF16), FA_ALL_FEATURES & ~FA_KV_HEADS, {0}, 1, 256},
    [FA_SM90_SPARSEK] = {"sm90", "sparsek", FLOATS, SPARSEK, {0}, 0, 0},
    [FA_SM90_SPARSEK_BACKWARD] = {"sm90", "sparsek_backward", FLOATS, SPARSEK, {0}, 0, 0},
    [FA_SM90_SPARSE] = {"sm90", "sparse", DTYPE(F16) | DTYPE(BF16), LISTED, {0}, 1, 256},
    [FA_SM90_SPARSE_BACKWARD] = {"sm90",
                                 "sparse_backward",
                                 DTYPE(F16) | DTYPE(BF16),
                                 LISTED | FA_DETERMINISTIC,
                                 {0},
                                 1,
                                 256},
    [FA_SM80_FORWARD] = {"sm80",
                         "forward",
                         FLOATS,
                         FA_ALL_FEATURES & ~FA_PAGES,
                         {FA_DROPOUT | FA_KV_HEADS},
                         0,
                         512},
    [FA_SM80_BACKWARD] =
        {"sm80", "backward", FLOATS, FA_ALL_FEATURES & ~(FA_KV_HEADS | FA_PAGES), {0}, 0, 512},
    [FA_SM80_MERGE] =
        {"sm80", "merge", DTYPE(F32) | DTYPE(F16) | DTYPE(BF16), 0, {0}, 0, INT32_MAX},
};

fa_demand fa_forward_demand(const fa_params *p) {
    const fa_what *w = &p->what;
    const fa_masks *m = &p->masks;
    const fa_scores *s = &p->scores;
    const int right = (m->flags & FA_HAS_RIGHT) != 0;
    uint32_t asked = 0;
    if (right && m->right == 0) asked |= FA_CAUSAL;
    if (m->flags & FA_HAS_LEFT || (right && m->right != 0)) asked |= FA_WINDOW;
    if (m->flags & FA_HAS_OFFSET || m->q_offset) asked |= FA_Q_OFFSET;
    if (m->q_lengths || m->k_lengths || m->k_start) asked |= FA_LENGTHS;
    if (p->varlen.cu_q) asked |= FA_VARLEN;
    if (p->pages.table || (p->varlen.cu_q && !p->varlen.cu_k)) asked |= FA_PAGES;
    if (s->mask.data) asked |= s->mask_dtype == FA_BOOL ? FA_BOOL_MASK : FA_FLOAT_MASK;
    if (s->softcap != 0) asked |= FA_SOFTCAP;
    if (s->alibi_slopes) asked |= FA_ALIBI;
    if (s->sink) asked |= FA_SINK;
    if (p->dropout.p > 0) asked |= FA_DROPOUT;
    if (w->hq != w->hk || w->hq != w->hv) asked |= FA_GQA;
    if (w->hk != w->hv) asked |= FA_KV_HEADS;
    if (w->d != w->dv) asked |= FA_DV;
    if (w->lse.data) asked |= FA_LSE;
    if (w->batch_invariant) asked |= FA_BATCH_INVARIANT;
    return (fa_demand){w->dtype, asked, w->d, w->dv};
}

fa_demand fa_backward_demand(const fa_backward *b) {
    fa_demand demand = fa_forward_demand(&b->forward);
    if (b->deterministic) demand.features |= FA_DETERMINISTIC;
    if (b->dmask.data) demand.features |= FA_DMASK;
    return demand;
}

fa_demand fa_merge_demand(const fa_merge *m) {
    const int32_t dv = m->out.shape[3] > INT32_MAX ? INT32_MAX : (int32_t)m->out.shape[3];
    return (fa_demand){m->dtype, 0, dv, dv};
}

fa_demand fa_kvcache_demand(const fa_kvcache *c) {
    fa_demand demand = fa_forward_demand(&c->forward);
    if (c->k_new.data || c->s_new) demand.features |= FA_APPEND;
    if (c->mass.data) demand.features |= FA_MASS;
    return demand;
}

/* Its rows are causal by what they are. */
fa_demand fa_sparsek_demand(const fa_sparsek *r) {
    fa_params p = {.masks = r->masks};
    p.what.hq = p.what.hk = p.what.hv = 1;
    fa_demand demand = fa_forward_demand(&p);
    demand.features &= ~(uint32_t)FA_CAUSAL;
    if (r->lengths.data) demand.features |= FA_LENGTHS;
    demand.dtype = r->dtype;
    return demand;
}

fa_demand fa_sparse_demand(const fa_sparse *s) { return fa_forward_demand(&s->forward); }

fa_demand fa_sparse_backward_demand(const fa_sparse_backward *b) {
    return fa_backward_demand(&b->attention);
}

/* Causal by what it is; a window it always has. */
static fa_demand of_kept(fa_demand demand) {
    demand.features = (demand.features & ~(uint32_t)FA_CAUSAL) | FA_WINDOW;
    return demand;
}

fa_demand fa_sparsek_attention_demand(const fa_sparsek_attention *r) {
    return of_kept(fa_forward_demand(&r->forward));
}

fa_demand fa_sparsek_attention_backward_demand(const fa_sparsek_attention_backward *b) {
    return of_kept(fa_backward_demand(&b->attention));
}

static int32_t lowest_bit(uint32_t set) { return __builtin_ctz(set); }

/* "float16 and bfloat16" */
static const char *list_dtypes(uint32_t set, char text[96]) {
    size_t used = 0;
    for (int32_t i = 0; i < FA_DTYPE_COUNT; i++)
        if (set >> i & 1)
            used += (size_t)snprintf(text + used, 96 - used, "%s%s",
                                     !used            ? ""
                                     : set >> (i + 1) ? ", "
                                                      : " and ",
                                     fa_dtypes[i].name);
    return text;
}

static fa_status refuse_dtype(const fa_support *s, fa_dtype dtype, fa_error *why) {
    char names[96];
    const int casts = (s->dtypes & DTYPE(BF16)) != 0;
    return fa_fail(why, FA_UNSUPPORTED, "it takes %s, not %s%s", list_dtypes(s->dtypes, names),
                   fa_dtypes[dtype].name,
                   casts ? ": cast the arrays (with torch .bfloat16(), or a region of "
                           "torch.autocast)"
                         : "");
}

fa_status fa_check_support(int32_t line, const fa_demand *demand, fa_error *why) {
    const fa_support *s = &fa_support_table[line];
    const uint32_t more = demand->features & ~s->features;
    if (!(s->dtypes >> demand->dtype & 1)) return refuse_dtype(s, demand->dtype, why);
    if (demand->d < s->least_d || demand->d > s->most_d || demand->dv < s->least_d ||
        demand->dv > s->most_d)
        return fa_fail(why, FA_UNSUPPORTED,
                       "it takes d and dv from %d to %d, not d = %d and dv = %d", s->least_d,
                       s->most_d, demand->d, demand->dv);
    if (more)
        return fa_fail(why, FA_UNSUPPORTED, "it takes no %s", fa_features[lowest_bit(more)].words);
    for (int32_t i = 0; i < FA_MAX_APART && s->apart[i]; i++) {
        const uint32_t set = s->apart[i];
        if ((demand->features & set) == set)
            return fa_fail(why, FA_UNSUPPORTED, "it takes no %s with %s",
                           fa_features[lowest_bit(set)].words,
                           fa_features[lowest_bit(set & (set - 1))].words);
    }
    return FA_OK;
}
