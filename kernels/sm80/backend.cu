/* backend.cu - the portable backend: every GPU of compute capability 8.x and 9.0.
 *
 * It stands behind those of one architecture in dispatch.c, and takes what they refuse. Stop 5 of
 * 6. Next: fa_launch_<name>() of the variant's object, in kernels/sm80/fwd.cu. */
#include "common/empty.cuh"
#include "common/head_parts.h"
#include "common/launch.cuh"
#include "common/mask_bits.cuh"
#include "common/merge_op.cuh"
#include "fastattn.h"
#include "sm80/bwd_choice.h"
#include "sm80/bwd_sink.cuh"
#include "sm80/fwd_choice.h"
#include "support.h"

/* The one function that every variant exports (fwd_launch.cuh). The tensors' device is current. */
typedef fa_status fa_launcher(const fa_params *p, const fa_device *device, void *workspace,
                              fa_error *error);

#define FA_VARIANT(name, ...) extern "C" fa_launcher fa_launch_##name;
#include "sm80/fwd.def"
#undef FA_VARIANT

static fa_launcher *const launchers[] = {
#define FA_VARIANT(name, ...) fa_launch_##name,
#include "sm80/fwd.def"
#undef FA_VARIANT
    NULL,
};

typedef fa_status fa_bwd_launcher(const fa_backward *r, const fa_device *device, void *workspace,
                                  fa_error *error);

#define FA_VARIANT(name, ...) extern "C" fa_bwd_launcher fa_launch_##name;
#include "sm80/bwd.def"
#undef FA_VARIANT

static fa_bwd_launcher *const bwd_launchers[] = {
#define FA_VARIANT(name, ...) fa_launch_##name,
#include "sm80/bwd.def"
#undef FA_VARIANT
    NULL,
};

static const char *const names[] = {
#define FA_VARIANT(name, ...) #name,
#include "sm80/fwd.def"
#include "sm80/bwd.def"
#undef FA_VARIANT
    NULL,
};

#ifdef FA_SOME_VARIANTS
#define FA_OF_SOME " among those that FASTATTN_VARIANTS chose"
#else
#define FA_OF_SOME ""
#endif

static fa_status takes_device(const fa_where *where, const void **found, fa_error *why) {
    const fa_device *device;
    if (fa_find_device(where->device_id, &device, why) != FA_OK) return FA_UNSUPPORTED;
    if (device->major < 8 || device->major * 10 + device->minor > 90)
        return fa_fail(why, FA_UNSUPPORTED,
                       "it has code for compute capability 8.0 to 9.0, and cuda:%d has %d.%d",
                       where->device_id, device->major, device->minor);
    *found = device;
    return FA_OK;
}

/* All parts of a request (head_parts.h) run the same variant: head sizes are the same. */
static fa_status reject(const fa_params *p, fa_choice *choice, fa_error *why) {
    const fa_what *w = &p->what;
    const fa_device *device = (const fa_device *)choice->device;
    const int32_t variant = fa_sm80_choose(p, device->smem_bytes);
    if (variant < 0)
        return fa_fail(why, FA_UNSUPPORTED,
                       "it has no kernel for %s with d = %d and dv = %d" FA_OF_SOME,
                       fa_dtypes[w->dtype].name, w->d, w->dv);
    choice->variant = &fa_sm80_variants[variant];
    return FA_OK;
}

static const char *kernel(const fa_params *, const fa_choice *choice) {
    return ((const fa_sm80_variant *)choice->variant)->name;
}

/* The parts of a request share it, one after the other. */
static int64_t workspace(const fa_params *p, const fa_choice *) {
    fa_params memory;
    return fa_sm80_workspace(fa_head_part(p, 0, &memory));
}

static fa_status launch(const fa_params *p, const fa_device *device, const fa_sm80_variant *variant,
                        void *workspace, fa_error *error) {
    if (fa_is_empty(&p->what)) return launch_empty(p, device, error);
    fa_status status = FA_OK;
    if (fa_sm80_workspace(p)) status = launch_pack_mask(p, device, workspace, error);
    if (status != FA_OK) return status;
    return launchers[variant - fa_sm80_variants](p, device, workspace, error);
}

static fa_status run(const fa_params *p, const fa_choice *choice, void *workspace,
                     fa_error *error) {
    const fa_device *device = (const fa_device *)choice->device;
    const fa_sm80_variant *variant = (const fa_sm80_variant *)choice->variant;
    int before;
    fa_status status = fa_enter_device(device, &before, error);
    if (status != FA_OK) return status;
    for (int32_t i = 0, parts = fa_head_parts(&p->what); i < parts && status == FA_OK; ++i) {
        fa_params memory;
        status = launch(fa_head_part(p, i, &memory), device, variant, workspace, error);
    }
    return fa_leave_device(device, before, status, error);
}

static const fa_forward_op forward = {FA_SM80_FORWARD, reject, kernel, workspace, run};

/* ---- the backward pass ---- */

static fa_status reject_backward(const fa_backward *r, fa_choice *choice, fa_error *why) {
    const fa_what *w = &r->forward.what;
    const fa_device *device = (const fa_device *)choice->device;
    const int32_t variant = fa_sm80_choose_bwd(r, device->smem_bytes);
    if (variant < 0)
        return fa_fail(why, FA_UNSUPPORTED,
                       "it has no backward kernel for %s with d = %d and dv = %d in %d bytes of "
                       "shared memory" FA_OF_SOME,
                       fa_dtypes[w->dtype].name, w->d, w->dv, device->smem_bytes);
    choice->variant = &fa_sm80_bwd_variants[variant];
    return FA_OK;
}

static const char *backward_kernel(const fa_backward *, const fa_choice *choice) {
    return ((const fa_sm80_variant *)choice->variant)->name;
}

static int64_t backward_workspace(const fa_backward *r, const fa_choice *) {
    return fa_sm80_lay_out_bwd(&r->forward).bytes;
}

/* Where there is no score to compute, gradients are 0, but for the sinks': of lse. */
static fa_status launch_zeros(const fa_backward *r, const fa_device *device, fa_error *error) {
    const fa_params *p = &r->forward;
    const fa_tensor *gradients[] = {&r->dq, &r->dk, &r->dv, &r->dmask};
    fa_status status = launch_sink(r, NULL, device, error);
    for (int i = 0; i < 4 && status == FA_OK; ++i)
        status = launch_clear(gradients[i], i < 3 ? p->what.dtype : p->scores.mask_dtype, device,
                              p->where.stream, error);
    return status;
}

static fa_status launch_backward(const fa_backward *r, const fa_device *device,
                                 const fa_sm80_variant *v, void *workspace, fa_error *error) {
    const fa_params *p = &r->forward;
    if (fa_is_empty(&p->what)) return launch_zeros(r, device, error);
    fa_status status = FA_OK;
    if (p->scores.mask.data && p->scores.mask_dtype == FA_BOOL)
        status =
            launch_pack_mask(p, device, (char *)workspace + fa_sm80_lay_out_bwd(p).mask, error);
    if (status == FA_OK)
        status = bwd_launchers[v - fa_sm80_bwd_variants](r, device, workspace, error);
    return status == FA_OK ? launch_sink(r, workspace, device, error) : status;
}

static fa_status run_backward(const fa_backward *r, const fa_choice *choice, void *workspace,
                              fa_error *error) {
    const fa_device *device = (const fa_device *)choice->device;
    int before;
    fa_status status = fa_enter_device(device, &before, error);
    if (status != FA_OK) return status;
    status = launch_backward(r, device, (const fa_sm80_variant *)choice->variant, workspace, error);
    return fa_leave_device(device, before, status, error);
}

static const fa_backward_op backward = {FA_SM80_BACKWARD, reject_backward, backward_kernel,
                                        backward_workspace, run_backward};

/* ---- merging ---- */

static const fa_merge_op merge = {FA_SM80_MERGE, reject_merge, merge_kernel, merge_workspace,
                                  run_merge};

const fa_backend fa_sm80 = {"sm80", FA_CUDA, takes_device, &forward, &backward, &merge, NULL,
                            NULL,   NULL,    NULL,         NULL,     NULL,      NULL,   names};
