/* sparse_launch.cuh - the launcher of a variant of attention to lists of keys.
 */
#ifndef FASTATTN_SM90_SPARSE_LAUNCH_CUH
#define FASTATTN_SM90_SPARSE_LAUNCH_CUH

#include "common/launch.cuh"
#include "sm90/sparse_request.cuh"
#include "sm90/sparse_smem.h"

/* Of the kernel; the tests run it on the host. */
typedef sparse_args sparse_kernel_args;

__global__ void VARIANT_NAME(const __grid_constant__ sparse_args a);

extern "C" fa_status PASTE(fa_launch_, VARIANT_NAME)(const fa_sparse *s, const fa_device *device,
                                                     fa_error *error) {
    const int64_t blocks = fa_sparse_grid(&s->forward, &s->lists, ROWS);
    if (blocks > INT32_MAX)
        return fa_fail(error, FA_UNSUPPORTED, "sm90 takes at most 2^31 tiles of lists");
    sparse_args a = fa_sparse_arguments(&s->forward, &s->lists, ROWS);
    static uint64_t allowed;
    fa_status status =
        fa_allow_smem(&allowed, device, (const void *)VARIANT_NAME, SMEM_BYTES, error);
    if (status != FA_OK) return status;
    return fa_launch_kernel((const void *)VARIANT_NAME, (int32_t)blocks, THREADS, SMEM_BYTES,
                            s->forward.where.stream, device->early, &a, error);
}

#endif
