/* tensor.h - from Python objects to described arrays, and new arrays of the caller's own kind. */
#ifndef FASTATTN_TENSOR_H
#define FASTATTN_TENSOR_H

#include "state.h"

/* How an array came, and so how its like is made. Of a described one, which has no memory, there is
 * none: such a call is checked and not run. */
typedef enum array_kind { KIND_TABLE, KIND_NUMPY, KIND_DLPACK, KIND_DESCRIBED } array_kind;

typedef struct borrowed {
    fa_array array;
    array_kind kind;
    PyObject *object; /* the caller's, not owned; or `cast` */
    PyObject *cast;   /* owned: what autocast made of the caller's, or NULL */
    int writeable;
    int requires_grad;                   /* and gradients are being taken */
    DLManagedTensorVersioned *versioned; /* owned where object came by __dlpack__, else NULL */
    DLManagedTensor *unversioned;        /* same */
} borrowed;

typedef struct torch_now torch_now; /* internals.h */

/* Describes object; owns nothing after a failure. */
fa_status tensor_borrow(module_state *state, torch_now *now, PyObject *object, const char *name,
                        borrowed *out, fa_error *error);
void tensor_release(borrowed *b);

/* Copies a DLTensor, whose own arrays live only as long as its producer likes, and checks what a
 * hand-made one may get wrong. a has its name already. */
fa_status tensor_describe(const DLTensor *t, fa_array *a, fa_error *error);

/* An array of the kind of `like`, from its framework's allocator, on its device. */
typedef struct output {
    PyObject *object;  /* owned; NULL for a buffer of our own */
    PyObject *capsule; /* owned: our own buffer, given to `like`'s framework at the end */
    borrowed memory;   /* what is written */
} output;

/* stride: of a torch tensor; all others, and all where it is NULL, are contiguous. out: cleared;
 * after a failure too. */
fa_status tensor_new(module_state *state, const borrowed *like, int32_t ndim, const int64_t *shape,
                     const int64_t *stride, fa_any_dtype dtype, output *out, fa_error *error);
/* The finished array as the caller's kind: a new reference, or NULL with an exception. */
PyObject *tensor_hand_over(module_state *state, const borrowed *like, output *out);
void tensor_drop(output *out);

#endif
