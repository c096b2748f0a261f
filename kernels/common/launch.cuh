/* launch.cuh - what every launcher needs of the host: the device, CUDA's errors, tensor maps.
 *
 * Host code, but for what a kernel owes its stream. A launcher is one function per row of
 * fwd.def,
 *
 *     extern "C" fa_status fa_launch_<name>(const fa_params *p, const fa_sm90_device *device,
 *                                           void *workspace, fa_error *error);
 *
 * called through kernels/sm90/backend.cu with the tensors' device current. It encodes its tensor
 * maps, makes one launch on p->where.stream and returns the launch's own error. It never allocates
 * and never synchronises, so it may run inside a graph capture.
 */
#ifndef FASTATTN_LAUNCH_CUH
#define FASTATTN_LAUNCH_CUH

#include <cuda.h> /* types only: nothing of libcuda is linked */
#include <cuda_runtime.h>
#include <stdarg.h>
#include <stdio.h>

#include "forward.h"

/* cuTensorMapEncodeTiled, looked up in the driver at run time. */
typedef CUresult (*fa_encode_tiled)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                                    const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                                    const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                                    CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

/* One GPU as the launchers see it; filled once per device, then only read. */
typedef struct fa_sm90_device {
    int32_t id;             /* CUDA ordinal */
    int32_t major, minor;   /* compute capability */
    int32_t sms;            /* multiprocessors */
    int32_t l2_bytes;       /* size of the L2 */
    int32_t smem_bytes;     /* dynamic shared memory one block may ask for */
    int32_t early;          /* kernels may start early: the driver captures that into graphs */
    fa_encode_tiled encode; /* NULL where the driver has no tensor maps */
} fa_sm90_device;

/* The one function that every row exports. */
typedef fa_status fa_launcher(const fa_params *p, const fa_sm90_device *device, void *workspace,
                              fa_error *error);

/* Writes the sentence, returns the status: `return fa_fail(error, FA_RUNTIME, "...", ...);` */
static inline fa_status fa_fail(fa_error *error, fa_status status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error->text, sizeof error->text, format, arguments);
    va_end(arguments);
    return status;
}

/* CUDA's name and text for a failure of `call`; clears it, so that it is not reported twice. */
static inline fa_status fa_cuda(cudaError_t code, const char *call, fa_error *error) {
    if (code == cudaSuccess) return FA_OK;
    (void)cudaGetLastError();
    return fa_fail(error, FA_RUNTIME, "%s failed: %s: %s", call, cudaGetErrorName(code),
                   cudaGetErrorString(code));
}

/* What every kernel calls before it reads or writes global memory: those before it in the stream
 * have ended. Until then only its arguments are there. */
static __device__ __forceinline__ void wait_for_stream() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

/* Once all blocks have said so, or ended, the next kernel's blocks start where there is room. */
static __device__ __forceinline__ void let_next_start() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

/* `kernel<<<blocks, threads, smem, stream>>>(*arguments)`, 0.3 us sooner. `early`: it starts before
 * the kernels before it in the stream have ended, and waits for them itself. */
static inline fa_status fa_launch_kernel(const void *kernel, int32_t blocks, int32_t threads,
                                         int32_t smem, void *stream, bool early, void *arguments,
                                         fa_error *error) {
    cudaLaunchConfig_t shape = {};
    shape.gridDim = dim3(blocks);
    shape.blockDim = dim3(threads);
    shape.dynamicSmemBytes = smem;
    shape.stream = (cudaStream_t)stream;
    cudaLaunchAttribute serial = {};
    serial.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    serial.val.programmaticStreamSerializationAllowed = 1;
    shape.attrs = &serial;
    shape.numAttrs = early;
    return fa_cuda(cudaLaunchKernelExC(&shape, kernel, &arguments), "the launch", error);
}

/* Lets `kernel` use `bytes` of dynamic shared memory, once per device. `done` is the kernel's own
 * static bit set of device numbers; two threads may both find a bit clear, and set the same value.
 */
static inline fa_status fa_allow_smem(uint64_t *done, const fa_sm90_device *device,
                                      const void *kernel, int32_t bytes, fa_error *error) {
    uint64_t bit = device->id < 64 ? 1ull << device->id : 0;
    if (__atomic_load_n(done, __ATOMIC_ACQUIRE) & bit) return FA_OK;
    fa_status status =
        fa_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
                "cudaFuncSetAttribute", error);
    if (status == FA_OK) __atomic_fetch_or(done, bit, __ATOMIC_RELEASE);
    return status;
}

#endif
