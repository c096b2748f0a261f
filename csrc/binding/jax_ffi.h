/* jax_ffi.h - one operation of a program of XLA's, as fastattn.jax puts it there: operands by the
 * names of the public arguments, and attributes for all that is no array.
 *
 * jax_tracing.c, which knows Python, fills one while JAX traces, jax_ffi.c from what XLA calls it
 * with; jax_run.c runs it.
 */
#ifndef FASTATTN_JAX_FFI_H
#define FASTATTN_JAX_FFI_H

#include "check_sparse.h"
#include "check_sparsek_attention.h"
#include "xla_ffi.h"

typedef enum jax_target {
    JAX_FORWARD,
    JAX_BACKWARD,
    JAX_MERGE,
    JAX_SPARSEK,
    JAX_SPARSEK_BACKWARD,
    JAX_SPARSE,
    JAX_SPARSE_BACKWARD,
    JAX_SPARSEK_ATTENTION,
    JAX_SPARSEK_ATTENTION_BACKWARD,
    JAX_TARGETS
} jax_target;

/* An operand or a result. */
typedef struct jax_array {
    fa_array array; /* of one run */
    int64_t step;   /* bytes from one run to the next */
} jax_array;

typedef struct jax_call {
    jax_target target;
    fa_request request;
    fa_backward_request backward;
    fa_sparsek_request sparsek;
    fa_sparse_request sparse;
    fa_selection_request selection;
    int64_t runs;    /* the call is made for each index of a first axis; 0: there is none */
    int64_t stepped; /* bit i: operand i has that axis; all results have it */
    char backend[8]; /* or empty */
    int32_t operand_count, result_count;
    jax_array *operands, *results;
} jax_call;

/* What is no array: attributes of these names, int64 or float64; absent is 0. */
typedef struct jax_attribute {
    const char *name;
    enum { JAX_INT, JAX_INT64, JAX_DOUBLE } kind;
    size_t offset; /* in jax_call */
} jax_attribute;

enum { JAX_ATTRIBUTES = 36 };
extern const jax_attribute jax_attributes[JAX_ATTRIBUTES];

/* NULL where there is none of this name. */
const jax_attribute *jax_find_attribute(const char *name, size_t size);

/* Whether an operand has the axis of the runs; all results have it, operand -1. */
int jax_has_axis(const jax_call *c, int32_t operand);
/* Completes a contiguous array that has a name, a dtype and its whole shape: strides, and the first
 * axis taken off where it counts runs. */
fa_status jax_lay_out(const jax_call *c, jax_array *a, int has_axis, fa_error *error);

/* Runs it; or, where bytes is not NULL, only says there how much workspace it needs. */
fa_status jax_run(jax_call *c, int64_t *bytes, fa_error *error);

/* What the runs of all targets share, jax_run.c: operands into the request, by their names. */
fa_status jax_bind_operands(jax_call *c, fa_error *error);
/* The same of attention: q, k and v are there. */
fa_status jax_bind_attention(jax_call *c, fa_error *error);
/* NULL: not asked for. */
fa_array *jax_find_result(jax_call *c, const char *name);
fa_status jax_check_result(const fa_array *a, int32_t ndim, const int64_t *shape,
                           fa_any_dtype dtype, fa_error *error);
/* The workspace that comes as one more result; or *bytes. */
fa_status jax_take_workspace(jax_call *c, int64_t needed, int64_t *bytes, void **workspace,
                             fa_error *error);

/* jax_sparsek.c */
fa_status jax_run_sparsek(jax_call *c, int64_t *bytes, fa_error *error);
fa_status jax_run_sparsek_backward(jax_call *c, int64_t *bytes, fa_error *error);

/* jax_sparse.c */
fa_status jax_run_sparse(jax_call *c, int64_t *bytes, fa_error *error);
fa_status jax_run_sparse_backward(jax_call *c, int64_t *bytes, fa_error *error);

/* jax_selection.c */
fa_status jax_run_selection(jax_call *c, int64_t *bytes, fa_error *error);
fa_status jax_run_selection_backward(jax_call *c, int64_t *bytes, fa_error *error);

extern xla_handler *const jax_handler[JAX_TARGETS][2]; /* on the CPU, on CUDA */

#endif
