/* check_sparsek_attention.h - sparsek_attention: what it takes beside attention's arguments. */
#ifndef FASTATTN_CHECK_SPARSEK_ATTENTION_H
#define FASTATTN_CHECK_SPARSEK_ATTENTION_H

#include "check.h"

/* A NULL array is absent. */
typedef struct fa_selection_request {
    const fa_array *scores; /* never NULL */
    double k;
    int64_t window; /* any; clamped */
    int keep_all, key_gate;
    /* Of the backward: what the forward gave, and what is wanted. */
    const fa_array *tau, *ends;
    int need_dscores;
} fa_selection_request;

/* What the forward gives beside out and lse, as the arrays are to be. */
enum { FA_SELECTION_TAU, FA_SELECTION_ENDS, FA_SELECTION_RESULTS };

/* check_sparsek_attention.c: after fa_check_attention() of a causal request, whose plan has the
 * forward's. */
fa_status fa_check_selection(const fa_request *attention, const fa_selection_request *request,
                             const fa_plan *plan, fa_sparsek_attention *r,
                             fa_result results[FA_SELECTION_RESULTS], fa_error *error);
/* The caller's out=. */
fa_status fa_check_selection_out(const fa_request *attention, const fa_selection_request *request,
                                 const fa_plan *plan, const fa_array *out, fa_error *error);
/* After it and fa_check_backward(), whose request b->attention is. dscores: as the array is to be.
 */
fa_status fa_check_selection_backward(const fa_selection_request *request,
                                      const fa_sparsek_attention *forward,
                                      const fa_result results[FA_SELECTION_RESULTS],
                                      fa_sparsek_attention_backward *b, fa_gradient *dscores,
                                      fa_error *error);
/* dispatch.c: as the forward's. */
const fa_backend *fa_choose_sparsek_attention(const fa_sparsek_attention *r, const char *name,
                                              fa_chosen *chosen, fa_error *reasons,
                                              fa_error *error);
const char *fa_sparsek_attention_kernel(const fa_sparsek_attention *r, const fa_chosen *chosen);
int64_t fa_sparsek_attention_workspace(const fa_sparsek_attention *r, const fa_chosen *chosen);
fa_status fa_run_sparsek_attention(const fa_sparsek_attention *r, const fa_chosen *chosen,
                                   void *workspace, fa_error *error);
const fa_backend *fa_choose_sparsek_attention_backward(const fa_sparsek_attention_backward *b,
                                                       const char *name, fa_chosen *chosen,
                                                       fa_error *reasons, fa_error *error);
const char *fa_sparsek_attention_backward_kernel(const fa_sparsek_attention_backward *b,
                                                 const fa_chosen *chosen);
int64_t fa_sparsek_attention_backward_workspace(const fa_sparsek_attention_backward *b,
                                                const fa_chosen *chosen);
fa_status fa_run_sparsek_attention_backward(const fa_sparsek_attention_backward *b,
                                            const fa_chosen *chosen, void *workspace,
                                            fa_error *error);

#endif
