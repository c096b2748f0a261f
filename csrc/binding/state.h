/* state.h - what the module has learnt about the process, and the way to _frameworks.py. */
#ifndef FASTATTN_STATE_H
#define FASTATTN_STATE_H

#include <Python.h>

#include "arguments.h"
#include "check.h"
#include "torch_abi.h"

/* A Python exception is already set; not in the contract, as the next one. */
#define FA_RAISED ((fa_status) - 1)
/* No failures: the call is one for fastattn.torch, which takes it from the start, for a gradient;
 * or for what records or transforms torch's operators; or one for fastattn.jax. */
#define FA_TO_TORCH ((fa_status) - 2)
#define FA_TO_GRAPH ((fa_status) - 3)
#define FA_TO_JAX ((fa_status) - 4)

/* One per module object. */
typedef struct module_state {
    /* torch.Tensor and torch.nn.Parameter; NULL until torch is there. */
    PyTypeObject *tensor, *parameter;
    const DLExchangeAPI *exchange; /* torch's table; NULL before torch 2.10 */
    PyObject *is_grad_enabled;     /* torch.is_grad_enabled */
    PyObject *forward_ad;          /* the dict of torch.autograd.forward_ad */
    PyObject *is_transformed;      /* whether torch.func transforms what runs */
    PyCFunction is_neg; /* the C function of torch.Tensor.is_neg: half the time of a method call */
    torch_abi abi;
    PyTypeObject *ndarray; /* numpy.ndarray; NULL until NumPy is there */
    PyObject *frameworks;  /* fastattn._frameworks: recognises them, serves those without a table */
    PyObject *torch;       /* fastattn.torch: gradients, transforms and graphs of torch */
    PyObject *follow;      /* its autograd function, as a function */
    PyObject *jax;         /* fastattn.jax: what JAX traces, and its arrays on a GPU */
    signature signatures[FUNCTIONS];
    PyObject *requires_grad, *current_level, *to_save, *materialize_grads, *call,
        *top_left;                      /* interned */
    PyObject *value_error, *type_error; /* the drop-in's, each a RuntimeError too, as torch's */
    int warned;                         /* of the environment, if there was a reason */
} module_state;

int state_init(module_state *state);
int state_traverse(module_state *state, visitproc visit, void *arg);
void state_clear(module_state *state);

/* Learns about the frameworks that have been imported since the last look. `tensor` and `ndarray`
 * are set last and say that the rest is there. -1 with an exception. */
int state_learn(module_state *state);

/* Calls a function of fastattn._frameworks, which is imported by the first call that needs it. */
PyObject *state_call(module_state *state, const char *function, const char *format, ...);

/* What the module that has a call of this status, FA_TO_..., calls so. */
PyObject *state_of(module_state *state, fa_status status, const char *name);

/* Calls a function of it with a tuple, which it takes over. */
PyObject *state_hand_on(module_state *state, fa_status status, const char *function,
                        PyObject *arguments);

/* Copies a str, which it takes over, into a buffer; "an object" if text is NULL. */
const char *state_text(PyObject *text, size_t size, char *buffer);

/* Of an object, for a sentence: its repr(), the name of its type. */
const char *state_repr(PyObject *object, char buffer[64]);
const char *state_type_name(PyObject *object, char buffer[128]);

#endif
