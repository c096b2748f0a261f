/* A variant of the Hopper backward with threads as fibers: its three kernels, one block after the
 * other. */
#define FIBERS (128 * (VARIANT_WARPGROUPS + 1))
#include "hopper.h"
#include "side_by_side.h"

static fa_status fa_launch_kernel(const void *kernel, int32_t blocks, int32_t threads, int32_t smem,
                                  void *stream, bool early, void *arguments, fa_error *error);
static fa_status fa_launch_clusters(const void *kernel, int32_t blocks, int32_t cluster,
                                    int32_t threads, int32_t smem, void *stream, bool early,
                                    void *arguments, fa_error *error);

#include "backward_request.h"
#include "sm90/bwd.cu"
#include "sm90/bwd_choice.h"
#include "pack_host.h"
#include "sm90/bwd_sink.cuh"

static const void *kernel_now;
static void *arguments_now;
static int32_t threads_now;
static int32_t deterministic;
static std::vector<uint32_t> sums_now;
static uint64_t order; /* in which blocks run, beside each other; 0: one after the other */

static void body() {
    if (current >= threads_now) return;
    if (kernel_now == (const void *)bwd_rows)
        bwd_rows(*(bwd_rows_args *)arguments_now);
    else if (kernel_now == (const void *)bwd_dq)
        bwd_dq(*(bwd_dq_args *)arguments_now);
    else if (kernel_now == (const void *)bwd_sink)
        bwd_sink(*(sink_args *)arguments_now);
#if VARIANT_GENERAL
    else if (kernel_now == (const void *)bwd_mask)
        bwd_mask(*(bwd_mask_args *)arguments_now);
#endif
    else
        VARIANT_NAME(*(bwd_args *)arguments_now);
}

static fa_status fa_launch_kernel(const void *kernel, int32_t blocks, int32_t threads, int32_t,
                                  void *, bool, void *arguments, fa_error *) {
    kernel_now = kernel, arguments_now = arguments, threads_now = threads;
    gridDim.x = blocks;
    if (order && kernel == (const void *)VARIANT_NAME) {
        run_blocks(body, 3, order);
        return FA_OK;
    }
    for (blockIdx.x = blocks - 1; blockIdx.x >= 0; --blockIdx.x) {
        start_block();
        run_block(body);
    }
    return FA_OK;
}

static fa_status fa_launch_clusters(const void *kernel, int32_t blocks, int32_t cluster,
                                    int32_t threads, int32_t smem, void *stream, bool early,
                                    void *arguments, fa_error *error) {
    if (cluster == 1)
        return fa_launch_kernel(kernel, blocks, threads, smem, stream, early, arguments, error);
    kernel_now = kernel, arguments_now = arguments, threads_now = threads;
    gridDim.x = blocks;
    static uint64_t seed;
    run_blocks(body, cluster, seed += 0x123456789);
    return FA_OK;
}

/* Blocks of rows that the last call has walked over: of each, lse and delta. */
extern "C" int64_t walked() { return bulk_loads / 2; }

/* Of the calls that follow. */
extern "C" void set_order(int is_deterministic, uint64_t seed) {
    deterministic = is_deterministic, order = seed;
}

/* Of the last call's sums of dQ, before they are rounded: a number that others will not have. */
extern "C" uint64_t bits_of_sums() {
    uint64_t bits = 0;
    for (uint32_t x : sums_now) bits = (bits ^ x) * 1099511628211;
    return bits;
}

/* Of backward_request.h's. Returns a status. */
extern "C" int backward(const fa_tensor *const *arrays, double scale, const int32_t *masks,
                        const int32_t *const *lengths, float *const *sinks,
                        const int32_t *const *packed, const changed_scores *scores, int is_late) {
    fa_backward r =
        make_request(VARIANT_DTYPE, arrays, scale, masks, lengths, sinks, packed, scores);
    r.deterministic = deterministic;
    const fa_params &p = r.forward;
    const fa_backward_workspace at = fa_lay_out_backward(&p, BLOCK_M, SUM_COLUMNS);
    std::vector<float4> workspace(at.floats / 4 + 1, make_float4(NAN, NAN, NAN, NAN));
    const fa_device device = {3, 0, encode_host}; /* few SMs: more tiles than blocks */
    fa_error error = {};
    late = is_late, bulk_loads = 0;
    if (fa_bwd_packs(&p)) pack_host(&p, (char *)((float *)workspace.data() + at.mask));
    const fa_status status = PASTE(fa_launch_, VARIANT_NAME)(&r, &device, workspace.data(), &error);
    if (status != FA_OK) return status;
    const uint32_t *words = (const uint32_t *)workspace.data();
    sums_now.assign(words + at.sums, words + at.taken);
    return launch_sink(&r, (const float *)workspace.data() + at.delta, at.head, BLOCK_M, &device,
                       &error);
}
