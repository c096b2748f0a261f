/* launch.cuh - how a kernel is launched. What it owes its stream: stream.cuh.
 *
 * A launcher makes one launch on the caller's stream and returns the launch's own error. It never
 * allocates and never synchronises, so it may run inside a graph capture.
 */
#ifndef FASTATTN_LAUNCH_CUH
#define FASTATTN_LAUNCH_CUH

#include "common/device.h"

/* `kernel<<<blocks, threads, smem, stream>>>(*arguments)`, 0.3 us sooner, in clusters of `cluster`
 * blocks. `early`: it starts before the kernels before it in the stream have ended, and waits for
 * them itself. */
static inline fa_status fa_launch_clusters(const void *kernel, int32_t blocks, int32_t cluster,
                                           int32_t threads, int32_t smem, void *stream, bool early,
                                           void *arguments, fa_error *error) {
    cudaLaunchConfig_t shape = {};
    shape.gridDim = dim3(blocks);
    shape.blockDim = dim3(threads);
    shape.dynamicSmemBytes = smem;
    shape.stream = (cudaStream_t)stream;
    cudaLaunchAttribute attributes[2] = {};
    shape.attrs = attributes;
    if (early) {
        cudaLaunchAttribute *serial = &attributes[shape.numAttrs++];
        serial->id = cudaLaunchAttributeProgrammaticStreamSerialization;
        serial->val.programmaticStreamSerializationAllowed = 1;
    }
    if (cluster > 1) {
        cudaLaunchAttribute *size = &attributes[shape.numAttrs++];
        size->id = cudaLaunchAttributeClusterDimension;
        size->val.clusterDim.x = cluster;
        size->val.clusterDim.y = size->val.clusterDim.z = 1;
    }
    return fa_cuda(cudaLaunchKernelExC(&shape, kernel, &arguments), "the launch", error);
}

static inline fa_status fa_launch_kernel(const void *kernel, int32_t blocks, int32_t threads,
                                         int32_t smem, void *stream, bool early, void *arguments,
                                         fa_error *error) {
    return fa_launch_clusters(kernel, blocks, 1, threads, smem, stream, early, arguments, error);
}

/* Lets `kernel` use `bytes` of dynamic shared memory, once per device. `done` is the kernel's own
 * static bit set of device numbers; two threads may both find a bit clear, and set the same value.
 */
static inline fa_status fa_allow_smem(uint64_t *done, const fa_device *device, const void *kernel,
                                      int32_t bytes, fa_error *error) {
    uint64_t bit = device->id < 64 ? 1ull << device->id : 0;
    if (__atomic_load_n(done, __ATOMIC_ACQUIRE) & bit) return FA_OK;
    fa_status status =
        fa_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
                "cudaFuncSetAttribute", error);
    if (status == FA_OK) __atomic_fetch_or(done, bit, __ATOMIC_RELEASE);
    return status;
}

#endif
