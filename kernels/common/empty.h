/* empty.h - whether a request has a score to compute. Plain C, compiled by gcc and nvcc alike. */
#ifndef FASTATTN_EMPTY_H
#define FASTATTN_EMPTY_H

#include "forward.h"

/* A request without one: no query row, or no key for any of them. */
static inline int32_t fa_is_empty(const fa_what *w) {
    return w->b == 0 || w->hq == 0 || w->sq == 0 || w->sk == 0 || w->q.shape[2] == 0 ||
           w->k.shape[2] == 0;
}

#endif
