/* fastattn.h - THE contract: what the C side asks and what a backend computes.
 *
 * Stop 3 of 6 (see README.md): check.c fills one fa_params, dispatch.c offers it to the backends
 * in order, the first that does not reject runs it. Both sides, gcc and nvcc, read this file and
 * nothing else of each other, so it includes nothing but <stdint.h>.
 *
 * Letters: b batch, sq/sk query/key length, hq/hk query/key heads, d head size of q and k, dv of v.
 * Absent means a NULL pointer or a clear flag bit, never a magic value.
 */
#ifndef FASTATTN_H
#define FASTATTN_H

#include <stdint.h>

#ifdef __CUDACC__
#define FA_INLINE static __host__ __device__ __forceinline__
#else
#define FA_INLINE static inline
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum {
    FA_MAX_THREADS = 1024,         /* of the CPU backend */
    FA_MAX_LENGTH = (1 << 30) - 1, /* sq and sk: any sum of two row numbers fits an int32 */
    FA_MAX_SHIFT = 1 << 30,        /* window bounds and offsets lie in +-this: past every key */
};

typedef enum fa_status {
    FA_OK = 0,
    FA_VALUE,       /* ValueError: a value or a shape */
    FA_TYPE,        /* TypeError: a type or a dtype */
    FA_UNSUPPORTED, /* NotImplementedError: a legal request that no backend serves */
    FA_RUNTIME,     /* RuntimeError: a CUDA failure, with CUDA's name and text */
    FA_MEMORY,      /* MemoryError */
} fa_status;

/* One sentence for the user; empty while the status is FA_OK. */
typedef struct fa_error {
    char text[512];
} fa_error;

typedef enum fa_dtype { FA_F64 = 1, FA_F32, FA_F16, FA_BF16, FA_BOOL } fa_dtype;

typedef enum fa_device_type { FA_CPU = 1, FA_CUDA = 2 } fa_device_type; /* DLPack's numbers */

/* A strided array of rank 4. Strides count elements, may be 0 or negative; 64 bits throughout.
 * stride[i] has no meaning where shape[i] is 1 (check.c sets it to 0 there). */
typedef struct fa_tensor {
    void *data; /* element (0, 0, 0, 0); may be NULL if a shape is 0 or the tensor optional */
    int64_t shape[4];
    int64_t stride[4];
} fa_tensor;

/* What is computed: softmax(scale * q k^T) v. Always valid. Of packed sequences (fa_varlen) the
 * shapes of q, k, v, out and lse are (1, h, total, ...) instead; b counts the sequences, and sq and
 * sk are the longest that they may be. */
typedef struct fa_what {
    fa_tensor q;    /* (b, hq, sq, d)  dtype */
    fa_tensor k;    /* (b, hk, sk, d)  dtype */
    fa_tensor v;    /* (b, hv, sk, dv) dtype */
    fa_tensor out;  /* (b, hq, sq, dv) dtype, written whole; never overlaps an input */
    fa_tensor lse;  /* (b, hq, sq, 1) natural logarithm, float32, or float64 where dtype is;
                     * data NULL: not wanted */
    fa_dtype dtype; /* of q, k, v and out: FA_F64, FA_F32, FA_F16 or FA_BF16 */
    /* b, hq, sq, sk, d and dv may be 0; hq is a multiple of hk and of hv, which mostly are equal
     * and never 0 (where hq is, k and v may have no heads). */
    int32_t b, hq, hk, hv, sq, sk, d, dv;
    double scale;            /* multiplies q.k; any finite value, 0 and negative included */
    int32_t batch_invariant; /* 1: the bits of a sequence do not depend on the others */
} fa_what;

/* Which keys a row may see: one interval per row, computed by fa_row_interval() in mask.h. */
enum {
    FA_HAS_LEFT = 1,   /* `left` bounds the interval from below */
    FA_HAS_RIGHT = 2,  /* `right` bounds it from above (causal is right = 0) */
    FA_HAS_OFFSET = 4, /* i' = i + offset instead of i + sk - sq (top-left is offset = 0) */
};

typedef struct fa_masks {
    uint32_t flags;           /* FA_HAS_LEFT | FA_HAS_RIGHT | FA_HAS_OFFSET */
    int32_t left, right;      /* keys i' - left .. i' + right, inclusive; +-FA_MAX_SHIFT */
    const int32_t *q_lengths; /* (b,) on the device, true query lengths, or NULL: sq */
    const int32_t *k_lengths; /* (b,) on the device, true key lengths, or NULL: sk */
    const int32_t *k_start;   /* (b,) on the device, first key that counts, or NULL: 0 */
    int64_t q_lengths_stride, k_lengths_stride, k_start_stride; /* elements */
    const int32_t *q_offset; /* (b,) on the device, i' = i + that, clamped; or NULL: `offset` */
    int64_t q_offset_stride; /* elements */
    int32_t offset;          /* of FA_HAS_OFFSET; +-FA_MAX_SHIFT */
} fa_masks;

/* What changes the scores. */
typedef struct fa_scores {
    double softcap;            /* c of c * tanh(s / c); 0 = off (by definition of the argument) */
    fa_dtype mask_dtype;       /* FA_BOOL (1 = attend), or FA_F32, FA_F16, FA_BF16, FA_F64: added */
    fa_tensor mask;            /* (b, hq, sq, sk), broadcast by stride 0; data NULL: none */
    const float *alibi_slopes; /* (b, hq) on the device, or NULL */
    int64_t alibi_stride[2];   /* elements, for b and hq; 0 for b where the slopes are (hq,) */
    const float *sink;         /* (hq,) on the device, an extra logit per head, or NULL */
    int64_t sink_stride;       /* elements */
} fa_scores;

/* Sequences packed end to end along one axis: sequence n of q is the rows cu_q[n] .. cu_q[n + 1]
 * - 1. fa_find_sequence() in mask.h reads them, and clamps. fa_masks' lengths, the mask and every
 * other position count within a sequence. */
typedef struct fa_varlen {
    const int32_t *cu_q, *cu_k;       /* (b + 1,) on the device; both NULL: not packed */
    int64_t cu_q_stride, cu_k_stride; /* elements */
    int32_t total_q, total_k;         /* rows of q and of k */
} fa_varlen;

/* Elements of P are dropped after the row's sum; fa_dropout_bits() in philox.h says which. */
typedef struct fa_dropout {
    double p;    /* 0 .. 1; 0 = off (by definition of the argument) */
    double gain; /* of what is kept: 1 / (1 - p); 0 where nothing is */
    uint32_t
        threshold;   /* kept are 16 bits >= it: p * 65,536, rounded; all of it: nothing is kept */
    int32_t first_b; /* number of the request's first sequence, from which b counts */
    const int64_t *seed_data; /* one number on the device, or NULL: `seed` */
    int64_t seed;
} fa_dropout;

/* Where it runs. */
typedef struct fa_where {
    fa_device_type device_type;
    int32_t device_id; /* CUDA ordinal; 0 on the CPU */
    void *stream;      /* the caller's cudaStream_t, NULL is the legacy default; not on the CPU */
} fa_where;

typedef struct fa_params {
    fa_what what;
    fa_masks masks;
    fa_scores scores;
    fa_varlen varlen;
    fa_dropout dropout;
    fa_where where;
} fa_params;

/* Partial results over disjoint keys, merged:
 * lse = logaddexp(lses), out = sum of exp(lse_i - lse) out_i. A part whose lse is -inf or +inf (as
 * some say of a row without keys) is empty. */
typedef struct fa_merge {
    int32_t n;             /* number of parts, >= 1 */
    const fa_tensor *outs; /* n of (b, h, s, dv) dtype */
    const fa_tensor *lses; /* n of (b, h, s, 1) float32, or float64 where dtype is */
    fa_tensor out;         /* (b, h, s, dv) dtype */
    fa_tensor lse;         /* (b, h, s, 1) like lses */
    fa_dtype dtype;
    fa_where where;
} fa_merge;

/* One backend. reject and workspace are pure host functions of the request: they read no tensor
 * and launch nothing. A backend never allocates device memory and never synchronises. */
typedef struct fa_backend {
    const char *name; /* "cpu", "sm90": the value of backend= */
    /* FA_OK: takes it. FA_UNSUPPORTED: why->text says why not, in a clause ("it takes d <= 256") */
    fa_status (*reject)(const fa_params *p, fa_error *why);
    /* The kernel row that would run, e.g. "sm90_fwd_bf16_d128_128x128"; static storage. */
    const char *(*kernel)(const fa_params *p);
    /* Bytes of device workspace that run() needs, 256-byte aligned; 0 = none. */
    int64_t (*workspace)(const fa_params *p);
    fa_status (*run)(const fa_params *p, void *workspace, fa_error *error);
    fa_status (*merge)(const fa_merge *m, fa_error *error); /* NULL: not served */
} fa_backend;

extern const fa_backend fa_cpu; /* csrc/cpu/cpu.c */
/* The CPU's vector level that fa_cpu runs with: "portable", "avx2", "avx512", "avx512_bf16". */
const char *fa_cpu_level(void);
int32_t fa_cpu_threads(void); /* that a call may use, the caller's included */
/* 1 .. FA_MAX_THREADS, for all calls that start later; NULL: as the environment says. */
void fa_cpu_set_threads(const int32_t *n);
const char *fa_cpu_warning(void); /* a sentence about FASTATTN_NUM_THREADS, or empty */

#ifdef FASTATTN_CUDA             /* built with nvcc; kernels/ */
extern const fa_backend fa_sm90; /* kernels/sm90/backend.cu */

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

void fa_cuda_probe(fa_cuda_state *state); /* kernels/sm90/backend.cu */
fa_status fa_cuda_device(int32_t device_id, fa_gpu *gpu,
                         fa_error *error); /* kernels/sm90/backend.cu */
const char *const *fa_cuda_rows(void);     /* names of the rows built in, NULL-terminated */
#endif

#ifdef __cplusplus
}
#endif
#endif
