/* fwd_args.cuh - the arguments of the portable forward kernel. fwd_launch.cuh fills them in. */
#ifndef FASTATTN_SM80_FWD_ARGS_CUH
#define FASTATTN_SM80_FWD_ARGS_CUH

#include "sm80/args.cuh"

struct kernel_args : request_args {
    array_args out;
    real *lse; /* or NULL */
    int64_t lse_stride[3];
    const float *sink; /* or NULL */
    int64_t sink_stride;
};

#endif
