/* dlpack.c - arrays of any framework that speaks DLPack, and a buffer of our own for those that
 * take one.
 *
 * By __dlpack__ as fastattn._frameworks calls it: capsules of DLPack 1 and of before. Seen with JAX
 * 0.6 to 0.11, CuPy 14, MLX, Paddle 3.3, torch before 2.10.
 */
#include "internals.h"

#include <stdlib.h>

const DLExchangeAPI *dlpack_table(PyObject *capsule) {
    if (!PyCapsule_IsValid(capsule, "dlpack_exchange_api")) return NULL;
    DLExchangeHeader *header = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    while (header && header->version.major > DL_MAJOR) header = header->prev_api;
    if (!header || header->version.major != DL_MAJOR) return NULL;
    const DLExchangeAPI *api = (const DLExchangeAPI *)header; /* static in its framework */
    return api->borrow_from_object ? api : NULL;
}

/* fastattn.jax's (shape, code, bits) of what has no memory. As if on a GPU, whose memory no check
 * reads. */
static fa_status borrow_described(PyObject *found, borrowed *b, fa_error *error) {
    int64_t shape[FA_MAX_RANK] = {0};
    PyObject *sizes;
    int code, bits;
    b->kind = KIND_DESCRIBED;
    if (!PyArg_ParseTuple(found, "O!ii", &PyTuple_Type, &sizes, &code, &bits)) return FA_RAISED;
    DLTensor t = {FA_TO_COME, {DL_CUDA, 0}, 0, {(uint8_t)code, (uint8_t)bits, 1}, shape, NULL, 0};
    t.ndim = (int32_t)PyTuple_Size(sizes);
    for (int32_t i = 0; i < t.ndim && i < FA_MAX_RANK; i++)
        shape[i] = PyLong_AsLongLong(PyTuple_GetItem(sizes, i));
    return PyErr_Occurred() ? FA_RAISED : tensor_describe(&t, &b->array, error);
}

fa_status dlpack_borrow(module_state *state, PyObject *object, borrowed *b, fa_error *error) {
    char got[128];
    PyObject *found = state_call(state, "export", "(Os)", object, b->array.name), *capsule = NULL;
    unsigned long long stream = 0;
    int cpu;
    if (!found) return FA_RAISED;
    if (PyUnicode_Check(found)) { /* a stand-in for one, of torch.fx; or JAX's own call */
        const int to_jax = PyUnicode_CompareWithASCIIString(found, "jax") == 0;
        Py_DECREF(found);
        return to_jax ? FA_TO_JAX : FA_TO_GRAPH;
    }
    if (PyTuple_Check(found) && PyTuple_Check(PyTuple_GetItem(found, 0))) {
        fa_status described = borrow_described(found, b, error);
        Py_DECREF(found);
        return described;
    }
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
                             : state_type_name(capsule, got));
    }
    Py_DECREF(found);
    if (status == FA_OK) status = tensor_describe(t, &b->array, error);
    if (status == FA_OK && b->array.device_type == FA_CPU) b->array.device_id = cpu;
    if (status != FA_OK) tensor_release(b);
    return status;
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

fa_status dlpack_new(const DLTensor *t, output *out, fa_error *error) {
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
    return tensor_describe(own, &out->memory.array, error);
}
