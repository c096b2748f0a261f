/* sparse.h - one call of attention_sparse, attention_sparse_varlen or their backward. */
#ifndef FASTATTN_SPARSE_CALL_H
#define FASTATTN_SPARSE_CALL_H

#include "call.h"
#include "check_sparse.h"

typedef struct sparse_call {
    call forward;
    fa_sparse_request request;
    int return_mass;
    fa_sparse sparse;
    /* Of the backward: */
    fa_backward_request backward_request;
    int need_dgate;
    fa_sparse_backward backward;
    fa_gradient gradients[FA_GRADIENTS]; /* dgate's in the place of dmask's */
    fa_chosen chosen;
    output made[FA_GRADIENTS]; /* or out, lse and mass */
    const borrowed *out;       /* out=, or NULL */
} sparse_call;

void sparse_start(sparse_call *c, module_state *state);
/* which: SPARSE, SPARSE_VARLEN or SPARSE_BACKWARD. As prepare_forward(). */
fa_status sparse_prepare(sparse_call *c, const arguments *a, int which);

/* What selection.c has, too: an array or None, an int, and lengths or where sequences are packed
 * their ends. */
fa_status sparse_borrow(call *c, PyObject *object, const char *name, int is_followed,
                        const fa_array **out);
fa_status sparse_get_size(call *c, PyObject *object, const char *name, int64_t *to);
fa_status sparse_get_sequences(call *c, const arguments *a);

#endif
