/* backend.cu - the Hopper backend: stop 5 of 6. It asks the driver what is there, says what it does
 * not take, and hands a request to its row. The kernels are in fwd.cu. */
#include <pthread.h>

#ifndef FASTATTN_CUDA
#define FASTATTN_CUDA /* this is the side that it announces */
#endif
#include "common/driver.h"
#include "common/launch.cuh"
#include "common/mask_bits.cuh"
#include "common/packed.cuh"
#include "fastattn.h"
#include "rows.h"
#include "support.h"
#include "workspace.h"

static_assert(FA_CUDA_NO_DEVICE == (int)cudaErrorNoDevice, "common/driver.h");

#define FA_VARIANT(name, ...) extern "C" fa_launcher fa_launch_##name;
#include FA_VARIANTS
#undef FA_VARIANT

static fa_launcher *const launchers[] = {
#define FA_VARIANT(name, ...) fa_launch_##name,
#include FA_VARIANTS
#undef FA_VARIANT
};

static const char *const row_names[] = {
#define FA_VARIANT(name, ...) #name,
#include FA_VARIANTS
#undef FA_VARIANT
    NULL,
};

extern "C" const char *const *fa_cuda_rows(void) { return row_names; }

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

/* ---- devices ---------------------------------------------------------------------------------*/

enum { MAX_DEVICES = 64 };

static fa_status query_device(int32_t id, fa_sm90_device *device, fa_error *error) {
    fa_cuda_state state;
    fa_cuda_probe(&state);
    if (state.error[0]) return fa_fail(error, FA_RUNTIME, "%s", state.error);

    *device = fa_sm90_device{};
    device->id = id;
    device->early = state.driver >= 12030;
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
    cudaDriverEntryPointQueryResult found;
    void *encode = NULL;
    fa_status status = fa_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode,
                                                                12000, cudaEnableDefault, &found),
                               "cudaGetDriverEntryPointByVersion", error);
    if (status != FA_OK) return status;
    device->encode = (fa_encode_tiled)encode;
    return FA_OK;
}

/* Each device is asked once. A ready entry never changes, so the warm path takes no lock; the lock
 * only keeps two first calls from writing one entry at once. */
static fa_status find_device(int32_t id, const fa_sm90_device **device, fa_error *error) {
    static fa_sm90_device devices[MAX_DEVICES];
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

/* ---- the backend -----------------------------------------------------------------------------*/

static fa_status takes_device(const fa_where *where, const void **found, fa_error *why) {
    const fa_sm90_device *device;
    if (find_device(where->device_id, &device, why) != FA_OK) return FA_UNSUPPORTED;
    if (device->major != 9)
        return fa_fail(why, FA_UNSUPPORTED,
                       "it runs on compute capability 9.0, and cuda:%d has %d.%d", where->device_id,
                       device->major, device->minor);
    if (!device->encode)
        return fa_fail(why, FA_UNSUPPORTED, "the NVIDIA driver cannot encode tensor maps");
    *found = device;
    return FA_OK;
}

static fa_status reject(const fa_params *p, fa_choice *choice, fa_error *why) {
    const fa_what *w = &p->what;
    const fa_sm90_device *device = (const fa_sm90_device *)choice->device;
    for (int32_t i = 0, parts = fa_head_parts(w); i < parts; ++i) {
        fa_params part;
        const int32_t variant = fa_choose_row(fa_head_part(p, i, &part), device->sms);
        if (variant < 0)
            return fa_fail(why, FA_UNSUPPORTED,
                           "it has no kernel for %s with d = %d and dv = %d" FA_OF_SOME,
                           fa_dtypes[w->dtype].name, w->d, w->dv);
        if (i == 0) choice->variant = &fa_variants[variant];
    }
    return FA_OK;
}

static const char *kernel(const fa_params *, const fa_choice *choice) {
    return ((const fa_row *)choice->variant)->name;
}

/* The variant of part i of fa_head_parts(): the choice is the first one's; each other begins
 * elsewhere in memory, which may suit another variant. */
static const fa_row *variant_of(const fa_params *part, int32_t i, const fa_choice *choice) {
    const fa_sm90_device *device = (const fa_sm90_device *)choice->device;
    return i ? &fa_variants[fa_choose_row(part, device->sms)] : (const fa_row *)choice->variant;
}

/* The parts of a request share it, one after the other. */
static int64_t workspace(const fa_params *p, const fa_choice *choice) {
    int64_t most = 0;
    for (int32_t i = 0, parts = fa_head_parts(&p->what); i < parts; ++i) {
        fa_params memory;
        const fa_params *part = fa_head_part(p, i, &memory);
        int64_t bytes = fa_lay_out_forward(part, variant_of(part, i, choice)->block_m).bytes;
        if (bytes > most) most = bytes;
    }
    return most;
}

struct empty_args {
    fa_what what;
    fa_masks masks;
    fa_varlen varlen;
    const float *sink;
    int64_t sink_stride;
};

/* Whether row i of q, packed or of batch b, is no query. */
static __device__ bool is_padding(const empty_args &a, int64_t b, int32_t i) {
    const fa_what &w = a.what;
    if (w.b == 0) return true;
    if (a.varlen.cu_q) b = fa_packed_at(&a.varlen, w.b, i);
    const fa_sequence s = fa_find_sequence(&a.varlen, &a.masks, b, w.sq, w.sk);
    return i - s.q >= s.lengths.sq;
}

/* No key: every output row is 0 and every lse is the sink's value, -inf without one and for
 * padding. Both 16-bit formats write 0 as 0. */
static __global__ void sm90_write_empty_rows(const __grid_constant__ empty_args a) {
    const fa_what &w = a.what;
    wait_for_stream();
    int64_t sq = w.out.shape[2], rows = w.out.shape[0] * w.hq * sq;
    for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
        int64_t i = row % sq, h = row / sq % w.hq, b = row / sq / w.hq;
        uint16_t *out = (uint16_t *)w.out.data + b * w.out.stride[0] + h * w.out.stride[1] +
                        i * w.out.stride[2];
        for (int32_t c = threadIdx.x; c < w.dv; c += blockDim.x) out[c * w.out.stride[3]] = 0;
        if (!w.lse.data || threadIdx.x != 0) continue;
        const bool padding = a.sink && is_padding(a, b, (int32_t)i);
        ((float *)w.lse.data)[b * w.lse.stride[0] + h * w.lse.stride[1] + i * w.lse.stride[2]] =
            a.sink && !padding ? a.sink[h * a.sink_stride] : -INFINITY;
    }
}

/* Before the forward kernel, in the same stream: the list of its tiles. */
static fa_status launch_list(const fa_params *p, int32_t block_m, void *workspace,
                             fa_error *error) {
    const fa_what *w = &p->what;
    if (fa_packed_capacity(&p->varlen, w->b, block_m) > INT32_MAX)
        return fa_fail(error, FA_UNSUPPORTED, "sm90 takes at most 2^31 tiles of %d rows", block_m);
    packed_args a = {fa_packed_make(w, &p->masks, &p->varlen, block_m, workspace), p->varlen,
                     p->masks, w->sq, w->sk};
    return fa_launch_kernel((const void *)sm90_list_tiles, 1, PACKED_THREADS, 0, p->where.stream,
                            true, &a, error);
}

static fa_status launch(const fa_params *p, const fa_sm90_device *device, const fa_row *row,
                        void *workspace, fa_error *error) {
    const fa_what *w = &p->what;
    if (!fa_is_empty(w)) {
        const fa_forward_workspace at = fa_lay_out_forward(p, row->block_m);
        char *mask = (char *)workspace + at.mask;
        fa_status status = FA_OK;
        if (p->varlen.cu_q) status = launch_list(p, row->block_m, workspace, error);
        if (at.packs && status == FA_OK) status = launch_pack_mask(p, device, mask, error);
        if (status != FA_OK) return status;
        return launchers[row - fa_variants](p, device, workspace, error);
    }
    int64_t rows = w->out.shape[0] * w->hq * w->out.shape[2];
    if (rows == 0) return FA_OK;
    int64_t blocks = rows < 8 * device->sms ? rows : 8 * device->sms;
    empty_args a = {*w, p->masks, p->varlen, p->scores.sink, p->scores.sink_stride};
    return fa_launch_kernel((const void *)sm90_write_empty_rows, (int32_t)blocks, 128, 0,
                            p->where.stream, true, &a, error);
}

/* Makes the tensors' device current for the launch and restores the caller's. A thread new to CUDA
 * has no context yet, without which tensor maps cannot be encoded: its first call sets the device
 * in any case. */
static fa_status run(const fa_params *p, const fa_choice *choice, void *workspace,
                     fa_error *error) {
    static __thread bool has_context;
    const fa_sm90_device *device = (const fa_sm90_device *)choice->device;
    int before;
    fa_status status = fa_cuda(cudaGetDevice(&before), "cudaGetDevice", error);
    if (status == FA_OK && (before != device->id || !has_context))
        status = fa_cuda(cudaSetDevice(device->id), "cudaSetDevice", error);
    if (status != FA_OK) return status;
    has_context = true;

    for (int32_t i = 0, parts = fa_head_parts(&p->what); i < parts && status == FA_OK; ++i) {
        fa_params memory;
        const fa_params *part = fa_head_part(p, i, &memory);
        status = launch(part, device, variant_of(part, i, choice), workspace, error);
    }
    if (before == device->id) return status;
    cudaError_t restored = cudaSetDevice(before);
    return status == FA_OK ? fa_cuda(restored, "cudaSetDevice", error) : status;
}

static const fa_forward_op forward = {FA_SM90_FORWARD, reject, kernel, workspace, run};

const fa_backend fa_sm90 = {"sm90", FA_CUDA, takes_device, &forward, NULL};
