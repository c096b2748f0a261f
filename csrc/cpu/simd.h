/* simd.h - the vector operations that kernel.h is written in, once per instance.
 *
 * An instance is a level and a number type. It defines FA_NAME (its suffix), FA_REAL (float or
 * double), FA_INT (the integer of that size), FA_BYTES (of a vector), FA_X86 (which intrinsics it
 * may use: 0, 256 or 512) and FA_PAIRS (1: products of bfloat16 pairs). Every name below gets the
 * suffix, so that instances live side by side in one file.
 */
#ifndef FASTATTN_CPU_SIMD_H
#define FASTATTN_CPU_SIMD_H

#define FN(name) FA_JOIN(name, FA_NAME)
#define real FA_REAL
#define vec FN(vec)
#define ivec FN(ivec)
#define unit FN(unit)
#define base FN(base)
#define base_of FN(base_of)
#define dot FN(dot)
#define exponent FN(exponent)
#define fma_ FN(fma)
#define log2_ FN(log2)
#define max_ FN(max)
#define multiply_units FN(multiply_units)
#define pair FN(pair)
#define pick FN(pick)
#define power FN(power)
#define power_parts FN(power_parts)
#define read_row FN(read_row)
#define read_step FN(read_step)
#define read_units FN(read_units)
#define splat FN(splat)
#define tanh_ FN(tanh)
#define transpose FN(transpose)
#define write_row FN(write_row)

#define LANES (FA_BYTES / (int)sizeof(real))
#define DOUBLE (sizeof(real) == 8)
#define STEP (FA_PAIRS ? 2 : 1) /* elements in a unit */

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
/* One step of a dot product as it lies in memory: the bits of a number, or of two bfloat16. */
typedef FA_INT unit __attribute__((may_alias, aligned(2)));

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

FA_FAST vec dot(vec a, vec b, vec c) {
#if FA_PAIRS
    return (vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#else
    return fma_(a, b, c);
#endif
}

/* Lane by lane: a condition is all ones or all zeros. */
FA_FAST vec pick(ivec condition, vec yes, vec no) {
    return (vec)((condition & (ivec)yes) | (~condition & (ivec)no));
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

/* log2 of the base of a power, in two parts so that x * log2 loses nothing (in one, a power that is
 * all of a row's P, beside a sink, is off by 7e-7 of itself), and the x where the power becomes 0.
 */
typedef struct base {
    real high, low, floor;
} base;

static base base_of(double log2) {
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

/* Transposes a square of LANES x LANES numbers: log2(LANES) rounds that interleave row i with row
 * i + LANES/2. Strides count numbers. */
static void transpose(real *to, int64_t to_stride, const real *from, int64_t from_stride) {
    vec a[LANES], b[LANES];
    ivec low, high;
#pragma GCC unroll 16 /* all of it: what the shuffles do is then known to the compiler */
    for (int i = 0; i < LANES; i++) {
        low[i] = i / 2 + i % 2 * LANES;
        high[i] = low[i] + LANES / 2;
        memcpy(&a[i], from + i * from_stride, sizeof(vec));
    }
#pragma GCC unroll 4
    for (int round = 1; round < LANES; round *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; i++) {
            b[2 * i] = __builtin_shuffle(a[i], a[i + LANES / 2], low);
            b[2 * i + 1] = __builtin_shuffle(a[i], a[i + LANES / 2], high);
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) a[i] = b[i];
    }
    for (int i = 0; i < LANES; i++) memcpy(to + i * to_stride, &a[i], sizeof(vec));
}

/* n strided elements of `type` -> contiguous reals. */
#define READ(type, expression)                                           \
    do {                                                                 \
        const type *x = from;                                            \
        if (stride == 1) {                                               \
            for (int i = 0; i < n; i++, x++) to[i] = expression;         \
        } else {                                                         \
            for (int i = 0; i < n; i++, x += stride) to[i] = expression; \
        }                                                                \
    } while (0)
static void read_row(real *to, const void *from, fa_dtype type, int64_t stride, int n) {
    switch (type) {
        case FA_F64:
            READ(double, (real)*x);
            break;
        case FA_F32:
            READ(float, *x);
            break;
        case FA_BF16:
            READ(uint16_t, fa_bf16_to_float(*x));
            break;
        case FA_BOOL:
            READ(uint8_t, *x);
            break;
        case FA_F16: {
            const uint16_t *x = from;
            int i = 0;
#if FA_X86
            if (!DOUBLE && stride == 1)
                for (; i + 8 <= n; i += 8) {
                    __m256 y = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(x + i)));
                    memcpy(to + i, &y, sizeof y);
                }
#endif
            for (; i < n; i++) to[i] = fa_f16_to_float(x[i * stride]);
            break;
        }
    }
}
#undef READ

/* What differs where a unit is a pair of bfloat16: Q and K pair along d, V and P along keys.
 *
 * read_units      n strided elements of a row of Q or K -> contiguous units
 * read_step       one row of V, or with pairs two of them zipped -> units; a NULL row counts as
 * zeros multiply_units  n elements in units times 1 or -1
 */
#if FA_PAIRS
static void read_units(real *to, const void *from, fa_dtype type, int64_t stride, int n) {
    const uint16_t *x = from;
    uint16_t *y = (uint16_t *)to;
    (void)type;
    if (stride == 1)
        memcpy(y, x, (size_t)n * sizeof *x);
    else
        for (int i = 0; i < n; i++) y[i] = x[i * stride];
    if (n % 2) y[n] = 0;
}

static void read_step(real *to, const void *first, const void *second, fa_dtype type,
                      int64_t stride, int n) {
    const uint16_t *x = first, *y = second;
    uint16_t *z = (uint16_t *)to;
    (void)type;
    if (x && y && stride == 1) {
        for (int i = 0; i < n; i++) {
            z[2 * i] = x[i];
            z[2 * i + 1] = y[i];
        }
    } else {
        for (int i = 0; i < n; i++) {
            z[2 * i] = x ? x[i * stride] : 0;
            z[2 * i + 1] = y ? y[i * stride] : 0;
        }
    }
}

static void multiply_units(real *units, real factor, int n) {
    uint16_t *x = (uint16_t *)units;
    for (int i = 0; i < n; i++) x[i] = fa_float_to_bf16(fa_bf16_to_float(x[i]) * factor);
}

/* x and y rounded to bfloat16: x0 y0 x1 y1 ... */
FA_FAST vec pair(vec x, vec y) {
    const __m512i order =
        (__m512i)(__v32hi){0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                           8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return (vec)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x));
}
#else
static void read_units(real *to, const void *from, fa_dtype type, int64_t stride, int n) {
    read_row(to, from, type, stride, n);
}

static void read_step(real *to, const void *first, const void *second, fa_dtype type,
                      int64_t stride, int n) {
    (void)second;
    if (first)
        read_row(to, first, type, stride, n);
    else
        memset(to, 0, (size_t)n * sizeof *to);
}

static void multiply_units(real *units, real factor, int n) {
    for (int i = 0; i < n; i++) units[i] *= factor;
}

FA_FAST vec pair(vec x, vec y) {
    (void)y;
    return x;
}
#endif

/* n contiguous reals -> strided elements of `type`. */
static void write_row(void *to, fa_dtype type, int64_t stride, const real *from, int n) {
    if (type == FA_BF16) {
        uint16_t *x = to;
        for (int i = 0; i < n; i++) x[i * stride] = fa_float_to_bf16((float)from[i]);
    } else if (type == FA_F16) {
        uint16_t *x = to;
        int i = 0;
#if FA_X86
        if (!DOUBLE && stride == 1)
            for (; i + 8 <= n; i += 8) {
                __m256 y;
                memcpy(&y, from + i, sizeof y);
                _mm_storeu_si128((__m128i *)(x + i), _mm256_cvtps_ph(y, 0));
            }
#endif
        for (; i < n; i++) x[i * stride] = fa_float_to_f16((float)from[i]);
    } else {
        real *x = to; /* float for float32, double for float64 */
        if (stride == 1)
            memcpy(x, from, (size_t)n * sizeof(real));
        else
            for (int i = 0; i < n; i++) x[i * stride] = from[i];
    }
}
