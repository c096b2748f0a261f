/* ptx.cuh - one Hopper instruction, one function, the PTX name kept.
 *
 * Included by kernels/sm90_*.cu, which define FA_PTX_TYPE ("bf16" or "f16") first; includes
 * nothing. Shared-memory addresses are 32-bit (`smem_address`), barriers are addresses of 8-byte
 * mbarriers.
 */
#ifndef FASTATTN_PTX_SM90_CUH
#define FASTATTN_PTX_SM90_CUH

#include <stdint.h>

#define DEVICE static __device__ __forceinline__

DEVICE uint32_t smem_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

/* ---- mbarriers: a phase ends when `count` arrivals and all expected bytes are there ---------- */

DEVICE void mbarrier_init(uint32_t barrier, uint32_t count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
DEVICE void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
DEVICE void mbarrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
DEVICE void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}
/* Returns once the phase of this parity has ended. */
DEVICE void mbarrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra ready;\nbra again;\nready:\n}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}
/* Whether it has. */
DEVICE bool mbarrier_test(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    asm volatile(
        "{\n.reg .pred done;\n"
        "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    return done;
}

/* ---- named barriers: `id` 1 .. 15, `threads` of them ----------------------------------------- */

DEVICE void bar_sync(uint32_t id, uint32_t threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
/* Counts towards the barrier without waiting for it. */
DEVICE void bar_arrive(uint32_t id, uint32_t threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/* ---- the copy engine: 4-dimensional boxes {columns, rows, head, batch} ----------------------- */

/* Cache policies as createpolicy makes them: Q is read once, K and V by every tile of a head. */
static constexpr uint64_t EVICT_FIRST = 0x12F0000000000000, EVICT_LAST = 0x14F0000000000000,
                          EVICT_NORMAL = 0x1000000000000000;

DEVICE void prefetch_tensormap(const void *map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
DEVICE void cp_async_bulk_tensor_load(uint32_t smem, const void *map, int32_t column, int32_t row,
                                      int32_t head, int32_t batch, uint32_t barrier,
                                      uint64_t policy) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".L2::cache_hint [%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(smem),
        "l"(map), "r"(column), "r"(row), "r"(head), "r"(batch), "r"(barrier), "l"(policy)
        : "memory");
}
/* `bytes` that lie side by side; all addresses and the number in units of 16. */
DEVICE void cp_async_bulk_load(uint32_t smem, const void *from, uint32_t bytes, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
        "[%3];" ::"r"(smem),
        "l"(from), "r"(bytes), "r"(barrier)
        : "memory");
}
DEVICE void cp_async_bulk_tensor_store(const void *map, uint32_t smem, int32_t column, int32_t row,
                                       int32_t head, int32_t batch) {
    asm volatile(
        "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::"l"(
            map),
        "r"(column), "r"(row), "r"(head), "r"(batch), "r"(smem)
        : "memory");
}
DEVICE void cp_async_bulk_commit_group() {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
/* The sources of this thread's stores have been read: their shared memory may be written again. */
DEVICE void cp_async_bulk_wait_group_read() {
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
/* This thread's stores have been made. */
DEVICE void cp_async_bulk_wait_group() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
/* Ordinary writes to shared memory become visible to wgmma and the copy engine. */
DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/* A thread's own copy: BYTES arrive by themselves, at the latest when it has waited. */
template <int BYTES>
DEVICE void cp_async(uint32_t smem, const void *from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(smem), "l"(from), "n"(BYTES)
                 : "memory");
}
DEVICE void cp_async_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

/* What no kernel writes meanwhile. */
DEVICE uint4 load_v4(const void *from) {
    uint4 x;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(from));
    return x;
}
DEVICE uint32_t load_u32(const void *from) {
    uint32_t x;
    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(x) : "l"(from));
    return x;
}
DEVICE uint32_t load_u16(const void *from) {
    uint16_t x;
    asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(x) : "l"(from));
    return x;
}

DEVICE void st_shared(uint32_t smem, uint32_t x) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(smem), "r"(x) : "memory");
}
DEVICE void st_shared_b16(uint32_t smem, uint16_t x) {
    asm volatile("st.shared.b16 [%0], %1;" ::"r"(smem), "h"(x) : "memory");
}
DEVICE void st_shared_v4(uint32_t smem, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};"
                 :
                 : "r"(smem), "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}

DEVICE uint32_t ld_shared(uint32_t smem) {
    uint32_t x;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(smem) : "memory");
    return x;
}
DEVICE float2 ld_shared_v2(uint32_t smem) {
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(smem) : "memory");
    return x;
}

DEVICE void stmatrix_x4(uint32_t smem, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("stmatrix.sync.aligned.x4.m8n8.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem),
                 "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}

/* Four matrices of 8 x 8 pairs of bytes: lanes 8i .. 8i + 7 give the rows of the i-th. */
DEVICE void ldmatrix_x4(uint32_t (&x)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.x4.m8n8.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(row)
                 : "memory");
}

/* ---- arithmetic -------------------------------------------------------------------------------*/

DEVICE float ex2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float rcp_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
/* Two floats rounded and packed, `low` in the low half (PTX names the high half first). */
DEVICE uint32_t cvt_pack(float low, float high) {
    uint32_t y;
    asm("cvt.rn." FA_PTX_TYPE "x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

/* `count` bits from bit `first` on. */
DEVICE uint32_t bit_mask(int32_t first, int32_t count) {
    uint32_t y;
    asm("bmsk.clamp.b32 %0, %1, %2;" : "=r"(y) : "r"(first), "r"(count));
    return y;
}

/* a * b + c on pairs of 16 bits. */
DEVICE uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t y;
    asm("fma.rn." FA_PTX_TYPE "x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
    return y;
}

/* threadIdx.x, read where it is asked for: what is computed from it is not kept around a loop, in
 * registers that the loop needs. */
DEVICE int32_t thread_here() {
    int32_t x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return x;
}

/* For an x that is never 0: a store that never happens. What x is made of is worked out before it;
 * else ptxas does so where registers are fewest, behind the wait that was to hide it. (A branch
 * there would cost wgmma its pipeline.) */
DEVICE void work_out(uint32_t x) {
    asm volatile(
        "{\n.reg .pred never;\nsetp.eq.u32 never, %0, 0;\n"
        "@never st.shared.u32 [%0], %0;\n}" ::"r"(x)
        : "memory");
}

template <int N>
DEVICE void setmaxnreg_inc() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
DEVICE void setmaxnreg_dec() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

/* ---- wgmma: 64 x N += 64 x 16 times 16 x N, by the four warps of a warpgroup ----------------- */

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
DEVICE void wgmma_wait_group() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
/* Keeps the compiler from moving uses of the accumulators across a wait. */
template <int N>
DEVICE void wgmma_accumulators(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
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
#define WGMMA(N, NAMES, REGISTERS, n0, n1, n2, n3, n4, n5)                                         \
    template <>                                                                                    \
    __device__ __forceinline__ void wgmma_ss<N>(float (&d)[N / 2], uint64_t a, uint64_t b,         \
                                                int accumulate) {                                  \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #n2                                      \
                     ", 0;\n"                                                                      \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." FA_PTX_TYPE "." FA_PTX_TYPE \
                     " {" NAMES "}, %" #n0 ", %" #n1 ", p, 1, 1, 0, 0;\n}"                         \
                     : LIST REGISTERS                                                              \
                     : "l"(a), "l"(b), "r"(accumulate));                                           \
    }                                                                                              \
    template <>                                                                                    \
    __device__ __forceinline__ void wgmma_rs<N>(float (&d)[N / 2], const uint32_t (&a)[4],         \
                                                uint64_t b, int accumulate) {                      \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #n5                                      \
                     ", 0;\n"                                                                      \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." FA_PTX_TYPE "." FA_PTX_TYPE \
                     " {" NAMES "}, {%" #n0 ",%" #n1 ",%" #n2 ",%" #n3 "}, %" #n4                  \
                     ", p, 1, 1, 1;\n}"                                                            \
                     : LIST REGISTERS                                                              \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));       \
    }

#define LIST(...) __VA_ARGS__
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
