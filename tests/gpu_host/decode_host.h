/* decode_host.h - hopper.h and what the decode kernel uses besides: mma.sync, ldmatrix, each
 * thread's own copies. `late`: loads come when somebody waits for them, and until then what is to
 * be written there is NaN.
 */
#ifndef FASTATTN_TESTS_DECODE_HOST_H
#define FASTATTN_TESTS_DECODE_HOST_H

#include <functional>
#include <map>

#include "hopper.h"
#define FASTATTN_SM90_MMA_CUH

/* ---- late loads -------------------------------------------------------------------------------*/

static std::map<uint32_t, std::vector<std::function<void()>>> on_their_way; /* by barrier */
static std::vector<std::function<void()>> own_copies[FIBERS];

static void let_come(uint32_t barrier) {
    auto loads = std::move(on_their_way[barrier]);
    on_their_way[barrier].clear();
    for (auto &load : loads) load();
}
static void late_wait(uint32_t barrier, uint32_t parity) {
    let_come(barrier);
    while ((barrier_at(barrier).phases & 1) == parity) {
        yield();
        let_come(barrier);
    }
}
static void late_box(uint32_t smem, const void *map, int32_t column, int32_t row, int32_t head,
                     int32_t batch, uint32_t barrier, uint64_t policy) {
    const host_map &m = *(const host_map *)map;
    auto load = [=] {
        cp_async_bulk_tensor_load(smem, map, column, row, head, batch, barrier, policy);
    };
    if (!late) return load();
    memset(shared_at(smem), 0xFF, (size_t)m.rows * 128);
    on_their_way[barrier].push_back(load);
}
#define mbarrier_wait late_wait
#define cp_async_bulk_tensor_load late_box

template <int BYTES>
static void cp_async_or_zero(uint32_t smem, const void *from, uint32_t bytes) {
    if (smem % BYTES || (uintptr_t)from % BYTES || bytes > BYTES) abort();
    auto copy = [=] {
        memset(shared_at(smem), 0, BYTES);
        memcpy(shared_at(smem), from, bytes);
    };
    if (!late) return copy();
    memset(shared_at(smem), 0xFF, BYTES);
    own_copies[current].push_back(copy);
}
static void cp_async_mbarrier_arrive(uint32_t barrier) {
    auto copies = std::move(own_copies[current]);
    own_copies[current].clear();
    auto arrive = [=] {
        for (auto &copy : copies) copy();
        mbarrier_arrive(barrier);
    };
    if (!late) return arrive();
    on_their_way[barrier].push_back(arrive);
}

/* Groups of a thread's copies; the last is not ended. */
static std::vector<std::vector<std::function<void()>>> own_groups[FIBERS];

static void cp_async_commit_group() {
    own_groups[current].push_back(std::move(own_copies[current]));
    own_copies[current].clear();
}
template <int PENDING>
static void cp_async_wait_group() {
    auto &groups = own_groups[current];
    while (groups.size() > PENDING) {
        for (auto &copy : groups.front()) copy();
        groups.erase(groups.begin());
    }
}

/* ---- clusters: each block runs twice. The first time it stops where it meets the others, and what
 * its shared memory holds then is what they read the second time. -------------------------------*/

static std::vector<uint8_t> of_rank[8];
static bool is_first_run;
static int cluster_now = 1;

static void cluster_sync() {
    __syncthreads();
    if (!is_first_run) return;
    if (current == 0) of_rank[blockIdx.x % cluster_now].assign(raw, raw + sizeof raw);
    fibers[current].done = true;
    for (;;) yield();
}
/* Addresses begin with zeros, which become the rank. */
static uint32_t mapa(uint32_t smem, uint32_t rank) {
    if (smem % 4 || smem >> 28) abort();
    return smem | rank << 28;
}
static const uint8_t *cluster_at(uint32_t at) {
    const uint32_t own = at & 0xFFFFFFF;
    if (cluster_now == 1) return shared_at(own);
    if ((int)(at >> 28) >= cluster_now) abort();
    return of_rank[at >> 28].data() + (own - SHARED_BASE);
}
static float ld_cluster(uint32_t at) {
    float x;
    memcpy(&x, cluster_at(at), 4);
    return x;
}
static float4 ld_cluster_v4(uint32_t at) {
    float4 x;
    if (at % 16) abort();
    memcpy(&x, cluster_at(at), 16);
    return x;
}

/* ---- fragments --------------------------------------------------------------------------------*/

static void ldmatrix(uint32_t (&x)[4], uint32_t row, bool transposed) {
    const int lane = current % 32;
    if (row % 16) abort();
    uint32_t rows[32];
    const uint64_t *all = exchange((uint64_t)row);
    for (int i = 0; i < 32; ++i) rows[i] = (uint32_t)all[i];
    for (int i = 0; i < 4; ++i) {
        uint16_t pair[2];
        for (int e = 0; e < 2; ++e) {
            const int r = transposed ? lane % 4 * 2 + e : lane / 4;
            const int c = transposed ? lane / 4 : lane % 4 * 2 + e;
            memcpy(&pair[e], shared_at(rows[8 * i + r]) + 2 * c, 2);
        }
        x[i] = pair[0] | (uint32_t)pair[1] << 16;
    }
    __syncwarp();
}
static void ldmatrix_x4(uint32_t (&x)[4], uint32_t row) { ldmatrix(x, row, false); }
static void ldmatrix_x4_trans(uint32_t (&x)[4], uint32_t row) { ldmatrix(x, row, true); }

static uint4 load_v4(const void *from) {
    uint4 x;
    if ((uintptr_t)from % 16) abort();
    memcpy(&x, from, 16);
    return x;
}

/* What the lanes of each warp multiply. */
static uint32_t factors[FIBERS / 32][32][6];

template <fa_dtype T>
static float half_of(uint32_t x, int i) {
    return element<T>::widen((uint16_t)(x >> 16 * i));
}

template <fa_dtype T>
static void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const int lane = current % 32;
    auto &all = factors[current / 32];
    for (int i = 0; i < 4; ++i) all[lane][i] = a[i];
    all[lane][4] = b0, all[lane][5] = b1;
    __syncwarp();
    for (int e = 0; e < 4; ++e) {
        const int row = lane / 4, column = lane % 4 * 2 + e % 2;
        for (int k = 0; k < 16; ++k) {
            const uint32_t x = all[row * 4 + k % 8 / 2][k / 8 * 2 + e / 2];
            const uint32_t y = all[column * 4 + k % 8 / 2][4 + k / 8];
            d[e] += half_of<T>(x, k % 2) * half_of<T>(y, k % 2);
        }
    }
    __syncwarp();
}

#endif
