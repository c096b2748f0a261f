/* A variant of the portable backward with threads as fibers: its kernels, one block after the
 * other.
 */
#define FIBERS 256
#include "portable.h"

static fa_status fa_launch_kernel(const void *kernel, int32_t blocks, int32_t threads, int32_t smem,
                                  void *stream, bool early, void *arguments, fa_error *error);

#include "backward_request.h"
#include "pack_host.h"
#include "sm80/bwd.cu"
#include "sm80/bwd_sink.cuh"

static const void *kernel_now;
static void *arguments_now;

static void body() {
    if (current >= block_threads) return;
    if (kernel_now == (const void *)bwd_rows)
        bwd_rows(*(bwd_rows_args *)arguments_now);
    else if (kernel_now == (const void *)Q_KERNEL)
        Q_KERNEL(*(bwd_args *)arguments_now);
    else if (kernel_now == (const void *)VARIANT_NAME)
        VARIANT_NAME(*(bwd_args *)arguments_now);
#if VARIANT_GENERAL
    else if (kernel_now == (const void *)MASK_KERNEL)
        MASK_KERNEL(*(bwd_mask_args *)arguments_now);
#endif
    else
        bwd_sink<real>(*(sink_args *)arguments_now);
}

static fa_status fa_launch_kernel(const void *kernel, int32_t blocks, int32_t threads, int32_t smem,
                                  void *, bool, void *arguments, fa_error *) {
    kernel_now = kernel, arguments_now = arguments, block_threads = threads;
    gridDim.x = blocks;
    for (blockIdx.x = blocks - 1; blockIdx.x >= 0; --blockIdx.x) {
        start_block();
        memset(raw + smem, 0, sizeof raw - smem);
        run_block(body);
        for (size_t i = smem; i < sizeof raw; ++i)
            if (raw[i]) abort(); /* past its shared memory */
    }
    return FA_OK;
}

/* Of backward_request.h's. Returns a status. */
extern "C" int backward(const fa_tensor *const *arrays, double scale, const int32_t *masks,
                        const int32_t *const *lengths, float *const *sinks,
                        const int32_t *const *packed, const changed_scores *scores, int is_late) {
    const fa_backward r =
        make_request(VARIANT_DTYPE, arrays, scale, masks, lengths, sinks, packed, scores);
    const fa_sm80_bwd_workspace at = fa_sm80_lay_out_bwd(&r.forward);
    std::vector<double2> workspace(at.bytes / 16 + 1, {NAN, NAN});
    const fa_device device = {2, 0};
    fa_error error = {};
    late = is_late;
    if (r.forward.scores.mask.data && r.forward.scores.mask_dtype == FA_BOOL)
        pack_host(&r.forward, (char *)workspace.data() + at.mask);
    const fa_status status = PASTE(fa_launch_, VARIANT_NAME)(&r, &device, workspace.data(), &error);
    if (status != FA_OK) return status;
    return launch_sink(&r, workspace.data(), &device, &error);
}
