/* scale.h - what the scores are multiplied by. Host code, plain C. */
#ifndef FASTATTN_SCALE_H
#define FASTATTN_SCALE_H

#include <math.h>

/* A scale that a float holds, of its sign, and that brings no score to infinity; 1e30 leaves only a
 * row's greatest score. 0 must not meet the -inf of a hidden score: 1e-37 of any is 0 too. */
static inline double usable_scale(double scale) {
    const double size = fmin(fmax(fabs(scale), 1e-37), 1e30);
    return scale < 0 ? -size : size;
}

#endif
