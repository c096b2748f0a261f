/* call.h - one call of a public function, from its arguments to its result. */
#ifndef FASTATTN_CALL_H
#define FASTATTN_CALL_H

#include "frameworks.h"

enum { MAX_ARRAYS = 20 }; /* of one call; attention_varlen_backward will have 19 */

typedef struct call {
    module_state *state;
    torch_now now;
    borrowed arrays[MAX_ARRAYS]; /* the first is q */
    int count;
    borrowed out; /* out=, if given */
    int has_out, return_lse;
    int draws, drawn; /* dropout's seed is to come, has come, from torch's generator */
    output seed;
    const char *backend;
    fa_request request;
    fa_plan plan;
    fa_error error;
} call;

/* prepare.c: arguments into the request and, by check_attention.c, the plan. */
typedef fa_status prepare_function(call *c, const arguments *a);
prepare_function prepare_attention, prepare_sdpa, prepare_varlen;

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

/* explain(name, *args, **keywords) -> (backend or None, kernel or None, {backend: reason}). Runs
 * nothing. */
PyObject *call_explain(PyObject *module, PyObject *const *arguments, Py_ssize_t count,
                       PyObject *keywords);

/* merge.c: merge_states(outs, lses, layout), two tuples of the same length. */
PyObject *merge_states(PyObject *module, PyObject *const *arguments, Py_ssize_t count);

/* threads.c */
PyObject *threads_get(PyObject *module, PyObject *unused);
PyObject *threads_set(PyObject *module, PyObject *n);
/* Says once what is wrong with FASTATTN_NUM_THREADS, before the first work on the CPU. */
fa_status threads_warn(module_state *state);

#endif
