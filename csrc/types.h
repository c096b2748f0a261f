/* types.h - what all operations of the contract share: statuses, arrays, and what an operation is.
 *
 * Compiled by gcc and nvcc alike; includes nothing but dtype.h.
 */
#ifndef FASTATTN_TYPES_H
#define FASTATTN_TYPES_H

#include "dtype.h"

#ifdef __CUDACC__
#define FA_INLINE static __host__ __device__ __forceinline__
#else
#define FA_INLINE static inline
#endif

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

/* A strided array of rank 4. Strides count elements, may be 0 or negative; 64 bits throughout.
 * stride[i] has no meaning where shape[i] is 1 (views.c sets it to 0 there). */
typedef struct fa_tensor {
    void *data; /* element (0, 0, 0, 0); may be NULL if a shape is 0 or the tensor optional */
    int64_t shape[4];
    int64_t stride[4];
} fa_tensor;

/* The address of an output while a backend is chosen, for it is allocated only for a request that
 * is taken: as aligned as a GPU's allocators are. All else of it is as it will be. */
#define FA_TO_COME ((void *)256)

typedef enum fa_device_type { FA_CPU = 1, FA_CUDA = 2 } fa_device_type; /* DLPack's numbers */

/* Where a request runs. */
typedef struct fa_where {
    fa_device_type device_type;
    int32_t device_id; /* CUDA ordinal; 0 on the CPU */
    void *stream;      /* the caller's cudaStream_t, NULL is the legacy default; not on the CPU */
} fa_where;

/* What a backend found out when it was asked, handed on so that nothing is searched twice. Both
 * point to static storage, of a type that the backend alone knows. */
typedef struct fa_choice {
    const void *device;  /* of fa_backend.find_device */
    const void *variant; /* of an operation's reject: the kernel that runs */
} fa_choice;

/* An operation of a backend: all of them have these members, each for requests of its own type.
 * But run they are pure host functions of the request: they read no tensor and launch nothing.
 *
 *     support    what it takes, a line of support.h's table: other requests do not come here
 *     reject     FA_OK, and choice->variant is set. FA_UNSUPPORTED: why->text says why not, in a
 *                clause; only for what this build lacks, never for what `support` declares
 *     kernel     the name of the variant, as its table has it; static storage
 *     workspace  bytes of device workspace that run needs, 256-byte aligned; 0: none
 *     run        on the request that was not rejected, with the choice that was made for it
 */
#define FA_OPERATION(operation, request)                                                           \
    typedef struct fa_##operation##_op {                                                           \
        int32_t support;                                                                           \
        fa_status (*reject)(const request *r, fa_choice *choice, fa_error *why);                   \
        const char *(*kernel)(const request *r, const fa_choice *choice);                          \
        int64_t (*workspace)(const request *r, const fa_choice *choice);                           \
        fa_status (*run)(const request *r, const fa_choice *choice, void *workspace, fa_error *e); \
    } fa_##operation##_op

#endif
