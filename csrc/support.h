/* support.h - declared support: which backend takes what, in one table that every build has.
 *
 * dispatch.c refuses by it what is not declared, info()["support"] tells it to README's matrix and
 * to the tests: a refusal that is not declared here is a fault. Includes nothing but fastattn.h.
 */
#ifndef FASTATTN_SUPPORT_H
#define FASTATTN_SUPPORT_H

#include "fastattn.h"

/* What a request may ask for besides its dtype and head sizes: X(constant, name, in a sentence) */
#define FA_FEATURES(X)                                                                        \
    X(CAUSAL, causal, "causal masks")                                                         \
    X(WINDOW, window, "windows")                                                              \
    X(Q_OFFSET, q_offset, "q_offset")                                                         \
    X(LENGTHS, lengths, "lengths")        /* k_start too */                                   \
    X(VARLEN, varlen, "packed sequences") /* attention_varlen */                              \
    X(BOOL_MASK, bool_mask, "bool masks")                                                     \
    X(FLOAT_MASK, float_mask, "float masks")                                                  \
    X(SOFTCAP, softcap, "softcap")                                                            \
    X(ALIBI, alibi, "ALiBi")                                                                  \
    X(SINK, sink, "sinks")                                                                    \
    X(DROPOUT, dropout, "dropout")                                                            \
    X(GQA, gqa, "grouped heads")                                   /* hq != hk or hq != hv */ \
    X(KV_HEADS, kv_heads, "different numbers of heads of k and v") /* hk != hv */             \
    X(DV, dv, "dv other than d")                                                              \
    X(LSE, lse, "lse")                                                                        \
    X(BATCH_INVARIANT, batch_invariant, "batch_invariant")                                    \
    X(PAGES, pages, "keys in pages") /* of a cache, whose queries may be packed */            \
    X(DETERMINISTIC, deterministic, "deterministic gradients")                                \
    X(DMASK, dmask, "gradients of float masks")                                               \
    X(APPEND, append, "new keys") /* and rotary positions */                                  \
    X(MASS, mass, "return_mass")

enum {
#define FA_X(constant, ...) FA_BIT_##constant,
    FA_FEATURES(FA_X)
#undef FA_X
        FA_FEATURE_COUNT
};

enum {
#define FA_X(constant, ...) FA_##constant = 1 << FA_BIT_##constant,
    FA_FEATURES(FA_X)
#undef FA_X
};

enum { FA_ALL_FEATURES = (1 << FA_FEATURE_COUNT) - 1 };

typedef struct fa_feature {
    const char *name, *words;
} fa_feature;

extern const fa_feature fa_features[FA_FEATURE_COUNT]; /* by bit */

/* The lines of the table: fa_*_op.support. */
enum {
    FA_CPU_FORWARD,
    FA_CPU_BACKWARD,
    FA_CPU_MERGE,
    FA_CPU_KVCACHE,
    FA_CPU_SPARSEK,
    FA_CPU_SPARSEK_BACKWARD,
    FA_CPU_SPARSE,
    FA_CPU_SPARSE_BACKWARD,
    FA_CPU_SPARSEK_ATTENTION,
    FA_CPU_SPARSEK_ATTENTION_BACKWARD,
    FA_SM90_FORWARD,
    FA_SM90_BACKWARD,
    FA_SM90_MERGE,
    FA_SM90_KVCACHE,
    FA_SM90_SPARSEK,
    FA_SM90_SPARSEK_BACKWARD,
    FA_SM90_SPARSE,
    FA_SM90_SPARSE_BACKWARD,
    FA_SM80_FORWARD,
    FA_SM80_BACKWARD,
    FA_SM80_MERGE,
    FA_SUPPORT_COUNT
};

enum { FA_MAX_APART = 5 };

typedef struct fa_support {
    const char *backend, *operation;
    uint32_t dtypes;              /* bits 1 << fa_dtype, of q, k, v or of the parts */
    uint32_t features;            /* FA_CAUSAL | ... */
    uint32_t apart[FA_MAX_APART]; /* sets of features that never come together; 0: no set */
    int32_t least_d, most_d;      /* of d and dv */
} fa_support;

extern const fa_support fa_support_table[FA_SUPPORT_COUNT];

/* What a request asks for. */
typedef struct fa_demand {
    fa_dtype dtype;
    uint32_t features;
    int32_t d, dv; /* dv twice where there is no d */
} fa_demand;

fa_demand fa_forward_demand(const fa_params *p);
fa_demand fa_backward_demand(const fa_backward *b);
fa_demand fa_merge_demand(const fa_merge *m);
fa_demand fa_kvcache_demand(const fa_kvcache *c);
fa_demand fa_sparsek_demand(const fa_sparsek *r);
fa_demand fa_sparse_demand(const fa_sparse *s);
fa_demand fa_sparse_backward_demand(const fa_sparse_backward *b);
fa_demand fa_sparsek_attention_demand(const fa_sparsek_attention *r);
fa_demand fa_sparsek_attention_backward_demand(const fa_sparsek_attention_backward *b);

/* FA_OK where the line declares all of it; else FA_UNSUPPORTED, and why it does not. */
fa_status fa_check_support(int32_t line, const fa_demand *demand, fa_error *why);

#endif
