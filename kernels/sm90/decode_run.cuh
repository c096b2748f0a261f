/* decode_run.cuh - a request on a decode variant: the parts of its keys, and their merging. Host
 * code, a part of backend.cu.
 */
#ifndef FASTATTN_SM90_DECODE_RUN_CUH
#define FASTATTN_SM90_DECODE_RUN_CUH

#include "common/device.h"
#include "common/empty.cuh"
#include "common/empty.h"
#include "common/merge_plan.h"
#include "sm90/decode_choice.h"
#include "sm90/decode_gather.cuh"

typedef fa_status fa_decode_launcher(const fa_params *p, const fa_device *device,
                                     const fa_decode_plan *plan, const fa_tensor *out,
                                     int64_t out_step, const fa_tensor *lse, int64_t lse_step,
                                     fa_error *error);

#define FA_VARIANT(name, ...) extern "C" fa_decode_launcher fa_launch_##name;
#include "sm90/decode.def"
#undef FA_VARIANT

static fa_decode_launcher *const decode_launchers[] = {
#define FA_VARIANT(name, ...) fa_launch_##name,
#include "sm90/decode.def"
#undef FA_VARIANT
    NULL,
};

/* The decode variant that was chosen, or NULL: it is the forward kernel's. */
static const fa_decode_variant *decode_variant_of(const fa_choice *choice) {
    const uintptr_t at = (uintptr_t)choice->variant, table = (uintptr_t)fa_decode_variants;
    return at >= table && at < table + sizeof fa_decode_variants
               ? (const fa_decode_variant *)choice->variant
               : NULL;
}

static int64_t decode_workspace(const fa_params *p, const fa_choice *choice) {
    return fa_decode_make(p, decode_variant_of(choice), 0, ((const fa_device *)choice->device)->sms)
        .bytes;
}

/* Of all rows of q, contiguous. */
static fa_tensor decode_part(const fa_what *w, void *data, int64_t columns) {
    const int64_t b = w->q.shape[0], h = w->q.shape[1], s = w->q.shape[2];
    return {data, {b, h, s, columns}, {h * s * columns, s * columns, columns, 1}};
}

/* Packed sequences need not have all rows; those of none have no block. Of `sums` parts: their lse
 * says so. */
static fa_status launch_rest(const fa_params *p, const fa_device *device, const fa_tensor *lse,
                             int32_t sums, fa_error *error) {
    if (!p->varlen.cu_q) return FA_OK;
    if (sums == 1) return launch_empty(p, device, error);
    fa_params parts = *p;
    parts.what.lse = *lse, parts.what.lse.shape[0] *= sums;
    parts.what.out = parts.what.lse, parts.what.dv = 0;
    parts.scores.sink = NULL;
    return launch_empty(&parts, device, error);
}

static fa_status launch_decode(const fa_params *p, const fa_device *device,
                               const fa_decode_variant *variant, void *workspace, fa_error *error) {
    const fa_what *w = &p->what;
    if (fa_is_empty(w)) return launch_empty(p, device, error);
    const fa_decode_plan plan = fa_decode_make(p, variant, 0, device->sms);
    fa_decode_launcher *const run = decode_launchers[variant - fa_decode_variants];
    const int32_t sums = plan.parts / plan.cluster;
    const fa_tensor out = sums == 1 ? w->out : decode_part(w, workspace, w->dv);
    const fa_tensor lse = sums == 1 ? w->lse : decode_part(w, (char *)workspace + plan.lse, 1);
    const fa_merge_stack stack = {FA_F32, plan.rows * w->dv, plan.rows};
    fa_status status = launch_rest(p, device, &lse, sums, error);
    if (status == FA_OK)
        status = run(p, device, &plan, &out, stack.out_step, &lse, stack.lse_step, error);
    if (status != FA_OK || sums == 1) return status;
    if (plan.deal)
        return launch_gather(p, &out, stack.out_step, &lse, stack.lse_step, sums, device, error);
    fa_merge m = {sums, &out, &lse, w->out, w->lse, w->dtype, p->where};
    if (!m.lse.data) m.lse = decode_part(w, (char *)workspace + plan.merged, 1);
    return fa_merge_launch(&m, &stack, fa_merge_choose(&m, &stack), device, NULL, error);
}

/* The sequences of few rows that a prefill leaves. */
static fa_status launch_few(const fa_params *p, const fa_device *device, fa_error *error) {
    fa_params rest = *p;
    rest.what.sq = fa_few_rows(p);
    const int32_t chosen = fa_choose_decode(&rest);
    const fa_decode_plan plan =
        fa_decode_make(&rest, &fa_decode_variants[chosen], rest.what.sq, device->sms);
    return decode_launchers[chosen](&rest, device, &plan, &rest.what.out, 0, &rest.what.lse, 0,
                                    error);
}

#endif
