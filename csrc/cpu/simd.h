/* simd.h - the vector operations that the kernels are written in, once per instance.
 *
 * An instance is a level and a number type. It defines FA_NAME (its suffix), FA_REAL (float or
 * double), FA_INT (the integer of that size), FA_BYTES (of a vector), FA_X86 (which intrinsics it
 * may use: 0, 256 or 512) and FA_PAIRS (1: products of bfloat16 pairs). Every name below gets the
 * suffix, so that instances live side by side in one file; levels.h defines them all.
 */
#ifndef FASTATTN_CPU_SIMD_H
#define FASTATTN_CPU_SIMD_H

#define FN(name) FA_JOIN(name, FA_NAME)
#define real FA_REAL
#define vec FN(vec)
#define ivec FN(ivec)
#define across FN(across)
#define base FN(base)
#define base_of FN(base_of)
#define exponent FN(exponent)
#define fma_ FN(fma)
#define log2_ FN(log2)
#define max_ FN(max)
#define min_ FN(min)
#define pick FN(pick)
#define power FN(power)
#define power_parts FN(power_parts)
#define splat FN(splat)
#define tanh_ FN(tanh)

#define LANES (FA_BYTES / (int)sizeof(real))
#define DOUBLE (sizeof(real) == 8)

/* Where products are rounded before they are added, numbers are cut in two: half of the bits times
 * half of the bits is exact. */
#if defined(__aarch64__)
#define FUSED 1
#else
#define FUSED (FA_X86 != 0)
#endif
#define SPLIT (real)(DOUBLE ? 134217729. : 4097.) /* 2^(half of the bits) + 1 */

#endif

typedef real vec __attribute__((vector_size(FA_BYTES)));
typedef FA_INT ivec __attribute__((vector_size(FA_BYTES)));
FA_FAST vec splat(real x) { return x - (vec){0}; /* x - 0 is x, also where it is -0 */ }

FA_FAST vec fma_(vec a, vec b, vec c) {
#if FA_X86 == 512
    return DOUBLE ? (vec)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c)
                  : (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif FA_X86 == 256
    return DOUBLE ? (vec)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c)
                  : (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return DOUBLE ? (vec)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b)
                  : (vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

/* Lane by lane: a condition is all ones or all zeros. */
FA_FAST vec pick(ivec condition, vec yes, vec no) {
    return (vec)((condition & (ivec)yes) | (~condition & (ivec)no));
}

/* x of the lane that is `distance` away, by a bit of the lane's number. */
FA_FAST vec across(vec x, int distance) {
    ivec from;
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) from[i] = i ^ distance;
    return __builtin_shuffle(x, from);
}

/* The larger; `b` where either is NaN. */
FA_FAST vec max_(vec a, vec b) {
#if FA_X86 == 512
    return DOUBLE ? (vec)_mm512_max_pd((__m512d)a, (__m512d)b)
                  : (vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif FA_X86 == 256
    return DOUBLE ? (vec)_mm256_max_pd((__m256d)a, (__m256d)b)
                  : (vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return pick(a > b, a, b);
#endif
}

/* The smaller; `b` where either is NaN. */
FA_FAST vec min_(vec a, vec b) {
#if FA_X86 == 512
    return DOUBLE ? (vec)_mm512_min_pd((__m512d)a, (__m512d)b)
                  : (vec)_mm512_min_ps((__m512)a, (__m512)b);
#elif FA_X86 == 256
    return DOUBLE ? (vec)_mm256_min_pd((__m256d)a, (__m256d)b)
                  : (vec)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return pick(a < b, a, b);
#endif
}

/* log2 of the base of a power, in two parts so that x * log2 loses nothing (in one, a power that is
 * all of a row's P, beside a sink, is off by 7e-7 of itself), and the x where the power becomes 0.
 */
typedef struct base {
    real high, low, floor;
} base;

FA_LOCAL base base_of(double log2) {
    const real single = (real)log2, c = single * SPLIT;
    const real high = FUSED || c - c != 0 ? single : c - (c - single); /* c may overflow */
    return (base){high, (real)(log2 - high), (DOUBLE ? -1023 : -127) / single};
}

/* x * log2 + y, where that is near 0. */
FA_FAST vec exponent(base e, vec x, vec y) {
    if (FUSED) return fma_(x, splat(e.low), fma_(x, splat(e.high), y));
    const vec c = x * SPLIT, half = c - (c - x);
    return half * e.high + y + ((x - half) * e.high + x * e.low);
}

/* base^x = 2^n 2^f for x <= 0 (or NaN, which stays NaN), with n an integer and |f| <= 1/2: *scale =
 * 2^n (0 below 2^-126, or 2^-1022), and the result is 2^f - 1, which is exact to the last bit or so
 * also near 0. */
FA_FAST vec power_parts(base e, vec x, vec *scale) {
    /* Adding it leaves n, and the exponent's bias, in the lowest bits of a number. */
    const real round = DOUBLE ? 6755399441055744. + 1023 : 12582912. + 127; /* 1.5 * 2^mantissa */
    x = max_(splat(e.floor), x);
    vec shifted = fma_(x, splat(e.high + e.low), splat(round));
    vec f = exponent(e, x, round - shifted);
    *scale = (vec)((ivec)shifted << (DOUBLE ? 52 : 23));
    vec y; /* (2^f - 1) / f, interpolated at Chebyshev nodes: 5e-9, or 8e-18 in double */
    if (DOUBLE) {
        y = splat(4.4549605981865183938e-10);
        y = fma_(y, f, splat(7.0725859492692236999e-9));
        y = fma_(y, f, splat(1.0178062445845773521e-7));
        y = fma_(y, f, splat(1.3215442587921689653e-6));
        y = fma_(y, f, splat(1.5252733829836118394e-5));
        y = fma_(y, f, splat(1.5403530441736050155e-4));
        y = fma_(y, f, splat(1.333355814641693531e-3));
        y = fma_(y, f, splat(9.6181291076068885273e-3));
        y = fma_(y, f, splat(5.5504108664821594339e-2));
        y = fma_(y, f, splat(0.2402265069591009822));
        y = fma_(y, f, splat(0.69314718055994530942));
    } else {
        y = splat(1.5453162945120690e-4f);
        y = fma_(y, f, splat(1.3390863364671234e-3f));
        y = fma_(y, f, splat(9.6180825572778515e-3f));
        y = fma_(y, f, splat(5.5503571142190778e-2f));
        y = fma_(y, f, splat(0.24022650760568127f));
        y = fma_(y, f, splat(0.69314718802622878f));
    }
    return y * f;
}

FA_FAST vec power(base e, vec x) {
    vec scale, y = power_parts(e, x, &scale);
    return fma_(scale, y, scale);
}

/* With q = exp(-2|x|), tanh|x| is (1 - q) / (1 + q): near 0 from 1 - q, which loses no digits as
 * exp() - 1, and far from it as 1 - 2q / (1 + q), whose last rounding is then the only one. */
FA_FAST vec tanh_(base two_e, vec x) {
    const ivec sign = (ivec)splat(-(real)0);
    vec scale, y = power_parts(two_e, (vec)((ivec)x | sign), &scale);
    vec q = fma_(scale, y, scale), less = fma_(scale, y, scale - 1);
    const ivec far = q < (real)(1. / 3);
    vec part = pick(far, 2 * q, -less) / (1 + q);
    return (vec)((ivec)pick(far, 1 - part, part) | ((ivec)x & sign));
}

/* log2 of a positive normal number, or NaN: x = 2^n t, t near 1, z = (t - 1) / (t + 1), the odd
 * series of atanh(z), whose terms shrink by 34 each. */
FA_FAST vec log2_(vec x) {
    const int mantissa = DOUBLE ? 52 : 23;
    const FA_INT half = (FA_INT)(DOUBLE ? 0x3fe6a09e667f3bcd : 0x3f3504f3); /* sqrt(1/2) */
    ivec n = ((ivec)x - half) >> mantissa;
    vec t = (vec)((ivec)x - (n << mantissa));
    vec z = (t - 1) / (t + 1), w = z * z;
    const int last = DOUBLE ? 23 : 11;
    vec y = splat((real)(2 * FA_LOG2E / last));
#pragma GCC unroll 11
    for (int n = last - 2; n > 0; n -= 2) y = fma_(y, w, splat((real)(2 * FA_LOG2E / n)));
    return fma_(y, z, __builtin_convertvector(n, vec) + (x - x));
}
