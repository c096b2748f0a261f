/* sparse_bwd_run.cuh - the gradients of attention to lists of keys: a request on its variant, and
 * what comes before and behind it. Host code, a part of backend.cu.
 */
#ifndef FASTATTN_SM90_SPARSE_BWD_RUN_CUH
#define FASTATTN_SM90_SPARSE_BWD_RUN_CUH

#include "common/device.h"
#include "common/empty.cuh"
#include "common/empty.h"
#include "sm90/sparse_ends.cuh"
#include "support.h"

typedef fa_status fa_sparse_bwd_launcher(const fa_sparse_backward *r, const fa_device *device,
                                         float *workspace, fa_error *error);

#define FA_VARIANT(name, ...) extern "C" fa_sparse_bwd_launcher fa_launch_##name;
#include "sm90/sparse_bwd.def"
#undef FA_VARIANT

static fa_sparse_bwd_launcher *const sparse_bwd_launchers[] = {
#define FA_VARIANT(name, ...) fa_launch_##name,
#include "sm90/sparse_bwd.def"
#undef FA_VARIANT
    NULL,
};

static fa_status reject_sparse_backward(const fa_sparse_backward *r, fa_choice *choice,
                                        fa_error *why) {
    const fa_what *w = &r->attention.forward.what;
    const int32_t variant = fa_choose_sparse_bwd_variant(r);
    if (variant < 0)
        return fa_fail(why, FA_UNSUPPORTED,
                       "it has no kernel of gradients over lists of keys for %s with d = %d and "
                       "dv = %d",
                       fa_dtypes[w->dtype].name, w->d, w->dv);
    choice->variant = &fa_sparse_bwd_variants[variant];
    return FA_OK;
}

static const char *sparse_backward_kernel(const fa_sparse_backward *, const fa_choice *choice) {
    return ((const fa_sparse_variant *)choice->variant)->name;
}

static int64_t sparse_backward_workspace(const fa_sparse_backward *r, const fa_choice *choice) {
    return 4 * fa_sparse_bwd_make(r, ((const fa_sparse_variant *)choice->variant)->rows).floats;
}

/* What a launch over so many rows or numbers takes of the GPU. */
static fa_status launch_ends(const void *kernel, int64_t blocks, const fa_params *p,
                             const fa_device *device, sparse_ends_args *a, fa_error *error) {
    if (blocks > 8 * device->sms) blocks = 8 * device->sms;
    if (blocks == 0) return FA_OK;
    return fa_launch_kernel(kernel, (int32_t)blocks, ENDS_THREADS, ENDS_ROWS * 4, p->where.stream,
                            device->early, a, error);
}

static fa_status launch_sparse_backward(const fa_sparse_backward *r, const fa_device *device,
                                        const fa_sparse_variant *variant, float *workspace,
                                        fa_error *error) {
    const fa_backward *b = &r->attention;
    const fa_params *p = &b->forward;
    const fa_what *w = &p->what;
    void *const stream = p->where.stream;
    const bool is_bf16 = w->dtype == FA_BF16, is_empty = fa_is_empty(w);
    sparse_ends_args a = {};
    a.at = fa_sparse_bwd_make(r, variant->rows), a.workspace = workspace;
    a.out = w->out, a.dout = b->dout, a.lse = w->lse, a.dlse = b->dlse;
    a.dk = b->dk, a.dv = b->dv, a.dgate = r->dgate, a.gates = r->lists.entries;
    a.sink = p->scores.sink, a.sink_stride = p->scores.sink_stride;
    a.dsink = b->dsink, a.dsink_stride = b->dsink_stride;
    a.zeros = a.at.floats - a.at.dk;
    const int64_t rows = w->lse.shape[0] * w->lse.shape[1] * w->lse.shape[2];
    const int64_t keys = w->k.shape[0] * w->k.shape[1] * w->k.shape[2];
    fa_status status = launch_ends(
        is_bf16 ? (const void *)sparse_delta<FA_BF16> : (const void *)sparse_delta<FA_F16>,
        rows + a.zeros / ENDS_THREADS, p, device, &a, error);
    /* Of packed sequences some rows may be nobody's. */
    if (status == FA_OK && (is_empty || p->varlen.cu_q))
        status = launch_clear(&b->dq, w->dtype, device, stream, error);
    if (status == FA_OK && r->dgate.data && !a.at.of_gates)
        status = launch_clear(&r->dgate, FA_F32, device, stream, error);
    if (status == FA_OK && !is_empty)
        status =
            sparse_bwd_launchers[variant - fa_sparse_bwd_variants](r, device, workspace, error);
    if (status == FA_OK)
        status = launch_ends(
            is_bf16 ? (const void *)sparse_sums<FA_BF16> : (const void *)sparse_sums<FA_F16>,
            keys + a.at.of_gates, p, device, &a, error);
    if (status != FA_OK || !b->dsink || w->hq == 0) return status;
    return fa_launch_kernel((const void *)sparse_sink, w->hq, ENDS_THREADS, ENDS_ROWS * 4, stream,
                            device->early, &a, error);
}

static fa_status run_sparse_backward(const fa_sparse_backward *r, const fa_choice *choice,
                                     void *workspace, fa_error *error) {
    const fa_device *device = (const fa_device *)choice->device;
    int before;
    fa_status status = fa_enter_device(device, &before, error);
    if (status != FA_OK) return status;
    status = launch_sparse_backward(r, device, (const fa_sparse_variant *)choice->variant,
                                    (float *)workspace, error);
    return fa_leave_device(device, before, status, error);
}

static const fa_sparse_backward_op sparse_backward = {
    FA_SM90_SPARSE_BACKWARD, reject_sparse_backward, sparse_backward_kernel,
    sparse_backward_workspace, run_sparse_backward};

#endif
