/* check_scores.c - what changes the scores: mask, softcap, slopes, sink; and dropout. */
#include "check_attention.h"

#include <math.h>
#include <stdio.h>

/* What would make a mask of (b, sk) or (b, sq, sk) fit, of ints a bool one and of other floats a
 * float32 one, as ": pass mask.bool()[:, None, None, :]"; empty for any other. want: (b, hq, sq,
 * sk). */
static const char *mask_mend(const fa_array *a, const int64_t want[4], int fits_dtype,
                             char buffer[128]) {
    const int64_t *shape = a->shape;
    const char *index = "";
    char cast[80] = "";
    if (a->ndim == 2 && shape[0] == want[0] && shape[0] != want[2] && shape[1] == want[3])
        index = "[:, None, None, :]";
    if (a->ndim == 3 && shape[0] == want[0] && shape[0] != want[1] && shape[1] == want[2] &&
        shape[2] == want[3])
        index = "[:, None]";
    if (fits_dtype)
        snprintf(cast, sizeof cast, ": pass %s", a->name);
    else if (a->dtype.code == FA_CODE_INT || a->dtype.code == FA_CODE_UINT)
        snprintf(cast, sizeof cast, ": pass %s", fa_array_cast(a, "bool", "bool", buffer));
    else
        fa_size_mend(a, fa_float32, cast);
    if (!*cast || (fits_dtype && !*index)) return "";
    snprintf(buffer, 128, "%s%s", cast, index);
    return buffer;
}

fa_status fa_check_mask(const fa_request *r, int32_t n, const int64_t *lead, fa_plan *plan,
                        fa_view *mask, fa_error *error) {
    const fa_array *a = r->mask;
    const fa_what *w = &plan->params.what;
    fa_dtype dtype = fa_contract_dtype(a->dtype);
    int same = dtype == w->dtype;
    char got[32], want_shape[192], got_shape[192], mend[128];
    int64_t want[FA_MAX_RANK];
    memcpy(want, lead, n * sizeof *lead);
    want[n] = w->hq, want[n + 1] = w->sq, want[n + 2] = w->sk;
    if (r->sdpa && dtype != FA_BOOL && dtype != FA_F32 && !same)
        return fa_fail(error, FA_TYPE, "`%s` must be bool, float32 or of `%s`'s dtype, got %s%s",
                       a->name, r->q->name, fa_dtype_name(a->dtype, got),
                       mask_mend(a, want + n - 1, 0, mend));
    if (!dtype || (dtype == FA_F64 && !same))
        return fa_fail(error, FA_TYPE, "`%s` must be bool, float32, float16 or bfloat16, got %s%s",
                       a->name, fa_dtype_name(a->dtype, got), mask_mend(a, want + n - 1, 0, mend));
    TRY(fa_check_place(a, r->q, error));
    int fits = a->ndim <= n + 3;
    if (fits) fa_view_array(a, n, FA_BHSD, mask);
    for (int32_t i = 0; i < n && fits; i++) fits = fa_stretch(&mask->lead_shape[i], lead[i]);
    for (int i = 0; i < 3 && fits; i++) fits = fa_stretch(&mask->tensor.shape[i + 1], want[n + i]);
    if (!fits) {
        /* Ranks 2 and 3 have no leading dimension, but packed sequences have. */
        int32_t skip = r->cu_q ? 0 : n + 3 - plan->out_ndim;
        return fa_fail(error, FA_VALUE, "`%s` must broadcast to %s, got %s%s", a->name,
                       fa_shape_text(n + 3 - skip, want + skip, want_shape),
                       fa_shape_text(a->ndim, a->shape, got_shape),
                       mask_mend(a, want + n - 1, 1, mend));
    }
    plan->params.scores.mask_dtype = dtype;
    return FA_OK;
}

fa_status fa_check_scores(const fa_request *r, fa_plan *plan, fa_error *error) {
    fa_scores *s = &plan->params.scores;
    const fa_what *w = &plan->params.what;
    s->softcap = r->softcap;
    if (!(r->softcap >= 0) || !isfinite(r->softcap))
        return fa_fail(error, FA_VALUE, "`softcap` must be finite and >= 0, got %g", r->softcap);
    TRY(fa_check_vector(r->sink, r->q, fa_float32, w->hq, (const void **)&s->sink, &s->sink_stride,
                        error));
    const fa_array *slopes = r->alibi_slopes;
    if (!slopes || slopes->ndim != 2)
        return fa_check_vector(slopes, r->q, fa_float32, w->hq, (const void **)&s->alibi_slopes,
                               &s->alibi_stride[1], error);
    int64_t shape[2] = {w->b, w->hq};
    TRY(fa_check_dtype(slopes, fa_float32, NULL, error));
    TRY(fa_check_shape(slopes, 2, shape, error));
    TRY(fa_check_place(slopes, r->q, error));
    s->alibi_slopes = slopes->data;
    for (int i = 0; i < 2; i++) s->alibi_stride[i] = shape[i] == 1 ? 0 : slopes->stride[i];
    return FA_OK;
}

/* A seed of 32 bits is read here: kernels on a GPU read 64. */
static fa_status check_seed(const fa_request *r, fa_dropout *d, fa_error *error) {
    const fa_array *a = r->seed;
    const int is_int = a->dtype.code == FA_CODE_INT || a->dtype.code == FA_CODE_UINT,
              bits = a->dtype.bits;
    char got[192], name[32], mend[80];
    if (!is_int || a->dtype.lanes != 1 ||
        !(bits == 32 || (bits == 64 && a->dtype.code == FA_CODE_INT)))
        return fa_fail(error, FA_TYPE, "`%s` must be int64, int32 or uint32, got %s%s", a->name,
                       fa_dtype_name(a->dtype, name), fa_size_mend(a, fa_int64, mend));
    TRY(fa_check_place(a, r->q, error));
    if (a->ndim > 1 || (a->ndim == 1 && a->shape[0] != 1))
        return fa_fail(error, FA_VALUE, "`%s` must have shape () or (1,), got %s", a->name,
                       fa_shape_text(a->ndim, a->shape, got));
    if (bits == 64)
        d->seed_data = a->data;
    else if (a->device_type != FA_CPU)
        return fa_fail(error, FA_UNSUPPORTED, "`%s` must be int64 on a GPU, got %s%s", a->name,
                       fa_dtype_name(a->dtype, name), fa_size_mend(a, fa_int64, mend));
    else if (a->dtype.code == FA_CODE_INT)
        d->seed = *(const int32_t *)a->data;
    else
        d->seed = *(const uint32_t *)a->data;
    return FA_OK;
}

fa_status fa_check_dropout(const fa_request *r, fa_plan *plan, fa_error *error) {
    fa_dropout *d = &plan->params.dropout;
    if (!(r->dropout_p >= 0 && r->dropout_p <= 1))
        return fa_fail(error, FA_VALUE, "`dropout_p` must be from 0 to 1, got %g", r->dropout_p);
    d->p = r->dropout_p;
    d->threshold = (uint32_t)lrint(d->p * 65536);
    d->gain = d->threshold == 65536 ? 0 : 1 / (1 - d->p);
    d->seed = r->seed_value;
    return r->seed ? check_seed(r, d, error) : FA_OK;
}
