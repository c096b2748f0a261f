/* internals.h - what tensor.c asks of those who know the insides of a library, of torch's and
 * NumPy's, and of dlpack.c, which serves every other framework as it comes. A new one needs nothing
 * here: what it does differently goes into python/fastattn/_frameworks.py. */
#ifndef FASTATTN_INTERNALS_H
#define FASTATTN_INTERNALS_H

#include "tensor.h"

/* ---- torch_internals.c ----------------------------------------------------------------------- */

/* What one call has asked torch so far; the answers hold for all its tensors. */
struct torch_now {
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
};

/* parts: what fastattn._frameworks.loaded() says of torch. 0 with an exception. */
int torch_learn(module_state *state, PyObject *parts);

/* Whether it is a plain torch.Tensor or Parameter. */
static inline int torch_owns(const module_state *state, PyObject *object) {
    PyTypeObject *type = Py_TYPE(object);
    return type == state->tensor || type == state->parameter;
}

/* What autograd hands on, as memory holds it: it may be a lazily negated view, which no caller
 * chose. A new reference, or NULL with an exception. */
PyObject *torch_resolve(const module_state *state, PyObject *gradient);

/* Whether torch.func transforms what runs; -1 with an exception. */
int torch_is_transformed(const module_state *state);

/* Describes a plain torch.Tensor or Parameter, or refuses it. */
fa_status torch_borrow(module_state *state, torch_now *now, PyObject *object, borrowed *b,
                       fa_error *error);

/* Refuses a tensor that is not what it seems to be by a sentence of fastattn._frameworks;
 * FA_TO_GRAPH where it is transformed or operators are recorded; FA_OK where nothing speaks against
 * it. */
fa_status torch_refuse(module_state *state, PyObject *object, const char *name, fa_error *error);

/* Inside an autocast region of its device a torch tensor becomes what torch's own operators would
 * make of it. */
fa_status torch_autocast(module_state *state, torch_now *now, borrowed *b, fa_error *error);

/* Whether object may stand for a float, as far as torch goes: 0 for a tensor that has a gradient or
 * dimensions, as torch has it; -1 with an exception. */
int torch_is_number(module_state *state, PyObject *object);

/* Where `object` is torch's CausalBias: *is_one is set, with what the mask means. */
fa_status torch_causal_bias(module_state *state, PyObject *object, int *is_one, int *top_left,
                            int64_t *sq, int64_t *sk);

/* A seed for dropout from the generator of torch, on the device of `like`. */
fa_status torch_draw_seed(module_state *state, const borrowed *like, output *out, fa_error *error);

/* Whether torch lets out= be written here; if it was, tells torch, so that autograd notices a stale
 * saved tensor. */
fa_status torch_check_writable(module_state *state, const borrowed *out, fa_error *error);
fa_status torch_mark_written(module_state *state, const borrowed *out);

/* ---- numpy_internals.c ----------------------------------------------------------------------- */

/* 0 with an exception. */
int numpy_learn(module_state *state, PyObject *ndarray);

fa_status numpy_borrow(PyObject *object, borrowed *b, fa_error *error);

/* Of a subclass of numpy.ndarray: one that means the same, or a refusal. */
fa_status numpy_borrow_subclass(module_state *state, PyObject *object, borrowed *b,
                                fa_error *error);

fa_status numpy_new(const borrowed *like, const DLTensor *t, output *out, fa_error *error);

/* 1 or 0 for a bool of NumPy's, -1 for any other object, -2 with an exception. */
int numpy_truth(module_state *state, PyObject *object);

/* ---- dlpack.c ------------------------------------------------------------------------------ */

/* The newest table of our major version in a capsule, or NULL. */
const DLExchangeAPI *dlpack_table(PyObject *capsule);

/* By __dlpack__, through fastattn._frameworks. */
fa_status dlpack_borrow(module_state *state, PyObject *object, borrowed *b, fa_error *error);

/* A buffer of our own, in a capsule. */
fa_status dlpack_new(const DLTensor *t, output *out, fa_error *error);

#endif
