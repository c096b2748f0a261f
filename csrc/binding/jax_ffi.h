/* jax_ffi.h - one operation of a program of XLA's, as fastattn.jax puts it there: operands by the
 * names of the public arguments, and attributes for all that is no array.
 *
 * jax.c, which knows Python, fills one while JAX traces, jax_ffi.c from what XLA calls it with;
 * jax_run.c runs it.
 */
#ifndef FASTATTN_JAX_FFI_H
#define FASTATTN_JAX_FFI_H

#include "check.h"
#include "xla_ffi.h"

typedef enum jax_target { JAX_FORWARD, JAX_BACKWARD, JAX_MERGE, JAX_TARGETS } jax_target;

/* An operand or a result. */
typedef struct jax_array {
    fa_array array; /* of one run */
    int64_t step;   /* bytes from one run to the next */
} jax_array;

typedef struct jax_call {
    jax_target target;
    fa_request request;
    fa_backward_request backward;
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

enum { JAX_ATTRIBUTES = 20 };
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

extern xla_handler *const jax_handler[JAX_TARGETS][2]; /* on the CPU, on CUDA */

#endif
