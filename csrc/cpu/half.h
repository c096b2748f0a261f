/* half.h - float16 and bfloat16 in plain integer arithmetic, without branches on the way in so
 * that gcc can vectorise it. */
#ifndef FASTATTN_CPU_HALF_H
#define FASTATTN_CPU_HALF_H

#include <stdint.h>
#include <string.h>

static inline float fa_float_of_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline uint32_t fa_bits_of_float(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float fa_bf16_to_float(uint16_t x) { return fa_float_of_bits((uint32_t)x << 16); }

/* Round to nearest, ties to even; a NaN stays one. */
static inline uint16_t fa_float_to_bf16(float x) {
    uint32_t bits = fa_bits_of_float(x);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded);
}

static inline float fa_f16_to_float(uint16_t x) {
    uint32_t magnitude = x & 0x7fff;
    /* The product moves the exponent's bias, subnormals too. */
    float y = fa_float_of_bits(magnitude << 13) * 0x1p112f;
    uint32_t bits = fa_bits_of_float(y) | (magnitude >= 0x7c00 ? 0x7f800000 : 0);
    return fa_float_of_bits(bits | (uint32_t)(x & 0x8000) << 16);
}

static inline uint16_t fa_float_to_f16(float x) {
    uint32_t bits = fa_bits_of_float(x), sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (bits >= 0x477ff000) return (uint16_t)(sign | 0x7c00); /* 65520 and more round to inf */
    if (bits < 0x38800000) { /* 2^-14: + 1/2 leaves a subnormal's digits, rounded, at the end */
        float y = fa_float_of_bits(bits) + 0.5f;
        return (uint16_t)(sign | (fa_bits_of_float(y) - 0x3f000000));
    }
    bits += 0xfff + (bits >> 13 & 1); /* ties to even; a carry runs into the exponent, rightly */
    return (uint16_t)(sign | (bits - 0x38000000) >> 13);
}

#endif
