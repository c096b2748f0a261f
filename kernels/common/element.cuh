/* element.cuh - elements of the float formats: to float and back (float64: itself), and as many as
 * one load brings. Any architecture from sm_80 on. */
#ifndef FASTATTN_ELEMENT_CUH
#define FASTATTN_ELEMENT_CUH

#include "common/stream.cuh"
#include "dtype.h"

/* How an element is stored, what it means, and what the elements of 32 bits mean, the first in the
 * low half. */
template <fa_dtype T>
struct element;

template <>
struct element<FA_F64> {
    typedef double stored;
    DEVICE double widen(double x) { return x; }
    DEVICE double narrow(double x) { return x; }
};

template <>
struct element<FA_F32> {
    typedef float stored;
    DEVICE float widen(float x) { return x; }
    DEVICE float narrow(float x) { return x; }
    DEVICE void unpack(float (&x)[1], uint32_t bits) { x[0] = __uint_as_float(bits); }
};

template <>
struct element<FA_BF16> {
    typedef uint16_t stored;
    DEVICE float widen(uint16_t x) { return __uint_as_float((uint32_t)x << 16); }
    DEVICE uint16_t narrow(float x) {
        uint16_t y;
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
        return y;
    }
    DEVICE void unpack(float (&x)[2], uint32_t bits) {
        x[0] = __uint_as_float(bits << 16);
        x[1] = __uint_as_float(bits & 0xFFFF0000);
    }
};

template <>
struct element<FA_F16> {
    typedef uint16_t stored;
    DEVICE float widen(uint16_t x) {
        float y;
        asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
        return y;
    }
    DEVICE uint16_t narrow(float x) {
        uint16_t y;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
        return y;
    }
    DEVICE void unpack(float (&x)[2], uint32_t bits) {
        x[0] = widen((uint16_t)bits);
        x[1] = widen((uint16_t)(bits >> 16));
    }
};

/* Two neighbours, aligned so that they are read or written at once. */
template <typename T>
struct alignas(2 * sizeof(T)) pair_of {
    T x[2];
};

/* 16, 8 or 4 bytes, aligned so, that are read once: the L1 keeps nothing of them. */
DEVICE void load_once(uint32_t (&x)[4], const void *from) {
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "l"(from));
}
DEVICE void load_once(uint32_t (&x)[2], const void *from) {
    asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
                 : "=r"(x[0]), "=r"(x[1])
                 : "l"(from));
}
DEVICE void load_once(uint32_t (&x)[1], const void *from) {
    asm volatile("ld.global.L1::no_allocate.u32 %0, [%1];" : "=r"(x[0]) : "l"(from));
}

#endif
