/* dispatch.c - the ordered table of backends; the first that takes a request runs it.
 *
 * Stop 4 of 6. A backend is one entry here and nothing else: support.c declares what it takes, its
 * own folder computes. Next: fa_cpu_forward() in csrc/cpu/forward.c, or run() in
 * kernels/sm90/backend.cu.
 */
#include "check.h"
#include "check_sparse.h"
#include "check_sparsek_attention.h"
#include "support.h"

#include <stdio.h>
#include <string.h>

static const fa_backend *const table[] = {
#ifdef FASTATTN_CUDA
    &fa_sm90,
    &fa_sm80,
#endif
    &fa_cpu,
};

enum { COUNT = sizeof table / sizeof *table };
_Static_assert((int)COUNT <= (int)FA_MAX_BACKENDS, "fa_choose() writes as many reasons");

const char *fa_no_kernels(void) {
#ifdef FASTATTN_CUDA
    return NULL;
#else
    return FA_NO_KERNELS; /* setup.py's reason */
#endif
}

int32_t fa_backend_count(void) { return COUNT; }

const fa_backend *fa_backend_at(int32_t i) { return table[i]; }

/* ---- the choice ---- */

/* Whether a backend that runs on the device takes the request: of one operation. */
typedef fa_status ask_operation(const fa_backend *b, const void *request, fa_choice *choice,
                                fa_error *why);

/* Each backend is asked for what it declares, then for the rest. */
#define ASK(operation, asked, without)                                                            \
    static fa_status ask_##operation(const fa_backend *b, const void *request, fa_choice *choice, \
                                     fa_error *why) {                                             \
        if (!b->operation) return fa_fail(why, FA_UNSUPPORTED, without);                          \
        const fa_demand demand = asked;                                                           \
        TRY(fa_check_support(b->operation->support, &demand, why));                               \
        return b->operation->reject(request, choice, why);                                        \
    }
ASK(forward, fa_forward_demand(request), "it computes no attention")
ASK(backward, fa_backward_demand(request), "it computes no gradients")
ASK(merge, fa_merge_demand(request), "it merges no partial results")
ASK(kvcache, fa_kvcache_demand(request), "it reads and writes no caches of keys")
ASK(sparsek, fa_sparsek_demand(request), "it computes no SparseK")
ASK(sparsek_backward, fa_sparsek_demand(&((const fa_sparsek_backward *)request)->forward),
    "it has no gradient of SparseK")
ASK(sparse, fa_sparse_demand(request), "it has no attention to lists of keys")
ASK(sparse_backward, fa_sparse_backward_demand(request),
    "it has no gradients of attention to lists of keys")
ASK(sparsek_attention, fa_sparsek_attention_demand(request), "it has no SparseK attention")
ASK(sparsek_attention_backward, fa_sparsek_attention_backward_demand(request),
    "it has no gradients of SparseK attention")
#undef ASK

static fa_status ask(const fa_backend *b, ask_operation *operation, const void *request,
                     const fa_where *where, const char *name, fa_choice *choice, fa_error *why) {
    if (name && strcmp(name, b->name))
        return fa_fail(why, FA_UNSUPPORTED, "backend=\"%s\" was asked for", name);
    if (b->device != where->device_type)
        return fa_fail(why, FA_UNSUPPORTED, "the arrays are on %s",
                       where->device_type == FA_CPU ? "the CPU" : "a GPU");
    TRY(b->find_device(where, &choice->device, why));
    return operation(b, request, choice, why);
}

/* reasons: as in fa_choose(). */
static const fa_backend *choose(ask_operation *operation, const void *request,
                                const fa_where *where, const char *name, fa_chosen *to,
                                fa_error *reasons, fa_error *error) {
    const fa_backend *chosen = NULL;
    fa_choice other;
    /* The usual case first, without a word: a backend of another device is not even asked. */
    for (int32_t i = 0; i < COUNT && !chosen; i++)
        if (table[i]->device == where->device_type &&
            ask(table[i], operation, request, where, name, &to->choice, error) == FA_OK)
            chosen = table[i];
    to->backend = chosen;
    if (chosen && !reasons) return chosen;

    size_t used = 0, room = sizeof error->text;
    for (int32_t i = 0; i < COUNT; i++) {
        fa_error why = {""};
        if (ask(table[i], operation, request, where, name, &other, &why) == FA_OK) why.text[0] = 0;
        if (reasons) reasons[i] = why;
        if (used < room)
            used += (size_t)snprintf(error->text + used, room - used, "%s%s: %s",
                                     used ? "; " : "no backend takes this call: ", table[i]->name,
                                     why.text);
    }
#ifndef FASTATTN_CUDA
    if (used < room)
        snprintf(error->text + used, room - used, "; no CUDA kernels: %s", fa_no_kernels());
#endif
    return chosen;
}

/* ---- the forward pass ---- */

const fa_backend *fa_choose(fa_plan *plan, const char *name, fa_error *reasons, fa_error *error) {
    const fa_params *p = &plan->params;
    return choose(ask_forward, p, &p->where, name, &plan->chosen, reasons, error);
}

const char *fa_kernel(const fa_plan *plan) {
    return plan->chosen.backend->forward->kernel(&plan->params, &plan->chosen.choice);
}

int64_t fa_workspace(const fa_plan *plan) {
    return plan->chosen.backend->forward->workspace(&plan->params, &plan->chosen.choice);
}

/* The next index of the outer dimensions, counted like an odometer, and the arrays' data with it.
 */
static void step_outer(const fa_plan *plan, int64_t index[FA_OUTER], fa_params *p) {
    void **const data[FA_OPERANDS] = {
        [FA_OPERAND_Q] = &p->what.q.data,     [FA_OPERAND_K] = &p->what.k.data,
        [FA_OPERAND_V] = &p->what.v.data,     [FA_OPERAND_MASK] = &p->scores.mask.data,
        [FA_OPERAND_OUT] = &p->what.out.data,
    };
    for (int32_t i = 0; i < plan->outer_ndim; i++) {
        int64_t step = 1;
        if (++index[i] == plan->outer_shape[i]) step = 1 - plan->outer_shape[i], index[i] = 0;
        for (int t = 0; t < FA_OPERANDS; t++) {
            const fa_dtype dtype = t == FA_OPERAND_MASK ? p->scores.mask_dtype : p->what.dtype;
            if (*data[t])
                *data[t] =
                    (char *)*data[t] + step * plan->outer_stride[i][t] * fa_dtype_size(dtype);
        }
        if (index[i]) break;
    }
}

fa_status fa_run(const fa_plan *plan, void *workspace, fa_error *error) {
    const fa_forward_op *op = plan->chosen.backend->forward;
    fa_choice choice = plan->chosen.choice;
    if (!plan->outer_ndim) return op->run(&plan->params, &choice, workspace, error);
    fa_params p = plan->params;
    int64_t index[FA_OUTER] = {0}, runs = 1;
    for (int32_t i = 0; i < plan->outer_ndim; i++) runs *= plan->outer_shape[i];
    for (int64_t run = 0; run < runs; run++) {
        /* Each is a request with addresses of its own, on which a variant may depend. */
        if (run) TRY(op->reject(&p, &choice, error));
        TRY(op->run(&p, &choice, workspace, error));
        p.dropout.first_b += p.what.b;
        step_outer(plan, index, &p);
    }
    return FA_OK;
}

/* ---- merging ---- */

const fa_backend *fa_choose_merge(const fa_merge *m, fa_chosen *chosen, fa_error *error) {
    return choose(ask_merge, m, &m->where, NULL, chosen, NULL, error);
}

int64_t fa_merge_workspace(const fa_merge *m, const fa_chosen *chosen) {
    return chosen->backend->merge->workspace(m, &chosen->choice);
}

fa_status fa_run_merge(const fa_merge *m, const fa_chosen *chosen, void *workspace,
                       fa_error *error) {
    return chosen->backend->merge->run(m, &chosen->choice, workspace, error);
}

/* ---- SparseK ---- */

const fa_backend *fa_choose_sparsek(const fa_sparsek *r, fa_chosen *chosen, fa_error *error) {
    return choose(ask_sparsek, r, &r->where, NULL, chosen, NULL, error);
}

int64_t fa_sparsek_workspace(const fa_sparsek *r, const fa_chosen *chosen) {
    return chosen->backend->sparsek->workspace(r, &chosen->choice);
}

fa_status fa_run_sparsek(const fa_sparsek *r, const fa_chosen *chosen, void *workspace,
                         fa_error *error) {
    return chosen->backend->sparsek->run(r, &chosen->choice, workspace, error);
}

const fa_backend *fa_choose_sparsek_backward(const fa_sparsek_backward *b, fa_chosen *chosen,
                                             fa_error *error) {
    return choose(ask_sparsek_backward, b, &b->forward.where, NULL, chosen, NULL, error);
}

int64_t fa_sparsek_backward_workspace(const fa_sparsek_backward *b, const fa_chosen *chosen) {
    return chosen->backend->sparsek_backward->workspace(b, &chosen->choice);
}

fa_status fa_run_sparsek_backward(const fa_sparsek_backward *b, const fa_chosen *chosen,
                                  void *workspace, fa_error *error) {
    return chosen->backend->sparsek_backward->run(b, &chosen->choice, workspace, error);
}

/* ---- operations that explain() knows, whose backend may be asked for by its name ---- */

#define NAMED(operation, request, where_of)                                                    \
    const fa_backend *fa_choose_##operation(const request *r, const char *name, fa_chosen *to, \
                                            fa_error *reasons, fa_error *error) {              \
        return choose(ask_##operation, r, &r->where_of.where, name, to, reasons, error);       \
    }                                                                                          \
    const char *fa_##operation##_kernel(const request *r, const fa_chosen *chosen) {           \
        return chosen->backend->operation->kernel(r, &chosen->choice);                         \
    }                                                                                          \
    int64_t fa_##operation##_workspace(const request *r, const fa_chosen *chosen) {            \
        return chosen->backend->operation->workspace(r, &chosen->choice);                      \
    }                                                                                          \
    fa_status fa_run_##operation(const request *r, const fa_chosen *chosen, void *workspace,   \
                                 fa_error *error) {                                            \
        return chosen->backend->operation->run(r, &chosen->choice, workspace, error);          \
    }
NAMED(backward, fa_backward, forward)
NAMED(kvcache, fa_kvcache, forward)
NAMED(sparse, fa_sparse, forward)
NAMED(sparse_backward, fa_sparse_backward, attention.forward)
NAMED(sparsek_attention, fa_sparsek_attention, forward)
NAMED(sparsek_attention_backward, fa_sparsek_attention_backward, attention.forward)
#undef NAMED
