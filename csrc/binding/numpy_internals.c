/* numpy_internals.c - ndarrays, by NumPy's C API: the only file that includes it.
 *
 * Built against NumPy 2, seen with 1.23 to 2.5. Faster than NumPy's own DLPack export, and takes
 * what that refuses: ml_dtypes.bfloat16, read-only arrays. The API is loaded with the first
 * ndarray that arrives.
 */
#include "internals.h"

#include <string.h>

#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define NPY_TARGET_VERSION NPY_1_23_API_VERSION
#include <numpy/arrayobject.h>

int numpy_learn(module_state *state, PyObject *ndarray) {
    if (_import_array() < 0) return 0;
    __atomic_store_n(&state->ndarray, (PyTypeObject *)Py_NewRef(ndarray), __ATOMIC_RELEASE);
    return 1;
}

/* {0, 0, 1} where DLPack has no such dtype. */
static fa_any_dtype numpy_dtype(PyArray_Descr *descr) {
    switch (descr->type_num) {
        case NPY_BOOL:
            return (fa_any_dtype){FA_CODE_BOOL, 8, 1};
        case NPY_HALF:
            return (fa_any_dtype){FA_CODE_FLOAT, 16, 1};
        case NPY_FLOAT:
            return (fa_any_dtype){FA_CODE_FLOAT, 32, 1};
        case NPY_DOUBLE:
            return (fa_any_dtype){FA_CODE_FLOAT, 64, 1};
        default:
            break;
    }
    uint8_t bits = (uint8_t)(8 * PyDataType_ELSIZE(descr));
    if (PyTypeNum_ISSIGNED(descr->type_num)) return (fa_any_dtype){FA_CODE_INT, bits, 1};
    if (PyTypeNum_ISUNSIGNED(descr->type_num)) return (fa_any_dtype){FA_CODE_UINT, bits, 1};
    if (PyTypeNum_ISCOMPLEX(descr->type_num)) return (fa_any_dtype){FA_CODE_COMPLEX, bits, 1};
    /* ml_dtypes registers its types as they come: only the name tells them. */
    char name[128] = "";
    PyObject *type = (PyObject *)descr->typeobj;
    if (bits == 16) state_text(PyObject_GetAttrString(type, "__name__"), sizeof name, name);
    return strcmp(name, "bfloat16") ? (fa_any_dtype){0, 0, 1}
                                    : (fa_any_dtype){FA_CODE_BFLOAT, 16, 1};
}

fa_status numpy_borrow(PyObject *object, borrowed *b, fa_error *error) {
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
                       b->array.name, state_text(PyObject_Str((PyObject *)descr), sizeof got, got));
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
    return tensor_describe(&t, &b->array, error);
}

fa_status numpy_borrow_subclass(module_state *state, PyObject *object, borrowed *b,
                                fa_error *error) {
    char got[128];
    PyObject *plain = state_call(state, "is_plain_ndarray", "(O)", object);
    if (!plain) return FA_RAISED;
    Py_DECREF(plain);
    if (plain == Py_True) return numpy_borrow(object, b, error);
    return fa_fail(error, FA_TYPE, "`%s` must be a plain numpy.ndarray, got its subclass %s",
                   b->array.name, state_type_name(object, got));
}

fa_status numpy_new(const borrowed *like, const DLTensor *t, output *out, fa_error *error) {
    npy_intp shape[FA_MAX_RANK];
    PyArray_Descr *descr;
    for (int32_t i = 0; i < t->ndim; i++) shape[i] = (npy_intp)t->shape[i];
    if (memcmp(&t->dtype, &like->array.dtype, sizeof t->dtype)) {
        /* lse, which float64 arrays have in their own dtype, and the like; lists of keys */
        descr = PyArray_DescrFromType(t->dtype.code == FA_CODE_INT ? NPY_INT32 : NPY_FLOAT);
    } else {
        descr = (PyArray_Descr *)Py_NewRef(PyArray_DESCR((PyArrayObject *)like->object));
    }
    out->object = PyArray_Empty(t->ndim, shape, descr, 0); /* steals descr */
    return out->object ? numpy_borrow(out->object, &out->memory, error) : FA_RAISED;
}

int numpy_truth(module_state *state, PyObject *object) {
    PyObject *answer = state_call(state, "truth", "(O)", object);
    Py_XDECREF(answer); /* a bool or None, kept by the interpreter */
    return !answer ? -2 : answer == Py_None ? -1 : answer == Py_True;
}
