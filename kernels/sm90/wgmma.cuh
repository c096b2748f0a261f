/* wgmma.cuh - the tensor cores, and pairs of 16 bits, in the dtype of the variant.
 *
 * One instruction, one function, as ptx.cuh.
 */
#ifndef FASTATTN_SM90_WGMMA_CUH
#define FASTATTN_SM90_WGMMA_CUH

#include <stdint.h>

#include "common/stream.cuh"
#include "sm90/variant.h"

/* Two floats rounded and packed, `low` in the low half (PTX names the high half first). */
DEVICE uint32_t cvt_pack(float low, float high) {
    uint32_t y;
    asm("cvt.rn." PTX_TYPE "x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

/* a * b + c on pairs of 16 bits. */
DEVICE uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t y;
    asm("fma.rn." PTX_TYPE "x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
    return y;
}

/* ---- wgmma: 64 x N += 64 x 16 times 16 x N, by the four warps of a warpgroup ----------------- */

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
DEVICE void wgmma_wait_group() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
/* Descriptor of a 128-byte-swizzled operand whose panels of 64 columns start on 1024 bytes: 8 rows
 * are 1024 bytes, and `panel` (bytes / 16) leads to the next panel where one instruction spans
 * several (V); an operand with the k dimension along its rows ignores it (Q, K). */
DEVICE uint64_t wgmma_descriptor(uint32_t smem, uint32_t panel) {
    return (uint64_t)((smem & 0x3FFFF) >> 4) | (uint64_t)panel << 16 | 64ull << 32 | 1ull << 62;
}

/* wgmma_ss<N>: S = Q K^T, both in shared memory, both with k along their rows.
 * wgmma_rs<N>: O += P V, P in registers, V with k across its rows (transposed by the hardware).
 * Without `accumulate` the product replaces what d holds. */
template <int N>
DEVICE void wgmma_ss(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate);
template <int N>
DEVICE void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate);
/* wgmma_tt<N>: as wgmma_ss, both with k across their rows. */
template <int N>
DEVICE void wgmma_tt(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate);

/* wgmma_st<N>: A with k along its rows, B across. */
template <int N>
DEVICE void wgmma_st(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate);

/* Ten operands: their numbers in the string, the registers themselves. */
#define NUMBERS(t) \
    "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9"
#define D1(i) "+f"(d[i])
#define D2(t) D1(t##0), D1(t##1)
#define D4(t) D2(t), D1(t##2), D1(t##3)
#define D6(t) D4(t), D1(t##4), D1(t##5)
#define D8(t) D6(t), D1(t##6), D1(t##7)
#define D10(t) D8(t), D1(t##8), D1(t##9)
#define D30 D10(), D10(1), D10(2)
#define D60 D30, D10(3), D10(4), D10(5)
#define D90 D60, D10(6), D10(7), D10(8)
#define D120 D90, D10(9), D10(10), D10(11)
#define N30 NUMBERS() "," NUMBERS(1) "," NUMBERS(2) ","
#define N60 N30 NUMBERS(3) "," NUMBERS(4) "," NUMBERS(5) ","
#define N90 N60 NUMBERS(6) "," NUMBERS(7) "," NUMBERS(8) ","
#define N120 N90 NUMBERS(9) "," NUMBERS(10) "," NUMBERS(11) ","

/* WGMMA(N, numbers and registers of d, the numbers of the six operands behind them) */
#define WGMMA(N, NAMES, REGISTERS, n0, n1, n2, n3, n4, n5)                                   \
    template <>                                                                              \
    __device__ __forceinline__ void wgmma_ss<N>(float (&d)[N / 2], uint64_t a, uint64_t b,   \
                                                int accumulate) {                            \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #n2                                \
                     ", 0;\n"                                                                \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." PTX_TYPE "." PTX_TYPE \
                     " {" NAMES "}, %" #n0 ", %" #n1 ", p, 1, 1, 0, 0;\n}"                   \
                     : LIST REGISTERS                                                        \
                     : "l"(a), "l"(b), "r"(accumulate));                                     \
    }                                                                                        \
    template <>                                                                              \
    __device__ __forceinline__ void wgmma_tt<N>(float (&d)[N / 2], uint64_t a, uint64_t b,   \
                                                int accumulate) {                            \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #n2                                \
                     ", 0;\n"                                                                \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." PTX_TYPE "." PTX_TYPE \
                     " {" NAMES "}, %" #n0 ", %" #n1 ", p, 1, 1, 1, 1;\n}"                   \
                     : LIST REGISTERS                                                        \
                     : "l"(a), "l"(b), "r"(accumulate));                                     \
    }                                                                                        \
    template <>                                                                              \
    __device__ __forceinline__ void wgmma_st<N>(float (&d)[N / 2], uint64_t a, uint64_t b,   \
                                                int accumulate) {                            \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #n2                                \
                     ", 0;\n"                                                                \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." PTX_TYPE "." PTX_TYPE \
                     " {" NAMES "}, %" #n0 ", %" #n1 ", p, 1, 1, 0, 1;\n}"                   \
                     : LIST REGISTERS                                                        \
                     : "l"(a), "l"(b), "r"(accumulate));                                     \
    }                                                                                        \
    template <>                                                                              \
    __device__ __forceinline__ void wgmma_rs<N>(float (&d)[N / 2], const uint32_t (&a)[4],   \
                                                uint64_t b, int accumulate) {                \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #n5                                \
                     ", 0;\n"                                                                \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." PTX_TYPE "." PTX_TYPE \
                     " {" NAMES "}, {%" #n0 ",%" #n1 ",%" #n2 ",%" #n3 "}, %" #n4            \
                     ", p, 1, 1, 1;\n}"                                                      \
                     : LIST REGISTERS                                                        \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate)); \
    }

#define LIST(...) __VA_ARGS__
WGMMA(32, NUMBERS() ",%10,%11,%12,%13,%14,%15", (D10(), D6(1)), 16, 17, 18, 19, 20, 21)
WGMMA(64, N30 "%30,%31", (D30, D2(3)), 32, 33, 34, 35, 36, 37)
WGMMA(72, N30 "%30,%31,%32,%33,%34,%35", (D30, D6(3)), 36, 37, 38, 39, 40, 41)
WGMMA(80, N30 NUMBERS(3), (D30, D10(3)), 40, 41, 42, 43, 44, 45)
WGMMA(96, N30 NUMBERS(3) "," "%40,%41,%42,%43,%44,%45,%46,%47", (D30, D10(3), D8(4)), 48, 49, 50, 51, 52, 53)
WGMMA(112, N30 NUMBERS(3) "," NUMBERS(4) "," "%50,%51,%52,%53,%54,%55", (D30, D10(3), D10(4), D6(5)), 56, 57, 58, 59, 60, 61)
WGMMA(128, N60 "%60,%61,%62,%63", (D60, D4(6)), 64, 65, 66, 67, 68, 69)
WGMMA(160, N60 NUMBERS(6) "," NUMBERS(7), (D60, D10(6), D10(7)), 80, 81, 82, 83, 84, 85)
WGMMA(192, N90 "%90,%91,%92,%93,%94,%95", (D90, D6(9)), 96, 97, 98, 99, 100, 101)
WGMMA(256, N120 "%120,%121,%122,%123,%124,%125,%126,%127", (D120, D8(12)), 128, 129, 130, 131, 132,
      133)

#undef WGMMA
#undef LIST

#endif
