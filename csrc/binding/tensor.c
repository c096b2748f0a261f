/* tensor.c - from Python objects to described arrays, and new arrays of the caller's own kind.
 *
 * Stop 2 of 6. Three ways in, fastest first: torch's own C functions, or where they do not serve
 * DLPack's C exchange table (no reference, no allocation, 60 ns), NumPy's C API for ndarrays (it
 * also takes what NumPy's own DLPack export refuses: ml_dtypes.bfloat16, read-only arrays), and
 * __dlpack__ for everything else, through fastattn/_arrays.py. No framework is ever imported from
 * here: an array of one is the proof that it is in sys.modules.
 */
#include "tensor.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define NPY_TARGET_VERSION NPY_1_23_API_VERSION
#include <numpy/arrayobject.h>

const char *tensor_text(PyObject *text, size_t size, char *buffer) {
    PyObject *bytes = text ? PyUnicode_AsUTF8String(text) : NULL;
    snprintf(buffer, size, "%s", bytes ? PyBytes_AsString(bytes) : "an object");
    /* A sentence without a name is good enough, but no Ctrl-C is lost: raise_status() keeps it. */
    if (!bytes && PyErr_ExceptionMatches(PyExc_Exception)) PyErr_Clear();
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

/* torch's functions by name, from the libraries that it has loaded. `sample` is any tensor, `impl`
 * what torch's own tensor._cdata says of it. */
static torch_c find_torch_c(PyObject *sample, uintptr_t impl) {
    torch_c c = {0};
    void *library = dlopen("libtorch_python.so", RTLD_LAZY | RTLD_NOLOAD);
    const struct {
        void *function;
        const char *name;
    } wanted[] = {
        {&c.is_neg, "_ZN2at6native6is_negERKNS_6TensorE"},
        {&c.requires_grad, "_ZNK3c1010TensorImpl13requires_gradEv"},
        {&c.dispatch_modes, "_ZN3c104impl20TorchDispatchModeTLS9stack_lenEv"},
        {&c.function_modes, "_ZN2at4impl22PythonTorchFunctionTLS9stack_lenEv"},
        {&c.tracing_state, "_ZN5torch3jit6tracer15getTracingStateEv"},
        {&c.autocast_is_enabled, "_ZN2at8autocast19is_autocast_enabledEN3c1010DeviceTypeE"},
        {&c.autocast_dtype, "_ZN2at8autocast18get_autocast_dtypeEN3c1010DeviceTypeE"},
        {&c.grad_mode_is_enabled, "aoti_torch_grad_mode_is_enabled"},
        {&c.empty_strided, "aoti_torch_empty_strided"},
        {&c.get_data_ptr, "aoti_torch_get_data_ptr"},
        {&c.get_dim, "aoti_torch_get_dim"},
        {&c.get_sizes, "aoti_torch_get_sizes"},
        {&c.get_strides, "aoti_torch_get_strides"},
        {&c.get_dtype, "aoti_torch_get_dtype"},
        {&c.get_device_type, "aoti_torch_get_device_type"},
        {&c.get_device_index, "aoti_torch_get_device_index"},
        {&c.get_layout, "aoti_torch_get_layout"},
        {&c.delete_tensor, "aoti_torch_delete_tensor_object"},
        {&c.wrap, "_Z16THPVariable_WrapRKN2at10TensorBaseE"},
    };
    if (!library || !impl) return c;
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        void *found = dlsym(library, wanted[i].name);
        if (!found) return (torch_c){0};
        memcpy(wanted[i].function, &found, sizeof found);
    }
    /* Behind the object's head, or behind a flag after it, as torch had it before 2.10. */
    for (size_t word = 0; word < 2 && !c.offset; word++) {
        size_t offset = sizeof(PyObject) + word * sizeof impl;
        if (!memcmp((char *)sample + offset, &impl, sizeof impl)) c.offset = (Py_ssize_t)offset;
    }
    return c.offset ? c : (torch_c){0}; /* the library stays referenced, as the functions are */
}

/* Learns about the frameworks that have been imported since the last look. `tensor` and `ndarray`
 * are set last and say that the rest is there. */
static int learn(module_state *state) {
    PyObject *torch, *ndarray, *tensor, *parameter, *is_neg, *enabled, *forward_ad, *table, *impl;
    if (state->tensor && state->ndarray) return 0;
    PyObject *loaded = call_arrays(state, "loaded", "()");
    if (!loaded || !PyArg_ParseTuple(loaded, "OO", &torch, &ndarray)) goto failed;
    if (!state->tensor && torch != Py_None) {
        if (!PyArg_ParseTuple(torch, "OOOOOOO", &tensor, &parameter, &is_neg, &enabled, &forward_ad,
                              &table, &impl))
            goto failed;
        int is_c = PyCFunction_Check(is_neg) && PyCFunction_GetFlags(is_neg) == METH_NOARGS;
        state->is_neg = is_c ? PyCFunction_GetFunction(is_neg) : call_is_neg;
        state->torch = exchange_table(table);
        if (is_c)
            state->c = find_torch_c(PyCFunction_GetSelf(is_neg), (uintptr_t)PyLong_AsVoidPtr(impl));
        if (PyErr_Occurred()) goto failed;
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
    Py_VISIT(state->value_error);
    Py_VISIT(state->type_error);
    return 0;
}

void tensor_clear(module_state *state) {
    Py_CLEAR(state->tensor);
    Py_CLEAR(state->parameter);
    Py_CLEAR(state->is_grad_enabled);
    Py_CLEAR(state->forward_ad);
    Py_CLEAR(state->ndarray);
    Py_CLEAR(state->arrays);
    Py_CLEAR(state->value_error);
    Py_CLEAR(state->type_error);
    Py_CLEAR(state->requires_grad);
    Py_CLEAR(state->current_level);
    for (int i = 0; i < FUNCTIONS; i++) {
        Py_CLEAR(state->signatures[i].text);
        Py_CLEAR(state->signatures[i].names);
        Py_CLEAR(state->signatures[i].defaults);
    }
}

/* ---- In ------------------------------------------------------------------------------------ */

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

/* Copies a DLTensor, whose own arrays live only as long as its producer likes, and checks what a
 * hand-made one may get wrong. */
static fa_status describe(const DLTensor *t, fa_array *a, fa_error *error) {
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
    a->data = t->data ? (void *)((uintptr_t)t->data + t->byte_offset) : NULL;
    if (size && (uintptr_t)a->data % (uintptr_t)(size > 8 ? 8 : size))
        return fa_fail(error, FA_VALUE, "`%s` must be aligned to its item size of %lld bytes",
                       a->name, (long long)size);
    /* Sizes and strides from 0 to 2^26 - 1, as nearly all are, reach less than 2^60 bytes. */
    return bits >> 26 ? check_reach(a, size, error) : FA_OK;
}

/* Refuses a tensor that is not what it seems to be, or whose operators are being recorded, by a
 * sentence of fastattn._arrays. The one place that gives way to operators of torch. */
static fa_status refuse_torch(module_state *state, PyObject *object, const char *name,
                              fa_error *error) {
    PyObject *refusal = call_arrays(state, "refusal", "(O)", object), *sentence;
    int later;
    if (!refusal) return FA_RAISED;
    fa_status status = FA_OK;
    if (refusal != Py_None) {
        char text[384];
        status = PyArg_ParseTuple(refusal, "pO", &later, &sentence) ? FA_OK : FA_RAISED;
        if (status == FA_OK)
            status = fa_fail(error, later ? FA_UNSUPPORTED : FA_TYPE, "`%s` %s", name,
                             tensor_text(Py_NewRef(sentence), sizeof text, text));
    }
    Py_DECREF(refusal);
    return status;
}

static fa_status ask_torch(module_state *state, torch_now *now) {
    const torch_c *c = &state->c;
    if (c->offset) {
        now->grad_enabled = c->grad_mode_is_enabled();
        now->dispatch_modes = c->dispatch_modes() > 0;
        now->is_seen = now->dispatch_modes || c->function_modes() || *c->tracing_state();
    } else {
        PyObject *enabled = PyObject_CallObject(state->is_grad_enabled, NULL);
        if (!enabled) return FA_RAISED;
        Py_DECREF(enabled);
        now->grad_enabled = enabled == Py_True;
        now->is_seen = 1; /* fastattn._arrays will know */
    }
    PyObject *level = PyDict_GetItemWithError(state->forward_ad, state->current_level);
    now->dual_level = level && PyLong_AsLong(level) >= 0;
    if (PyErr_Occurred()) return FA_RAISED;
    now->asked = 1;
    return FA_OK;
}

static fa_status ask_tensor(module_state *state, const torch_now *now, PyObject *object,
                            int *requires_grad, int *neg) {
    *requires_grad = 0;
    if (state->c.offset) {
        const void *tensor = (const char *)object + state->c.offset, *impl;
        memcpy(&impl, tensor, sizeof impl);
        if (now->grad_enabled) *requires_grad = state->c.requires_grad(impl);
        *neg = state->c.is_neg(tensor);
        return FA_OK;
    }
    PyObject *answer;
    if (now->grad_enabled) {
        if (!(answer = PyObject_GetAttr(object, state->requires_grad))) return FA_RAISED;
        Py_DECREF(answer); /* a bool, immortal or at least kept by the interpreter */
        *requires_grad = answer == Py_True;
    }
    if (!(answer = state->is_neg(object, NULL))) return FA_RAISED;
    Py_DECREF(answer);
    *neg = answer == Py_True;
    return FA_OK;
}

/* What the exchange table and DLPack lose silently: a gradient and the negative bit (the conjugate
 * bit needs a complex dtype, which check.c refuses). */
static fa_status check_torch(module_state *state, torch_now *now, PyObject *object,
                             const char *name, fa_error *error) {
    if (!now->asked) {
        TRY(ask_torch(state, now));
        if (now->is_seen) TRY(refuse_torch(state, object, name, error));
    }
    int requires_grad, neg;
    TRY(ask_tensor(state, now, object, &requires_grad, &neg));
    if (requires_grad)
        return fa_fail(error, FA_UNSUPPORTED,
                       "`%s` requires grad and the backward pass is not built yet: call under "
                       "torch.no_grad() where no gradient is wanted",
                       name);
    if (neg)
        return fa_fail(
            error, FA_TYPE,
            "`%s` must not be a lazily negated view (the imaginary part of a conjugate): "
            "pass `%s`.resolve_neg()",
            name, name);
    if (!now->dual_level) return FA_OK;
    PyObject *dual = call_arrays(state, "has_tangent", "(O)", object);
    if (!dual) return FA_RAISED;
    Py_DECREF(dual);
    if (dual != Py_True) return FA_OK;
    return fa_fail(error, FA_UNSUPPORTED,
                   "`%s` is a dual tensor and forward-mode gradients are not built", name);
}

/* torch's current stream is one per device, and a call has one device. */
static fa_status find_stream(module_state *state, torch_now *now, fa_array *a) {
    if (!now->has_stream || now->device_id != a->device.device_id) {
        if (state->torch->current_stream(DL_CUDA, a->device.device_id, &now->stream) < 0)
            return FA_RAISED;
        now->device_id = a->device.device_id;
        now->has_stream = 1;
    }
    a->stream = now->stream;
    return FA_OK;
}

/* torch's numbers of dtypes, which its saved files keep. */
static const struct {
    DLDataType dtype;
    int32_t number;
} torch_dtypes[] = {{{DL_BFLOAT, 16, 1}, 15}, {{DL_FLOAT, 16, 1}, 5}, {{DL_FLOAT, 32, 1}, 6},
                    {{DL_FLOAT, 64, 1}, 7},   {{DL_BOOL, 8, 1}, 11},  {{DL_INT, 32, 1}, 3},
                    {{DL_UINT, 8, 1}, 0}};

/* -1 where there is none. */
static int32_t torch_number(DLDataType dtype) {
    for (size_t i = 0; i < sizeof torch_dtypes / sizeof *torch_dtypes; i++)
        if (!memcmp(&dtype, &torch_dtypes[i].dtype, sizeof dtype)) return torch_dtypes[i].number;
    return -1;
}

/* What the exchange table says of a strided tensor in CPU or CUDA memory, of a dtype above, in half
 * the time; 0 for all others. Shape and strides are the tensor's own. */
static int view_by_torch_c(const torch_c *c, PyObject *object, DLTensor *t) {
    const void *tensor = (const char *)object + c->offset;
    int32_t layout, dtype, type, id = 0;
    int64_t ndim;
    if (!c->offset || c->get_layout(tensor, &layout) || layout != 0 ||
        c->get_device_type(tensor, &type) || (type != 0 && type != 1) ||
        c->get_dtype(tensor, &dtype) || (type && c->get_device_index(tensor, &id)) ||
        c->get_dim(tensor, &ndim) || c->get_sizes(tensor, &t->shape) ||
        c->get_strides(tensor, &t->strides) || c->get_data_ptr(tensor, &t->data))
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

static fa_status borrow_torch(module_state *state, torch_now *now, PyObject *object, borrowed *b,
                              fa_error *error) {
    DLTensor t;
    if (!view_by_torch_c(&state->c, object, &t) &&
        state->torch->borrow_from_object(object, &t) < 0) {
        /* A tensor without strided memory: sparse, meta, or under a functorch transform. */
        if (!PyErr_ExceptionMatches(PyExc_Exception)) return FA_RAISED;
        PyErr_Clear();
        TRY(refuse_torch(state, object, b->array.name, error));
        return fa_fail(error, FA_TYPE,
                       "`%s` must be a strided tensor with memory of its own, got one without",
                       b->array.name);
    }
    if (!t.data) TRY(refuse_torch(state, object, b->array.name, error)); /* or it is empty */
    fa_status status = describe(&t, &b->array, error);
    if (status == FA_OK) status = check_torch(state, now, object, b->array.name, error);
    if (status != FA_OK) return status;
    b->kind = now->dispatch_modes ? KIND_DLPACK : KIND_TABLE;
    return b->array.device.device_type == DL_CUDA ? find_stream(state, now, &b->array) : FA_OK;
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
                       "`%s` must hold float64, float32, float16 or bfloat16, integers or bools, "
                       "in native byte order, got %s",
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
    PyObject *found = call_arrays(state, "export", "(Os)", object, b->array.name), *capsule = NULL;
    unsigned long long stream = 0;
    int cpu;
    if (!found) return FA_RAISED;
    if (!PyArg_ParseTuple(found, "OKi", &capsule, &stream, &cpu)) {
        Py_DECREF(found);
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
    Py_DECREF(found);
    if (status == FA_OK) status = describe(t, &b->array, error);
    if (b->array.device.device_type == DL_CPU) b->array.device.device_id = cpu;
    if (status != FA_OK) tensor_release(b);
    return status;
}

fa_status tensor_borrow(module_state *state, torch_now *now, PyObject *object, const char *name,
                        borrowed *b, fa_error *error) {
    PyTypeObject *type = Py_TYPE(object);
    char got[128];
    b->array.name = name;
    b->array.stream = NULL;
    b->array.is_torch = 0;
    b->object = object;
    b->cast = NULL;
    b->writeable = 1;
    b->versioned = NULL;
    b->unversioned = NULL;
    for (int look = 0; look < 2; look++) {
        PyTypeObject *tensor = __atomic_load_n(&state->tensor, __ATOMIC_ACQUIRE);
        PyTypeObject *ndarray = __atomic_load_n(&state->ndarray, __ATOMIC_ACQUIRE);
        if (tensor && (type == tensor || type == state->parameter)) {
            b->array.is_torch = 1;
            if (state->torch) return borrow_torch(state, now, object, b, error);
            fa_status status = check_torch(state, now, object, name, error);
            return status == FA_OK ? borrow_dlpack(state, object, b, error) : status;
        }
        if (ndarray && type == ndarray) return borrow_numpy(object, b, error);
        if (tensor && PyType_IsSubtype(type, tensor))
            return refuse_torch(state, object, name, error);
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

fa_status tensor_autocast(module_state *state, torch_now *now, borrowed *b, fa_error *error) {
    const fa_array *a = &b->array;
    PyTypeObject *type = Py_TYPE(b->object);
    if ((type != state->tensor && type != state->parameter) || a->dtype.code == DL_BOOL)
        return FA_OK;
    if (state->c.offset) {
        const int8_t device = a->device.device_type == DL_CUDA;
        if (now->autocast_device != device + 1) {
            const bool enabled = state->c.autocast_is_enabled(device);
            now->autocast_device = device + 1;
            now->autocast_dtype = enabled ? state->c.autocast_dtype(device) : -1;
        }
        if (now->autocast_dtype < 0 || now->autocast_dtype == torch_number(a->dtype)) return FA_OK;
    }
    PyObject *cast = call_arrays(state, "autocast", "(O)", b->object);
    if (!cast || cast == b->object) {
        Py_XDECREF(cast);
        return cast ? FA_OK : FA_RAISED;
    }
    tensor_release(b);
    fa_status status = tensor_borrow(state, now, cast, a->name, b, error);
    b->cast = cast;
    return status;
}

int tensor_truth(module_state *state, PyObject *object) {
    PyObject *answer = call_arrays(state, "truth", "(O)", object);
    Py_XDECREF(answer); /* a bool or None, kept by the interpreter */
    return !answer ? -2 : answer == Py_None ? -1 : answer == Py_True;
}

int tensor_is_number(module_state *state, PyObject *object) {
    if (!state->tensor && learn(state) < 0) return -1;
    if (!state->tensor || !PyType_IsSubtype(Py_TYPE(object), state->tensor)) return 1;
    PyObject *answer = call_arrays(state, "is_number", "(O)", object);
    Py_XDECREF(answer); /* a bool, kept by the interpreter */
    return answer ? answer == Py_True : -1;
}

fa_status tensor_causal_bias(module_state *state, PyObject *object, int *is_one, int *top_left,
                             int64_t *sq, int64_t *sk) {
    PyTypeObject *type = Py_TYPE(object);
    long long rows, keys;
    *is_one = 0;
    if (!state->tensor || type == state->tensor || !PyType_IsSubtype(type, state->tensor))
        return FA_OK;
    PyObject *found = call_arrays(state, "causal_bias", "(O)", object);
    *is_one = found && found != Py_None;
    fa_status status = found ? FA_OK : FA_RAISED;
    if (*is_one && !PyArg_ParseTuple(found, "pLL", top_left, &rows, &keys)) status = FA_RAISED;
    if (*is_one && status == FA_OK) *sq = rows, *sk = keys;
    Py_XDECREF(found);
    return status;
}

/* ---- Out ----------------------------------------------------------------------------------- */

/* 0 where torch refuses; it does not say why. */
static int new_by_torch_c(const torch_c *c, DLTensor *t, PyObject **object) {
    const int on_gpu = t->device.device_type == DL_CUDA;
    const int32_t dtype = torch_number(t->dtype);
    void *tensor;
    if (!c->empty_strided || dtype < 0 ||
        c->empty_strided(t->ndim, t->shape, t->strides, dtype, on_gpu,
                         on_gpu ? t->device.device_id : -1, &tensor))
        return 0;
    *object = c->get_data_ptr(tensor, &t->data) ? NULL : c->wrap(tensor);
    c->delete_tensor(tensor);
    return *object != NULL;
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
    buffer->managed.manager_ctx = buffer; /* Paddle 3.3 calls no deleter where this is NULL */
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

/* That a framework gave the array that was asked for: writeable, of this shape, strides, dtype and
 * device. */
static fa_status check_new(const borrowed *like, const DLTensor *want, const borrowed *got,
                           fa_error *error) {
    const fa_array *a = &got->array;
    int fits = got->writeable && a->ndim == want->ndim &&
               !memcmp(&a->dtype, &want->dtype, sizeof a->dtype) &&
               !memcmp(&a->device, &want->device, sizeof a->device);
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
        out->object = call_arrays(state, "empty", "(OOOsi)", like->object, shape, strides,
                                  fa_dtype_name(t->dtype, name), t->device.device_type == DL_CUDA);
    Py_XDECREF(shape);
    Py_XDECREF(strides);
    if (!out->object) return FA_RAISED;
    if (out->object == Py_None) {
        Py_CLEAR(out->object);
        return new_buffer(t, out, error);
    }
    torch_now now = {0};
    TRY(tensor_borrow(state, &now, out->object, "the output", &out->memory, error));
    return check_new(like, t, &out->memory, error);
}

fa_status tensor_new(module_state *state, const borrowed *like, int32_t ndim, const int64_t *shape,
                     const int64_t *stride, DLDataType dtype, output *out, fa_error *error) {
    int64_t sizes[FA_MAX_RANK], steps[FA_MAX_RANK], contiguous = 1;
    for (int32_t i = ndim - 1; i >= 0; i--) {
        sizes[i] = shape[i];
        steps[i] = stride ? stride[i] : contiguous;
        if (shape[i]) contiguous *= shape[i];
    }
    DLTensor t = {NULL, like->array.device, ndim, dtype, sizes, steps, 0};
    out->memory.array.name = "the output";
    fa_status status = FA_OK;
    if (like->kind == KIND_TABLE && new_by_torch_c(&state->c, &t, &out->object))
        status = describe(&t, &out->memory.array, error);
    else if (PyErr_Occurred())
        status = FA_RAISED;
    else if (like->kind == KIND_NUMPY)
        status = new_numpy(like, &t, out, error);
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
        object = call_arrays(state, "hand_over", "(OOs)", like->object, out->capsule,
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

fa_status tensor_draw_seed(module_state *state, const borrowed *like, output *out,
                           fa_error *error) {
    memset(out, 0, sizeof *out);
    out->object = call_arrays(state, "draw_seed", "(O)", like->object);
    if (!out->object) return FA_RAISED;
    torch_now now = {0};
    return tensor_borrow(state, &now, out->object, "seed", &out->memory, error);
}

fa_status tensor_check_writable(module_state *state, const borrowed *out, fa_error *error) {
    PyTypeObject *type = Py_TYPE(out->object);
    if (!state->tensor || (type != state->tensor && type != state->parameter)) return FA_OK;
    PyObject *frozen = call_arrays(state, "is_frozen", "(O)", out->object);
    Py_XDECREF(frozen); /* a bool, kept by the interpreter */
    if (!frozen) return FA_RAISED;
    if (frozen != Py_True) return FA_OK;
    return fa_fail(error, FA_VALUE,
                   "`%s` must not be an inference tensor outside of torch.inference_mode(): pass "
                   "its clone()",
                   out->array.name);
}

fa_status tensor_mark_written(module_state *state, const borrowed *out) {
    PyTypeObject *type = Py_TYPE(out->object);
    if (!state->tensor || (type != state->tensor && type != state->parameter)) return FA_OK;
    PyObject *done = call_arrays(state, "mark_written", "(O)", out->object);
    Py_XDECREF(done);
    return done ? FA_OK : FA_RAISED;
}
