/* bwd_args.cuh - the arguments of the portable backward's kernels. bwd_launch.cuh fills them in. */
#ifndef FASTATTN_SM80_BWD_ARGS_CUH
#define FASTATTN_SM80_BWD_ARGS_CUH

#include "backward.h"
#include "common/element.cuh"
#include "sm80/args.cuh"

typedef pair_of<real> row_terms; /* lse, +inf: P is 0; and delta (backward.h) */

struct bwd_args : request_args {
    array_args dout, dq, dk, dv;
    int32_t n_blocks, hk; /* blocks of keys of a head */
    real factor;          /* of dq and dk: the scale */
    const row_terms *terms;
    int64_t terms_rows; /* of a head */
};

/* Of a float mask's gradient. */
struct bwd_mask_args : bwd_args {
    fa_tensor to;
    int32_t row_blocks, key_blocks; /* of the mask: BLOCK_M rows by BLOCK_N keys, or a whole axis */
};

struct bwd_rows_args : request_args {
    array_args out, dout;
    const real *lse, *dlse; /* dlse NULL: zeros */
    int64_t lse_stride[3], dlse_stride[3];
    row_terms *terms;
    int64_t terms_rows, all_rows;
};

#endif
