/* level.h - one level: the kernel for float32 (float16 and bfloat16 are widened to it) and for
 * float64. The level's FA_LEVEL, FA_BYTES, FA_X86, FA_VECTORS and FA_ACCUMULATORS are defined where
 * this is included. */
#define FA_PAIRS 0

#define FA_NAME FA_JOIN(f32, FA_LEVEL)
#define FA_REAL float
#define FA_INT int32_t
#include "kernel.h"

#define FA_NAME FA_JOIN(f64, FA_LEVEL)
#define FA_REAL double
#define FA_INT int64_t
#include "kernel.h"

#undef FA_PAIRS
#undef FA_LEVEL
#undef FA_BYTES
#undef FA_X86
#undef FA_VECTORS
#undef FA_ACCUMULATORS
