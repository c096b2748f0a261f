/* portable.h - a block of a portable kernel on the host: sm80/ptx.cuh over gpu.h. VARIANT_DTYPE and
 * FIBERS come from whoever includes it. `late`: copies come when they are waited for, and until
 * then what is to be written there is NaN.
 */
#ifndef FASTATTN_TESTS_PORTABLE_H
#define FASTATTN_TESTS_PORTABLE_H

#include <functional>

#include "gpu.h"
#define FASTATTN_SM80_PTX_CUH

struct alignas(16) double2 {
    double x, y;
};

/* ---- copies into shared memory ----------------------------------------------------------------*/

typedef std::vector<std::function<void()>> copies;
static struct {
    copies open;              /* of no group yet */
    std::vector<copies> ends; /* groups, in their order */
} own_copies[FIBERS];

template <int BYTES>
static void cp_async_or_zero(uint32_t smem, const void *from, uint32_t bytes) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "");
    if (smem % BYTES || bytes > BYTES || (uintptr_t)from % BYTES) abort();
    auto copy = [=] {
        memset(shared_at(smem), 0, BYTES);
        if (bytes) memcpy(shared_at(smem), from, bytes);
    };
    if (!late) return copy();
    memset(shared_at(smem), 0xFF, BYTES);
    own_copies[current].open.push_back(copy);
}
static void cp_async_16(uint32_t smem, const void *from) { cp_async_or_zero<16>(smem, from, 16); }
static void cp_async_commit_group() {
    auto &own = own_copies[current];
    own.ends.push_back(std::move(own.open));
    own.open.clear();
}
template <int N>
static void cp_async_wait_group() {
    auto &groups = own_copies[current].ends;
    for (; groups.size() > N; groups.erase(groups.begin()))
        for (auto &copy : groups.front()) copy();
}
template <typename T>
static void st_shared(uint32_t smem, T x) {
    if (smem % sizeof x) abort();
    memcpy(shared_at(smem), &x, sizeof x);
}

/* ---- and out of it ----------------------------------------------------------------------------*/

static void ldmatrix(uint32_t (&x)[4], uint32_t row, bool transposed) {
    const int lane = current % 32;
    if (row % 16) abort();
    const uint64_t *all = exchange((uint64_t)row);
    uint32_t rows[32];
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
static uint32_t ld_shared(uint32_t smem) {
    uint32_t x;
    if (smem % 4) abort();
    memcpy(&x, shared_at(smem), 4);
    return x;
}
static double2 ld_shared_f64x2(uint32_t smem) {
    double2 x;
    if (smem % 16) abort();
    memcpy(&x, shared_at(smem), 16);
    return x;
}

/* ---- tensor cores -----------------------------------------------------------------------------*/

/* What the lanes of each warp multiply. */
static uint32_t factors[FIBERS / 32][32][6];

/* As tensor cores add: all terms in steps of 2^-25 of the greatest, the sum in float's, both
 * rounded towards 0. */
template <int N>
static float truncated_sum(const double (&terms)[N]) {
    double most = 0, sum = 0;
    for (double x : terms) most = fabs(x) > most ? fabs(x) : most, sum += x;
    if (!(fabs(sum) < INFINITY) || most == 0) return (float)sum;
    int exponent;
    frexp(most, &exponent);
    sum = 0;
    for (double x : terms) sum += ldexp(trunc(ldexp(x, 25 - exponent)), exponent - 25);
    const float nearest = (float)sum;
    return fabs((double)nearest) > fabs(sum) ? nextafterf(nearest, 0.f) : nearest;
}

/* d += the product of A and B, of K columns and rows, each register `width` of them. */
template <int K, typename F>
static void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, F part) {
    constexpr int WIDTH = K / 8;
    const int lane = current % 32;
    auto &all = factors[current / 32];
    for (int i = 0; i < 4; ++i) all[lane][i] = a[i];
    all[lane][4] = b0, all[lane][5] = b1;
    __syncwarp();
    for (int e = 0; e < 4; ++e) {
        const int row = lane / 4, column = lane % 4 * 2 + e % 2;
        double terms[K + 1] = {d[e]};
        for (int k = 0; k < K; ++k) {
            const int holder = k % (K / 2) / WIDTH, half = k / (K / 2);
            terms[k + 1] = (double)part(all[row * 4 + holder][half * 2 + e / 2], k % WIDTH) *
                           part(all[column * 4 + holder][4 + half], k % WIDTH);
        }
        d[e] = truncated_sum(terms);
    }
    __syncwarp();
}
template <fa_dtype T>
static void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma<16>(d, a, b0, b1, [](uint32_t x, int i) {
        return (float)element<T>::widen((typename element<T>::stored)(x >> 16 * i));
    });
}
static void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma<8>(d, a, b0, b1, [](uint32_t x, int) { return __uint_as_float(x & 0xffffe000); });
}

/* ---- arithmetic -------------------------------------------------------------------------------*/

template <fa_dtype T>
static uint32_t cvt_pack(float low, float high) {
    return (uint32_t)element<T>::narrow(low) | (uint32_t)element<T>::narrow(high) << 16;
}

/* A block begins. */
static void start_block() {
    memset(raw, 0xFF, sizeof raw);
    for (auto &own : own_copies) own = {};
}

typedef struct fa_device {
    int32_t sms, early;
} fa_device;

#endif
