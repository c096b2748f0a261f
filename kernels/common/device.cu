/* device.cu - what the NVIDIA driver says of this machine and of each GPU; shared by the backends
 * of all architectures. No device code. */
#include "common/device.h"

#include <pthread.h>

#include "common/driver.h"
#include "fastattn.h"

static_assert(FA_CUDA_NO_DEVICE == (int)cudaErrorNoDevice, "common/driver.h");

extern "C" void fa_cuda_probe(fa_cuda_state *state) {
    *state = fa_cuda_state{};
    state->toolkit = CUDART_VERSION;
    (void)cudaDriverGetVersion(&state->driver);
    cudaError_t code = cudaGetDeviceCount(&state->devices);
    if (code == cudaSuccess) return;
    (void)cudaGetLastError();
    state->devices = 0;
    fa_driver_sentence(state->error, sizeof state->error, state->toolkit, state->driver, code,
                       cudaGetErrorString(code));
}

extern "C" fa_status fa_cuda_device(int32_t device_id, fa_gpu *gpu, fa_error *error) {
    cudaDeviceProp properties;
    fa_status status =
        fa_cuda(cudaGetDeviceProperties(&properties, device_id), "cudaGetDeviceProperties", error);
    if (status != FA_OK) return status;
    snprintf(gpu->name, sizeof gpu->name, "%.127s", properties.name);
    gpu->major = properties.major;
    gpu->minor = properties.minor;
    gpu->sms = properties.multiProcessorCount;
    gpu->memory = (int64_t)properties.totalGlobalMem;
    return FA_OK;
}

static fa_status query_device(int32_t id, fa_device *device, fa_error *error) {
    fa_cuda_state state;
    fa_cuda_probe(&state);
    if (state.error[0]) return fa_fail(error, FA_RUNTIME, "%s", state.error);

    *device = fa_device{};
    device->id = id;
    const struct {
        int32_t *value;
        cudaDeviceAttr attribute;
    } attributes[] = {
        {&device->major, cudaDevAttrComputeCapabilityMajor},
        {&device->minor, cudaDevAttrComputeCapabilityMinor},
        {&device->sms, cudaDevAttrMultiProcessorCount},
        {&device->l2_bytes, cudaDevAttrL2CacheSize},
        {&device->smem_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin},
    };
    for (const auto &a : attributes) {
        fa_status status = fa_cuda(cudaDeviceGetAttribute(a.value, a.attribute, id),
                                   "cudaDeviceGetAttribute", error);
        if (status != FA_OK) return status;
    }
    device->early = state.driver >= 12030 && device->major >= 9;
    cudaDriverEntryPointQueryResult found;
    void *encode = NULL;
    fa_status status = fa_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode,
                                                                12000, cudaEnableDefault, &found),
                               "cudaGetDriverEntryPointByVersion", error);
    if (status != FA_OK) return status;
    device->encode = (fa_encode_tiled)encode;
    return FA_OK;
}

/* A ready entry never changes, so the warm path takes no lock; the lock only keeps two first calls
 * from writing one entry at once. */
fa_status fa_find_device(int32_t id, const fa_device **device, fa_error *error) {
    enum { MAX_DEVICES = 64 };
    static fa_device devices[MAX_DEVICES];
    static int ready[MAX_DEVICES];
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

    if (id < 0 || id >= MAX_DEVICES)
        return fa_fail(error, FA_RUNTIME, "cuda:%d is past the %d devices it knows", id,
                       MAX_DEVICES);
    *device = &devices[id];
    if (__atomic_load_n(&ready[id], __ATOMIC_ACQUIRE)) return FA_OK;

    fa_status status = FA_OK;
    pthread_mutex_lock(&lock);
    if (!ready[id]) status = query_device(id, &devices[id], error);
    if (status == FA_OK) __atomic_store_n(&ready[id], 1, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&lock);
    return status;
}

/* A thread new to CUDA has no context yet, without which tensor maps cannot be encoded: its first
 * call sets the device in any case. */
fa_status fa_enter_device(const fa_device *device, int *before, fa_error *error) {
    static __thread bool has_context;
    fa_status status = fa_cuda(cudaGetDevice(before), "cudaGetDevice", error);
    if (status != FA_OK || (*before == device->id && has_context)) return status;
    status = fa_cuda(cudaSetDevice(device->id), "cudaSetDevice", error);
    has_context = status == FA_OK;
    return status;
}

fa_status fa_leave_device(const fa_device *device, int before, fa_status status, fa_error *error) {
    if (before == device->id) return status;
    cudaError_t restored = cudaSetDevice(before);
    return status == FA_OK ? fa_cuda(restored, "cudaSetDevice", error) : status;
}
