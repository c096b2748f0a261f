/* ptx.cuh - one instruction of sm_80, one function, the PTX name kept.
 *
 * tests/gpu_host/portable.h stands in for it on the host.
 */
#ifndef FASTATTN_SM80_PTX_CUH
#define FASTATTN_SM80_PTX_CUH

#include <stdint.h>

#include "common/stream.cuh"
#include "dtype.h"

DEVICE uint32_t smem_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

/* ---- copies into shared memory ----------------------------------------------------------------*/

/* The first `bytes` of BYTES, and zeros. */
template <int BYTES>
DEVICE void cp_async_or_zero(uint32_t smem, const void *from, uint32_t bytes) {
    if (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem), "l"(from),
                     "r"(bytes)
                     : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(smem), "l"(from),
                     "r"(bytes), "n"(BYTES)
                     : "memory");
}
DEVICE void cp_async_16(uint32_t smem, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(smem), "l"(from) : "memory");
}
DEVICE void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/* All but the last N groups of this thread's copies have come. */
template <int N>
DEVICE void cp_async_wait_group() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

DEVICE void st_shared(uint32_t smem, uint16_t x) {
    asm volatile("st.shared.b16 [%0], %1;" ::"r"(smem), "h"(x) : "memory");
}
DEVICE void st_shared(uint32_t smem, float x) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(smem), "f"(x) : "memory");
}
DEVICE void st_shared(uint32_t smem, double x) {
    asm volatile("st.shared.f64 [%0], %1;" ::"r"(smem), "d"(x) : "memory");
}

/* ---- and out of it ----------------------------------------------------------------------------*/

/* Four matrices of 8 rows of 16 bytes: lanes 8i .. 8i + 7 give the rows of the i-th, and lane
 * 4r + c gets 4 bytes, c, of row r of each. */
DEVICE void ldmatrix_x4(uint32_t (&x)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.x4.m8n8.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(row)
                 : "memory");
}
/* Each of them, of 8 x 8 pairs of bytes, transposed. */
DEVICE void ldmatrix_x4_trans(uint32_t (&x)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.x4.trans.m8n8.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(row)
                 : "memory");
}
DEVICE uint32_t ld_shared(uint32_t smem) {
    uint32_t x;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(smem) : "memory");
    return x;
}
DEVICE double2 ld_shared_f64x2(uint32_t smem) {
    double2 x;
    asm volatile("ld.shared.v2.f64 {%0, %1}, [%2];" : "=d"(x.x), "=d"(x.y) : "r"(smem) : "memory");
    return x;
}

/* ---- tensor cores -----------------------------------------------------------------------------*/

/* 16 x 8 += 16 x 16 times 16 x 8. */
template <fa_dtype T>
DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if (T == FA_BF16)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
            "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
            "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
/* 16 x 8 += 16 x 8 times 8 x 8, of floats whose lowest 13 bits do not count. */
DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* ---- arithmetic -------------------------------------------------------------------------------*/

/* Rounded to 16 bits, the first in the low half. */
template <fa_dtype T>
DEVICE uint32_t cvt_pack(float low, float high) {
    uint32_t x;
    if (T == FA_BF16)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
    return x;
}
DEVICE float ex2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#endif
