/* philox.h - the random bits of dropout: a function of the place in P, so that every backend, every
 * tiling and the backward pass see the same.
 *
 * Compiled by gcc and nvcc alike (csrc/cpu.c, kernels/). Includes nothing but fastattn.h.
 * Philox4x32-10 of Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", 2011,
 * section 3. One counter serves 8 neighbouring keys of a row.
 */
#ifndef FASTATTN_PHILOX_H
#define FASTATTN_PHILOX_H

#include "fastattn.h"

typedef struct fa_random {
    uint32_t word[4];
} fa_random;

FA_INLINE fa_random fa_philox(fa_random counter, uint32_t key0, uint32_t key1) {
    fa_random x = counter;
    for (int round = 0; round < 10; round++) {
        const uint64_t product0 = (uint64_t)0xD2511F53u * x.word[0];
        const uint64_t product1 = (uint64_t)0xCD9E8D57u * x.word[2];
        x.word[0] = (uint32_t)(product1 >> 32) ^ x.word[1] ^ key0;
        x.word[1] = (uint32_t)product1;
        x.word[2] = (uint32_t)(product0 >> 32) ^ x.word[3] ^ key1;
        x.word[3] = (uint32_t)product0;
        key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
    }
    return x;
}

FA_INLINE int64_t fa_dropout_seed(const fa_dropout *d) {
    return d->seed_data ? *d->seed_data : d->seed;
}

/* The bits of the keys 8 * group .. 8 * group + 7 in row i of query head h of sequence b (counted
 * with first_b): of key 8 * group + n the half n % 2 (0: the low one) of word n / 2. */
FA_INLINE fa_random fa_dropout_bits(int64_t seed, int32_t b, int32_t h, int32_t i, int32_t group) {
    const fa_random counter = {{(uint32_t)group, (uint32_t)i, (uint32_t)h, (uint32_t)b}};
    return fa_philox(counter, (uint32_t)seed, (uint32_t)((uint64_t)seed >> 32));
}

/* Whether the element with these bits stays; it then counts `gain` times. */
FA_INLINE int fa_dropout_keeps(uint32_t threshold, fa_random bits, int32_t key) {
    return (bits.word[key % 8 / 2] >> 16 * (key % 2) & 0xffff) >= threshold;
}

#endif
