/* tensor.c - from Python objects to described arrays, and new arrays of the caller's own kind.
 *
 * Three ways in, fastest first: torch's own C functions (torch_internals.c), NumPy's C API for
 * ndarrays (numpy_internals.c), and __dlpack__ for everything else (dlpack.c).
 */
#include "internals.h"

#include <string.h>

/* Strides that all later arithmetic may rely on: sums over the bytes of two arrays fit an int64,
 * and no address below the first is passed. Sizes of 1 have no stride. */
static fa_status check_reach(const fa_array *a, int64_t size, fa_error *error) {
    const int64_t limit = (int64_t)1 << 60;
    int64_t below = 0, above = 0, reach;
    for (int32_t i = 0; i < a->ndim; i++) {
        if (a->shape[i] <= 1) continue;
        int wrong = __builtin_mul_overflow(a->shape[i] - 1, a->stride[i], &reach) ||
                    __builtin_mul_overflow(reach, size, &reach) || reach <= -limit ||
                    reach >= limit;
        if (!wrong) *(reach < 0 ? &below : &above) += reach;
        if (wrong || below <= -limit || above >= limit)
            return fa_fail(error, FA_VALUE,
                           "`%s` must have strides that reach less than 2^60 bytes, got %lld for a "
                           "dimension of %lld",
                           a->name, (long long)a->stride[i], (long long)a->shape[i]);
    }
    if (a->data && (uintptr_t)-below > (uintptr_t)a->data)
        return fa_fail(error, FA_VALUE, "`%s` must have strides that stay above address 0",
                       a->name);
    return FA_OK;
}

fa_status tensor_describe(const DLTensor *t, fa_array *a, fa_error *error) {
    int64_t contiguous = 1, empty = 0, size = (t->dtype.bits + 7) / 8;
    uint64_t bits = 0;
    if (t->ndim < 0 || t->ndim > FA_MAX_RANK)
        return fa_fail(error, FA_VALUE, "`%s` must have at most %d dimensions, got %d", a->name,
                       FA_MAX_RANK, t->ndim);
    if (t->ndim && !t->shape)
        return fa_fail(error, FA_VALUE, "`%s` must have a shape, got a DLPack tensor without one",
                       a->name);
    a->ndim = t->ndim;
    a->dtype = t->dtype;
    for (int32_t i = t->ndim - 1; i >= 0; i--) {
        a->shape[i] = t->shape[i];
        a->stride[i] = t->strides ? t->strides[i] : contiguous;
        if (a->shape[i] < 0)
            return fa_fail(error, FA_VALUE, "`%s` must have sizes >= 0, got %lld", a->name,
                           (long long)a->shape[i]);
        if (!a->shape[i]) empty = 1;
        bits |= (uint64_t)(a->shape[i] | a->stride[i]);
        if (__builtin_mul_overflow(contiguous, a->shape[i], &contiguous))
            return fa_fail(error, FA_VALUE, "`%s` must have fewer than 2^63 elements", a->name);
    }
    switch (t->device.device_type) {
        case DL_CPU:
        case DL_CUDA_HOST:
            a->device_type = FA_CPU, a->device_id = 0;
            break;
        case DL_CUDA:
        case DL_CUDA_MANAGED:
            a->device_type = FA_CUDA, a->device_id = t->device.device_id;
            break;
        default:
            return fa_fail(error, FA_UNSUPPORTED,
                           "`%s` must be on the CPU or a CUDA GPU, got DLPack device type %d",
                           a->name, t->device.device_type);
    }
    if (!t->data && !empty)
        return fa_fail(error, FA_TYPE, "`%s` must have memory, got a tensor without data", a->name);
    a->data = t->data ? (void *)((uintptr_t)t->data + t->byte_offset) : NULL;
    if (size && (uintptr_t)a->data % (uintptr_t)(size > 8 ? 8 : size))
        return fa_fail(error, FA_VALUE, "`%s` must be aligned to its item size of %lld bytes",
                       a->name, (long long)size);
    /* Sizes and strides from 0 to 2^26 - 1, as nearly all are, reach less than 2^60 bytes. */
    return bits >> 26 ? check_reach(a, size, error) : FA_OK;
}

fa_status tensor_borrow(module_state *state, torch_now *now, PyObject *object, const char *name,
                        borrowed *b, fa_error *error) {
    PyTypeObject *type = Py_TYPE(object);
    b->array.name = name;
    b->array.stream = NULL;
    b->array.is_torch = 0;
    b->object = object;
    b->cast = NULL;
    b->writeable = 1;
    b->requires_grad = 0;
    b->versioned = NULL;
    b->unversioned = NULL;
    for (int look = 0; look < 2; look++) {
        PyTypeObject *tensor = __atomic_load_n(&state->tensor, __ATOMIC_ACQUIRE);
        PyTypeObject *ndarray = __atomic_load_n(&state->ndarray, __ATOMIC_ACQUIRE);
        if (tensor && (type == tensor || type == state->parameter))
            return torch_borrow(state, now, object, b, error);
        if (ndarray && type == ndarray) return numpy_borrow(object, b, error);
        if (tensor && PyType_IsSubtype(type, tensor))
            return torch_refuse(state, object, name, error);
        if (ndarray && PyType_IsSubtype(type, ndarray))
            return numpy_borrow_subclass(state, object, b, error);
        if (!look && state_learn(state) < 0) return FA_RAISED;
    }
    return dlpack_borrow(state, object, b, error);
}

/* A deleter may run Python, which must not meet an exception that is set already. One that it
 * leaves behind comes through where the call raises none, or if it is a Ctrl-C. */
void tensor_release(borrowed *b) {
    DLManagedTensorVersioned *versioned = b->versioned;
    DLManagedTensor *unversioned = b->unversioned;
    PyObject *type, *value, *traceback;
    Py_CLEAR(b->cast);
    if (!versioned && !unversioned) return;
    b->versioned = NULL;
    b->unversioned = NULL;
    PyErr_Fetch(&type, &value, &traceback);
    if (versioned && versioned->deleter) versioned->deleter(versioned);
    if (unversioned && unversioned->deleter) unversioned->deleter(unversioned);
    if (type && (!PyErr_Occurred() || PyErr_ExceptionMatches(PyExc_Exception))) {
        PyErr_Restore(type, value, traceback); /* clears the other */
        return;
    }
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(traceback);
}

/* That a framework gave the array that was asked for: writeable, of this shape, strides, dtype and
 * device. */
static fa_status check_new(const borrowed *like, const DLTensor *want, const borrowed *got,
                           fa_error *error) {
    const fa_array *a = &got->array;
    int fits = got->writeable && a->ndim == want->ndim &&
               !memcmp(&a->dtype, &want->dtype, sizeof a->dtype) &&
               a->device_type == (fa_device_type)want->device.device_type &&
               a->device_id == want->device.device_id;
    for (int32_t i = 0; i < want->ndim && fits; i++) {
        fits =
            a->shape[i] == want->shape[i] && (a->shape[i] <= 1 || a->stride[i] == want->strides[i]);
    }
    if (fits) return FA_OK;
    return fa_fail(error, FA_TYPE,
                   "`%s` must come from a framework whose empty() gives the shape, dtype and "
                   "device asked for, contiguous and writeable: pass `out`, or another kind of "
                   "array",
                   like->array.name);
}

static PyObject *tuple_of(int32_t n, const int64_t *numbers) {
    PyObject *tuple = PyTuple_New(n);
    for (int32_t i = 0; i < n && tuple; i++) {
        PyObject *number = PyLong_FromLongLong(numbers[i]);
        if (!number || PyTuple_SetItem(tuple, i, number) < 0) Py_CLEAR(tuple);
    }
    return tuple;
}

/* By the framework's own function for it, which also says why there is none. */
static fa_status new_by_python(module_state *state, const borrowed *like, DLTensor *t, output *out,
                               fa_error *error) {
    char name[32];
    PyObject *shape = tuple_of(t->ndim, t->shape), *strides = tuple_of(t->ndim, t->strides);
    if (shape && strides)
        out->object = state_call(state, "empty", "(OOOsi)", like->object, shape, strides,
                                 fa_dtype_name(t->dtype, name), t->device.device_type == DL_CUDA);
    Py_XDECREF(shape);
    Py_XDECREF(strides);
    if (!out->object) return FA_RAISED;
    if (out->object == Py_None) {
        Py_CLEAR(out->object);
        return dlpack_new(t, out, error);
    }
    torch_now now = {0};
    TRY(tensor_borrow(state, &now, out->object, "the output", &out->memory, error));
    return check_new(like, t, &out->memory, error);
}

fa_status tensor_new(module_state *state, const borrowed *like, int32_t ndim, const int64_t *shape,
                     const int64_t *stride, fa_any_dtype dtype, output *out, fa_error *error) {
    int64_t sizes[FA_MAX_RANK], steps[FA_MAX_RANK], contiguous = 1;
    for (int32_t i = ndim - 1; i >= 0; i--) {
        sizes[i] = shape[i];
        steps[i] = stride ? stride[i] : contiguous;
        if (shape[i]) contiguous *= shape[i];
    }
    const DLDevice device = {(int32_t)like->array.device_type, like->array.device_id};
    DLTensor t = {NULL, device, ndim, dtype, sizes, steps, 0};
    out->memory.array.name = "the output";
    fa_status status = FA_OK;
    if (like->kind == KIND_TABLE && torch_abi_new(&state->abi, &t, &out->object))
        status = tensor_describe(&t, &out->memory.array, error);
    else if (PyErr_Occurred())
        status = FA_RAISED;
    else if (like->kind == KIND_NUMPY)
        status = numpy_new(like, &t, out, error);
    else
        status = new_by_python(state, like, &t, out, error);
    if (status != FA_OK) tensor_drop(out);
    return status;
}

PyObject *tensor_hand_over(module_state *state, const borrowed *like, output *out) {
    PyObject *object = out->object;
    out->object = NULL;
    if (out->capsule) {
        char name[32];
        object = state_call(state, "hand_over", "(OOs)", like->object, out->capsule,
                            fa_dtype_name(out->memory.array.dtype, name));
    }
    tensor_drop(out);
    return object;
}

void tensor_drop(output *out) {
    tensor_release(&out->memory);
    Py_CLEAR(out->object);
    Py_CLEAR(out->capsule);
}
