/* hopper.h - a block of a Hopper kernel on the host: sm90/ptx.cuh, sm90/wgmma.cuh and
 * common/compiler.cuh over fibers.h. VARIANT_DTYPE and FIBERS come from whoever includes it.
 *
 * What instructions do, not how long they take: barriers and their phases, the copy engine and its
 * swizzle, wgmma and its descriptors. Products are computed as soon as they are issued or, if
 * `late`, when they are waited for: a kernel that is right both ways neither reads too early nor
 * gives away too soon. What it uses wrongly ends the process.
 */
#ifndef FASTATTN_TESTS_HOPPER_H
#define FASTATTN_TESTS_HOPPER_H

#include <cuda.h> /* include/cuda.h, beside this file */

#include "gpu.h"
#define FASTATTN_SM90_PTX_CUH
#define FASTATTN_SM90_WGMMA_CUH

/* ---- mbarriers --------------------------------------------------------------------------------*/

struct mbarrier {
    int32_t count, pending, bytes;
    uint32_t phases; /* that have ended */
};
static std::vector<mbarrier> mbarriers(sizeof raw / 8);
static mbarrier &barrier_at(uint32_t address) {
    shared_at(address);
    return mbarriers[(address - SHARED_BASE) / 8];
}
static void end_phase(mbarrier &b) {
    if (b.pending < 0) abort();
    if (b.pending == 0 && b.bytes == 0) b.pending = b.count, ++b.phases;
}
static void mbarrier_init(uint32_t barrier, uint32_t count) {
    barrier_at(barrier) = {(int32_t)count, (int32_t)count, 0, 0};
}
static void fence_mbarrier_init() {}
static void mbarrier_arrive(uint32_t barrier) {
    --barrier_at(barrier).pending;
    end_phase(barrier_at(barrier));
}
static void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes) {
    barrier_at(barrier).bytes += (int32_t)bytes;
    mbarrier_arrive(barrier);
}
static void bytes_came(uint32_t barrier, uint32_t bytes) {
    barrier_at(barrier).bytes -= (int32_t)bytes;
    end_phase(barrier_at(barrier));
}
static bool mbarrier_test(uint32_t barrier, uint32_t parity) {
    if ((barrier_at(barrier).phases & 1) != parity) return true;
    yield();
    return false;
}
/* What other blocks have sent, if that waits for who waits for it (side_by_side.h). */
static void (*deliver)(uint32_t barrier);
static void mbarrier_wait(uint32_t barrier, uint32_t parity) {
    for (int64_t i = 0; (barrier_at(barrier).phases & 1) == parity; ++i) {
        if (deliver) deliver(barrier);
        if (i > 1000000) {
            fprintf(stderr, "thread %d waits for ever\n", current);
            abort();
        }
        yield();
    }
}

static int64_t named[16];
static void bar_arrive(uint32_t id, uint32_t) { ++named[id]; }
static void bar_sync(uint32_t id, uint32_t threads) {
    const int64_t end = (named[id]++ / threads + 1) * threads;
    while (named[id] < end) yield();
}

/* ---- the copy engine --------------------------------------------------------------------------*/

static constexpr uint64_t EVICT_FIRST = 0, EVICT_LAST = 1, EVICT_NORMAL = 2;

/* In place of a tensor map. */
struct host_map {
    uint8_t *data;
    int64_t shape[4], strides[4]; /* innermost first; bytes */
    int32_t columns, rows, bytes; /* of a box; of an element */
};
static_assert(sizeof(host_map) <= sizeof(CUtensorMap), "");

static CUresult encode_host(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *data,
                            const cuuint64_t *shape, const cuuint64_t *strides,
                            const cuuint32_t *box, const cuuint32_t *, CUtensorMapInterleave,
                            CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                            CUtensorMapFloatOOBfill) {
    const int32_t bytes = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 2;
    host_map m = {(uint8_t *)data, {}, {bytes}, (int32_t)box[0], (int32_t)box[1], bytes};
    if (rank != 4 || (uintptr_t)data % 16 || box[0] * bytes > 128 || box[0] * bytes % 16 ||
        box[1] > 256 || box[2] * box[3] != 1 || swizzle != CU_TENSOR_MAP_SWIZZLE_128B)
        return CUDA_ERROR_INVALID_VALUE;
    for (int i = 0; i < 4; ++i) {
        if (shape[i] == 0 || (i && (strides[i - 1] % 16 || strides[i - 1] >> 40)))
            return CUDA_ERROR_INVALID_VALUE;
        m.shape[i] = (int64_t)shape[i];
        if (i) m.strides[i] = (int64_t)strides[i - 1];
    }
    memcpy((void *)map, &m, sizeof m);
    return CUDA_SUCCESS;
}

static uint32_t swizzled(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

/* Where an element of a box lies, or NULL: outside. */
static uint8_t *element_at(const host_map &m, int64_t column, int64_t row, int64_t head,
                           int64_t batch) {
    const int64_t at[4] = {column, row, head, batch};
    uint8_t *data = m.data;
    for (int i = 0; i < 4; ++i) {
        if (at[i] < 0 || at[i] >= m.shape[i]) return NULL;
        data += at[i] * m.strides[i];
    }
    return data;
}
static void cp_async_bulk_tensor_load(uint32_t smem, const void *map, int32_t column, int32_t row,
                                      int32_t head, int32_t batch, uint32_t barrier, uint64_t) {
    const host_map &m = *(const host_map *)map;
    if (smem % 1024) abort();
    for (int i = 0; i < m.rows; ++i)
        for (int j = 0; j < m.columns; ++j) {
            const uint8_t *from = element_at(m, column + j, row + i, head, batch);
            uint8_t *to = shared_at(swizzled(smem + i * 128 + j * m.bytes));
            if (from)
                memcpy(to, from, m.bytes);
            else
                memset(to, 0, m.bytes);
        }
    bytes_came(barrier, m.rows * m.columns * m.bytes);
}
static void cp_async_bulk_tensor_store(const void *map, uint32_t smem, int32_t column, int32_t row,
                                       int32_t head, int32_t batch) {
    const host_map &m = *(const host_map *)map;
    if (smem % 1024) abort();
    for (int i = 0; i < m.rows; ++i)
        for (int j = 0; j < m.columns; ++j)
            if (uint8_t *to = element_at(m, column + j, row + i, head, batch))
                memcpy(to, shared_at(swizzled(smem + i * 128 + j * m.bytes)), m.bytes);
}
/* A thread's sums: at once or, if `late`, read and added when that is waited for. */
struct bulk_sum {
    float *to;
    uint32_t smem, bytes;
    std::vector<float> read;
};
static std::vector<bulk_sum> bulk_sums[FIBERS];

static void cp_reduce_async_bulk_add(float *to, uint32_t smem, uint32_t bytes) {
    if ((uintptr_t)to % 16 || smem % 16 || bytes % 16) abort();
    bulk_sums[current].push_back({to, smem, bytes, {}});
}
static void cp_async_bulk_wait_group_read() {
    for (bulk_sum &x : bulk_sums[current]) {
        if (!x.read.empty()) continue;
        x.read.resize(x.bytes / 4);
        memcpy(x.read.data(), shared_at(x.smem), x.bytes);
    }
}
static void cp_async_bulk_wait_group() {
    cp_async_bulk_wait_group_read();
    for (const bulk_sum &x : bulk_sums[current])
        for (size_t i = 0; i < x.read.size(); ++i) x.to[i] += x.read[i];
    bulk_sums[current].clear();
}
static void cp_async_bulk_commit_group() {
    if (!late) cp_async_bulk_wait_group();
}
static void red_add_v4(float *to, float x, float y, float z, float w) {
    to[0] += x, to[1] += y, to[2] += z, to[3] += w;
}
static void prefetch_tensormap(const void *) {}
static int64_t bulk_loads; /* so many so far */
static void cp_async_bulk_load(uint32_t smem, const void *from, uint32_t bytes, uint32_t barrier) {
    ++bulk_loads;
    if (smem % 16 || (uintptr_t)from % 16 || bytes % 16) abort();
    memcpy(shared_at(smem), from, bytes);
    bytes_came(barrier, bytes);
}
static void fence_proxy_async() {}
static void fence_proxy_async_global() {}

/* ---- ordinary instructions --------------------------------------------------------------------*/

static void st_shared_v4(uint32_t smem, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    const uint32_t x[4] = {a, b, c, d};
    memcpy(shared_at(smem), x, 16);
}
static void st_shared_b16(uint32_t smem, uint16_t x) { memcpy(shared_at(smem), &x, 2); }
static uint32_t ld_shared(uint32_t smem) {
    uint32_t x;
    memcpy(&x, shared_at(smem), 4);
    return x;
}
static float2 ld_shared_v2(uint32_t smem) {
    float2 x;
    memcpy(&x, shared_at(smem), 8);
    return x;
}
static float4 ld_shared_v4(uint32_t smem) {
    float4 x;
    memcpy(&x, shared_at(smem), 16);
    return x;
}
static int32_t load_acquire(const int32_t *from) {
    yield();
    return *from;
}
static void red_release_add(int32_t *to, int32_t x) { *to += x; }
template <int N>
static void setmaxnreg_inc() {}
template <int N>
static void setmaxnreg_dec() {}

/* Lane 4 r + c has columns 2 c of row r of each of four matrices; lane 8 i + r the address of row r
 * of the i-th. */
static void stmatrix_x4(uint32_t smem, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    const uint32_t x[4] = {a, b, c, d};
    const int lane = current % 32;
    const uint64_t *rows = exchange((uint64_t)smem);
    uint32_t to[4];
    for (int i = 0; i < 4; ++i) to[i] = (uint32_t)rows[8 * i + lane / 4] + lane % 4 * 4;
    for (int i = 0; i < 4; ++i) memcpy(shared_at(to[i]), &x[i], 4);
    __syncwarp();
}

static uint32_t movmatrix_trans(uint32_t x) {
    const int lane = current % 32;
    const uint64_t *all = exchange((uint64_t)x);
    uint32_t y = 0;
    for (int i = 0; i < 2; ++i) { /* row lane / 4, columns lane % 4 * 2 and the next */
        const int row = lane % 4 * 2 + i, column = lane / 4;
        y |= (uint32_t)(all[4 * row + column / 2] >> 16 * (column % 2) & 0xffff) << 16 * i;
    }
    return y;
}
static uint32_t load_u32(const void *from) {
    uint32_t x;
    memcpy(&x, from, 4);
    return x;
}
static uint32_t load_u16(const void *from) {
    uint16_t x;
    memcpy(&x, from, 2);
    return x;
}

/* ---- elements ---------------------------------------------------------------------------------*/

static float widen(uint16_t x) { return element<VARIANT_DTYPE>::widen(x); }
static uint32_t cvt_pack(float low, float high) {
    return element<VARIANT_DTYPE>::narrow(low) | (uint32_t)element<VARIANT_DTYPE>::narrow(high)
                                                     << 16;
}

static uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t y = 0;
    for (int i = 0; i < 32; i += 16)
        y |= (uint32_t)element<VARIANT_DTYPE>::narrow(fmaf(
                 widen((uint16_t)(a >> i)), widen((uint16_t)(b >> i)), widen((uint16_t)(c >> i))))
             << i;
    return y;
}

/* ---- wgmma ------------------------------------------------------------------------------------*/

static uint64_t wgmma_descriptor(uint32_t smem, uint32_t panel) {
    return (uint64_t)((smem & 0x3FFFF) >> 4) | (uint64_t)panel << 16 | 64ull << 32 | 1ull << 62;
}

/* Element (line, k) of an operand: its k lie along the rows, or across them. */
static float operand_at(uint64_t descriptor, int line, int k, bool across) {
    const uint32_t start = (uint32_t)(descriptor & 0x3FFF) << 4;
    const uint32_t panel = (uint32_t)(descriptor >> 16 & 0x3FFF) << 4;
    const uint32_t eight = (uint32_t)(descriptor >> 32 & 0x3FFF) << 4;
    const uint32_t at =
        across ? start + line / 64 * panel + k / 8 * eight + k % 8 * 128 + line % 64 * 2
               : start + line / 8 * eight + line % 8 * 128 + k * 2;
    uint16_t x;
    memcpy(&x, shared_at(swizzled(at)), 2);
    return widen(x);
}

struct product {
    float *d;
    const uint32_t *a_registers; /* or NULL: */
    uint64_t a, b;
    int n;
    bool a_across, b_across, accumulate; /* its k lie across its rows, not along them */
};
/* A thread's products that have been issued and not computed, and groups that it has ended. */
struct thread_products {
    std::vector<product> issued;
    std::vector<size_t> ends; /* of groups, in all that were ever issued */
    size_t done;              /* of these */
};
static thread_products products[FIBERS];

/* This thread's part of a product, of A's two rows. */
static void multiply(const product &p, const float (&a)[2][16], int lane) {
    for (int j = 0; j < p.n / 8; ++j)
        for (int e = 0; e < 2; ++e) {
            float b[16];
            for (int k = 0; k < 16; ++k)
                b[k] = operand_at(p.b, 8 * j + lane % 4 * 2 + e, k, p.b_across);
            for (int r = 0; r < 2; ++r) {
                float &d = p.d[4 * j + 2 * r + e], sum = p.accumulate ? d : 0.f;
                for (int k = 0; k < 16; ++k) sum += a[r][k] * b[k];
                d = sum;
            }
        }
}
/* Register i of lane c of a quad has columns of A's row i % 2. */
static void unpack_row(float (&a)[2][16], int i, int c, uint32_t x) {
    a[i % 2][i / 2 * 8 + 2 * c] = widen((uint16_t)x);
    a[i % 2][i / 2 * 8 + 2 * c + 1] = widen((uint16_t)(x >> 16));
}
static void load_a(float (&a)[2][16], const product &p, int thread) {
    for (int r = 0; r < 2; ++r)
        for (int k = 0; k < 16; ++k)
            a[r][k] =
                operand_at(p.a, thread / 32 % 4 * 16 + thread % 32 / 4 + 8 * r, k, p.a_across);
}

static void issue(const product &p) {
    if (late) {
        for (int i = 0; i < p.n / 2 && !p.accumulate; ++i) p.d[i] = NAN; /* not to be read yet */
        products[current].issued.push_back(p);
        return;
    }
    float a[2][16];
    if (!p.a_registers) load_a(a, p, current);
    for (int i = 0; i < 4 && p.a_registers; ++i) {
        const uint64_t *all = exchange((uint64_t)p.a_registers[i]);
        for (int c = 0; c < 4; ++c) unpack_row(a, i, c, (uint32_t)all[current % 32 / 4 * 4 + c]);
    }
    multiply(p, a, current % 32);
}
/* The product of this number, of one thread. */
static void compute(int thread, size_t number) {
    const product &p = products[thread].issued[number];
    float a[2][16];
    if (!p.a_registers) load_a(a, p, thread);
    for (int i = 0; i < 4 && p.a_registers; ++i)
        for (int c = 0; c < 4; ++c)
            unpack_row(a, i, c, products[thread / 4 * 4 + c].issued[number].a_registers[i]);
    multiply(p, a, thread % 32);
}
static void wgmma_fence() { __syncwarp(); }
static void wgmma_commit_group() {
    products[current].ends.push_back(products[current].issued.size());
}
/* What one warp has waited for, all four have: CUTLASS, too, has one thread hand back what a
 * warpgroup has read. */
template <int PENDING>
static void wgmma_wait_group() {
    const size_t groups = products[current].ends.size();
    if (groups <= PENDING) return;
    const size_t last = groups - PENDING, end = products[current].ends[last - 1];
    const int first = current / 128 * 128;
    for (int t = first; t < first + 128; ++t)
        while (products[t].ends.size() < last) yield();
    for (int t = first; t < first + 128; ++t) {
        for (size_t i = products[t].done; i < end; ++i) compute(t, i);
        if (products[t].done < end) products[t].done = end;
    }
}
template <int N>
static void wgmma_ss(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
    issue({d, NULL, a, b, N, false, false, accumulate != 0});
}
template <int N>
static void wgmma_tt(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
    issue({d, NULL, a, b, N, true, true, accumulate != 0});
}
template <int N>
static void wgmma_st(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
    issue({d, NULL, a, b, N, false, true, accumulate != 0});
}
template <int N>
static void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {
    issue({d, a, 0, b, N, false, true, accumulate != 0});
}
template <int N>
static void wgmma_accumulators(float (&)[N]) {}

/* A block begins. */
static void start_block() {
    memset(raw, 0xFF, sizeof raw);
    memset(named, 0, sizeof named);
    for (auto &p : products) p = {};
}

/* ---- launches ---------------------------------------------------------------------------------*/

typedef CUresult (*fa_encode_tiled)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                                    const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                                    const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                                    CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
typedef struct fa_device {
    int32_t sms, early;
    fa_encode_tiled encode;
    int32_t major, minor;
} fa_device;

#endif
