/* check_attention.h - the parts of fa_check_attention(), each for a group of fa_params. */
#ifndef FASTATTN_CHECK_ATTENTION_H
#define FASTATTN_CHECK_ATTENTION_H

#include "check_array.h"
#include "views.h"

/* check_keys.c: which keys a row may see. */
fa_status fa_check_masks(const fa_request *r, fa_plan *plan, fa_error *error);
/* From here on sq and sk are the longest lengths, and the rows are total_q and total_k. */
fa_status fa_check_varlen(const fa_request *r, fa_plan *plan, fa_error *error);

/* check_scores.c: what changes them, and dropout. lead: the n leading dimensions. */
fa_status fa_check_mask(const fa_request *r, int32_t n, const int64_t *lead, fa_plan *plan,
                        fa_view *mask, fa_error *error);
fa_status fa_check_scores(const fa_request *r, fa_plan *plan, fa_error *error);
fa_status fa_check_dropout(const fa_request *r, fa_plan *plan, fa_error *error);

#endif
