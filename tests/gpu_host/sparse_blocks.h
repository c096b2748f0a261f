/* sparse_blocks.h - a kernel over lists of keys of a variant, and its launch: threads are fibers,
 * one block runs after the other. */
#ifndef FASTATTN_TESTS_SPARSE_BLOCKS_H
#define FASTATTN_TESTS_SPARSE_BLOCKS_H

#define FIBERS (VARIANT_ROWS == 128 ? 256 : 128)
#include "decode_host.h"

static fa_status fa_launch_kernel(const void *kernel, int32_t blocks, int32_t threads, int32_t smem,
                                  void *stream, bool early, void *arguments, fa_error *error);

#ifdef OF_GRADIENTS
#include "sm90/sparse_bwd.cu"
#else
#include "sm90/sparse.cu"
#endif

static const sparse_kernel_args *arguments_now;

static fa_status fa_launch_kernel(const void *, int32_t blocks, int32_t threads, int32_t smem,
                                  void *, bool, void *arguments, fa_error *) {
    arguments_now = (const sparse_kernel_args *)arguments;
    if (smem > 227 << 10 || threads != FIBERS) abort();
    gridDim.x = blocks;
    late = !late; /* copies come at once, or when they are waited for */
    for (blockIdx.x = blocks - 1; blockIdx.x >= 0; --blockIdx.x) {
        start_block();
        run_block([] { VARIANT_NAME(*arguments_now); });
    }
    return FA_OK;
}

#endif
