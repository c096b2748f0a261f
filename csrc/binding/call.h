/* call.h - one call of a public function, from its arguments to its result. */
#ifndef FASTATTN_CALL_H
#define FASTATTN_CALL_H

#include "internals.h"

enum { MAX_ARRAYS = 20 }; /* of one call; attention_varlen_backward has 19 */

typedef struct call {
    module_state *state;
    torch_now now;
    borrowed arrays[MAX_ARRAYS]; /* the first is q */
    int count;
    borrowed out; /* out=, if given */
    int has_out, return_lse, deterministic;
    int is_backward;       /* the arrays are the forward's, as it had them */
    int is_followed;       /* an array has a gradient that torch is to take */
    PyObject *record;      /* what autograd.c then knows it by */
    int is_differentiated; /* so a backward pass is to serve it, too; there is a lse */
    int draws, drawn;      /* dropout's seed is to come, has come, from torch's generator */
    output seed;
    const char *backend;
    fa_request request;
    fa_plan plan;
    fa_error error;
} call;

/* Cleared as far as need be; and what it has borrowed, given back. */
void call_start(call *c, module_state *state);
void call_release(call *c);

/* Around a backend's run: a workspace from the caller's allocator, on the device of `like`, and the
 * GIL, which is given up but for attention of some microseconds. p: the forward's request, or NULL.
 */
typedef struct call_work {
    void *memory; /* of the workspace; NULL: none is needed */
    output workspace;
    PyThreadState *thread; /* NULL: the GIL is kept */
} call_work;
fa_status call_begin_work(call_work *w, module_state *state, const borrowed *like, int64_t bytes,
                          const fa_params *p, fa_error *error);
/* A caching allocator orders the reuse of the workspace after the launch. */
void call_end_work(call_work *w);

/* Whether fastattn.torch or fastattn.jax has the call, with every argument in the order of the
 * signature. */
static inline int call_is_elsewhere(fa_status status) {
    return status == FA_TO_TORCH || status == FA_TO_GRAPH || status == FA_TO_JAX;
}
PyObject *call_hand_on(module_state *state, const arguments *a, int which, fa_status status);

/* prepare.c: arguments into the request and, by check_attention.c, the plan. FA_TO_TORCH where a
 * gradient of an argument is asked for, and nothing speaks against the call. */
fa_status prepare_forward(call *c, const arguments *a, int which);

/* FA_TO_TORCH if torch is to take the gradient of one of the arrays. */
fa_status prepare_followed(call *c);

/* One array more; is_followed: it may have a gradient, which torch takes. */
fa_status prepare_array(call *c, PyObject *object, const char *name, int is_followed,
                        const fa_array **out);
/* One that torch's autocast casts, as q is; and q_offset=, an int or an array. */
fa_status prepare_operand(call *c, PyObject *object, const char *name, const fa_array **out);
fa_status prepare_offset(call *c, PyObject *object);
/* Whether an argument that may be an int is an array; -1 with an exception. */
int prepare_is_array(PyObject *object);
/* An argument that may be None, and has no gradient. */
fa_status prepare_some(call *c, PyObject *object, const char *name, const fa_array **out);
/* q_offset=: None, an int or an array. */
fa_status prepare_offset(call *c, PyObject *object);
/* One that the call writes. */
fa_status prepare_written(call *c, PyObject *object, const char *name, const fa_array **out);

/* Outputs and workspace from the caller's allocator, then the backend without the GIL. */
fa_status call_run(call *c, output *out, output *lse);

/* kvcache.c */
PyObject *kvcache_compute(module_state *state, const arguments *a);
fa_status kvcache_explain(module_state *state, const arguments *a, const fa_backend **chosen,
                          const char **kernel, fa_error *reasons, fa_error *error);

/* sparse.c; which: SPARSE, SPARSE_VARLEN or SPARSE_BACKWARD */
PyObject *sparse_compute(module_state *state, const arguments *a, int which);
fa_status sparse_explain(module_state *state, const arguments *a, int which,
                         const fa_backend **chosen, const char **kernel, fa_error *reasons,
                         fa_error *error);

/* selection.c; which: SPARSEK, SPARSEK_VARLEN or SPARSEK_BACKWARD */
PyObject *selection_compute(module_state *state, const arguments *a, int which);
fa_status selection_explain(module_state *state, const arguments *a, int which,
                            const fa_backend **chosen, const char **kernel, fa_error *reasons,
                            fa_error *error);

/* backward.c */
typedef struct backward_call {
    call forward;
    fa_backward_request request;
    fa_backward backward;
    fa_gradient gradients[FA_GRADIENTS];
    const borrowed *given[FA_GRADIENTS]; /* dq=, dk=, dv=, in forward.arrays */
    output made[FA_GRADIENTS];
    fa_chosen chosen;
} backward_call;

/* The forward's arguments and its results, as prepare_forward() does it. */
void backward_start(backward_call *c, module_state *state);
fa_status backward_prepare(backward_call *c, const arguments *a, int which);

/* Whether a backward pass will serve what the forward pass computes now. reasons: as in
 * fa_choose_backward(). */
fa_status backward_expect(const call *c, fa_error *reasons, fa_error *error);
PyObject *backward_compute(module_state *state, const arguments *a, int which);
fa_status backward_explain(module_state *state, const arguments *a, int which,
                           const fa_backend **chosen, const char **kernel, fa_error *reasons,
                           fa_error *error);

/* The one place where a status becomes an exception; returns NULL. Where torch raises RuntimeError,
 * sdpa's is one too (and Python's NotImplementedError is by itself). */
PyObject *call_raise(const module_state *state, fa_status status, int sdpa, const fa_error *error);

/* What a call returns, once its arrays are released: a deleter may have left an exception. */
PyObject *call_finish(const module_state *state, PyObject *result, fa_status status, int sdpa,
                      const fa_error *error);

/* (out, lse), or out, as the caller's kind of array. given: out=, or NULL. */
PyObject *call_hand_over(module_state *state, const borrowed *like, output *out, output *lse,
                         PyObject *given, int return_lse);

/* function(text, names, defaults, positional) -> the builtin. text is the bytes "name\0doc", where
 * doc starts with the text signature; defaults are those of the last parameters. */
PyObject *call_function(PyObject *module, PyObject *args);

/* autograd.c: the call, prepared, by way of torch's autograd function. NULL without an exception
 * where it is for fastattn.torch from the start. */
PyObject *autograd_apply(call *c, const arguments *a, int which);

/* forward(context, record, *tensors) -> out, or (out, lse) if that was asked for: of the autograd
 * function, whose context gets what gradients() takes; where no backward pass serves it nothing is
 * computed. With None for a context (out, lse, seed); seed: the one that was drawn, or None. */
PyObject *autograd_forward(PyObject *module, PyObject *const *given, Py_ssize_t count);

/* gradients(record, (out, lse, seed, *tensors), needs, dout, dlse, deterministic) -> (None, and a
 * gradient or None for each tensor), as needs says in the same order. */
PyObject *autograd_gradients(PyObject *module, PyObject *const *given, Py_ssize_t count);

/* explain.c: explain(name, *args, **keywords) -> (backend or None, kernel or None, {backend:
 * reason}). Runs nothing. */
PyObject *call_explain(PyObject *module, PyObject *const *arguments, Py_ssize_t count,
                       PyObject *keywords);

/* explain_forward(name, arguments): the same of a function of the forward pass that is given every
 * argument in the order of its signature, for a gradient. */
PyObject *call_explain_forward(PyObject *module, PyObject *const *given, Py_ssize_t count);

/* merge.c: merge_states(outs, lses, layout), two tuples of the same length. */
PyObject *merge_states(PyObject *module, PyObject *const *arguments, Py_ssize_t count);

/* sparsek.c: the arguments of the public functions in their order: (gates, tau), or (key_lists,
 * gates, tau). Of the gradients, before these, tau, dgates and, with lists, key_lists: dscores. Of
 * described arrays None. */
PyObject *sparsek(PyObject *module, PyObject *const *given, Py_ssize_t count);
PyObject *sparsek_lists(PyObject *module, PyObject *const *given, Py_ssize_t count);
PyObject *sparsek_backward(PyObject *module, PyObject *const *given, Py_ssize_t count);
PyObject *sparsek_lists_backward(PyObject *module, PyObject *const *given, Py_ssize_t count);

/* jax_tracing.c: what fastattn.jax asks for while JAX traces. */

/* jax_plan(name, arguments) -> (operands, attributes, results): a public function given every
 * argument in the order of its signature, its arrays described only. Operands are (name, object),
 * results (name, shape, dtype); attributes a dict of what is no array. */
PyObject *jax_plan(PyObject *module, PyObject *const *given, Py_ssize_t count);
/* jax_workspace(target, operands, attributes, results) -> the bytes that a kernel of the first GPU
 * needs. Operands and results are (name, shape, code, bits). */
PyObject *jax_workspace(PyObject *module, PyObject *args);
/* jax_handlers() -> {target: (capsule for the CPU, capsule for CUDA)} */
PyObject *jax_handlers(PyObject *module, PyObject *unused);

/* threads.c */
PyObject *threads_get(PyObject *module, PyObject *unused);
PyObject *threads_set(PyObject *module, PyObject *n);
/* Says once what is wrong with FASTATTN_NUM_THREADS, before the first work on the CPU. */
fa_status threads_warn(module_state *state);

#endif
