/* fwd_launch.cuh - the launcher of a portable forward variant: arguments, the launch. */
#ifndef FASTATTN_SM80_FWD_LAUNCH_CUH
#define FASTATTN_SM80_FWD_LAUNCH_CUH

#include "common/launch.cuh"
#include "sm80/fwd_args.cuh"
#include "sm80/request.cuh"

__global__ void VARIANT_NAME(const __grid_constant__ kernel_args a);

extern "C" fa_status PASTE(fa_launch_, VARIANT_NAME)(const fa_params *p, const fa_device *device,
                                                     void *workspace, fa_error *error) {
    const fa_what *w = &p->what;
    const int64_t tiles =
        count_blocks(p, w->sq, p->varlen.total_q) * w->hq * (p->varlen.cu_q ? 1 : w->b);
    if (tiles > INT32_MAX)
        return fa_fail(error, FA_UNSUPPORTED, "sm80 takes at most 2^31 tiles of %d rows", BLOCK_M);
    kernel_args a = {};
    set_request(a, p, workspace, 2 * device->sms);
    a.out = describe_output(&w->out);
    a.lse = (real *)w->lse.data;
    for (int i = 0; i < 3; ++i) a.lse_stride[i] = w->lse.stride[i];
    a.sink = p->scores.sink;
    a.sink_stride = p->scores.sink_stride;
    static uint64_t allowed;
    const fa_status status =
        fa_allow_smem(&allowed, device, (const void *)VARIANT_NAME, SMEM_BYTES<1>, error);
    if (status != FA_OK) return status;
    return fa_launch_kernel((const void *)VARIANT_NAME, (int32_t)tiles, THREADS, SMEM_BYTES<1>,
                            p->where.stream, device->early, &a, error);
}

#endif
