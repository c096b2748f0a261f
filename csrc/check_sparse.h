/* check_sparse.h - attention_sparse: what it takes beside attention's arguments. */
#ifndef FASTATTN_CHECK_SPARSE_H
#define FASTATTN_CHECK_SPARSE_H

#include "check.h"

/* A NULL array is absent. */
typedef struct fa_sparse_request {
    const fa_array *entries, *counts, *gate; /* entries is never NULL */
    int64_t q_block, k_block;                /* any */
    int key_gate, validate;
    int has_window, has_left, has_right; /* of window_union */
    int64_t left, right;                 /* any; clamped */
} fa_sparse_request;

/* check_sparse.c: after fa_check_attention(), whose plan has the forward's request. */
fa_status fa_check_lists(const fa_request *attention, const fa_sparse_request *request,
                         const fa_plan *plan, fa_lists *lists, fa_error *error);
/* The caller's out=. */
fa_status fa_check_sparse_out(const fa_request *attention, const fa_sparse_request *request,
                              const fa_plan *plan, const fa_array *out, fa_error *error);

/* Whether the mass is wanted, or the gate's gradient: the layout of what is to come, like an array
 * of the request. */
void fa_expect_like(const fa_array *a, fa_tensor *to);

/* dispatch.c: as the forward's. */
const fa_backend *fa_choose_sparse(const fa_sparse *sparse, const char *name, fa_chosen *chosen,
                                   fa_error *reasons, fa_error *error);
const char *fa_sparse_kernel(const fa_sparse *sparse, const fa_chosen *chosen);
int64_t fa_sparse_workspace(const fa_sparse *sparse, const fa_chosen *chosen);
fa_status fa_run_sparse(const fa_sparse *sparse, const fa_chosen *chosen, void *workspace,
                        fa_error *error);
const fa_backend *fa_choose_sparse_backward(const fa_sparse_backward *backward, const char *name,
                                            fa_chosen *chosen, fa_error *reasons, fa_error *error);
const char *fa_sparse_backward_kernel(const fa_sparse_backward *backward, const fa_chosen *chosen);
int64_t fa_sparse_backward_workspace(const fa_sparse_backward *backward, const fa_chosen *chosen);
fa_status fa_run_sparse_backward(const fa_sparse_backward *backward, const fa_chosen *chosen,
                                 void *workspace, fa_error *error);

#endif
