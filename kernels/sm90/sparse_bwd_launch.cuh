/* sparse_bwd_launch.cuh - the launcher of a variant of the gradients of attention to lists. */
#ifndef FASTATTN_SM90_SPARSE_BWD_LAUNCH_CUH
#define FASTATTN_SM90_SPARSE_BWD_LAUNCH_CUH

#include "common/launch.cuh"
#include "sm90/sparse_bwd_args.cuh"
#include "sm90/sparse_bwd_plan.h"
#include "sm90/sparse_bwd_smem.h"
#include "sm90/sparse_request.cuh"

__global__ void VARIANT_NAME(const __grid_constant__ sparse_bwd_args b);

extern "C" fa_status PASTE(fa_launch_, VARIANT_NAME)(const fa_sparse_backward *r,
                                                     const fa_device *device, float *workspace,
                                                     fa_error *error) {
    const fa_params *p = &r->attention.forward;
    const fa_what *w = &p->what;
    const fa_sparse_bwd_plan at = fa_sparse_bwd_make(r, ROWS);
    const int64_t pairs = w->k.shape[0] * w->hk;
    if (pairs * at.tiles > INT32_MAX)
        return fa_fail(error, FA_UNSUPPORTED, "sm90 takes at most 2^31 tiles of lists");
    sparse_bwd_args b = {};
    b.a = fa_sparse_arguments(p, &r->lists, ROWS);
    b.dout = r->attention.dout, b.dq = r->attention.dq;
    b.dout_wide = b.dout.data && fa_copy_width(&b.dout) == 16;
    b.dq_wide = b.dq.data && fa_copy_width(&b.dq) == 16;
    b.delta = workspace, b.rows = w->q.shape[2], b.keys = w->k.shape[2];
    if (r->attention.dk.data) b.dk = workspace + at.dk;
    if (r->attention.dv.data) b.dv = workspace + at.dv;
    b.of_part = at.of_part, b.dk_pitch = at.dk_pitch, b.dv_pitch = at.dv_pitch;
    b.dgate = r->dgate;
    if (at.of_gates) {
        const int64_t *n = r->lists.entries.shape;
        b.dgate = fa_tensor{workspace + at.gates,
                            {n[0], n[1], n[2], n[3]},
                            {n[1] * n[2] * n[3], n[2] * n[3], n[3], 1}};
    }
    b.dscale = (float)usable_scale(w->scale);
    b.parts = at.parts, b.sums = at.sums, b.by_parts = fa_divisor_make(at.parts);
    b.head_tiles = (int32_t)at.tiles, b.each = (b.head_tiles + at.parts - 1) / at.parts;
    /* The tiles of a block share their gates' sums, and so one part. */
    if (r->attention.deterministic) b.each = (b.each + b.a.tiles - 1) / b.a.tiles * b.a.tiles;
    static uint64_t allowed;
    fa_status status =
        fa_allow_smem(&allowed, device, (const void *)VARIANT_NAME, SMEM_BYTES, error);
    if (status != FA_OK) return status;
    return fa_launch_kernel((const void *)VARIANT_NAME, (int32_t)(pairs * at.parts), THREADS,
                            SMEM_BYTES, p->where.stream, device->early, &b, error);
}

#endif
