/* philox.h - the random bits of dropout: a function of the place in P, so that every backend, every
 * tiling and the backward pass see the same.
 *
 * Compiled by gcc and nvcc alike (csrc/cpu, kernels/). Includes nothing but forward.h.
 * Philox4x32-7 of Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", 2011,
 * section 3: seven rounds are the fewest of which they found no test to fail. One counter serves 8
 * neighbouring keys of a row.
 */
#ifndef FASTATTN_PHILOX_H
#define FASTATTN_PHILOX_H

#include "forward.h"

typedef struct fa_random {
    uint32_t word[4];
} fa_random;

/* `n` counters, each replaced by its random bits, all with the same key. */
FA_INLINE void fa_philox(fa_random *x, int32_t n, uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 7; round++) {
        for (int32_t i = 0; i < n; i++) {
            uint32_t *word = x[i].word;
            const uint64_t product0 = (uint64_t)0xD2511F53u * word[0];
            const uint64_t product1 = (uint64_t)0xCD9E8D57u * word[2];
            word[0] = (uint32_t)(product1 >> 32) ^ word[1] ^ key0;
            word[1] = (uint32_t)product1;
            word[2] = (uint32_t)(product0 >> 32) ^ word[3] ^ key1;
            word[3] = (uint32_t)product0;
        }
        key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
    }
}

FA_INLINE int64_t fa_dropout_seed(const fa_dropout *d) {
    return d->seed_data ? *d->seed_data : d->seed;
}

/* What becomes the bits of the keys 8 * group .. 8 * group + 7 in row i of query head h of sequence
 * b (counted with first_b): of key 8 * group + n the half n % 2 (0: the low one) of word n / 2. */
FA_INLINE fa_random fa_dropout_counter(int32_t b, int32_t h, int32_t i, int32_t group) {
    const fa_random counter = {{(uint32_t)group, (uint32_t)i, (uint32_t)h, (uint32_t)b}};
    return counter;
}

FA_INLINE fa_random fa_dropout_bits(int64_t seed, int32_t b, int32_t h, int32_t i, int32_t group) {
    fa_random x = fa_dropout_counter(b, h, i, group);
    fa_philox(&x, 1, (uint32_t)seed, (uint32_t)((uint64_t)seed >> 32));
    return x;
}

/* Whether the element with these bits stays; it then counts `gain` times. */
FA_INLINE int fa_dropout_keeps(uint32_t threshold, fa_random bits, int32_t key) {
    return (bits.word[key % 8 / 2] >> 16 * (key % 2) & 0xffff) >= threshold;
}

#endif
