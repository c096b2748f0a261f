/* cpu.h - what the files of the CPU backend share: cpu.c chooses the level, forward.c, backward.c
 * kvcache.c, merge.c, sparse*.c and sparsek*.c are an operation each, pool.c has the threads.
 */
#ifndef FASTATTN_CPU_H
#define FASTATTN_CPU_H

#include <float.h>
#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "backward.h"
#include "fastattn.h"
#include "half.h"
#include "mask.h"
#include "philox.h"

#define FA_LOG2E 1.44269504088896340736
#define FA_LN2 0.69314718055994530942
#define FA_FAST static inline __attribute__((always_inline))
#define FA_LOCAL static __attribute__((unused)) /* not every file needs it */
#define FA_JOIN_(a, b) a##_##b
#define FA_JOIN(a, b) FA_JOIN_(a, b)

/* Element (b, h, s, 0) of a tensor, in elements. */
static inline int64_t element(const fa_tensor *t, int64_t b, int64_t h, int64_t s) {
    return b * t->stride[0] + h * t->stride[1] + s * t->stride[2];
}

/* Key j of sequence b, from its key 0 on, or where there are pages from page 0 on, in elements. */
static inline int64_t key_place(const fa_pages *pages, const fa_tensor *t, int64_t b, int32_t j) {
    if (!pages->table) return j * t->stride[2];
    return fa_find_page(pages, b, j) * t->stride[0] + j % pages->size * t->stride[2];
}

/* Element `at` of lse: float64 where the arrays are, else float32. */
static inline void put_lse(const fa_tensor *lse, fa_dtype type, int64_t at, double value) {
    if (type == FA_F64)
        ((double *)lse->data)[at] = value;
    else
        ((float *)lse->data)[at] = (float)value;
}

/* The vector levels, the plainest first. */
typedef enum fa_level { FA_PORTABLE, FA_AVX2, FA_AVX512, FA_AVX512_BF16 } fa_level;

fa_status fa_cpu_forward(const fa_params *p, fa_level level, fa_error *error);
fa_status fa_cpu_backward(const fa_backward *b, fa_level level, fa_error *error);
fa_status fa_cpu_kvcache(const fa_kvcache *c, fa_level level, fa_error *error);
fa_status fa_cpu_merge(const fa_merge *m, fa_error *error);
fa_status fa_cpu_sparsek(const fa_sparsek *r, fa_error *error);
fa_status fa_cpu_sparsek_backward(const fa_sparsek_backward *b, fa_error *error);
fa_status fa_cpu_sparse(const fa_sparse *s, fa_level level, fa_error *error);
fa_status fa_cpu_sparse_backward(const fa_sparse_backward *b, fa_level level, fa_error *error);
fa_status fa_cpu_sparsek_attention(const fa_sparsek_attention *r, fa_level level, fa_error *error);
fa_status fa_cpu_sparsek_attention_backward(const fa_sparsek_attention_backward *b, fa_level level,
                                            fa_error *error);
/* Of keys whose runs are known; sparse.c, sparse_backward.c */
fa_status fa_cpu_kept(const fa_sparsek_attention *r, fa_level level);
fa_status fa_cpu_kept_backward(const fa_sparsek_attention_backward *b, fa_level level,
                               fa_error *error);
/* The sums of `mass`, by the lse of the forward's request. */
fa_status fa_cpu_mass(const fa_sparse *s, fa_level level, fa_error *error);

#endif
