/* cpu.c - the CPU backend: chooses the vector level, and is what dispatch.c calls.
 *
 * Each operation is computed in a file of its own.
 */
#include "cpu.h"

#include <pthread.h>

#include "pool.h"
#include "support.h"

typedef struct level {
    const char *name;
    int (*here)(void);                    /* whether this machine has it, and all before it */
    const char *forward[5], *backward[5]; /* names of the kernels, by dtype */
} level;

static int has_portable(void) { return 1; }

#if defined(__x86_64__)
static int has_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
}

static int has_avx512(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

static int has_avx512_bf16(void) { return __builtin_cpu_supports("avx512bf16"); }
#endif

/* clang-format off */
#define LEVEL(name)                                                                             \
    {#name, has_##name,                                                                         \
     {NULL, "cpu_" #name "_f64", "cpu_" #name "_f32", "cpu_" #name "_f16", "cpu_" #name "_bf16"}, \
     {NULL, "cpu_" #name "_bwd_f64", "cpu_" #name "_bwd_f32", "cpu_" #name "_bwd_f16",            \
      "cpu_" #name "_bwd_bf16"}}
/* clang-format on */

static const level levels[] = {
    /* in the order of fa_level */
    LEVEL(portable),
#if defined(__x86_64__)
    LEVEL(avx2),
    LEVEL(avx512),
    LEVEL(avx512_bf16),
#endif
};

static pthread_once_t level_once = PTHREAD_ONCE_INIT;
static const level *chosen = &levels[0];

/* The highest level that this machine has. FASTATTN_CPU_LEVEL names a lower one, for tests. */
static void choose_level(void) {
    const int count = sizeof levels / sizeof *levels;
    int highest = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
#endif
    while (highest + 1 < count && levels[highest + 1].here()) highest++;
    const char *wanted = getenv("FASTATTN_CPU_LEVEL");
    for (int i = 0; wanted && i < highest; i++)
        if (strcmp(wanted, levels[i].name) == 0) highest = i;
    chosen = &levels[highest];
}

static const level *the_level(void) {
    pthread_once(&level_once, choose_level);
    return chosen;
}

const char *fa_cpu_level(void) { return the_level()->name; }

static fa_level level_of(const fa_choice *choice) {
    return (fa_level)((const level *)choice->variant - levels);
}

int32_t fa_cpu_threads(void) { return fa_pool_threads(); }

void fa_cpu_set_threads(const int32_t *n) { fa_pool_set_threads(n); }

const char *fa_cpu_warning(void) { return fa_pool_warnings(); }

/* ---- the operations: support.c declares what they take, and they take all of it ---- */

static fa_status find_device(const fa_where *where, const void **device, fa_error *why) {
    (void)where, (void)why;
    *device = NULL;
    return FA_OK;
}

static fa_status reject_forward(const fa_params *p, fa_choice *choice, fa_error *why) {
    (void)p, (void)why;
    choice->variant = the_level();
    return FA_OK;
}

static const char *name_forward(const fa_params *p, const fa_choice *choice) {
    return ((const level *)choice->variant)->forward[p->what.dtype];
}

static int64_t no_workspace(const fa_params *p, const fa_choice *choice) {
    (void)p, (void)choice;
    return 0;
}

static fa_status run_forward(const fa_params *p, const fa_choice *choice, void *workspace,
                             fa_error *error) {
    (void)workspace;
    return fa_cpu_forward(p, level_of(choice), error);
}

static const fa_forward_op forward = {FA_CPU_FORWARD, reject_forward, name_forward, no_workspace,
                                      run_forward};

static fa_status reject_kvcache(const fa_kvcache *c, fa_choice *choice, fa_error *why) {
    return reject_forward(&c->forward, choice, why);
}

static const char *name_kvcache(const fa_kvcache *c, const fa_choice *choice) {
    return name_forward(&c->forward, choice);
}

static int64_t no_kvcache_workspace(const fa_kvcache *c, const fa_choice *choice) {
    (void)c, (void)choice;
    return 0;
}

static fa_status run_kvcache(const fa_kvcache *c, const fa_choice *choice, void *workspace,
                             fa_error *error) {
    (void)workspace;
    return fa_cpu_kvcache(c, level_of(choice), error);
}

static const fa_kvcache_op kvcache = {FA_CPU_KVCACHE, reject_kvcache, name_kvcache,
                                      no_kvcache_workspace, run_kvcache};

static fa_status reject_backward(const fa_backward *b, fa_choice *choice, fa_error *why) {
    (void)b, (void)why;
    choice->variant = the_level();
    return FA_OK;
}

static const char *name_backward(const fa_backward *b, const fa_choice *choice) {
    return ((const level *)choice->variant)->backward[b->forward.what.dtype];
}

static int64_t no_backward_workspace(const fa_backward *b, const fa_choice *choice) {
    (void)b, (void)choice;
    return 0;
}

static fa_status run_backward(const fa_backward *b, const fa_choice *choice, void *workspace,
                              fa_error *error) {
    (void)workspace;
    return fa_cpu_backward(b, level_of(choice), error);
}

static const fa_backward_op backward = {FA_CPU_BACKWARD, reject_backward, name_backward,
                                        no_backward_workspace, run_backward};

/* Operations of one variant, without workspace, whatever is asked. */
#define SINGLE(operation, request, line)                                                         \
    static fa_status reject_##operation(const request *r, fa_choice *choice, fa_error *why) {    \
        (void)r, (void)why;                                                                      \
        choice->variant = NULL;                                                                  \
        return FA_OK;                                                                            \
    }                                                                                            \
    static const char *name_##operation(const request *r, const fa_choice *choice) {             \
        (void)r, (void)choice;                                                                   \
        return "cpu_" #operation;                                                                \
    }                                                                                            \
    static int64_t no_##operation##_workspace(const request *r, const fa_choice *choice) {       \
        (void)r, (void)choice;                                                                   \
        return 0;                                                                                \
    }                                                                                            \
    static fa_status run_##operation(const request *r, const fa_choice *choice, void *workspace, \
                                     fa_error *error) {                                          \
        (void)choice, (void)workspace;                                                           \
        return fa_cpu_##operation(r, error);                                                     \
    }                                                                                            \
    static const fa_##operation##_op operation = {line, reject_##operation, name_##operation,    \
                                                  no_##operation##_workspace, run_##operation};
SINGLE(merge, fa_merge, FA_CPU_MERGE)
SINGLE(sparsek, fa_sparsek, FA_CPU_SPARSEK)
SINGLE(sparsek_backward, fa_sparsek_backward, FA_CPU_SPARSEK_BACKWARD)
#undef SINGLE

/* Of lists of keys: with the variants of the forward, or of the backward pass. field: of which. */
#define LISTED(operation, request, like, field, line)                                            \
    static fa_status reject_##operation(const request *r, fa_choice *choice, fa_error *why) {    \
        return reject_##like(&r->field, choice, why);                                            \
    }                                                                                            \
    static const char *name_##operation(const request *r, const fa_choice *choice) {             \
        return name_##like(&r->field, choice);                                                   \
    }                                                                                            \
    static int64_t no_##operation##_workspace(const request *r, const fa_choice *choice) {       \
        (void)r, (void)choice;                                                                   \
        return 0;                                                                                \
    }                                                                                            \
    static fa_status run_##operation(const request *r, const fa_choice *choice, void *workspace, \
                                     fa_error *error) {                                          \
        (void)workspace;                                                                         \
        return fa_cpu_##operation(r, level_of(choice), error);                                   \
    }                                                                                            \
    static const fa_##operation##_op operation = {line, reject_##operation, name_##operation,    \
                                                  no_##operation##_workspace, run_##operation};
LISTED(sparse, fa_sparse, forward, forward, FA_CPU_SPARSE)
LISTED(sparse_backward, fa_sparse_backward, backward, attention, FA_CPU_SPARSE_BACKWARD)
LISTED(sparsek_attention, fa_sparsek_attention, forward, forward, FA_CPU_SPARSEK_ATTENTION)
LISTED(sparsek_attention_backward, fa_sparsek_attention_backward, backward, attention,
       FA_CPU_SPARSEK_ATTENTION_BACKWARD)
#undef LISTED

const fa_backend fa_cpu = {.name = "cpu",
                           .device = FA_CPU,
                           .find_device = find_device,
                           .forward = &forward,
                           .backward = &backward,
                           .merge = &merge,
                           .kvcache = &kvcache,
                           .sparse = &sparse,
                           .sparse_backward = &sparse_backward,
                           .sparsek = &sparsek,
                           .sparsek_backward = &sparsek_backward,
                           .sparsek_attention = &sparsek_attention,
                           .sparsek_attention_backward = &sparsek_attention_backward};
