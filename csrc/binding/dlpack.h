/* dlpack.h - our declaration of the DLPack 1.3 ABI (https://dmlc.github.io/dlpack/latest/).
 *
 * Plain C. Field order and widths are the standard's; a test holds them against a framework's
 * header. Its dtypes are those of check.h, which describes arrays of any type.
 */
#ifndef FASTATTN_DLPACK_H
#define FASTATTN_DLPACK_H

#include "check.h"

enum { DL_MAJOR = 1, DL_MINOR = 3 };

enum { DL_CPU = 1, DL_CUDA = 2, DL_CUDA_HOST = 3, DL_CUDA_MANAGED = 13 }; /* device types */

enum { DL_READ_ONLY = 1 }; /* bit of DLManagedTensorVersioned.flags */

typedef struct DLVersion {
    uint32_t major, minor;
} DLVersion;

typedef struct DLDevice {
    int32_t device_type, device_id;
} DLDevice;

typedef fa_any_dtype DLDataType;

typedef struct DLTensor {
    void *data;
    DLDevice device;
    int32_t ndim;
    DLDataType dtype;
    int64_t *shape;   /* (ndim,) */
    int64_t *strides; /* (ndim,) elements; NULL (before 1.2): contiguous */
    uint64_t byte_offset;
} DLTensor;

typedef struct DLManagedTensor { /* capsule "dltensor" */
    DLTensor dl_tensor;
    void *manager_ctx;
    void (*deleter)(struct DLManagedTensor *self); /* may be NULL */
} DLManagedTensor;

typedef struct DLManagedTensorVersioned { /* capsule "dltensor_versioned" */
    DLVersion version;
    void *manager_ctx;
    void (*deleter)(struct DLManagedTensorVersioned *self); /* may be NULL */
    uint64_t flags;
    DLTensor dl_tensor;
} DLManagedTensorVersioned;

/* The C exchange table, type(x).__dlpack_c_exchange_api__, a capsule "dlpack_exchange_api". The
 * functions return 0, or -1 with a Python exception set; none of them synchronises. */
typedef struct DLExchangeHeader {
    DLVersion version;
    struct DLExchangeHeader *prev_api; /* the table of an older major version, or NULL */
} DLExchangeHeader;

typedef struct DLExchangeAPI {
    DLExchangeHeader header;
    int (*allocate)(DLTensor *prototype, DLManagedTensorVersioned **out, void *error_context,
                    void (*set_error)(void *error_context, const char *kind, const char *message));
    int (*managed_from_object)(void *object, DLManagedTensorVersioned **out);
    int (*managed_to_object)(DLManagedTensorVersioned *tensor, void **out_object); /* steals */
    int (*borrow_from_object)(void *object, DLTensor *out);                        /* may be NULL */
    int (*current_stream)(int32_t device_type, int32_t device_id, void **out_stream);
} DLExchangeAPI;

#endif
