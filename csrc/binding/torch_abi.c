/* torch_abi.c - functions of torch's libraries that are called without Python.
 *
 * Seen in torch 2.10, 2.11, 2.13 and 2.14; a torch that lacks one of them is served without any, by
 * torch_internals.c. aoti_torch_* are its C interface for compiled models, which stays as it is
 * between versions; the others are C++ functions of simple types. A Python tensor holds its
 * at::Tensor where the address that torch tells of a sample stands. Against the ways through Python
 * and the exchange table:
 * - requires_grad and is_neg take 3 ns instead of 50 and 75 (the method lets other threads in)
 * - a description of a tensor takes half the time of the table's
 * - so does a new tensor, and its memory is torch's: record_stream() does nothing on the table's,
 *   which is a view of memory that something else holds
 */
#include "torch_abi.h"

#include <dlfcn.h>
#include <string.h>

torch_abi torch_abi_find(PyObject *sample, uintptr_t impl) {
    torch_abi abi = {0};
    void *library = dlopen("libtorch_python.so", RTLD_LAZY | RTLD_NOLOAD);
    const struct {
        void *function;
        const char *name;
    } wanted[] = {
        {&abi.is_neg, "_ZN2at6native6is_negERKNS_6TensorE"},
        {&abi.requires_grad, "_ZNK3c1010TensorImpl13requires_gradEv"},
        {&abi.dispatch_modes, "_ZN3c104impl20TorchDispatchModeTLS9stack_lenEv"},
        {&abi.function_modes, "_ZN2at4impl22PythonTorchFunctionTLS9stack_lenEv"},
        {&abi.tracing_state, "_ZN5torch3jit6tracer15getTracingStateEv"},
        {&abi.autocast_is_enabled, "_ZN2at8autocast19is_autocast_enabledEN3c1010DeviceTypeE"},
        {&abi.autocast_dtype, "_ZN2at8autocast18get_autocast_dtypeEN3c1010DeviceTypeE"},
        {&abi.grad_mode_is_enabled, "aoti_torch_grad_mode_is_enabled"},
        {&abi.inference_mode_is_enabled, "_ZN3c1013InferenceMode10is_enabledEv"},
        {&abi.empty_strided, "aoti_torch_empty_strided"},
        {&abi.get_data_ptr, "aoti_torch_get_data_ptr"},
        {&abi.get_dim, "aoti_torch_get_dim"},
        {&abi.get_sizes, "aoti_torch_get_sizes"},
        {&abi.get_strides, "aoti_torch_get_strides"},
        {&abi.get_dtype, "aoti_torch_get_dtype"},
        {&abi.get_device_type, "aoti_torch_get_device_type"},
        {&abi.get_device_index, "aoti_torch_get_device_index"},
        {&abi.get_layout, "aoti_torch_get_layout"},
        {&abi.delete_tensor, "aoti_torch_delete_tensor_object"},
        {&abi.wrap, "_Z16THPVariable_WrapRKN2at10TensorBaseE"},
    };
    if (!library || !impl) return abi;
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        void *found = dlsym(library, wanted[i].name);
        if (!found) return (torch_abi){0};
        memcpy(wanted[i].function, &found, sizeof found);
    }
    /* Behind the object's head, or behind a flag after it, as torch had it before 2.10. */
    for (size_t word = 0; word < 2 && !abi.offset; word++) {
        size_t offset = sizeof(PyObject) + word * sizeof impl;
        if (!memcmp((char *)sample + offset, &impl, sizeof impl)) abi.offset = (Py_ssize_t)offset;
    }
    /* The library stays referenced, as the functions are. */
    return abi.offset ? abi : (torch_abi){0};
}

/* torch's numbers of dtypes, which its saved files keep. */
static const struct {
    fa_any_dtype dtype;
    int32_t number;
} torch_dtypes[] = {{{FA_CODE_BFLOAT, 16, 1}, 15}, {{FA_CODE_FLOAT, 16, 1}, 5},
                    {{FA_CODE_FLOAT, 32, 1}, 6},   {{FA_CODE_FLOAT, 64, 1}, 7},
                    {{FA_CODE_BOOL, 8, 1}, 11},    {{FA_CODE_INT, 32, 1}, 3},
                    {{FA_CODE_UINT, 8, 1}, 0}};

int32_t torch_abi_dtype(fa_any_dtype dtype) {
    for (size_t i = 0; i < sizeof torch_dtypes / sizeof *torch_dtypes; i++)
        if (!memcmp(&dtype, &torch_dtypes[i].dtype, sizeof dtype)) return torch_dtypes[i].number;
    return -1;
}

int torch_abi_view(const torch_abi *abi, PyObject *object, DLTensor *t) {
    const void *tensor = (const char *)object + abi->offset;
    int32_t layout, dtype, type, id = 0;
    int64_t ndim;
    if (!abi->offset || abi->get_layout(tensor, &layout) || layout != 0 ||
        abi->get_device_type(tensor, &type) || (type != 0 && type != 1) ||
        abi->get_dtype(tensor, &dtype) || (type && abi->get_device_index(tensor, &id)) ||
        abi->get_dim(tensor, &ndim) || abi->get_sizes(tensor, &t->shape) ||
        abi->get_strides(tensor, &t->strides) || abi->get_data_ptr(tensor, &t->data))
        return 0;
    t->device = (DLDevice){type ? DL_CUDA : DL_CPU, id};
    t->ndim = (int32_t)ndim;
    t->byte_offset = 0;
    for (size_t i = 0; i < sizeof torch_dtypes / sizeof *torch_dtypes; i++)
        if (torch_dtypes[i].number == dtype) {
            t->dtype = torch_dtypes[i].dtype;
            return 1;
        }
    return 0;
}

int torch_abi_new(const torch_abi *abi, DLTensor *t, PyObject **object) {
    const int on_gpu = t->device.device_type == DL_CUDA;
    const int32_t dtype = torch_abi_dtype(t->dtype);
    void *tensor;
    if (!abi->empty_strided || dtype < 0 ||
        abi->empty_strided(t->ndim, t->shape, t->strides, dtype, on_gpu,
                           on_gpu ? t->device.device_id : -1, &tensor))
        return 0;
    *object = abi->get_data_ptr(tensor, &t->data) ? NULL : abi->wrap(tensor);
    abi->delete_tensor(tensor);
    return *object != NULL;
}
