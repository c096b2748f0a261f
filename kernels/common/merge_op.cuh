/* merge_op.cuh - merging (merge.cu) as an operation of a backend, whichever it is: stop 5 of 6. */
#ifndef FASTATTN_MERGE_OP_CUH
#define FASTATTN_MERGE_OP_CUH

#include "common/device.h"
#include "common/merge_plan.h"

static fa_status reject_merge(const fa_merge *m, fa_choice *choice, fa_error *) {
    choice->variant = fa_merge_choose(m, NULL);
    return FA_OK;
}

static const char *merge_kernel(const fa_merge *, const fa_choice *choice) {
    return ((const fa_merge_variant *)choice->variant)->name;
}

static int64_t merge_workspace(const fa_merge *m, const fa_choice *choice) {
    return fa_merge_bytes(m, NULL, (const fa_merge_variant *)choice->variant);
}

static fa_status run_merge(const fa_merge *m, const fa_choice *choice, void *workspace,
                           fa_error *error) {
    const fa_device *device = (const fa_device *)choice->device;
    int before;
    fa_status status = fa_enter_device(device, &before, error);
    if (status != FA_OK) return status;
    status = fa_merge_launch(m, NULL, (const fa_merge_variant *)choice->variant, device, workspace,
                             error);
    return fa_leave_device(device, before, status, error);
}

#endif
