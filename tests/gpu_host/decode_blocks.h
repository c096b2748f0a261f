/* decode_blocks.h - the decode kernel of a variant, and its launch: threads are fibers, one block
 * runs after the other. */
#ifndef FASTATTN_TESTS_DECODE_BLOCKS_H
#define FASTATTN_TESTS_DECODE_BLOCKS_H

#define FIBERS (VARIANT_STRIDED ? 128 : 160)
#include "decode_host.h"

static fa_status fa_launch_clusters(const void *kernel, int32_t blocks, int32_t cluster,
                                    int32_t threads, int32_t smem, void *stream, bool early,
                                    void *arguments, fa_error *error);

#include "sm90/decode.cu"

static const decode_args *arguments_now;

static void run_cluster(int first) {
    for (int i = 0; i < cluster_now; ++i) {
        blockIdx.x = first + i;
        start_block();
        run_block([] { VARIANT_NAME(*arguments_now); });
    }
}

static fa_status fa_launch_clusters(const void *, int32_t blocks, int32_t cluster, int32_t,
                                    int32_t smem, void *, bool, void *arguments, fa_error *) {
    arguments_now = (const decode_args *)arguments;
    if (smem > 227 << 10 || blocks % cluster) abort();
    gridDim.x = blocks, cluster_now = cluster;
    for (int first = blocks - cluster; first >= 0; first -= cluster) {
        is_first_run = true;
        if (cluster > 1) run_cluster(first);
        is_first_run = false;
        run_cluster(first);
    }
    return FA_OK;
}

#endif
