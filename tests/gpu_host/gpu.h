/* gpu.h - what CUDA has besides fibers.h that kernels of every architecture use: types, shared
 * memory, intrinsics, common/compiler.cuh; and their launchers' surroundings.
 *
 * `late`: what is asked for comes when it is waited for, as late as it may. What is used wrongly
 * ends the process.
 */
#ifndef FASTATTN_TESTS_GPU_H
#define FASTATTN_TESTS_GPU_H

#include <math.h>
#include <stdio.h>

#include <vector>

#include "fibers.h"
#undef __shared__
#define __shared__
#define __align__(bytes)
#define FASTATTN_COMPILER_CUH
#define FASTATTN_LAUNCH_CUH
#define FASTATTN_DEVICE_H

#include "element.h"

struct int2 {
    int32_t x, y;
};
struct float2 {
    float x, y;
};
static float2 make_float2(float x, float y) { return {x, y}; }
struct alignas(16) float4 {
    float x, y, z, w;
};
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
static uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

alignas(1024) uint8_t raw[228 << 10];
enum { SHARED_BASE = 1024 };
static bool late;

static uint32_t smem_address(const void *p) {
    return (uint32_t)((const uint8_t *)p - raw) + SHARED_BASE;
}
static uint8_t *shared_at(uint32_t address) {
    if (address < SHARED_BASE || address - SHARED_BASE >= sizeof raw) abort();
    return raw + (address - SHARED_BASE);
}

/* ---- intrinsics -------------------------------------------------------------------------------*/

static float ex2_approx(float x) { return exp2f(x); }
static float rcp_approx(float x) { return 1.f / x; }
static uint32_t bit_mask(int32_t first, int32_t count) {
    const uint64_t bits = ((1ull << (count > 32 ? 32 : count)) - 1) << (first > 32 ? 32 : first);
    return (uint32_t)bits;
}
static int32_t __float_as_int(float x) {
    int32_t y;
    memcpy(&y, &x, 4);
    return y;
}
static float __int_as_float(int32_t x) {
    float y;
    memcpy(&y, &x, 4);
    return y;
}
static int64_t __double_as_longlong(double x) {
    int64_t y;
    memcpy(&y, &x, 8);
    return y;
}
static double __longlong_as_double(int64_t x) {
    double y;
    memcpy(&y, &x, 8);
    return y;
}
static uint32_t __float_as_uint(float x) { return (uint32_t)__float_as_int(x); }
static float __uint_as_float(uint32_t x) { return __int_as_float((int32_t)x); }
#define __log2f log2f /* glibc has one of that name */
static float __fdividef(float x, float y) { return x / y; }
static int32_t max(int32_t a, int32_t b) { return a > b ? a : b; }
static int32_t min(int32_t a, int32_t b) { return a < b ? a : b; }
static int32_t __vimax3_s32(int32_t a, int32_t b, int32_t c) { return max(a, max(b, c)); }
static bool __any_sync(uint32_t mask, bool yes) { return __ballot_sync(mask, yes) != 0; }
static bool __all_sync(uint32_t mask, bool yes) { return __ballot_sync(mask, yes) == ~0u; }
static int __syncthreads_or(int yes) {
    static int any[2];
    static int64_t rounds; /* that have ended; two in turn: who is slow still reads the last one */
    int &now = any[rounds % 2];
    const int64_t round = rounds;
    now |= yes;
    __syncthreads();
    if (rounds == round) rounds = round + 1, any[rounds % 2] = 0;
    const int result = now;
    return result;
}
static void __trap() { abort(); }
static uint32_t atomicOr(uint32_t *to, uint32_t x) {
    const uint32_t before = *to;
    *to |= x;
    return before;
}
static uint32_t atomicExch(uint32_t *to, uint32_t x) {
    const uint32_t before = *to;
    *to = x;
    return before;
}
template <typename T>
static T atomicAdd(T *to, T x) {
    const T before = *to;
    *to += x;
    return before;
}

/* ---- common/compiler.cuh ----------------------------------------------------------------------*/

static int32_t uniform(int32_t x) { return __shfl_sync(~0u, x, 0); }
static int32_t thread_here() { return current; }
static void work_out(uint32_t) {}
static void not_a_select(float &) {}

/* ---- launches ---------------------------------------------------------------------------------*/

static fa_status fa_fail(fa_error *error, fa_status status, const char *text, ...) {
    snprintf(error->text, sizeof error->text, "%s", text);
    return status;
}
struct fa_device;
static fa_status fa_allow_smem(uint64_t *, const fa_device *, const void *, int32_t, fa_error *) {
    return FA_OK;
}

#endif
