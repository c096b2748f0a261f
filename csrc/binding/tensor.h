/* tensor.h - from Python objects to described arrays, and new arrays of the caller's own kind.
 *
 * Stop 2 of 6, with module.c the only files that include Python.h.
 */
#ifndef FASTATTN_TENSOR_H
#define FASTATTN_TENSOR_H

#include <Python.h>
#include <stdbool.h>

#include "check.h"

/* A Python exception is already set; the only status that is not in the contract. */
#define FA_RAISED ((fa_status) - 1)

enum { MAX_ARGS = 25, FUNCTIONS = 3 };

/* A public function as Python's `def` has it; see function() in module.c. */
typedef struct signature {
    PyMethodDef method;
    PyObject *text, *names, *defaults; /* owned; text holds name and doc of `method` */
    PyObject *name[MAX_ARGS];          /* borrowed from names, interned */
    PyObject *value[MAX_ARGS];         /* borrowed from defaults; NULL: required */
    Py_ssize_t positional, count;
} signature;

/* Functions of torch that are called without Python. aoti_torch_* are its C interface for compiled
 * models, which stays as it is between versions; the others are C++ functions of simple types.
 * Tensors are at::Tensor by reference, so pointers; a Python tensor holds its own where the address
 * that torch tells of a sample stands. Against the ways through Python and the exchange table:
 * - requires_grad and is_neg take 3 ns instead of 50 and 75 (the method lets other threads in)
 * - a description of a tensor takes half the time of the table's
 * - so does a new tensor, and its memory is torch's: record_stream() does nothing on the table's,
 *   which is a view of memory that something else holds */
typedef struct torch_c {
    Py_ssize_t offset; /* of the at::Tensor in a Python tensor; 0: not found */
    bool (*is_neg)(const void *tensor);
    bool (*requires_grad)(const void *impl); /* what an at::Tensor points to */
    bool (*grad_mode_is_enabled)(void);
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
} torch_c;

/* What the module has learnt about the process so far; one per module object. */
typedef struct module_state {
    PyTypeObject *tensor,
        *parameter;             /* torch.Tensor and torch.nn.Parameter; NULL until torch is there */
    const DLExchangeAPI *torch; /* their exchange table; NULL before torch 2.10 */
    PyObject *is_grad_enabled;  /* torch.is_grad_enabled */
    PyObject *forward_ad;       /* the dict of torch.autograd.forward_ad */
    PyCFunction is_neg; /* the C function of torch.Tensor.is_neg: half the time of a method call */
    torch_c c;          /* all 0 where this torch lacks one of them */
    PyTypeObject *ndarray;           /* numpy.ndarray; NULL until NumPy is there */
    PyObject *arrays;                /* fastattn._arrays: the frameworks without a C table */
    signature signatures[FUNCTIONS]; /* in the order of module.c's table */
    PyObject *requires_grad, *current_level; /* interned names */
    PyObject *value_error, *type_error; /* the drop-in's, each a RuntimeError too, as torch's */
    int warned;                         /* of the environment, if there was a reason */
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
    PyObject *object; /* the caller's, not owned; or `cast` */
    PyObject *cast;   /* owned: what autocast made of the caller's, or NULL */
    int writeable;
    DLManagedTensorVersioned *versioned; /* owned where object came by __dlpack__, else NULL */
    DLManagedTensor *unversioned;        /* same */
} borrowed;

/* What one call has asked torch so far; the answers hold for all its tensors. */
typedef struct torch_now {
    int asked;          /* whether the next four are set */
    int grad_enabled;   /* torch.is_grad_enabled() */
    int dual_level;     /* whether forward-mode gradients are being taken */
    int dispatch_modes; /* whether modes see torch's operators: then one makes the outputs */
    int is_seen;        /* whether anything does, and so may record them */
    int has_stream;     /* whether the next two are set */
    int32_t device_id;
    void *stream;            /* current on that device */
    int32_t autocast_device; /* 1 + torch's number of the device type that was asked for; 0: none */
    int32_t autocast_dtype;  /* torch's number; -1: no autocast there */
} torch_now;

/* Describes object; owns nothing after a failure. */
fa_status tensor_borrow(module_state *state, torch_now *now, PyObject *object, const char *name,
                        borrowed *out, fa_error *error);
void tensor_release(borrowed *b);

/* Inside an autocast region of its device a torch tensor becomes what torch's own operators would
 * make of it. */
fa_status tensor_autocast(module_state *state, torch_now *now, borrowed *b, fa_error *error);

/* 1 or 0 for a bool of NumPy's, -1 for any other object, -2 with an exception. */
int tensor_truth(module_state *state, PyObject *object);

/* Whether object may stand for a float, as far as torch goes: 0 for a tensor that has a gradient or
 * dimensions, as torch has it; -1 with an exception. */
int tensor_is_number(module_state *state, PyObject *object);

/* Where `object` is torch's CausalBias: *is_one is set, with what the mask means. */
fa_status tensor_causal_bias(module_state *state, PyObject *object, int *is_one, int *top_left,
                             int64_t *sq, int64_t *sk);

/* An array of the kind of `like`, from its framework's allocator, on its device. */
typedef struct output {
    PyObject *object;  /* owned; NULL for a buffer of our own */
    PyObject *capsule; /* owned: our own buffer, given to `like`'s framework at the end */
    borrowed memory;   /* what is written */
} output;

/* stride: of a torch tensor; all others, and all where it is NULL, are contiguous. out: cleared;
 * after a failure too. */
fa_status tensor_new(module_state *state, const borrowed *like, int32_t ndim, const int64_t *shape,
                     const int64_t *stride, DLDataType dtype, output *out, fa_error *error);
/* The finished array as the caller's kind: a new reference, or NULL with an exception. */
PyObject *tensor_hand_over(module_state *state, const borrowed *like, output *out);
void tensor_drop(output *out);

/* A seed for dropout from the generator of torch, on the device of `like`. */
fa_status tensor_draw_seed(module_state *state, const borrowed *like, output *out, fa_error *error);

/* Whether torch lets out= be written here; if it was, tells torch, so that autograd notices a stale
 * saved tensor. */
fa_status tensor_check_writable(module_state *state, const borrowed *out, fa_error *error);
fa_status tensor_mark_written(module_state *state, const borrowed *out);

#endif
