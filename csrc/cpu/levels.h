/* levels.h - includes FA_KERNEL once per instance: each vector level in float32 (float16 and
 * bfloat16 are widened to it) and in float64; and where bfloat16 has products of its own, in pairs
 * of these. FA_KERNELS is then the table of the instances.
 *
 * FA_BYTES of a vector; FA_X86: which intrinsics an instance may use (0, 256 or 512); FA_VECTORS
 * and FA_ACCUMULATORS: of the forward's register tile.
 */
#define FA_BYTES 16 /* SSE2, NEON, or whatever gcc makes of them */
#define FA_X86 0
#define FA_VECTORS 3
#define FA_ACCUMULATORS 12
#define FA_PAIRS 0
#define FA_NAME f32_portable
#define FA_REAL float
#define FA_INT int32_t
#include FA_KERNEL
#define FA_NAME f64_portable
#define FA_REAL double
#define FA_INT int64_t
#include FA_KERNEL
#undef FA_BYTES
#undef FA_X86
#undef FA_VECTORS
#undef FA_ACCUMULATORS
#undef FA_PAIRS

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define FA_BYTES 32
#define FA_X86 256
#define FA_VECTORS 3
#define FA_ACCUMULATORS 12
#define FA_PAIRS 0
#define FA_NAME f32_avx2
#define FA_REAL float
#define FA_INT int32_t
#include FA_KERNEL
#define FA_NAME f64_avx2
#define FA_REAL double
#define FA_INT int64_t
#include FA_KERNEL
#undef FA_BYTES
#undef FA_X86
#undef FA_VECTORS
#undef FA_ACCUMULATORS
#undef FA_PAIRS
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#define FA_BYTES 64
#define FA_X86 512
#define FA_VECTORS 4
#define FA_ACCUMULATORS 16
#define FA_PAIRS 0
#define FA_NAME f32_avx512
#define FA_REAL float
#define FA_INT int32_t
#include FA_KERNEL
#define FA_NAME f64_avx512
#define FA_REAL double
#define FA_INT int64_t
#include FA_KERNEL
#undef FA_BYTES
#undef FA_X86
#undef FA_VECTORS
#undef FA_ACCUMULATORS
#undef FA_PAIRS
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#define FA_BYTES 64
#define FA_X86 512
#define FA_VECTORS 4
#define FA_ACCUMULATORS 16
#define FA_PAIRS 1
#define FA_NAME bf16_avx512_bf16
#define FA_REAL float
#define FA_INT int32_t
#include FA_KERNEL
#undef FA_BYTES
#undef FA_X86
#undef FA_VECTORS
#undef FA_ACCUMULATORS
#undef FA_PAIRS
#pragma GCC pop_options
#endif

/* By level and dtype: float16, and mostly bfloat16, run the float32 kernel. */
#define FA_BY_DTYPE(f64, f32, bf16) \
    {[FA_F64] = &kernel_##f64,      \
     [FA_F32] = &kernel_##f32,      \
     [FA_F16] = &kernel_##f32,      \
     [FA_BF16] = &kernel_##bf16}
#if defined(__x86_64__)
#define FA_KERNELS                                                                               \
    {FA_BY_DTYPE(f64_portable, f32_portable, f32_portable),                                      \
     FA_BY_DTYPE(f64_avx2, f32_avx2, f32_avx2), FA_BY_DTYPE(f64_avx512, f32_avx512, f32_avx512), \
     FA_BY_DTYPE(f64_avx512, f32_avx512, bf16_avx512_bf16)}
#else
#define FA_KERNELS {FA_BY_DTYPE(f64_portable, f32_portable, f32_portable)}
#endif
