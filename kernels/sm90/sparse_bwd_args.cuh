/* sparse_bwd_args.cuh - the arguments of the kernel of gradients. */
#ifndef FASTATTN_SM90_SPARSE_BWD_ARGS_CUH
#define FASTATTN_SM90_SPARSE_BWD_ARGS_CUH

#include "sm90/sparse_args.cuh"

struct sparse_bwd_args {
    sparse_args a;
    fa_tensor dout, dq; /* data NULL: zeros; not wanted */
    const float *delta; /* (batch, hq, rows) */
    int64_t rows, keys; /* of q and of k, of a head */
    float *dk, *dv;     /* sums (batch, hk, keys, pitch), `of_part` apart; NULL: not wanted */
    int64_t of_part;
    int32_t dk_pitch, dv_pitch;
    fa_tensor dgate;          /* sums like a.lists.entries; data NULL: not wanted */
    float dscale;             /* of dq and dk: the scale, in no exponents */
    fa_divisor by_parts;      /* blocks of the grid of a head */
    int32_t parts, sums;      /* the last: how many dk and dv there are */
    int32_t head_tiles, each; /* tiles of a head, of a block of the grid */
    int32_t dout_wide, dq_wide;
};

/* Of the kernel; the tests run it on the host. */
typedef sparse_bwd_args sparse_kernel_args;

#endif
