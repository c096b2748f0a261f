// One candidate: time_NAME(call, workspace, ms[3]) launches its three kernels once; floats_NAME: of its workspace.
#include <cuda.h>
#include <cuda_runtime.h>
#include <cstdio>
#include "common/launch.cuh"
static cudaEvent_t ev[4]; static int at;
static fa_status timed_launch(const void *kernel, int32_t blocks, int32_t threads, int32_t smem, void *stream, bool early, void *arguments, fa_error *error) {
    fa_status s = fa_launch_kernel(kernel, blocks, threads, smem, stream, false, arguments, error);
    cudaEventRecord(ev[++at], (cudaStream_t)stream);
    return s;
}
#define fa_launch_kernel timed_launch
#include "sm90/bwd.cu"
#undef fa_launch_kernel
extern "C" int PASTE(head_, VARIANT_NAME)(int *dv) { *dv = DV; return D; }
extern "C" double PASTE(floats_, VARIANT_NAME)(double rows) { return (rows + 2 * 128) * (2 + SUM_COLUMNS) * 1.1 + 4096; }
extern "C" int PASTE(time_, VARIANT_NAME)(const fa_backward *r, const fa_device *device, void *w, float *ms) {
    fa_error err = {};
    if (!ev[0]) for (auto &e : ev) cudaEventCreate(&e);
    at = 0; cudaEventRecord(ev[0]);
    if (PASTE(fa_launch_, VARIANT_NAME)(r, device, w, &err) != FA_OK) { printf("%s\n", err.text); return 1; }
    cudaEventSynchronize(ev[at]);
    if (cudaError_t e = cudaGetLastError()) { printf("%s\n", cudaGetErrorString(e)); return 1; }
    ms[2] = 0;
    for (int j = 0; j < at; ++j) cudaEventElapsedTime(&ms[j], ev[j], ev[j + 1]);
    return 0;
}
