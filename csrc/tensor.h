/* tensor.h - from Python objects to described arrays, and new arrays of the caller's own kind.
 *
 * Stop 2 of 6, with module.c the only files that include Python.h.
 */
#ifndef FASTATTN_TENSOR_H
#define FASTATTN_TENSOR_H

#include <Python.h>

#include "check.h"

/* A Python exception is already set; the only status that is not in the contract. */
#define FA_RAISED ((fa_status) - 1)

enum { MAX_ARGS = 24, FUNCTIONS = 3 };

/* A public function as Python's `def` has it; see function() in module.c. */
typedef struct signature {
    PyMethodDef method;
    PyObject *text, *names, *defaults; /* owned; text holds name and doc of `method` */
    PyObject *name[MAX_ARGS];          /* borrowed from names, interned */
    PyObject *value[MAX_ARGS];         /* borrowed from defaults; NULL: required */
    Py_ssize_t positional, count;
} signature;

/* What the module has learnt about the process so far; one per module object. */
typedef struct module_state {
    PyTypeObject *tensor,
        *parameter;             /* torch.Tensor and torch.nn.Parameter; NULL until torch is there */
    const DLExchangeAPI *torch; /* their exchange table; NULL before torch 2.10 */
    PyObject *is_grad_enabled;  /* torch.is_grad_enabled */
    PyObject *forward_ad;       /* the dict of torch.autograd.forward_ad */
    PyCFunction is_neg; /* the C function of torch.Tensor.is_neg: half the time of a method call */
    PyTypeObject *ndarray;           /* numpy.ndarray; NULL until NumPy is there */
    PyObject *arrays;                /* fastattn._arrays: the frameworks without a C table */
    signature signatures[FUNCTIONS]; /* in the order of module.c's table */
    PyObject *requires_grad, *current_level; /* interned names */
} module_state;

int tensor_init(module_state *state);
int tensor_traverse(module_state *state, visitproc visit, void *arg);
void tensor_clear(module_state *state);

/* Copies a str, which it takes over, into a buffer; "an object" if text is NULL. */
const char *tensor_text(PyObject *text, size_t size, char *buffer);

/* How an array came, and so how its like is made. */
typedef enum array_kind { KIND_TABLE, KIND_NUMPY, KIND_DLPACK } array_kind;

typedef struct borrowed {
    fa_array array;
    array_kind kind;
    PyObject *object; /* the caller's; not owned */
    int writeable;
    DLManagedTensorVersioned *versioned; /* owned where object came by __dlpack__, else NULL */
    DLManagedTensor *unversioned;        /* same */
} borrowed;

/* Describes object; owns nothing after a failure. */
fa_status tensor_borrow(module_state *state, PyObject *object, const char *name, borrowed *out,
                        fa_error *error);
void tensor_release(borrowed *b);

/* An array of the kind of `like`, from its framework's allocator, on its device. */
typedef struct output {
    PyObject *object;  /* owned; NULL for a buffer of our own */
    PyObject *capsule; /* owned: our own buffer, given to `like`'s framework at the end (JAX) */
    borrowed memory;   /* what is written */
} output;

fa_status tensor_new(module_state *state, const borrowed *like, int32_t ndim, const int64_t *shape,
                     DLDataType dtype, output *out, fa_error *error);
/* The finished array as the caller's kind: a new reference, or NULL with an exception. */
PyObject *tensor_hand_over(module_state *state, const borrowed *like, output *out);
void tensor_drop(output *out);

/* A seed for dropout from the generator of torch, on the device of `like`. */
fa_status tensor_draw_seed(module_state *state, const borrowed *like, output *out, fa_error *error);

/* Tells torch that out= was written, so that autograd notices a stale saved tensor. */
fa_status tensor_mark_written(module_state *state, const borrowed *out);

#endif
