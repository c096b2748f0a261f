/* mask_fields.h - which keys a row may see, as a request says it: what mask.h makes intervals of.
 *
 * A new kind of mask is a field here and its interval in mask.h; what is said of scores, an array
 * of one for each too, is fa_scores in forward.h.
 */
#ifndef FASTATTN_MASK_FIELDS_H
#define FASTATTN_MASK_FIELDS_H

#include "types.h"

enum { FA_MAX_SHIFT = 1 << 30 }; /* window bounds and offsets lie in +-this: past every key */

/* One interval per row, computed by fa_row_interval() in mask.h. */
enum {
    FA_HAS_LEFT = 1,   /* `left` bounds the interval from below */
    FA_HAS_RIGHT = 2,  /* `right` bounds it from above (causal is right = 0) */
    FA_HAS_OFFSET = 4, /* i' = i + offset instead of i + sk - sq (top-left is offset = 0) */
};

typedef struct fa_masks {
    uint32_t flags;           /* FA_HAS_LEFT | FA_HAS_RIGHT | FA_HAS_OFFSET */
    int32_t left, right;      /* keys i' - left .. i' + right, inclusive; +-FA_MAX_SHIFT */
    const int32_t *q_lengths; /* (b,) on the device, true query lengths, or NULL: sq */
    const int32_t *k_lengths; /* (b,) on the device, true key lengths, or NULL: sk */
    const int32_t *k_start;   /* (b,) on the device, first key that counts, or NULL: 0 */
    int64_t q_lengths_stride, k_lengths_stride, k_start_stride; /* elements */
    const int32_t *q_offset; /* (b,) on the device, i' = i + that, clamped; or NULL: `offset` */
    int64_t q_offset_stride; /* elements */
    int32_t offset;          /* of FA_HAS_OFFSET; +-FA_MAX_SHIFT */
} fa_masks;

#endif
