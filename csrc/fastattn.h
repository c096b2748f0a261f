/* fastattn.h - THE contract: what the C side asks, one header per operation, and what a backend is.
 *
 * check_*.c fill one request, dispatch.c offers it to the backends in order, the first that takes
 * it runs it. Both sides, gcc and nvcc, read these headers and nothing else of each other, so they
 * include nothing but each other and <stdint.h>.
 */
#ifndef FASTATTN_H
#define FASTATTN_H

#include "backward.h"
#include "forward.h"
#include "kvcache.h"
#include "merge.h"
#include "sparsek.h"
#include "sparse.h"
#include "sparsek_attention.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A backend never allocates device memory and never synchronises. */
typedef struct fa_backend {
    const char *name;      /* "cpu", "sm90": the value of backend= */
    fa_device_type device; /* on which a request's arrays lie */
    /* Whether it runs on this very device: FA_OK, and *device is what it knows of it, or
     * FA_UNSUPPORTED, and why->text says why not, in a clause. Asked before any operation. */
    fa_status (*find_device)(const fa_where *where, const void **device, fa_error *why);
    /* NULL where it has no such operation. */
    const fa_forward_op *forward;
    const fa_backward_op *backward;
    const fa_merge_op *merge;
    const fa_kvcache_op *kvcache;
    const fa_sparsek_op *sparsek;
    const fa_sparsek_backward_op *sparsek_backward;
    const fa_sparse_op *sparse;
    const fa_sparse_backward_op *sparse_backward;
    const fa_sparsek_attention_op *sparsek_attention;
    const fa_sparsek_attention_backward_op *sparsek_attention_backward;
    /* Of its tables: the names of the kernels built in, NULL at the end. NULL: it has no table. */
    const char *const *variants;
} fa_backend;

enum { FA_MAX_THREADS = 1024 }; /* of the CPU backend */

extern const fa_backend fa_cpu; /* csrc/cpu/cpu.c */
/* The CPU's vector level that fa_cpu runs with: "portable", "avx2", "avx512", "avx512_bf16". */
const char *fa_cpu_level(void);
int32_t fa_cpu_threads(void); /* that a call may use, the caller's included */
/* 1 .. FA_MAX_THREADS, for all calls that start later; NULL: as the environment says. */
void fa_cpu_set_threads(const int32_t *n);
const char *fa_cpu_warning(void); /* a sentence about FASTATTN_NUM_THREADS, or empty */

#ifdef FASTATTN_CUDA             /* built with nvcc; kernels/ */
extern const fa_backend fa_sm90; /* kernels/sm90/backend.cu */
extern const fa_backend fa_sm80; /* kernels/sm80/backend.cu */

typedef struct fa_gpu {
    char name[128];
    int32_t major, minor; /* compute capability */
    int32_t sms;          /* multiprocessors */
    int64_t memory;       /* bytes */
} fa_gpu;

typedef struct fa_cuda_state {
    int32_t toolkit; /* CUDART_VERSION built with, e.g. 13000 */
    int32_t driver;  /* cudaDriverGetVersion(), 0: no driver */
    int32_t devices; /* usable devices */
    char error[128]; /* CUDA's sentence where devices cannot be listed, else empty */
} fa_cuda_state;

/* kernels/common/device.cu */
void fa_cuda_probe(fa_cuda_state *state);
fa_status fa_cuda_device(int32_t device_id, fa_gpu *gpu, fa_error *error);
#endif

#ifdef __cplusplus
}
#endif
#endif
