/* rows.h - rows of arrays to and from contiguous numbers, and transposing, once per instance (see
 * simd.h). Included without a guard.
 */
#ifndef FASTATTN_CPU_ROWS_H
#define FASTATTN_CPU_ROWS_H

#define read_row FN(read_row)
#define transpose FN(transpose)
#define write_row FN(write_row)

#endif

/* Transposes a square of LANES x LANES numbers: log2(LANES) rounds that interleave row i with row
 * i + LANES/2. Strides count numbers. */
FA_LOCAL void transpose(real *to, int64_t to_stride, const real *from, int64_t from_stride) {
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

/* Numbers as the caller's arrays have them that are reals of this instance, side by side. */
#define is_plain(type, stride) ((type) == (DOUBLE ? FA_F64 : FA_F32) && (stride) == 1)

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
FA_LOCAL void read_row(real *to, const void *from, fa_dtype type, int64_t stride, int n) {
    if (is_plain(type, stride)) { /* rows are short: no call of memcpy() */
        const real *x = from;
        int i = 0;
        for (; i + LANES <= n; i += LANES) memcpy(to + i, x + i, sizeof(vec));
        for (; i < n; i++) to[i] = x[i];
        return;
    }
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

/* n contiguous reals -> strided elements of `type`. */
FA_LOCAL void write_row(void *to, fa_dtype type, int64_t stride, const real *from, int n) {
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
    } else if (type == (DOUBLE ? FA_F64 : FA_F32)) {
        real *x = to;
        if (stride == 1)
            memcpy(x, from, (size_t)n * sizeof(real));
        else
            for (int i = 0; i < n; i++) x[i * stride] = from[i];
    } else if (type == FA_F64) {
        for (int i = 0; i < n; i++) ((double *)to)[i * stride] = (double)from[i];
    } else {
        for (int i = 0; i < n; i++) ((float *)to)[i * stride] = (float)from[i];
    }
}
