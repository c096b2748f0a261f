/* The Hopper backward's three kernels with threads as fibers. */
#define FIBERS 384
#include "hopper.h"

static fa_status fa_launch_kernel(const void *kernel, int32_t blocks, int32_t threads, int32_t,
                                  void *, bool, void *arguments, fa_error *error);

#include "sm90/bwd.cu"

static const void *kernel_now;
static void *arguments_now;
static int32_t threads_now;

static void body() {
    if (current >= threads_now) return;
    if (kernel_now == (const void *)bwd_rows)
        bwd_rows(*(bwd_rows_args *)arguments_now);
    else if (kernel_now == (const void *)bwd_dq)
        bwd_dq(*(bwd_dq_args *)arguments_now);
    else
        VARIANT_NAME(*(bwd_args *)arguments_now);
}
static fa_status fa_launch_kernel(const void *kernel, int32_t blocks, int32_t threads, int32_t,
                                  void *, bool, void *arguments, fa_error *) {
    kernel_now = kernel, arguments_now = arguments, threads_now = threads;
    for (int i = blocks - 1; i >= 0; --i) {
        blockIdx.x = i;
        start_block();
        run_block(body);
    }
    return FA_OK;
}

extern "C" int backward(const fa_backward *r, void *workspace, int is_late, char *said) {
    const fa_device device = {132, 0, encode_host};
    fa_error error = {};
    late = is_late;
    const fa_status status = PASTE(fa_launch_, VARIANT_NAME)(r, &device, workspace, &error);
    memcpy(said, error.text, sizeof error.text);
    return status;
}

static fa_tensor whole(void *data, int64_t b, int64_t h, int64_t s, int64_t d) {
    return {data, {b, h, s, d}, {h * s * d, s * d, d, 1}};
}

/* Contiguous arrays, (b, h, s, d). sizes: b hq hk sq sk d dv; masks: flags left right offset. */
extern "C" int backward_of(const int32_t *sizes, const int32_t *mask, double scale, void **data,
                           int is_late, char *said) {
    const int32_t b = sizes[0], hq = sizes[1], hk = sizes[2], sq = sizes[3], sk = sizes[4],
                  d = sizes[5], dv = sizes[6];
    fa_backward r = {};
    fa_what &w = r.forward.what;
    w.dtype = VARIANT_DTYPE;
    w.b = b, w.hq = hq, w.hk = w.hv = hk, w.sq = sq, w.sk = sk, w.d = d, w.dv = dv;
    w.scale = scale;
    w.q = whole(data[0], b, hq, sq, d), w.k = whole(data[1], b, hk, sk, d);
    w.v = whole(data[2], b, hk, sk, dv), w.out = whole(data[3], b, hq, sq, dv);
    w.lse = whole(data[4], b, hq, sq, 1);
    r.dout = whole(data[5], b, hq, sq, dv);
    r.dlse = whole(data[6], b, hq, sq, 1);
    r.dq = whole(data[7], b, hq, sq, d), r.dk = whole(data[8], b, hk, sk, d);
    r.dv = whole(data[9], b, hk, sk, dv);
    fa_masks &m = r.forward.masks;
    m.flags = mask[0], m.left = mask[1], m.right = mask[2], m.offset = mask[3];
    m.q_lengths = (const int32_t *)data[10], m.q_lengths_stride = 1;
    m.k_lengths = (const int32_t *)data[11], m.k_lengths_stride = 1;
    m.k_start = (const int32_t *)data[12], m.k_start_stride = 1;
    const int64_t rows = (int64_t)b * hq * ((sq + BLOCK_M - 1) / BLOCK_M) * BLOCK_M;
    float *workspace = (float *)aligned_alloc(256, (rows * (2 + D) * 4 + 255) / 256 * 256);
    memset(workspace, 0xFF, rows * (2 + D) * 4);
    const int status = backward(&r, workspace, is_late, said);
    free(workspace);
    return status;
}
