/* general.h - which requests need a general variant. Plain C. */
#ifndef FASTATTN_GENERAL_H
#define FASTATTN_GENERAL_H

#include "forward.h"

/* Whether something changes scores. Which keys a row may see, and a sink, which joins at the end of
 * a tile, is every variant's business. */
static inline int32_t fa_needs_general(const fa_params *p) {
    const fa_scores *s = &p->scores;
    return s->mask.data || s->softcap != 0 || s->alibi_slopes || p->dropout.p > 0;
}

#endif
