/* dtype.h - the one table of element types: for checks, binding, dispatch and backends alike.
 *
 * Compiled by gcc and nvcc. Includes nothing but <stdint.h>.
 */
#ifndef FASTATTN_DTYPE_H
#define FASTATTN_DTYPE_H

#include <stdint.h>

/* 0 is none: one that the contract does not have. */
typedef enum fa_dtype { FA_F64 = 1, FA_F32, FA_F16, FA_BF16, FA_BOOL } fa_dtype;

enum { FA_DTYPE_COUNT = FA_BOOL + 1 };

typedef struct fa_dtype_row {
    const char *name; /* as frameworks have it */
    int32_t size;     /* bytes of an element */
    uint8_t code;     /* DLPack's; with 8 * size bits and 1 lane */
} fa_dtype_row;

/* In the order of fa_dtype. */
static const fa_dtype_row fa_dtypes[FA_DTYPE_COUNT] = {
    {"none", 0, 0},    {"float64", 8, 2},  {"float32", 4, 2},
    {"float16", 2, 2}, {"bfloat16", 2, 4}, {"bool", 1, 6},
};

static inline int64_t fa_dtype_size(fa_dtype dtype) { return fa_dtypes[dtype].size; }

#endif
