/* jax_sparse.c - attention_sparse and its backward as operations of XLA's: the same checks and the
 * same dispatch as every other call. Knows neither Python nor XLA. Next to jax_run.c, which calls
 * it.
 */
#include "check_array.h"
#include "jax_ffi.h"

static fa_status check_lists(jax_call *c, fa_plan *plan, fa_lists *lists, fa_error *error) {
    TRY(jax_bind_attention(c, error));
    if (!c->sparse.entries) return fa_fail(error, FA_TYPE, "`key_lists` is an operand");
    TRY(fa_check_attention(&c->request, plan, error));
    return fa_check_lists(&c->request, &c->sparse, plan, lists, error);
}

fa_status jax_run_sparse(jax_call *c, int64_t *bytes, fa_error *error) {
    fa_plan plan;
    fa_sparse s;
    fa_chosen chosen;
    void *workspace;
    const fa_array *out = jax_find_result(c, "out"), *lse = jax_find_result(c, "lse");
    const fa_array *mass = jax_find_result(c, "mass"), *lists;
    fa_clear(&s, sizeof s);
    TRY(check_lists(c, &plan, &s.lists, error));
    lists = c->sparse.entries;
    if (!out) return fa_fail(error, FA_TYPE, "`out` is a result");
    TRY(jax_check_result(out, plan.out_ndim, plan.out_shape, plan.out_dtype, error));
    if (lse) TRY(jax_check_result(lse, plan.lse_ndim, plan.lse_shape, plan.lse_dtype, error));
    if (mass) TRY(jax_check_result(mass, lists->ndim, lists->shape, fa_float32, error));
    fa_expect_outputs(&plan, NULL, lse != NULL);
    s.forward = plan.params;
    if (mass) fa_expect_like(lists, &s.mass);
    if (!fa_choose_sparse(&s, *c->backend ? c->backend : NULL, &chosen, NULL, error))
        return FA_UNSUPPORTED;
    TRY(jax_take_workspace(c, fa_sparse_workspace(&s, &chosen), bytes, &workspace, error));
    if (bytes) return FA_OK;
    s.forward.what.out.data = out->data;
    if (lse) s.forward.what.lse.data = lse->data;
    if (mass) s.mass.data = mass->data;
    return fa_run_sparse(&s, &chosen, workspace, error);
}

fa_status jax_run_sparse_backward(jax_call *c, int64_t *bytes, fa_error *error) {
    static const char *const names[FA_GRADIENTS] = {"dq", "dk", "dv", NULL, "dsink"};
    fa_plan plan;
    fa_sparse_backward b;
    fa_gradient gradients[FA_GRADIENTS];
    fa_chosen chosen;
    void *workspace;
    const fa_array *dgate = jax_find_result(c, "dgate"), *gate;
    fa_clear(&b, sizeof b);
    TRY(check_lists(c, &plan, &b.lists, error));
    gate = c->sparse.gate;
    for (int i = 0; i < FA_GRADIENTS; i++)
        c->backward.need[i] = names[i] && jax_find_result(c, names[i]);
    if (!c->backward.out || !c->backward.lse || (dgate && !gate))
        return fa_fail(error, FA_TYPE, "`out`, `lse` and what has a gradient are operands");
    TRY(fa_check_backward(&c->request, &c->backward, &plan, &b.attention, gradients, error));
    if (dgate) {
        TRY(jax_check_result(dgate, gate->ndim, gate->shape, gate->dtype, error));
        fa_expect_like(gate, &b.dgate);
    }
    if (!fa_choose_sparse_backward(&b, *c->backend ? c->backend : NULL, &chosen, NULL, error))
        return FA_UNSUPPORTED;
    TRY(jax_take_workspace(c, fa_sparse_backward_workspace(&b, &chosen), bytes, &workspace, error));
    if (bytes) return FA_OK;
    for (int i = 0; i < FA_GRADIENTS; i++) {
        const fa_gradient *g = &gradients[i];
        if (!g->wanted) continue;
        const fa_array *result = jax_find_result(c, names[i]);
        TRY(jax_check_result(result, g->ndim, g->shape, g->dtype, error));
        fa_bind_gradient(&b.attention, i, result, plan.layout);
    }
    if (dgate) b.dgate.data = dgate->data;
    return fa_run_sparse_backward(&b, &chosen, workspace, error);
}
