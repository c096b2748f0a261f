/* check_backward.c - attention_backward: what it takes and gives beside attention's arguments,
 * which fa_check_attention() has turned into a plan.
 */
#include "check_array.h"
#include "views.h"

/* The forward's own output, or a gradient of it: like `plan` says. */
static fa_status check_like_out(const fa_array *a, const fa_request *r, const fa_plan *plan,
                                fa_error *error) {
    TRY(fa_check_shape(a, plan->out_ndim, plan->out_shape, error));
    TRY(fa_check_dtype(a, r->q->dtype, r->q, error));
    return fa_check_place(a, r->q, error);
}

static fa_status check_like_lse(const fa_array *a, const fa_request *r, const fa_plan *plan,
                                fa_error *error) {
    TRY(fa_check_shape(a, plan->lse_ndim, plan->lse_shape, error));
    TRY(fa_check_dtype(a, fa_lse_dtype(plan->params.what.dtype), NULL, error));
    return fa_check_place(a, r->q, error);
}

/* That there is something to take each wanted gradient of. */
static fa_status check_needs(const fa_request *r, const fa_backward_request *b, fa_error *error) {
    static const char *const names[] = {"dq", "dk", "dv"};
    for (int i = 0; i < 3; i++)
        if (b->given[i] && !b->need[i])
            return fa_fail(error, FA_VALUE, "`%s` must be None with need_%s=False, got an array",
                           names[i], names[i]);
    if (b->need[FA_OF_MASK] && (!r->mask || r->mask->dtype.code == FA_CODE_BOOL))
        return fa_fail(error, FA_VALUE, "`need_dmask` must be False %s, got True",
                       r->mask ? "for a bool mask, which has no gradient" : "without a mask");
    if (b->need[FA_OF_SINK] && !r->sink)
        return fa_fail(error, FA_VALUE, "`need_dsink` must be False without a sink, got True");
    return FA_OK;
}

static fa_status check_given(const fa_request *r, const fa_backward_request *b,
                             const fa_gradient *gradients, fa_error *error) {
    const fa_array *apart[FA_MAX_INPUTS + 6] = {b->dout, b->out, b->lse, b->dlse};
    int32_t n = 4;
    fa_list_inputs(r, apart + n);
    n += FA_MAX_INPUTS;
    for (int i = 0; i < 3; i++) {
        const fa_array *a = b->given[i];
        if (!a) continue;
        TRY(fa_check_written(a, gradients[i].ndim, gradients[i].shape, r->q, n, apart, error));
        if (i < 2) apart[n++] = a;
    }
    return FA_OK;
}

/* Of all but dsink, which is no tensor of rank 4; a mask has no layout. */
static fa_tensor *tensor_of(fa_backward *b, int which) {
    fa_tensor *const tensors[] = {&b->dq, &b->dk, &b->dv, &b->dmask};
    return tensors[which];
}

static fa_layout layout_of(int which, fa_layout layout) {
    return which == FA_OF_MASK ? FA_BHSD : layout;
}

fa_status fa_check_backward(const fa_request *r, const fa_backward_request *b, const fa_plan *plan,
                            fa_backward *to, fa_gradient gradients[FA_GRADIENTS], fa_error *error) {
    const fa_array *const of[FA_GRADIENTS] = {r->q, r->k, r->v, r->mask, r->sink};
    fa_clear(to, sizeof *to);
    to->forward = plan->params;
    to->deterministic = b->deterministic;
    if (!b->dout && !b->dlse)
        return fa_fail(error, FA_VALUE, "`dout` must be an array where `dlse` is None, got None");
    TRY(check_needs(r, b, error));
    if (b->dout) TRY(check_like_out(b->dout, r, plan, error));
    TRY(check_like_out(b->out, r, plan, error));
    TRY(check_like_lse(b->lse, r, plan, error));
    if (b->dlse) TRY(check_like_lse(b->dlse, r, plan, error));
    if (b->dout) fa_bind(&to->dout, b->dout, plan->layout);
    fa_bind(&to->forward.what.out, b->out, plan->layout);
    fa_bind_lse(&to->forward.what.lse, b->lse);
    if (b->dlse) fa_bind_lse(&to->dlse, b->dlse);
    for (int i = 0; i < FA_GRADIENTS; i++) {
        gradients[i] = (fa_gradient){.wanted = b->need[i]};
        if (!b->need[i]) continue;
        gradients[i].dtype = of[i]->dtype;
        gradients[i].ndim = of[i]->ndim, gradients[i].shape = of[i]->shape;
        if (b->given[i])
            fa_bind_gradient(to, i, b->given[i], plan->layout);
        else if (i == FA_OF_SINK)
            to->dsink = FA_TO_COME;
        else
            fa_expect(tensor_of(to, i), of[i]->ndim, of[i]->shape, layout_of(i, plan->layout));
    }
    return check_given(r, b, gradients, error);
}

void fa_bind_gradient(fa_backward *b, int which, const fa_array *a, fa_layout layout) {
    if (which != FA_OF_SINK) {
        fa_bind(tensor_of(b, which), a, layout_of(which, layout));
        return;
    }
    b->dsink = a->data;
    b->dsink_stride = a->shape[0] == 1 ? 0 : a->stride[0];
}
