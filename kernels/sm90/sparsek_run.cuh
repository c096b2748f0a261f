/* sparsek_run.cuh - the SparseK operator and its gradient: requests and their launches. Host code,
 * a part of backend.cu.
 */
#ifndef FASTATTN_SM90_SPARSEK_RUN_CUH
#define FASTATTN_SM90_SPARSEK_RUN_CUH

#include "common/device.h"
#include "common/launch.cuh"
#include "sm90/sparsek_grad.cuh"
#include "support.h"

static fa_status reject_sparsek(const fa_sparsek *, fa_choice *, fa_error *) { return FA_OK; }
static const char *sparsek_kernel(const fa_sparsek *r, const fa_choice *) {
    return r->has_lists ? "sparsek_fill" : "sparsek_gates";
}
static int64_t sparsek_workspace(const fa_sparsek *, const fa_choice *) { return 0; }

/* One of several launches that share their arguments. */
struct sparsek_launch {
    const fa_device *device;
    void *stream, *arguments;
    fa_error *error;
    fa_status run(const void *kernel, int64_t blocks, int32_t smem) const {
        if (blocks == 0) return FA_OK;
        if (blocks > INT32_MAX)
            return fa_fail(error, FA_UNSUPPORTED, "sm90 takes at most 2^31 streams of scores");
        return fa_launch_kernel(kernel, (int32_t)blocks, SPARSEK_THREADS, smem, stream,
                                device->early, arguments, error);
    }
};

enum { SPARSEK_SHARED = SPARSEK_THREADS * 8, SPARSEK_SMEM = sizeof(kept_keys) };

static fa_status launch_sparsek(const fa_sparsek *r, const fa_device *device, fa_error *error) {
    sparsek_args a = {*r, 1, (r->sq + SPARSEK_ROWS - 1) / SPARSEK_ROWS};
    int64_t streams = 1;
    for (int32_t i = 0; i < r->lead; ++i) streams *= r->shape[i];
    const sparsek_launch go = {device, r->where.stream, &a, error};
    if (!r->has_lists) return go.run((const void *)sparsek_gates, streams, SPARSEK_SHARED);
    static uint64_t allowed[2];
    const void *const kernels[] = {(const void *)sparsek_taus, (const void *)sparsek_fill};
    for (int i = 0; i < 2; ++i) {
        const fa_status status =
            fa_allow_smem(&allowed[i], device, kernels[i], SPARSEK_SMEM, error);
        if (status != FA_OK) return status;
    }
    fa_status status = go.run(kernels[0], streams * a.chunks, SPARSEK_SMEM);
    if (status == FA_OK && r->sq)
        status = go.run((const void *)sparsek_rise, streams, SPARSEK_SHARED);
    if (status == FA_OK) status = go.run(kernels[1], streams * a.chunks, SPARSEK_SMEM);
    return status;
}

static fa_status run_sparsek(const fa_sparsek *r, const fa_choice *choice, void *,
                             fa_error *error) {
    const fa_device *device = (const fa_device *)choice->device;
    int before;
    fa_status status = fa_enter_device(device, &before, error);
    if (status != FA_OK) return status;
    status = launch_sparsek(r, device, error);
    return fa_leave_device(device, before, status, error);
}

static const fa_sparsek_op sparsek = {FA_SM90_SPARSEK, reject_sparsek, sparsek_kernel,
                                      sparsek_workspace, run_sparsek};

/* ---- the gradient -----------------------------------------------------------------------------*/

static fa_status reject_sparsek_backward(const fa_sparsek_backward *, fa_choice *, fa_error *) {
    return FA_OK;
}
static const char *sparsek_backward_kernel(const fa_sparsek_backward *b, const fa_choice *) {
    return b->forward.has_lists ? "sparsek_keys" : "sparsek_whole";
}
static int64_t sparsek_backward_workspace(const fa_sparsek_backward *b, const fa_choice *) {
    sparsek_grad_args a = {};
    a.b = *b;
    if (!b->forward.has_lists) return 0;
    lay_out_sparsek(a, NULL);
    return a.bytes;
}

static fa_status launch_sparsek_backward(const fa_sparsek_backward *b, const fa_device *device,
                                         void *workspace, fa_error *error) {
    const fa_sparsek *r = &b->forward;
    sparsek_grad_args a = {};
    a.b = *b;
    lay_out_sparsek(a, workspace);
    const sparsek_launch go = {device, r->where.stream, &a, error};
    if (!r->has_lists) return go.run((const void *)sparsek_whole, a.streams, SPARSEK_SHARED);
    const int64_t keys = (a.streams * r->sk + SPARSEK_THREADS - 1) / SPARSEK_THREADS;
    const int64_t rows = (a.streams * r->sq + SPARSEK_WARPS - 1) / SPARSEK_WARPS;
    const int64_t most = 16 * device->sms;
    if (keys == 0) return FA_OK;
    const struct {
        const void *kernel;
        int64_t blocks;
    } launches[] = {
        {(const void *)sparsek_clear, most},
        {(const void *)sparsek_runs, keys < most ? keys : most},
        {(const void *)sparsek_prefix<false>, a.streams},
        {(const void *)sparsek_means, rows < most ? rows : most},
        {(const void *)sparsek_prefix<true>, a.streams},
        {(const void *)sparsek_keys, keys < most ? keys : most},
    };
    fa_status status = FA_OK;
    for (int i = 0; i < 6 && status == FA_OK; ++i)
        status = go.run(launches[i].kernel, launches[i].blocks, SPARSEK_SHARED);
    return status;
}

static fa_status run_sparsek_backward(const fa_sparsek_backward *b, const fa_choice *choice,
                                      void *workspace, fa_error *error) {
    const fa_device *device = (const fa_device *)choice->device;
    int before;
    fa_status status = fa_enter_device(device, &before, error);
    if (status != FA_OK) return status;
    status = launch_sparsek_backward(b, device, workspace, error);
    return fa_leave_device(device, before, status, error);
}

static const fa_sparsek_backward_op sparsek_backward = {
    FA_SM90_SPARSEK_BACKWARD, reject_sparsek_backward, sparsek_backward_kernel,
    sparsek_backward_workspace, run_sparsek_backward};

#endif
