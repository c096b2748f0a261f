/* jax_selection.c - sparsek_attention and its backward as operations of XLA's: the same checks and
 * the same dispatch as every other call. Knows neither Python nor XLA. Next to jax_run.c, which
 * calls it.
 */
#include "check_array.h"
#include "jax_ffi.h"

static const char *const names[FA_SELECTION_RESULTS] = {"tau", "ends"};

static fa_status check(jax_call *c, fa_plan *plan, fa_sparsek_attention *r,
                       fa_result results[FA_SELECTION_RESULTS], fa_error *error) {
    TRY(jax_bind_attention(c, error));
    if (!c->selection.scores) return fa_fail(error, FA_TYPE, "`scores` is an operand");
    TRY(fa_check_attention(&c->request, plan, error));
    return fa_check_selection(&c->request, &c->selection, plan, r, results, error);
}

fa_status jax_run_selection(jax_call *c, int64_t *bytes, fa_error *error) {
    fa_plan plan;
    fa_sparsek_attention r;
    fa_result results[FA_SELECTION_RESULTS];
    fa_chosen chosen;
    void *workspace;
    const fa_array *out = jax_find_result(c, "out"), *lse = jax_find_result(c, "lse");
    TRY(check(c, &plan, &r, results, error));
    if (!out || !lse) return fa_fail(error, FA_TYPE, "`out` and `lse` are results");
    TRY(jax_check_result(out, plan.out_ndim, plan.out_shape, plan.out_dtype, error));
    TRY(jax_check_result(lse, plan.lse_ndim, plan.lse_shape, plan.lse_dtype, error));
    fa_expect_outputs(&plan, NULL, 1);
    r.forward = plan.params;
    if (!fa_choose_sparsek_attention(&r, *c->backend ? c->backend : NULL, &chosen, NULL, error))
        return FA_UNSUPPORTED;
    TRY(jax_take_workspace(c, fa_sparsek_attention_workspace(&r, &chosen), bytes, &workspace,
                           error));
    if (bytes) return FA_OK;
    fa_tensor *const more[FA_SELECTION_RESULTS] = {&r.tau, &r.ends};
    for (int i = 0; i < FA_SELECTION_RESULTS; i++) {
        const fa_array *a = jax_find_result(c, names[i]);
        if (!a) return fa_fail(error, FA_TYPE, "`%s` is a result", names[i]);
        TRY(jax_check_result(a, results[i].ndim, results[i].shape, results[i].dtype, error));
        more[i]->data = a->data;
    }
    r.forward.what.out.data = out->data, r.forward.what.lse.data = lse->data;
    return fa_run_sparsek_attention(&r, &chosen, workspace, error);
}

fa_status jax_run_selection_backward(jax_call *c, int64_t *bytes, fa_error *error) {
    static const char *const gradients_of[FA_GRADIENTS] = {"dq", "dk", "dv", "dscores", "dsink"};
    fa_plan plan;
    fa_sparsek_attention r;
    fa_sparsek_attention_backward b;
    fa_result results[FA_SELECTION_RESULTS];
    fa_gradient gradients[FA_GRADIENTS];
    fa_chosen chosen;
    void *workspace;
    fa_clear(&b, sizeof b);
    TRY(check(c, &plan, &r, results, error));
    for (int i = 0; i < FA_GRADIENTS; i++)
        c->backward.need[i] = i != FA_OF_MASK && jax_find_result(c, gradients_of[i]);
    c->selection.need_dscores = jax_find_result(c, "dscores") != NULL;
    if (!c->backward.out || !c->backward.lse || !c->selection.tau || !c->selection.ends)
        return fa_fail(error, FA_TYPE, "`out`, `lse`, `tau` and `ends` are operands");
    TRY(fa_check_backward(&c->request, &c->backward, &plan, &b.attention, gradients, error));
    TRY(fa_check_selection_backward(&c->selection, &r, results, &b, &gradients[FA_OF_MASK], error));
    if (!fa_choose_sparsek_attention_backward(&b, *c->backend ? c->backend : NULL, &chosen, NULL,
                                              error))
        return FA_UNSUPPORTED;
    TRY(jax_take_workspace(c, fa_sparsek_attention_backward_workspace(&b, &chosen), bytes,
                           &workspace, error));
    if (bytes) return FA_OK;
    for (int i = 0; i < FA_GRADIENTS; i++) {
        const fa_gradient *g = &gradients[i];
        if (!g->wanted) continue;
        const fa_array *result = jax_find_result(c, gradients_of[i]);
        TRY(jax_check_result(result, g->ndim, g->shape, g->dtype, error));
        if (i == FA_OF_MASK)
            b.dscores.data = result->data;
        else
            fa_bind_gradient(&b.attention, i, result, plan.layout);
    }
    return fa_run_sparsek_attention_backward(&b, &chosen, workspace, error);
}
