/* merge.h - partial results over disjoint keys, merged: one fa_merge is one request. */
#ifndef FASTATTN_MERGE_H
#define FASTATTN_MERGE_H

#include "types.h"

/* lse = logaddexp(lses), out = sum of exp(lse_i - lse) out_i. A part whose lse is -inf or +inf (as
 * some say of a row without keys) is empty. */
typedef struct fa_merge {
    int32_t n;             /* number of parts, >= 1 */
    const fa_tensor *outs; /* n of (b, h, s, dv) dtype */
    const fa_tensor *lses; /* n of (b, h, s, 1) float32, or float64 where dtype is */
    fa_tensor out;         /* (b, h, s, dv) dtype */
    fa_tensor lse;         /* (b, h, s, 1) like lses */
    fa_dtype dtype;
    fa_where where;
} fa_merge;

FA_OPERATION(merge, fa_merge);

#endif
