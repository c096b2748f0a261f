/* backend.cu itself on the host, for a module whose backend "sm90" takes arrays on the CPU: decode,
 * caches, lists of keys, merging. Compiled several times, once for each thing that has threads of
 * its own:
 *
 *     nothing defined     backend.cu, and the kernels that it has itself
 *     VARIANT_NAME        a decode variant; with OVER_LISTS, one over lists of keys, or,
 *                         with OF_GRADIENTS too, of their gradients
 *     MERGING             merging's kernels
 *
 * In place of the one forward variant in its table there is the CPU; of the backward, nothing.
 */
#if defined OVER_LISTS

#include "sparse_blocks.h"

#elif defined VARIANT_NAME

#include "decode_blocks.h"

#elif defined MERGING

#include "merge_host.h"

typedef struct fa_merge_variant fa_merge_variant;
typedef struct fa_device fa_device;

extern "C" const fa_merge_variant *fa_merge_choose(const fa_merge *, const fa_merge_stack *) {
    return NULL;
}
extern "C" fa_status fa_merge_launch(const fa_merge *m, const fa_merge_stack *stack,
                                     const fa_merge_variant *, const fa_device *, void *,
                                     fa_error *) {
    const fa_merge_plan p = fa_merge_make(m, stack, fa_merge_walk(m, stack));
    if (p.dtype != FA_F32 || m->dtype != FA_BF16 || p.bytes) abort();
    run_merge<FA_F32, FA_BF16>(m, &p, NULL, 2);
    return FA_OK;
}

#else

#define FIBERS 128
#define VARIANT_DTYPE FA_BF16
#include "decode_host.h"

#include "fastattn.h"
#include "merge.h"

static fa_status fa_launch_kernel(const void *kernel, int32_t blocks, int32_t threads, int32_t smem,
                                  void *stream, bool early, void *arguments, fa_error *error);
static fa_device device_now;

extern "C" {
__attribute__((visibility("default"))) int32_t sms_now = 4; /* of the device */
fa_status forward_here(const fa_params *p, fa_error *error);

typedef struct fa_merge_variant {
    const char *name;
} fa_merge_variant;
struct fa_merge_stack;
const fa_merge_variant *fa_merge_choose(const fa_merge *m, const fa_merge_stack *stack);
fa_status fa_merge_launch(const fa_merge *m, const fa_merge_stack *stack,
                          const fa_merge_variant *variant, const fa_device *device, void *workspace,
                          fa_error *error);
}
static int64_t fa_merge_bytes(const fa_merge *, const fa_merge_stack *, const fa_merge_variant *) {
    return 0;
}

static fa_status fa_find_device(int32_t, const fa_device **found, fa_error *) {
    device_now = {sms_now, 0, encode_host, 9, 0};
    *found = &device_now;
    return FA_OK;
}
static fa_status fa_enter_device(const fa_device *, int *, fa_error *) { return FA_OK; }
static fa_status fa_leave_device(const fa_device *, int, fa_status status, fa_error *) {
    return status;
}

#include "sm90/fwd_choice.h"
#define fa_choose_variant(p, sms) 0
#define FA_CUDA FA_CPU
#include "sm90/backend.cu"

static const void *kernel_now, *arguments_now;

template <typename A>
static void run_kernel() {
    ((void (*)(const A))kernel_now)(*(const A *)arguments_now);
}

/* Each kernel, and how it is run. */
static const struct {
    const void *kernel;
    void (*run)();
} known[] = {
    {(const void *)write_empty_rows<uint16_t, float>, run_kernel<empty_args>},
    {(const void *)write_zeros<uint16_t>, run_kernel<fa_tensor>},
    {(const void *)write_zeros<uint32_t>, run_kernel<fa_tensor>},
    {(const void *)kvcache_append<FA_BF16>, run_kernel<append_args>},
    {(const void *)kvcache_mass<FA_BF16, 64>, run_kernel<mass_args>},
    {(const void *)gather_dealt<FA_BF16>, run_kernel<gather_args>},
    {(const void *)sparse_mass<FA_BF16, 64>, run_kernel<sparse_mass_args>},
    {(const void *)sparse_delta<FA_BF16>, run_kernel<sparse_ends_args>},
    {(const void *)sparse_sums<FA_BF16>, run_kernel<sparse_ends_args>},
    {(const void *)sparse_sink, run_kernel<sparse_ends_args>},
    {(const void *)sparsek_gates, run_kernel<sparsek_args>},
    {(const void *)sparsek_taus, run_kernel<sparsek_args>},
    {(const void *)sparsek_rise, run_kernel<sparsek_args>},
    {(const void *)sparsek_fill, run_kernel<sparsek_args>},
    {(const void *)sparsek_whole, run_kernel<sparsek_grad_args>},
    {(const void *)sparsek_clear, run_kernel<sparsek_grad_args>},
    {(const void *)sparsek_runs, run_kernel<sparsek_grad_args>},
    {(const void *)sparsek_prefix<false>, run_kernel<sparsek_grad_args>},
    {(const void *)sparsek_prefix<true>, run_kernel<sparsek_grad_args>},
    {(const void *)sparsek_means, run_kernel<sparsek_grad_args>},
    {(const void *)sparsek_keys, run_kernel<sparsek_grad_args>},
};

static fa_status fa_launch_kernel(const void *kernel, int32_t blocks, int32_t threads, int32_t,
                                  void *, bool, void *arguments, fa_error *) {
    if (kernel == (const void *)list_tiles) return FA_OK; /* what forward_here() has no use for */
    void (*run)() = NULL;
    for (const auto &one : known)
        if (one.kernel == kernel) run = one.run;
    if (threads != FIBERS || !run) abort();
    kernel_now = kernel, arguments_now = arguments;
    gridDim.x = blocks;
    for (blockIdx.x = blocks - 1; blockIdx.x >= 0; --blockIdx.x) run_block(run);
    return FA_OK;
}

/* The portable kernels are not here. */
static fa_status refuses_device(const fa_where *, const void **, fa_error *why) {
    return fa_fail(why, FA_UNSUPPORTED, "it is not here");
}
const fa_backend fa_sm80 = {"sm80", FA_CUDA, refuses_device};

#define FA_VARIANT(name, ...)                                                            \
    extern "C" fa_status fa_launch_##name(const fa_params *p, const fa_device *, void *, \
                                          fa_error *error) {                             \
        return forward_here(p, error);                                                   \
    }
#include "sm90/fwd.def"
#undef FA_VARIANT
#define FA_VARIANT(name, ...)                                                             \
    extern "C" fa_status fa_launch_##name(const fa_backward *, const fa_device *, void *, \
                                          fa_error *) {                                   \
        abort();                                                                          \
    }
#include "sm90/bwd.def"
#undef FA_VARIANT

extern "C" void fa_cuda_probe(fa_cuda_state *state) { *state = {}; }
extern "C" fa_status fa_cuda_device(int32_t, fa_gpu *, fa_error *error) {
    return fa_fail(error, FA_RUNTIME, "there is none");
}

#endif
