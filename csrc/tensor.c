/* tensor.c - from Python objects to described arrays, and new arrays of the caller's own kind.
 *
 * Stop 2 of 6. Three ways in, fastest first: DLPack's C exchange table (torch: no reference, no
 * allocation, ~50 ns), NumPy's C API for ndarrays (it also takes what NumPy's own DLPack export
 * refuses: ml_dtypes.bfloat16, read-only arrays), and __dlpack__ for everything else, through
 * fastattn/_arrays.py. No framework is ever imported from here: an array of one is the proof that
 * it is in sys.modules.
 */
#include "tensor.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define NPY_TARGET_VERSION NPY_1_23_API_VERSION
#include <numpy/arrayobject.h>

const char *tensor_text(PyObject *text, size_t size, char *buffer) {
    PyObject *bytes = text ? PyUnicode_AsUTF8String(text) : NULL;
    snprintf(buffer, size, "%s", bytes ? PyBytes_AsString(bytes) : "an object");
    if (!bytes) PyErr_Clear();
    Py_XDECREF(text);
    Py_XDECREF(bytes);
    return buffer;
}

/* The name of an object's type, for a sentence. */
static const char *type_name(PyObject *object, char buffer[128]) {
    PyObject *type = (PyObject *)Py_TYPE(object);
    return tensor_text(PyObject_GetAttrString(type, "__qualname__"), 128, buffer);
}

/* ---- What is loaded ------------------------------------------------------------------------ */

/* Calls a function of fastattn._arrays, which is imported by the first call that needs it. */
static PyObject *call_arrays(module_state *state, const char *function, const char *format, ...) {
    if (!state->arrays) state->arrays = PyImport_ImportModule("fastattn._arrays");
    PyObject *callable = state->arrays ? PyObject_GetAttrString(state->arrays, function) : NULL;
    if (!callable) return NULL;
    va_list values;
    va_start(values, format);
    PyObject *arguments = Py_VaBuildValue(format, values);
    va_end(values);
    PyObject *result = arguments ? PyObject_CallObject(callable, arguments) : NULL;
    Py_XDECREF(arguments);
    Py_DECREF(callable);
    return result;
}

/* The newest table of our major version in a capsule, or NULL. */
static const DLExchangeAPI *exchange_table(PyObject *capsule) {
    if (!PyCapsule_IsValid(capsule, "dlpack_exchange_api")) return NULL;
    DLExchangeHeader *header = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    while (header && header->version.major > DL_MAJOR) header = header->prev_api;
    if (!header || header->version.major != DL_MAJOR) return NULL;
    const DLExchangeAPI *api = (const DLExchangeAPI *)header; /* static in its framework */
    return api->borrow_from_object ? api : NULL;
}

static PyObject *call_is_neg(PyObject *tensor, PyObject *unused) {
    (void)unused;
    return PyObject_CallMethod(tensor, "is_neg", NULL);
}

/* Learns about the frameworks that have been imported since the last look. `tensor` and `ndarray`
 * are set last and say that the rest is there. */
static int learn(module_state *state) {
    PyObject *torch, *ndarray, *tensor, *parameter, *is_neg, *enabled, *forward_ad, *table;
    if (state->tensor && state->ndarray) return 0;
    PyObject *loaded = call_arrays(state, "loaded", "()");
    if (!loaded || !PyArg_ParseTuple(loaded, "OO", &torch, &ndarray)) goto failed;
    if (!state->tensor && torch != Py_None) {
        if (!PyArg_ParseTuple(torch, "OOOOOO", &tensor, &parameter, &is_neg, &enabled, &forward_ad,
                              &table))
            goto failed;
        int is_c = PyCFunction_Check(is_neg) && PyCFunction_GetFlags(is_neg) == METH_NOARGS;
        state->is_neg = is_c ? PyCFunction_GetFunction(is_neg) : call_is_neg;
        state->torch = exchange_table(table);
        state->is_grad_enabled = Py_NewRef(enabled);
        state->forward_ad = Py_NewRef(forward_ad);
        state->parameter = (PyTypeObject *)Py_NewRef(parameter);
        __atomic_store_n(&state->tensor, (PyTypeObject *)Py_NewRef(tensor), __ATOMIC_RELEASE);
    }
    if (!state->ndarray && ndarray != Py_None) {
        if (_import_array() < 0) goto failed;
        __atomic_store_n(&state->ndarray, (PyTypeObject *)Py_NewRef(ndarray), __ATOMIC_RELEASE);
    }
    Py_DECREF(loaded);
    return 0;

failed:
    Py_XDECREF(loaded);
    return -1;
}

int tensor_init(module_state *state) {
    state->requires_grad = PyUnicode_InternFromString("requires_grad");
    state->current_level = PyUnicode_InternFromString("_current_level");
    return state->requires_grad && state->current_level ? 0 : -1;
}

int tensor_traverse(module_state *state, visitproc visit, void *arg) {
    Py_VISIT(state->tensor);
    Py_VISIT(state->parameter);
    Py_VISIT(state->is_grad_enabled);
    Py_VISIT(state->forward_ad);
    Py_VISIT(state->ndarray);
    Py_VISIT(state->arrays);
    return 0;
}

void tensor_clear(module_state *state) {
    Py_CLEAR(state->tensor);
    Py_CLEAR(state->parameter);
    Py_CLEAR(state->is_grad_enabled);
    Py_CLEAR(state->forward_ad);
    Py_CLEAR(state->ndarray);
    Py_CLEAR(state->arrays);
    Py_CLEAR(state->requires_grad);
    Py_CLEAR(state->current_level);
    for (int i = 0; i < FUNCTIONS; i++) {
        Py_CLEAR(state->signatures[i].text);
        Py_CLEAR(state->signatures[i].names);
        Py_CLEAR(state->signatures[i].defaults);
    }
}

/* ---- In ------------------------------------------------------------------------------------ */

/* Copies a DLTensor, whose own arrays live only as long as its producer likes, and checks what a
 * hand-made one may get wrong. */
static fa_status describe(const DLTensor *t, fa_array *a, fa_error *error) {
    int64_t contiguous = 1, empty = 0, size = (t->dtype.bits + 7) / 8;
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
        if (__builtin_mul_overflow(contiguous, a->shape[i], &contiguous))
            return fa_fail(error, FA_VALUE, "`%s` must have fewer than 2^63 elements", a->name);
    }
    switch (t->device.device_type) {
        case DL_CPU:
        case DL_CUDA_HOST:
            a->device = (DLDevice){DL_CPU, 0};
            break;
        case DL_CUDA:
        case DL_CUDA_MANAGED:
            a->device = (DLDevice){DL_CUDA, t->device.device_id};
            break;
        default:
            return fa_fail(error, FA_UNSUPPORTED,
                           "`%s` must be on the CPU or a CUDA GPU, got DLPack device type %d",
                           a->name, t->device.device_type);
    }
    if (!t->data && !empty)
        return fa_fail(error, FA_TYPE, "`%s` must have memory, got a tensor without data", a->name);
    a->data = t->data ? (char *)t->data + t->byte_offset : NULL;
    if (size && (uintptr_t)a->data % (uintptr_t)(size > 8 ? 8 : size))
        return fa_fail(error, FA_VALUE, "`%s` must be aligned to its item size of %lld bytes",
                       a->name, (long long)size);
    return FA_OK;
}

/* What the exchange table and DLPack lose silently: a gradient and the negative bit (the conjugate
 * bit needs a complex dtype, which check.c refuses). */
static fa_status check_torch(module_state *state, PyObject *object, const char *name,
                             fa_error *error) {
    PyObject *requires_grad = PyObject_GetAttr(object, state->requires_grad);
    if (!requires_grad) return FA_RAISED;
    Py_DECREF(requires_grad); /* a bool, immortal or at least kept by the interpreter */
    if (requires_grad == Py_True) {
        PyObject *enabled = PyObject_CallObject(state->is_grad_enabled, NULL);
        if (!enabled) return FA_RAISED;
        Py_DECREF(enabled);
        if (enabled == Py_True)
            return fa_fail(error, FA_UNSUPPORTED,
                           "`%s` requires grad and the backward pass is not built yet: call under "
                           "torch.no_grad() or pass `%s`.detach()",
                           name, name);
    }
    PyObject *neg = state->is_neg(object, NULL);
    if (!neg) return FA_RAISED;
    Py_DECREF(neg);
    if (neg == Py_True)
        return fa_fail(
            error, FA_TYPE,
            "`%s` must not be a lazily negated view (the imaginary part of a conjugate): "
            "pass `%s`.resolve_neg()",
            name, name);
    PyObject *level = PyDict_GetItemWithError(state->forward_ad, state->current_level);
    if (!level || PyLong_AsLong(level) < 0) return PyErr_Occurred() ? FA_RAISED : FA_OK;
    PyObject *dual = call_arrays(state, "has_tangent", "(O)", object);
    if (!dual) return FA_RAISED;
    Py_DECREF(dual);
    if (dual != Py_True) return FA_OK;
    return fa_fail(error, FA_UNSUPPORTED,
                   "`%s` is a dual tensor and forward-mode gradients are not built", name);
}

static fa_status borrow_torch(module_state *state, PyObject *object, borrowed *b, fa_error *error) {
    DLTensor t;
    if (state->torch->borrow_from_object(object, &t) < 0) {
        /* A tensor without strided memory: sparse, meta, or under a functorch transform. */
        char got[128];
        if (!PyErr_ExceptionMatches(PyExc_Exception)) return FA_RAISED;
        PyErr_Clear();
        return fa_fail(error, FA_TYPE,
                       "`%s` must be a strided tensor with memory of its own, got a %s without",
                       b->array.name, type_name(object, got));
    }
    fa_status status = describe(&t, &b->array, error);
    if (status == FA_OK) status = check_torch(state, object, b->array.name, error);
    if (status != FA_OK) return status;
    b->kind = KIND_TABLE;
    if (b->array.device.device_type == DL_CUDA &&
        state->torch->current_stream(DL_CUDA, b->array.device.device_id, &b->array.stream) < 0)
        return FA_RAISED;
    return FA_OK;
}

/* {0, 0, 1} where DLPack has no such dtype. */
static DLDataType numpy_dtype(PyArray_Descr *descr) {
    switch (descr->type_num) {
        case NPY_BOOL:
            return (DLDataType){DL_BOOL, 8, 1};
        case NPY_HALF:
            return (DLDataType){DL_FLOAT, 16, 1};
        case NPY_FLOAT:
            return (DLDataType){DL_FLOAT, 32, 1};
        case NPY_DOUBLE:
            return (DLDataType){DL_FLOAT, 64, 1};
        default:
            break;
    }
    uint8_t bits = (uint8_t)(8 * PyDataType_ELSIZE(descr));
    if (PyTypeNum_ISSIGNED(descr->type_num)) return (DLDataType){DL_INT, bits, 1};
    if (PyTypeNum_ISUNSIGNED(descr->type_num)) return (DLDataType){DL_UINT, bits, 1};
    if (PyTypeNum_ISCOMPLEX(descr->type_num)) return (DLDataType){DL_COMPLEX, bits, 1};
    /* ml_dtypes registers its types as they come: only the name tells them. */
    char name[128] = "";
    PyObject *type = (PyObject *)descr->typeobj;
    if (bits == 16) tensor_text(PyObject_GetAttrString(type, "__name__"), sizeof name, name);
    return strcmp(name, "bfloat16") ? (DLDataType){0, 0, 1} : (DLDataType){DL_BFLOAT, 16, 1};
}

static fa_status borrow_numpy(PyObject *object, borrowed *b, fa_error *error) {
    PyArrayObject *array = (PyArrayObject *)object;
    PyArray_Descr *descr = PyArray_DESCR(array);
    int64_t shape[NPY_MAXDIMS], strides[NPY_MAXDIMS], size = PyDataType_ELSIZE(descr);
    DLTensor t = {PyArray_DATA(array),
                  {DL_CPU, 0},
                  PyArray_NDIM(array),
                  numpy_dtype(descr),
                  shape,
                  strides,
                  0};
    char got[128];
    if (!t.dtype.bits || !PyArray_ISNOTSWAPPED(array))
        return fa_fail(error, FA_TYPE,
                       "`%s` must be float64, float32, float16 or bfloat16 in native byte order, "
                       "got %s",
                       b->array.name,
                       tensor_text(PyObject_Str((PyObject *)descr), sizeof got, got));
    for (int i = 0; i < t.ndim; i++) {
        shape[i] = PyArray_DIM(array, i);
        if (shape[i] > 1 && PyArray_STRIDE(array, i) % size)
            return fa_fail(error, FA_VALUE,
                           "`%s` must have strides that are multiples of its item size of %lld "
                           "bytes, got %lld",
                           b->array.name, (long long)size, (long long)PyArray_STRIDE(array, i));
        strides[i] = PyArray_STRIDE(array, i) / size;
    }
    b->kind = KIND_NUMPY;
    b->writeable = PyArray_ISWRITEABLE(array);
    return describe(&t, &b->array, error);
}

static fa_status borrow_dlpack(module_state *state, PyObject *object, borrowed *b,
                               fa_error *error) {
    char got[128];
    PyObject *pair = call_arrays(state, "export", "(Os)", object, b->array.name), *capsule = NULL;
    unsigned long long stream = 0;
    if (!pair) return FA_RAISED;
    if (!PyArg_ParseTuple(pair, "OK", &capsule, &stream)) {
        Py_DECREF(pair);
        return FA_RAISED;
    }
    b->array.stream = (void *)(uintptr_t)stream;
    b->kind = KIND_DLPACK;
    fa_status status = FA_OK;
    DLTensor *t = NULL;
    if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
        b->versioned = PyCapsule_GetPointer(capsule, "dltensor_versioned");
        PyCapsule_SetName(capsule, "used_dltensor_versioned");
        t = &b->versioned->dl_tensor;
        b->writeable = !(b->versioned->flags & DL_READ_ONLY);
        if (b->versioned->version.major != DL_MAJOR)
            status = fa_fail(
                error, FA_TYPE, "`%s` must speak DLPack %d, got a capsule of version %u.%u",
                b->array.name, DL_MAJOR, b->versioned->version.major, b->versioned->version.minor);
    } else if (PyCapsule_IsValid(capsule, "dltensor")) {
        b->unversioned = PyCapsule_GetPointer(capsule, "dltensor");
        PyCapsule_SetName(capsule, "used_dltensor");
        t = &b->unversioned->dl_tensor;
        b->writeable = 1;
    } else {
        status = fa_fail(error, FA_TYPE, "`%s` must export an unused DLPack capsule, got a %s",
                         b->array.name,
                         PyCapsule_IsValid(capsule, "used_dltensor") ||
                                 PyCapsule_IsValid(capsule, "used_dltensor_versioned")
                             ? "consumed one"
                             : type_name(capsule, got));
    }
    Py_DECREF(pair);
    if (status == FA_OK) status = describe(t, &b->array, error);
    if (status != FA_OK) tensor_release(b);
    return status;
}

fa_status tensor_borrow(module_state *state, PyObject *object, const char *name, borrowed *b,
                        fa_error *error) {
    PyTypeObject *type = Py_TYPE(object);
    char got[128];
    b->array.name = name;
    b->array.stream = NULL;
    b->object = object;
    b->writeable = 1;
    b->versioned = NULL;
    b->unversioned = NULL;
    for (int look = 0; look < 2; look++) {
        PyTypeObject *tensor = __atomic_load_n(&state->tensor, __ATOMIC_ACQUIRE);
        PyTypeObject *ndarray = __atomic_load_n(&state->ndarray, __ATOMIC_ACQUIRE);
        if (tensor && (type == tensor || type == state->parameter)) {
            if (state->torch) return borrow_torch(state, object, b, error);
            fa_status status = check_torch(state, object, name, error);
            return status == FA_OK ? borrow_dlpack(state, object, b, error) : status;
        }
        if (ndarray && type == ndarray) return borrow_numpy(object, b, error);
        if (tensor && PyType_IsSubtype(type, tensor))
            return fa_fail(error, FA_TYPE,
                           "`%s` must be a plain torch.Tensor or Parameter, got its subclass %s",
                           name, type_name(object, got));
        if (ndarray && PyType_IsSubtype(type, ndarray)) {
            PyObject *plain = call_arrays(state, "is_plain_ndarray", "(O)", object);
            if (!plain) return FA_RAISED;
            Py_DECREF(plain);
            if (plain == Py_True) return borrow_numpy(object, b, error);
            return fa_fail(error, FA_TYPE,
                           "`%s` must be a plain numpy.ndarray, got its subclass %s", name,
                           type_name(object, got));
        }
        if (!look && learn(state) < 0) return FA_RAISED;
    }
    return borrow_dlpack(state, object, b, error);
}

void tensor_release(borrowed *b) {
    if (b->versioned && b->versioned->deleter) b->versioned->deleter(b->versioned);
    if (b->unversioned && b->unversioned->deleter) b->unversioned->deleter(b->unversioned);
    b->versioned = NULL;
    b->unversioned = NULL;
}

/* ---- Out ----------------------------------------------------------------------------------- */

static void set_error(void *context, const char *kind, const char *message) {
    (void)context;
    PyErr_SetString(kind && !strcmp(kind, "MemoryError") ? PyExc_MemoryError : PyExc_RuntimeError,
                    message);
}

static fa_status new_torch(module_state *state, DLTensor *prototype, output *out, fa_error *error) {
    DLManagedTensorVersioned *managed = NULL;
    void *object = NULL;
    if (state->torch->allocate(prototype, &managed, NULL, set_error) < 0 || !managed) {
        if (!PyErr_Occurred()) PyErr_NoMemory();
        return FA_RAISED;
    }
    fa_status status = describe(&managed->dl_tensor, &out->memory.array, error);
    if (state->torch->managed_to_object(managed, &object) < 0)
        return FA_RAISED; /* it took managed */
    out->object = object;
    return status;
}

static fa_status new_numpy(const borrowed *like, const DLTensor *t, output *out, fa_error *error) {
    npy_intp shape[FA_MAX_RANK];
    PyArray_Descr *descr;
    for (int32_t i = 0; i < t->ndim; i++) shape[i] = (npy_intp)t->shape[i];
    if (memcmp(&t->dtype, &like->array.dtype, sizeof t->dtype)) {
        descr = PyArray_DescrFromType(NPY_FLOAT);
    } else {
        descr = (PyArray_Descr *)Py_NewRef(PyArray_DESCR((PyArrayObject *)like->object));
    }
    out->object = PyArray_Empty(t->ndim, shape, descr, 0); /* steals descr */
    return out->object ? borrow_numpy(out->object, &out->memory, error) : FA_RAISED;
}

/* A buffer of our own, aligned to the 64 bytes that XLA asks of memory it takes without a copy. */
typedef struct own_buffer {
    DLManagedTensor managed;
    int64_t shape[FA_MAX_RANK], stride[FA_MAX_RANK];
} own_buffer;

static void free_buffer(DLManagedTensor *managed) {
    free(managed->dl_tensor.data);
    free(managed);
}

static void free_capsule(PyObject *capsule) {
    if (PyCapsule_IsValid(capsule, "dltensor"))
        free_buffer(PyCapsule_GetPointer(capsule, "dltensor"));
}

static fa_status new_buffer(const DLTensor *t, output *out, fa_error *error) {
    int64_t elements = 1;
    own_buffer *buffer = calloc(1, sizeof *buffer);
    if (!buffer) return fa_fail(error, FA_MEMORY, "no memory for an output");
    DLTensor *own = &buffer->managed.dl_tensor;
    *own = *t;
    own->shape = buffer->shape, own->strides = buffer->stride;
    for (int32_t i = t->ndim - 1; i >= 0; i--) {
        buffer->shape[i] = t->shape[i], buffer->stride[i] = elements;
        elements *= t->shape[i];
    }
    buffer->managed.deleter = free_buffer;
    size_t bytes = ((size_t)elements * t->dtype.bits / 8 + 63) / 64 * 64;
    own->data = aligned_alloc(64, bytes ? bytes : 64);
    if (!own->data) {
        free(buffer);
        return fa_fail(error, FA_MEMORY, "no memory for an output of %zu bytes", bytes);
    }
    out->capsule = PyCapsule_New(&buffer->managed, "dltensor", free_capsule);
    if (!out->capsule) {
        free_buffer(&buffer->managed);
        return FA_RAISED;
    }
    return describe(own, &out->memory.array, error);
}

fa_status tensor_new(module_state *state, const borrowed *like, int32_t ndim, const int64_t *shape,
                     DLDataType dtype, output *out, fa_error *error) {
    int64_t sizes[FA_MAX_RANK];
    memcpy(sizes, shape, (size_t)ndim * sizeof *shape);
    DLTensor t = {NULL, like->array.device, ndim, dtype, sizes, NULL, 0};
    memset(out, 0, sizeof *out);
    out->memory.array.name = "the output";
    fa_status status;
    if (like->kind == KIND_TABLE) {
        status = new_torch(state, &t, out, error);
    } else if (like->kind == KIND_NUMPY) {
        status = new_numpy(like, &t, out, error);
    } else {
        char name[32];
        PyObject *tuple = PyTuple_New(ndim);
        for (int32_t i = 0; i < ndim && tuple; i++) {
            PyObject *size = PyLong_FromLongLong(shape[i]);
            if (!size || PyTuple_SetItem(tuple, i, size) < 0) Py_CLEAR(tuple);
        }
        if (!tuple) return FA_RAISED;
        out->object =
            call_arrays(state, "empty", "(ONsi)", like->object, tuple, fa_dtype_name(dtype, name),
                        like->array.device.device_type == DL_CUDA);
        if (!out->object) return FA_RAISED;
        if (out->object == Py_None) {
            Py_CLEAR(out->object);
            status = new_buffer(&t, out, error);
        } else {
            status = tensor_borrow(state, out->object, "the output", &out->memory, error);
        }
    }
    if (status != FA_OK) tensor_drop(out);
    return status;
}

PyObject *tensor_hand_over(module_state *state, const borrowed *like, output *out) {
    PyObject *object = out->object;
    out->object = NULL;
    if (out->capsule) object = call_arrays(state, "hand_over", "(OO)", like->object, out->capsule);
    tensor_drop(out);
    return object;
}

void tensor_drop(output *out) {
    tensor_release(&out->memory);
    Py_CLEAR(out->object);
    Py_CLEAR(out->capsule);
}

fa_status tensor_draw_seed(module_state *state, const borrowed *like, output *out,
                           fa_error *error) {
    memset(out, 0, sizeof *out);
    out->object = call_arrays(state, "draw_seed", "(O)", like->object);
    return out->object ? tensor_borrow(state, out->object, "seed", &out->memory, error) : FA_RAISED;
}

fa_status tensor_mark_written(module_state *state, const borrowed *out) {
    PyTypeObject *type = Py_TYPE(out->object);
    if (!state->tensor || (type != state->tensor && type != state->parameter)) return FA_OK;
    PyObject *done = call_arrays(state, "mark_written", "(O)", out->object);
    Py_XDECREF(done);
    return done ? FA_OK : FA_RAISED;
}
