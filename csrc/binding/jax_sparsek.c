/* jax_sparsek.c - the SparseK operator and its gradient in a program of XLA's: as jax_run.c does
 * it. Knows neither Python nor XLA.
 */
#include "check_array.h"
#include "jax_ffi.h"

/* The memory of a result of the operator's. */
static fa_status bind_result(jax_call *c, const char *name, const fa_result *r, fa_streams *to,
                             fa_error *error) {
    const fa_array *a = jax_find_result(c, name);
    if (!a) return fa_fail(error, FA_TYPE, "`%s` is a result", name);
    to->data = a->data;
    return jax_check_result(a, r->ndim, r->shape, r->dtype, error);
}

fa_status jax_run_sparsek(jax_call *c, int64_t *bytes, fa_error *error) {
    fa_sparsek r;
    fa_result results[FA_SPARSEK_RESULTS];
    fa_chosen chosen;
    void *workspace;
    TRY(jax_bind_operands(c, error));
    if (!c->sparsek.scores) return fa_fail(error, FA_TYPE, "`scores` is an operand");
    TRY(fa_check_sparsek(&c->request, &c->sparsek, &r, results, error));
    if (!fa_choose_sparsek(&r, &chosen, error)) return FA_UNSUPPORTED;
    TRY(jax_take_workspace(c, fa_sparsek_workspace(&r, &chosen), bytes, &workspace, error));
    if (bytes) return FA_OK;
    TRY(bind_result(c, "gates", &results[FA_GATES], &r.gates, error));
    TRY(bind_result(c, "tau", &results[FA_TAU], &r.tau, error));
    if (r.has_lists) TRY(bind_result(c, "key_lists", &results[FA_KEY_LISTS], &r.key_lists, error));
    return fa_run_sparsek(&r, &chosen, workspace, error);
}

fa_status jax_run_sparsek_backward(jax_call *c, int64_t *bytes, fa_error *error) {
    const fa_sparsek_request *request = &c->sparsek;
    fa_sparsek r;
    fa_sparsek_backward b;
    fa_result results[FA_SPARSEK_RESULTS];
    fa_chosen chosen;
    void *workspace;
    TRY(jax_bind_operands(c, error));
    if (!request->scores || !request->tau || !request->dgates ||
        (request->has_lists && !request->key_lists))
        return fa_fail(error, FA_TYPE, "`scores`, `tau`, `dgates` and lists are operands");
    TRY(fa_check_sparsek(&c->request, request, &r, results, error));
    TRY(fa_check_sparsek_backward(request, &r, results, &b, error));
    if (!fa_choose_sparsek_backward(&b, &chosen, error)) return FA_UNSUPPORTED;
    TRY(jax_take_workspace(c, fa_sparsek_backward_workspace(&b, &chosen), bytes, &workspace,
                           error));
    if (bytes) return FA_OK;
    TRY(bind_result(c, "dscores", &results[FA_DSCORES], &b.dscores, error));
    return fa_run_sparsek_backward(&b, &chosen, workspace, error);
}
