/* selection.h - one call of sparsek_attention, sparsek_attention_varlen or their backward. */
#ifndef FASTATTN_SELECTION_CALL_H
#define FASTATTN_SELECTION_CALL_H

#include "call.h"
#include "check_sparsek_attention.h"

typedef struct selection_call {
    call forward;
    fa_selection_request request;
    fa_sparsek_attention selection;
    fa_result results[FA_SELECTION_RESULTS]; /* tau and ends */
    int return_selection;
    /* Of the backward: */
    fa_backward_request backward_request;
    fa_sparsek_attention_backward backward;
    fa_gradient gradients[FA_GRADIENTS]; /* dscores in the place of dmask */
    fa_chosen chosen;
    output made[FA_GRADIENTS]; /* or out, lse, tau and ends */
    const borrowed *out;       /* out=, or NULL */
} selection_call;

void selection_start(selection_call *c, module_state *state);
/* which: SPARSEK, SPARSEK_VARLEN or SPARSEK_BACKWARD. As prepare_forward(). */
fa_status selection_prepare(selection_call *c, const arguments *a, int which);

#endif
