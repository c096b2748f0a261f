/* units.h - the steps of products: numbers, or with FA_PAIRS pairs of bfloat16 (vdpbf16ps). Once
 * per instance (see simd.h). Included without a guard.
 */
#ifndef FASTATTN_CPU_UNITS_H
#define FASTATTN_CPU_UNITS_H

#define dot FN(dot)
#define multiply_units FN(multiply_units)
#define narrow FN(narrow)
#define pair FN(pair)
#define read_step FN(read_step)
#define read_units FN(read_units)
#define unit FN(unit)
#define units_of FN(units_of)
#define zip FN(zip)

#define STEP (FA_PAIRS ? 2 : 1) /* elements in a unit */

#endif

/* One step of a dot product as it lies in memory: the bits of a number, or of two bfloat16. */
typedef FA_INT unit __attribute__((may_alias, aligned(2)));

static inline int units_of(int elements) { return (elements + STEP - 1) / STEP; }

FA_FAST vec dot(vec a, vec b, vec c) {
#if FA_PAIRS
    return (vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#else
    return fma_(a, b, c);
#endif
}

/* What differs where a unit is a pair of bfloat16: a product that sums over the elements of a row
 * pairs these, one that sums over rows pairs two rows.
 *
 *   - read_units: n strided elements of a row -> contiguous units
 *   - read_step: one row, or with pairs two of them zipped -> units; a NULL row counts as zeros
 *   - zip: vectors of such a step, of rows that lie `stride` elements apart
 *   - multiply_units: n elements in units times 1 or -1
 *   - pair: x and y rounded to bfloat16, zipped: x0 y0 x1 y1 ...
 *   - narrow: the same one after the other: x0 x1 ... y0 y1 ...
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

FA_FAST void zip(vec *to, const unit *rows, int step, int64_t stride, int column, int vectors) {
    const uint16_t *x = (const uint16_t *)rows + 2 * step * stride + column, *y = x + stride;
    const __m512i low =
        (__m512i)(__v32hi){0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                           8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i high = (__m512i)((__v32hi)low + 16);
    if (vectors == 1) { /* half a vector of each row */
        const __m512i a = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)x));
        const __m512i b = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)y));
        to[0] = (vec)_mm512_permutex2var_epi16(a, low, b);
        return;
    }
#pragma GCC unroll 4
    for (int i = 0; i < vectors; i += 2) {
        const __m512i a = _mm512_loadu_si512(x + 16 * i), b = _mm512_loadu_si512(y + 16 * i);
        to[i] = (vec)_mm512_permutex2var_epi16(a, low, b);
        to[i + 1] = (vec)_mm512_permutex2var_epi16(a, high, b);
    }
}

FA_LOCAL void multiply_units(real *units, real factor, int n) {
    uint16_t *x = (uint16_t *)units;
    for (int i = 0; i < n; i++) x[i] = fa_float_to_bf16(fa_bf16_to_float(x[i]) * factor);
}

FA_FAST vec narrow(vec x, vec y) { return (vec)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x); }

FA_FAST vec pair(vec x, vec y) {
    const __m512i order =
        (__m512i)(__v32hi){0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                           8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return (vec)_mm512_permutexvar_epi16(order, (__m512i)narrow(x, y));
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

FA_FAST void zip(vec *to, const unit *rows, int step, int64_t stride, int column, int vectors) {
    (void)to, (void)rows, (void)step, (void)stride, (void)column, (void)vectors;
}

FA_LOCAL void multiply_units(real *units, real factor, int n) {
    for (int i = 0; i < n; i++) units[i] *= factor;
}

FA_FAST vec narrow(vec x, vec y) {
    (void)y;
    return x;
}

FA_FAST vec pair(vec x, vec y) { return narrow(x, y); }
#endif
