/* arguments.h - the arguments of a public function, each by its name. */
#ifndef FASTATTN_ARGUMENTS_H
#define FASTATTN_ARGUMENTS_H

#include <Python.h>

/* The public functions that are builtins. */
enum {
    ATTENTION,
    SDPA,
    VARLEN,
    BACKWARD,
    VARLEN_BACKWARD,
    KVCACHE,
    SPARSE,
    SPARSE_VARLEN,
    SPARSE_BACKWARD,
    SPARSEK,
    SPARSEK_VARLEN,
    SPARSEK_BACKWARD,
    FUNCTIONS
};

enum { MAX_PARAMETERS = 40 }; /* of one function */

/* What one call was given, defaults included, under the names of python/fastattn/_attention.py.
 * NULL: the function has no such argument. All borrowed. */
typedef struct arguments {
    PyObject *q, *k, *v, *out;
    PyObject *query, *key, *value; /* scaled_dot_product_attention's names */
    PyObject *dout, *lse, *dlse, *dq, *dk, *dv;
    PyObject *need_dq, *need_dk, *need_dv, *need_dmask, *need_dsink;
    PyObject *causal, *is_causal, *window, *q_offset;
    PyObject *q_lengths, *k_lengths, *k_start;
    PyObject *cu_seqlens_q, *cu_seqlens_k, *max_seqlen_q, *max_seqlen_k, *seqused_q, *seqused_k;
    PyObject *page_table, *k_cache, *v_cache, *cache_seqlens, *cache_batch_idx, *cache_leftpad;
    PyObject *rotary_cos, *rotary_sin, *rotary_interleaved, *k_scale, *v_scale;
    PyObject *num_splits, *return_mass;
    PyObject *key_lists, *counts, *q_block, *k_block, *gate, *key_gate, *window_union, *validate;
    PyObject *need_dgate;
    PyObject *scores, *k_keep, *keep_all, *return_selection, *tau, *ends, *need_dscores;
    PyObject *mask, *attn_mask, *softcap, *alibi_slopes, *sink, *scale, *dropout_p, *seed;
    PyObject *layout, *enable_gqa, *return_lse, *deterministic, *batch_invariant, *backend;
} arguments;

/* A public function as Python's `def` has it. */
typedef struct signature {
    PyMethodDef method;
    PyObject *function;              /* its name; owned, as the next three */
    PyObject *text, *names, *values; /* text holds name and doc of `method` */
    PyObject *name[MAX_PARAMETERS];  /* borrowed from names, interned */
    size_t field[MAX_PARAMETERS];    /* its offset in `arguments` */
    arguments defaults;              /* borrowed from values; NULL where one is required, too */
    Py_ssize_t positional, required, count;
} signature;

/* Which public function has this name; FUNCTIONS: none. */
int arguments_function(const char *name);

/* Learns a function from Python: as many names as C has of it, in the same order, and the values of
 * the last ones. entry: the C function that runs it. -1 with an exception. */
int arguments_learn(signature *s, PyObject *text, PyObject *names, PyObject *values,
                    Py_ssize_t positional, PyCFunction entry);

/* Python's own way from a call to its arguments, and its complaints: -1 with one. */
int arguments_parse(const signature *s, PyObject *const *given, Py_ssize_t count,
                    PyObject *keywords, arguments *out);

/* All of them as a tuple in the order of the signature, new; and from one. */
PyObject *arguments_pack(const signature *s, const arguments *a);
int arguments_unpack(const signature *s, PyObject *tuple, arguments *out);

#endif
