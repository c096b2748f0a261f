/* ptx.cuh - one Hopper instruction, one function, the PTX name kept: all but what depends on the
 * dtype, which is in wgmma.cuh.
 *
 * Shared-memory addresses are 32-bit (`smem_address`), barriers are addresses of 8-byte mbarriers.
 */
#ifndef FASTATTN_SM90_PTX_CUH
#define FASTATTN_SM90_PTX_CUH

#include <stdint.h>

#include "common/stream.cuh"

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

/* ---- counters in global memory that blocks of threads wait for --------------------------------
 */

DEVICE int32_t load_acquire(const int32_t *from) {
    int32_t x;
    asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
    return x;
}
/* Behind all that this thread has seen written. */
DEVICE void red_release_add(int32_t *to, int32_t x) {
    asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(to), "r"(x) : "memory");
}

/* ---- named barriers: `id` 1 .. 15, `threads` of them ----------------------------------------- */

DEVICE void bar_sync(uint32_t id, uint32_t threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
/* Counts towards the barrier without waiting for it. */
DEVICE void bar_arrive(uint32_t id, uint32_t threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/* ---- clusters: blocks that reach each other's shared memory ---------------------------------- */

/* All threads of all blocks have come; what they wrote is there for the others. */
DEVICE void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
/* The same place in the block of this rank. */
DEVICE uint32_t mapa(uint32_t smem, uint32_t rank) {
    uint32_t x;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(x) : "r"(smem), "r"(rank));
    return x;
}
DEVICE void mbarrier_arrive_cluster(uint32_t barrier) {
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier)
                 : "memory");
}
/* Four bytes, which the barrier there counts. */
DEVICE void st_async(uint32_t to, uint32_t x, uint32_t barrier) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to),
        "r"(x), "r"(barrier)
        : "memory");
}
/* `bytes` of this block's, to the block that has `to` and the barrier. */
DEVICE void cp_async_bulk_cluster(uint32_t to, uint32_t smem, uint32_t bytes, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, "
        "[%3];" ::"r"(to),
        "r"(smem), "r"(bytes), "r"(barrier)
        : "memory");
}
DEVICE float ld_cluster(uint32_t at) {
    float x;
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(at) : "memory");
    return x;
}
DEVICE float4 ld_cluster_v4(uint32_t at) {
    float4 x;
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "r"(at)
                 : "memory");
    return x;
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
/* Adds `bytes` of floats that lie side by side, in no order of theirs and others'. */
DEVICE void cp_reduce_async_bulk_add(float *to, uint32_t smem, uint32_t bytes) {
    asm volatile(
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
        "r"(smem), "r"(bytes)
        : "memory");
}
/* Four floats side by side, on 16 bytes, added to memory; in no order. */
DEVICE void red_add_v4(float *to, float x, float y, float z, float w) {
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x),
                 "f"(y), "f"(z), "f"(w)
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
/* What this thread knows of global memory the copy engine does, too. */
DEVICE void fence_proxy_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
/* Ordinary writes to shared memory become visible to wgmma and the copy engine. */
DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/* A thread's own copy: BYTES arrive by themselves, at the latest when it has waited. */
template <int BYTES>
DEVICE void cp_async(uint32_t smem, const void *from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(smem), "l"(from), "n"(BYTES)
                 : "memory");
}
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
/* This thread arrives when its copies so far have come. */
DEVICE void cp_async_mbarrier_arrive(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
/* This thread's copies in groups: those since the last group become one; all but the last PENDING
 * groups have come. */
DEVICE void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
DEVICE void cp_async_wait_group() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
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

DEVICE float4 ld_shared_v4(uint32_t smem) {
    float4 x;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "r"(smem)
                 : "memory");
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
/* Each of them transposed. */
DEVICE void ldmatrix_x4_trans(uint32_t (&x)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.x4.trans.m8n8.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(row)
                 : "memory");
}

/* A matrix of 8 x 8 pairs of bytes, a row to four lanes, transposed. */
DEVICE uint32_t movmatrix_trans(uint32_t x) {
    uint32_t y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
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
/* `count` bits from bit `first` on. */
DEVICE uint32_t bit_mask(int32_t first, int32_t count) {
    uint32_t y;
    asm("bmsk.clamp.b32 %0, %1, %2;" : "=r"(y) : "r"(first), "r"(count));
    return y;
}

template <int N>
DEVICE void setmaxnreg_inc() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
DEVICE void setmaxnreg_dec() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

#endif
