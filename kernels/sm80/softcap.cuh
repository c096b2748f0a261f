/* softcap.cuh - tanh, as exactly as the dtype asks. */
#ifndef FASTATTN_SM80_SOFTCAP_CUH
#define FASTATTN_SM80_SOFTCAP_CUH

#include <math.h>

#include "common/stream.cuh"
#include "sm80/ptx.cuh"
#include "sm80/variant.h"

/* tanh(y): by a polynomial near 0, to 1.2e-6 of itself, elsewhere as 1 - 2 / (1 + e^2y), to 2e-7.
 * That is enough of scores that are rounded to 16 bits; elsewhere the library's. */
DEVICE float tanh_of(float y) {
    if (!IS_HALF) return tanhf(y);
    const float u = y * y;
    const float near = y * fmaf(fmaf(0.12633946f, u, -0.33310022f), u, 0.99999884f);
    const float far = 1.f - __fdividef(2.f, 1.f + ex2_approx(2.885390081777927f * y));
    return u < 0.09f ? near : far;
}
DEVICE double tanh_of(double y) { return tanh(y); }

#endif
