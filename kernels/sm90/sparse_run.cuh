/* sparse_run.cuh - attention to lists of keys: a request on its variant, and the mass behind it.
 * Host code, a part of backend.cu.
 */
#ifndef FASTATTN_SM90_SPARSE_RUN_CUH
#define FASTATTN_SM90_SPARSE_RUN_CUH

#include "common/device.h"
#include "common/empty.cuh"
#include "common/empty.h"
#include "sm90/sparse_choice.h"
#include "sm90/sparse_mass.cuh"
#include "support.h"

typedef fa_status fa_sparse_launcher(const fa_sparse *s, const fa_device *device, fa_error *error);

#define FA_VARIANT(name, ...) extern "C" fa_sparse_launcher fa_launch_##name;
#include "sm90/sparse.def"
#undef FA_VARIANT

static fa_sparse_launcher *const sparse_launchers[] = {
#define FA_VARIANT(name, ...) fa_launch_##name,
#include "sm90/sparse.def"
#undef FA_VARIANT
    NULL,
};

static fa_status reject_sparse(const fa_sparse *s, fa_choice *choice, fa_error *why) {
    const fa_what *w = &s->forward.what;
    const int32_t variant = fa_choose_sparse_variant(s);
    if (variant < 0)
        return fa_fail(why, FA_UNSUPPORTED,
                       "it has no kernel over lists of keys for %s with d = %d and dv = %d",
                       fa_dtypes[w->dtype].name, w->d, w->dv);
    choice->variant = &fa_sparse_variants[variant];
    return FA_OK;
}

static const char *sparse_kernel(const fa_sparse *, const fa_choice *choice) {
    return ((const fa_sparse_variant *)choice->variant)->name;
}

/* The mass is made of lse, which the caller may not want. */
static int64_t sparse_workspace(const fa_sparse *s, const fa_choice *) {
    const fa_tensor *q = &s->forward.what.q;
    if (!s->mass.data || s->forward.what.lse.data) return 0;
    return (q->shape[0] * q->shape[1] * q->shape[2] * 4 + 255) / 256 * 256;
}

static fa_status launch_sparse(const fa_sparse *given, const fa_device *device,
                               const fa_sparse_variant *variant, void *workspace, fa_error *error) {
    fa_sparse s = *given;
    fa_what *w = &s.forward.what;
    const int64_t h = w->q.shape[1], rows = w->q.shape[2];
    if (s.mass.data && !w->lse.data)
        w->lse = fa_tensor{workspace, {w->q.shape[0], h, rows, 1}, {h * rows, rows, 1, 1}};
    fa_status status = FA_OK;
    /* Of packed sequences some rows may be nobody's. */
    if (fa_is_empty(w) || s.forward.varlen.cu_q) status = launch_empty(&s.forward, device, error);
    if (status == FA_OK && !fa_is_empty(w))
        status = sparse_launchers[variant - fa_sparse_variants](&s, device, error);
    if (status != FA_OK || !s.mass.data) return status;
    if (fa_is_empty(w)) return launch_clear(&s.mass, FA_F32, device, s.forward.where.stream, error);
    return launch_sparse_mass(&s.forward, &s.lists, &s.mass, device, error);
}

static fa_status run_sparse(const fa_sparse *s, const fa_choice *choice, void *workspace,
                            fa_error *error) {
    const fa_device *device = (const fa_device *)choice->device;
    int before;
    fa_status status = fa_enter_device(device, &before, error);
    if (status != FA_OK) return status;
    status = launch_sparse(s, device, (const fa_sparse_variant *)choice->variant, workspace, error);
    return fa_leave_device(device, before, status, error);
}

static const fa_sparse_op sparse = {FA_SM90_SPARSE, reject_sparse, sparse_kernel, sparse_workspace,
                                    run_sparse};

#endif
