/* bwd_launch.cuh - the launcher of a portable backward variant: arguments, three launches. */
#ifndef FASTATTN_SM80_BWD_LAUNCH_CUH
#define FASTATTN_SM80_BWD_LAUNCH_CUH

#include "backward.h"
#include "common/launch.cuh"
#include "sm80/bwd_args.cuh"
#include "sm80/bwd_choice.h"
#include "sm80/bwd_rows.cuh"
#include "sm80/request.cuh"

/* That for dQ. */
#define Q_KERNEL PASTE(VARIANT_NAME, _q)

/* That for a float mask's gradient. */
#define MASK_KERNEL PASTE(VARIANT_NAME, _mask)

__global__ void Q_KERNEL(const __grid_constant__ bwd_args a);
__global__ void VARIANT_NAME(const __grid_constant__ bwd_args a);
__global__ void MASK_KERNEL(const __grid_constant__ bwd_mask_args a);

static array_args describe_optional(const fa_tensor *t, bool is_output) {
    array_args none = {};
    return !t->data ? none : is_output ? describe_output(t) : describe_array(t);
}

static fa_status launch_rows(const fa_backward *r, const bwd_args &b, const fa_device *device,
                             fa_error *error) {
    const fa_what *w = &r->forward.what;
    bwd_rows_args a = {};
    (request_args &)a = b;
    a.out = describe_array(&w->out);
    a.dout = b.dout;
    a.lse = (const real *)w->lse.data, a.dlse = (const real *)r->dlse.data;
    for (int i = 0; i < 3; ++i)
        a.lse_stride[i] = w->lse.stride[i], a.dlse_stride[i] = r->dlse.stride[i];
    a.terms = (row_terms *)b.terms, a.terms_rows = b.terms_rows;
    a.all_rows = w->q.shape[0] * w->hq * w->q.shape[2];
    const int64_t blocks = (a.all_rows + ROWS_THREADS / 32 - 1) / (ROWS_THREADS / 32);
    return fa_launch_kernel((const void *)bwd_rows, (int32_t)blocks, ROWS_THREADS, 0,
                            r->forward.where.stream, device->early, &a, error);
}

static fa_status launch_tiles(const void *kernel, uint64_t *allowed, int64_t tiles, void *args,
                              const fa_backward *r, const fa_device *device, fa_error *error) {
    const fa_status status = fa_allow_smem(allowed, device, kernel, SMEM_BYTES<2>, error);
    if (status != FA_OK) return status;
    return fa_launch_kernel(kernel, (int32_t)tiles, THREADS, SMEM_BYTES<2>, r->forward.where.stream,
                            device->early, args, error);
}

#if VARIANT_GENERAL
static fa_status launch_mask(const fa_backward *r, const bwd_args &b, const fa_device *device,
                             fa_error *error) {
    const int64_t *shape = r->dmask.shape;
    bwd_mask_args a = {};
    (bwd_args &)a = b;
    a.to = r->dmask;
    a.row_blocks = shape[2] == 1 ? 1 : (int32_t)((shape[2] + BLOCK_M - 1) / BLOCK_M);
    a.key_blocks = shape[3] == 1 ? 1 : (int32_t)((shape[3] + BLOCK_N - 1) / BLOCK_N);
    const int64_t parts = shape[0] * shape[1] * a.row_blocks * a.key_blocks;
    if (parts > INT32_MAX)
        return fa_fail(error, FA_UNSUPPORTED, "sm80 takes masks of at most 2^31 tiles");
    static uint64_t allowed;
    return launch_tiles((const void *)MASK_KERNEL, &allowed, parts, &a, r, device, error);
}
#endif

extern "C" fa_status PASTE(fa_launch_, VARIANT_NAME)(const fa_backward *r, const fa_device *device,
                                                     void *workspace, fa_error *error) {
    const fa_params *p = &r->forward;
    const fa_what *w = &p->what;
    const int64_t batches = p->varlen.cu_q ? 1 : w->b;
    bwd_args a = {};
    set_request(a, p, (char *)workspace + fa_sm80_lay_out_bwd(p).mask, 2 * device->sms);
    a.dout = describe_optional(&r->dout, false);
    a.dq = describe_optional(&r->dq, true);
    a.dk = describe_optional(&r->dk, true);
    a.dv = describe_optional(&r->dv, true);
    a.n_blocks = (int32_t)count_blocks(p, w->sk, p->varlen.total_k);
    a.hk = w->hk;
    a.factor = (real)w->scale;
    a.terms = (const row_terms *)workspace;
    a.terms_rows = w->q.shape[2];
    const int64_t q_tiles = a.m_blocks * batches * w->hq, k_tiles = a.n_blocks * batches * w->hk;
    if (q_tiles > INT32_MAX || k_tiles > INT32_MAX ||
        w->hq * batches * a.terms_rows > 8ll * INT32_MAX)
        return fa_fail(error, FA_UNSUPPORTED, "sm80 takes at most 2^31 tiles of %d rows", BLOCK_M);
    static uint64_t allowed[2];
    fa_status status = launch_rows(r, a, device, error);
    if (status == FA_OK && r->dq.data)
        status = launch_tiles((const void *)Q_KERNEL, &allowed[0], q_tiles, &a, r, device, error);
    if (status == FA_OK && (r->dk.data || r->dv.data))
        status =
            launch_tiles((const void *)VARIANT_NAME, &allowed[1], k_tiles, &a, r, device, error);
#if VARIANT_GENERAL
    if (status == FA_OK && r->dmask.data) status = launch_mask(r, a, device, error);
#endif
    return status;
}

#endif
