/* softcap.cuh - tanh of one score. scores_launch.cuh says which way serves which. */
#ifndef FASTATTN_SM90_SOFTCAP_CUH
#define FASTATTN_SM90_SOFTCAP_CUH

#include "sm90/ptx.cuh"

/* tanh of a score times its scale, plus `minus`, by a polynomial in its square, to 1.2e-6 of itself
 * and without MUFU. */
DEVICE float cap_near(const float (&series)[3], float s, float minus) {
    const float u = s * s;
    return fmaf(s, fmaf(fmaf(series[2], u, series[1]), u, series[0]), minus);
}

/* tanh of a score times its scale as 1 - 2 / (1 + e^2y), to 2e-7. */
DEVICE float cap_far(float scale, float s) {
    return fmaf(-2.f, rcp_approx(1.f + ex2_approx(2.885390081777927f * scale * s)), 1.f);
}

/* tanh of y: by its series near 0, where 1 - 2 / (1 + e^2y) has lost digits. */
DEVICE float tanh_of(float y) {
    const float u = y * y;
    const float near =
        y * fmaf(fmaf(fmaf(fmaf(0.021869489f, u, -0.053968254f), u, 0.13333333f), u, -0.33333333f),
                 u, 1.f);
    return fabsf(y) < 0.3f ? near : cap_far(1.f, y);
}

#endif
