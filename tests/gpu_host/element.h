/* element.h - kernels/common/element.cuh on the host, in its place. */
#ifndef FASTATTN_ELEMENT_CUH
#define FASTATTN_ELEMENT_CUH

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "fastattn.h"

template <fa_dtype T>
struct element;

template <>
struct element<FA_F64> {
    typedef double stored;
    static double widen(double x) { return x; }
    static double narrow(double x) { return x; }
};

template <>
struct element<FA_F32> {
    typedef float stored;
    static float widen(float x) { return x; }
    static float narrow(float x) { return x; }
    static void unpack(float (&x)[1], uint32_t bits) { memcpy(x, &bits, 4); }
};

template <>
struct element<FA_F16> {
    typedef uint16_t stored;
    static float widen(uint16_t x) {
        _Float16 y;
        memcpy(&y, &x, 2);
        return (float)y;
    }
    static uint16_t narrow(float x) {
        const _Float16 y = (_Float16)x;
        uint16_t bits;
        memcpy(&bits, &y, 2);
        return bits;
    }
    static void unpack(float (&x)[2], uint32_t bits) {
        x[0] = widen((uint16_t)bits);
        x[1] = widen((uint16_t)(bits >> 16));
    }
};

template <>
struct element<FA_BF16> {
    typedef uint16_t stored;
    static float widen(uint16_t x) {
        uint32_t bits = (uint32_t)x << 16;
        float y;
        memcpy(&y, &bits, 4);
        return y;
    }
    static uint16_t narrow(float x) {
        uint32_t bits;
        memcpy(&bits, &x, 4);
        if (x != x) return 0x7FFF;
        return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
    }
    static void unpack(float (&x)[2], uint32_t bits) {
        x[0] = widen((uint16_t)bits);
        x[1] = widen((uint16_t)(bits >> 16));
    }
};

template <typename T>
struct alignas(2 * sizeof(T)) pair_of {
    T x[2];
};

/* An address that a GPU would refuse ends the test. */
template <int WORDS>
static void load_once(uint32_t (&x)[WORDS], const void *from) {
    if ((uintptr_t)from % sizeof x) abort();
    memcpy(x, from, sizeof x);
}

#endif
