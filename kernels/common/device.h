/* device.h - a GPU as the host code of every architecture sees it, and CUDA's errors as sentences.
 *
 * Host code. What is asked of the driver is asked once per device, in device.cu.
 */
#ifndef FASTATTN_DEVICE_H
#define FASTATTN_DEVICE_H

#include <cuda.h> /* types only: nothing of libcuda is linked */
#include <cuda_runtime.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>

#include "types.h"

/* cuTensorMapEncodeTiled, looked up in the driver at run time. */
typedef CUresult (*fa_encode_tiled)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                                    const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                                    const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                                    CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

/* One GPU; filled once, then only read. */
typedef struct fa_device {
    int32_t id;             /* CUDA ordinal */
    int32_t major, minor;   /* compute capability */
    int32_t sms;            /* multiprocessors */
    int32_t l2_bytes;       /* size of the L2 */
    int32_t smem_bytes;     /* dynamic shared memory one block may ask for */
    int32_t early;          /* kernels may start early, and the driver captures that into graphs */
    fa_encode_tiled encode; /* NULL where the driver has no tensor maps */
} fa_device;

/* Takes no lock once the device is known. */
fa_status fa_find_device(int32_t id, const fa_device **device, fa_error *error);

/* Makes the device current, with a context, and says which one was; */
fa_status fa_enter_device(const fa_device *device, int *before, fa_error *error);
/* makes that one current again, whatever has come of the call in between: `status`, which is
 * returned unless this fails first. */
fa_status fa_leave_device(const fa_device *device, int before, fa_status status, fa_error *error);

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

#endif
