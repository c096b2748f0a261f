/* torch_abi.h - functions of torch's libraries that are called without Python. */
#ifndef FASTATTN_TORCH_ABI_H
#define FASTATTN_TORCH_ABI_H

#include <Python.h>
#include <stdbool.h>

#include "dlpack.h"

/* Tensors are at::Tensor by reference, so pointers. All 0 where this torch lacks one of them. */
typedef struct torch_abi {
    Py_ssize_t offset; /* of the at::Tensor in a Python tensor; 0: not found */
    bool (*is_neg)(const void *tensor);
    bool (*requires_grad)(const void *impl); /* what an at::Tensor points to */
    bool (*grad_mode_is_enabled)(void);
    bool (*inference_mode_is_enabled)(void);
    int64_t (*dispatch_modes)(void);
    int64_t (*function_modes)(void);
    void *const *(*tracing_state)(void); /* of torch.jit.trace; points to NULL where none runs */
    bool (*autocast_is_enabled)(int8_t device_type);
    int8_t (*autocast_dtype)(int8_t device_type);
    int32_t (*empty_strided)(int64_t ndim, const int64_t *shape, const int64_t *strides,
                             int32_t dtype, int32_t device_type, int32_t device_id, void **tensor);
    int32_t (*delete_tensor)(void *tensor);
    PyObject *(*wrap)(const void *tensor); /* a new Python object */
    /* These and empty_strided return 0, or 1 for a tensor that has no such thing. */
    int32_t (*get_layout)(const void *tensor, int32_t *layout);
    int32_t (*get_device_type)(const void *tensor, int32_t *device_type);
    int32_t (*get_device_index)(const void *tensor, int32_t *device_id);
    int32_t (*get_dtype)(const void *tensor, int32_t *dtype);
    int32_t (*get_dim)(const void *tensor, int64_t *ndim);
    int32_t (*get_sizes)(const void *tensor, int64_t **shape);
    int32_t (*get_strides)(const void *tensor, int64_t **strides);
    int32_t (*get_data_ptr)(const void *tensor, void **data);
} torch_abi;

/* By name, from the libraries that torch has loaded. `sample` is any tensor, `impl` what torch's
 * own tensor._cdata says of it. */
torch_abi torch_abi_find(PyObject *sample, uintptr_t impl);

/* What the exchange table says of a strided tensor in CPU or CUDA memory, of a dtype that
 * torch_abi_dtype() knows, in half the time; 0 for all others. Shape and strides are the tensor's
 * own. */
int torch_abi_view(const torch_abi *abi, PyObject *object, DLTensor *t);

/* An uninitialised tensor as `t` describes it, which gets its data; 0 where torch refuses, which
 * does not say why. */
int torch_abi_new(const torch_abi *abi, DLTensor *t, PyObject **object);

/* torch's number of a dtype, which its saved files keep; -1: none that we use. */
int32_t torch_abi_dtype(fa_any_dtype dtype);

#endif
