/* jax_run.c - one operation of a program of XLA's, run as every other call: its operands under
 * their names in a request, then the same checks and the same dispatch. Knows neither Python nor
 * XLA.
 */
#include "jax_ffi.h"

#include <stdlib.h>

#include "check_array.h"

#define ATTRIBUTE(kind, name, field) {#name, JAX_##kind, offsetof(jax_call, field)}

const jax_attribute jax_attributes[JAX_ATTRIBUTES] = {
    ATTRIBUTE(INT, causal, request.causal),
    ATTRIBUTE(INT, top_left, request.top_left),
    ATTRIBUTE(INT, has_left, request.has_left),
    ATTRIBUTE(INT64, left, request.left),
    ATTRIBUTE(INT, has_right, request.has_right),
    ATTRIBUTE(INT64, right, request.right),
    ATTRIBUTE(INT, has_offset, request.has_offset),
    ATTRIBUTE(INT64, offset, request.offset),
    ATTRIBUTE(INT, has_scale, request.has_scale),
    ATTRIBUTE(DOUBLE, scale, request.scale),
    ATTRIBUTE(DOUBLE, softcap, request.softcap),
    ATTRIBUTE(DOUBLE, dropout_p, request.dropout_p),
    ATTRIBUTE(INT64, seed_value, request.seed_value),
    ATTRIBUTE(INT64, max_seqlen_q, request.max_sq),
    ATTRIBUTE(INT64, max_seqlen_k, request.max_sk),
    ATTRIBUTE(INT, bshd, request.layout),
    ATTRIBUTE(INT, batch_invariant, request.batch_invariant),
    ATTRIBUTE(INT, deterministic, backward.deterministic),
    ATTRIBUTE(DOUBLE, k, sparsek.k),
    ATTRIBUTE(INT, has_lists, sparsek.has_lists),
    ATTRIBUTE(INT64, sq, sparsek.sq),
    ATTRIBUTE(INT64, window, sparsek.window),
    ATTRIBUTE(INT64, q_block, sparse.q_block),
    ATTRIBUTE(INT64, k_block, sparse.k_block),
    ATTRIBUTE(INT, key_gate, sparse.key_gate),
    ATTRIBUTE(INT, has_union, sparse.has_window),
    ATTRIBUTE(INT, has_union_left, sparse.has_left),
    ATTRIBUTE(INT64, union_left, sparse.left),
    ATTRIBUTE(INT, has_union_right, sparse.has_right),
    ATTRIBUTE(INT64, union_right, sparse.right),
    ATTRIBUTE(DOUBLE, k_keep, selection.k),
    ATTRIBUTE(INT64, kept_window, selection.window),
    ATTRIBUTE(INT, keep_all, selection.keep_all),
    ATTRIBUTE(INT, gates_keys, selection.key_gate),
    ATTRIBUTE(INT64, runs, runs),
    ATTRIBUTE(INT64, stepped, stepped),
};

const jax_attribute *jax_find_attribute(const char *name, size_t size) {
    for (int i = 0; i < JAX_ATTRIBUTES; i++)
        if (strlen(jax_attributes[i].name) == size && !memcmp(jax_attributes[i].name, name, size))
            return &jax_attributes[i];
    return NULL;
}

/* ---- one run ---- */

#define OPERAND(name, field) {#name, offsetof(jax_call, field)}

static const struct {
    const char *name;
    size_t offset; /* of a const fa_array * in jax_call */
} operand_fields[] = {
    OPERAND(q, request.q),
    OPERAND(k, request.k),
    OPERAND(v, request.v),
    OPERAND(mask, request.mask),
    OPERAND(q_lengths, request.q_lengths),
    OPERAND(k_lengths, request.k_lengths),
    OPERAND(k_start, request.k_start),
    OPERAND(seqused_q, request.q_lengths),
    OPERAND(seqused_k, request.k_lengths),
    OPERAND(q_offset, request.q_offset),
    OPERAND(alibi_slopes, request.alibi_slopes),
    OPERAND(sink, request.sink),
    OPERAND(seed, request.seed),
    OPERAND(cu_seqlens_q, request.cu_q),
    OPERAND(cu_seqlens_k, request.cu_k),
    OPERAND(key_lists, sparse.entries),
    OPERAND(counts, sparse.counts),
    OPERAND(gate, sparse.gate),
    OPERAND(dout, backward.dout),
    OPERAND(out, backward.out),
    OPERAND(lse, backward.lse),
    OPERAND(dlse, backward.dlse),
    OPERAND(scores, sparsek.scores),
    OPERAND(lengths, sparsek.lengths),
    OPERAND(tau, sparsek.tau),
    OPERAND(key_lists, sparsek.key_lists),
    OPERAND(dgates, sparsek.dgates),
    OPERAND(scores, selection.scores),
    OPERAND(tau, selection.tau),
    OPERAND(ends, selection.ends),
};

/* A seed of 64 bits comes as two numbers of 32, for most programs of JAX have no int64. */
static void join_seed(fa_array *seed) {
    if (seed->ndim != 1 || seed->shape[0] != 2 || seed->dtype.bits != 32) return;
    seed->ndim = 0;
    seed->dtype = fa_int64;
}

/* What vmap has not mapped has a batch of 1 among those that have a larger one. */
static void stretch_batch(fa_request *r) {
    fa_array *const arrays[] = {(fa_array *)r->q, (fa_array *)r->k, (fa_array *)r->v};
    int64_t b = 1;
    for (int i = 0; i < 3 && !r->cu_q; i++)
        if (arrays[i]->ndim && arrays[i]->shape[0] != 1) b = arrays[i]->shape[0];
    for (int i = 0; i < 3 && !r->cu_q; i++)
        if (arrays[i]->ndim && arrays[i]->shape[0] == 1)
            arrays[i]->shape[0] = b, arrays[i]->stride[0] = 0;
}

fa_status jax_bind_operands(jax_call *c, fa_error *error) {
    for (int32_t i = 0; i < c->operand_count; i++) {
        fa_array *a = &c->operands[i].array;
        size_t row = 0, rows = sizeof operand_fields / sizeof *operand_fields;
        const fa_array *bound = a;
        int found = 0;
        if (!strcmp(a->name, "seed")) join_seed(a);
        for (; row < rows; row++) { /* a name may be one of several requests */
            if (strcmp(operand_fields[row].name, a->name)) continue;
            memcpy((char *)c + operand_fields[row].offset, &bound, sizeof bound);
            found = 1;
        }
        if (!found) return fa_fail(error, FA_TYPE, "there is no operand `%s`", a->name);
    }
    return FA_OK;
}

fa_status jax_bind_attention(jax_call *c, fa_error *error) {
    const fa_request *r = &c->request;
    TRY(jax_bind_operands(c, error));
    if (!r->q || !r->k || !r->v) return fa_fail(error, FA_TYPE, "`q`, `k` and `v` are operands");
    stretch_batch(&c->request);
    return FA_OK;
}

fa_array *jax_find_result(jax_call *c, const char *name) {
    for (int32_t i = 0; i < c->result_count; i++)
        if (!strcmp(c->results[i].array.name, name)) return &c->results[i].array;
    return NULL;
}

fa_status jax_check_result(const fa_array *a, int32_t ndim, const int64_t *shape,
                           fa_any_dtype dtype, fa_error *error) {
    TRY(fa_check_dtype(a, dtype, NULL, error));
    return fa_check_shape(a, ndim, shape, error);
}

fa_status jax_take_workspace(jax_call *c, int64_t needed, int64_t *bytes, void **workspace,
                             fa_error *error) {
    const fa_array *a = jax_find_result(c, "workspace");
    if (bytes && *bytes < needed) *bytes = needed;
    *workspace = a ? a->data : NULL;
    if (bytes || needed <= (a ? a->shape[0] : 0)) return FA_OK;
    return fa_fail(error, FA_RUNTIME, "a workspace of %lld bytes was asked for, %lld are needed",
                   a ? (long long)a->shape[0] : 0LL, (long long)needed);
}

static fa_status run_forward(jax_call *c, int64_t *bytes, fa_error *error) {
    fa_plan plan;
    void *workspace;
    const fa_array *out = jax_find_result(c, "out"), *lse = jax_find_result(c, "lse");
    TRY(jax_bind_attention(c, error));
    TRY(fa_check_attention(&c->request, &plan, error));
    if (!out) return fa_fail(error, FA_TYPE, "`out` is a result");
    TRY(jax_check_result(out, plan.out_ndim, plan.out_shape, plan.out_dtype, error));
    if (lse) TRY(jax_check_result(lse, plan.lse_ndim, plan.lse_shape, plan.lse_dtype, error));
    fa_expect_outputs(&plan, NULL, lse != NULL);
    if (!fa_choose(&plan, *c->backend ? c->backend : NULL, NULL, error)) return FA_UNSUPPORTED;
    TRY(jax_take_workspace(c, fa_workspace(&plan), bytes, &workspace, error));
    if (bytes) return FA_OK;
    plan.params.what.out.data = out->data;
    if (lse) plan.params.what.lse.data = lse->data;
    return fa_run(&plan, workspace, error);
}

static fa_status run_backward(jax_call *c, int64_t *bytes, fa_error *error) {
    static const char *const names[FA_GRADIENTS] = {"dq", "dk", "dv", "dmask", "dsink"};
    fa_plan plan;
    fa_backward backward;
    fa_gradient gradients[FA_GRADIENTS];
    fa_chosen chosen;
    void *workspace;
    fa_array *results[FA_GRADIENTS];
    TRY(jax_bind_attention(c, error));
    TRY(fa_check_attention(&c->request, &plan, error));
    for (int i = 0; i < FA_GRADIENTS; i++) {
        results[i] = jax_find_result(c, names[i]);
        c->backward.need[i] = results[i] != NULL;
    }
    if (!c->backward.out || !c->backward.lse)
        return fa_fail(error, FA_TYPE, "`out` and `lse` are operands");
    TRY(fa_check_backward(&c->request, &c->backward, &plan, &backward, gradients, error));
    if (!fa_choose_backward(&backward, *c->backend ? c->backend : NULL, &chosen, NULL, error))
        return FA_UNSUPPORTED;
    TRY(jax_take_workspace(c, fa_backward_workspace(&backward, &chosen), bytes, &workspace, error));
    if (bytes) return FA_OK;
    for (int i = 0; i < FA_GRADIENTS; i++) {
        const fa_gradient *g = &gradients[i];
        if (!g->wanted) continue;
        TRY(jax_check_result(results[i], g->ndim, g->shape, g->dtype, error));
        fa_bind_gradient(&backward, i, results[i], plan.layout);
    }
    return fa_run_backward(&backward, &chosen, workspace, error);
}

/* outs, then as many lses. */
static fa_status run_merge(jax_call *c, int64_t *bytes, fa_error *error) {
    const int32_t n = c->operand_count / 2;
    const fa_array *out = jax_find_result(c, "out"), *lse = jax_find_result(c, "lse");
    fa_array *arrays = calloc(2 * (size_t)n + 1, sizeof *arrays);
    fa_tensor *tensors = calloc(2 * (size_t)n + 1, sizeof *tensors);
    fa_merge merge;
    fa_plan plan;
    fa_chosen chosen;
    void *workspace;
    fa_status status = FA_OK;
    if (!arrays || !tensors || !n || !out || !lse)
        status = fa_fail(error, FA_MEMORY, "no memory for %d parts", n);
    for (int32_t i = 0; i < 2 * n && status == FA_OK; i++) arrays[i] = c->operands[i].array;
    if (status == FA_OK)
        status =
            fa_check_merge(n, arrays, arrays + n, c->request.layout, tensors, &merge, &plan, error);
    if (status == FA_OK)
        status = jax_check_result(out, plan.out_ndim, plan.out_shape, plan.out_dtype, error);
    if (status == FA_OK)
        status = jax_check_result(lse, plan.lse_ndim, plan.lse_shape, plan.lse_dtype, error);
    if (status == FA_OK && !fa_choose_merge(&merge, &chosen, error)) status = FA_UNSUPPORTED;
    if (status == FA_OK)
        status =
            jax_take_workspace(c, fa_merge_workspace(&merge, &chosen), bytes, &workspace, error);
    if (status == FA_OK && !bytes) {
        merge.out.data = out->data, merge.lse.data = lse->data;
        status = fa_run_merge(&merge, &chosen, workspace, error);
    }
    free(arrays);
    free(tensors);
    return status;
}

/* ---- all runs ---- */

int jax_has_axis(const jax_call *c, int32_t operand) {
    return c->runs && (operand < 0 || operand > 62 || (c->stepped >> operand & 1));
}

fa_status jax_lay_out(const jax_call *c, jax_array *a, int has_axis, fa_error *error) {
    fa_array *one = &a->array;
    int64_t stride = 1;
    if (has_axis && (!one->ndim || one->shape[0] != c->runs))
        return fa_fail(error, FA_VALUE, "`%s` must have %lld runs", one->name, (long long)c->runs);
    if (has_axis)
        one->ndim--, memmove(one->shape, one->shape + 1, sizeof one->shape - sizeof *one->shape);
    for (int32_t i = one->ndim - 1; i >= 0; i--) {
        one->stride[i] = stride;
        stride *= one->shape[i];
    }
    a->step = has_axis ? stride * one->dtype.bits / 8 : 0;
    return FA_OK;
}

fa_status jax_run(jax_call *c, int64_t *bytes, fa_error *error) {
    static fa_status (*const run[JAX_TARGETS])(jax_call *, int64_t *, fa_error *) = {
        [JAX_FORWARD] = run_forward,
        [JAX_BACKWARD] = run_backward,
        [JAX_MERGE] = run_merge,
        [JAX_SPARSEK] = jax_run_sparsek,
        [JAX_SPARSEK_BACKWARD] = jax_run_sparsek_backward,
        [JAX_SPARSE] = jax_run_sparse,
        [JAX_SPARSE_BACKWARD] = jax_run_sparse_backward,
        [JAX_SPARSEK_ATTENTION] = jax_run_selection,
        [JAX_SPARSEK_ATTENTION_BACKWARD] = jax_run_selection_backward};
    const int64_t runs = c->runs ? c->runs : 1;
    for (int64_t i = 0; i < runs; i++) {
        TRY(run[c->target](c, bytes, error));
        if (bytes) break; /* all are alike */
        for (int32_t n = 0; n < c->operand_count; n++)
            c->operands[n].array.data = (char *)c->operands[n].array.data + c->operands[n].step;
        for (int32_t n = 0; n < c->result_count; n++)
            c->results[n].array.data = (char *)c->results[n].array.data + c->results[n].step;
    }
    return FA_OK;
}
