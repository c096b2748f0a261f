/* kvcache.h - attention to a cache of keys and values, which new ones are written into first: one
 * fa_kvcache is one request.
 */
#ifndef FASTATTN_KVCACHE_H
#define FASTATTN_KVCACHE_H

#include "forward.h"

/* Rotary positions: the elements of a pair (x, y) become x cos - y sin and y cos + x sin, of the
 * table's row of their position. New keys lie at the positions from fa_keys_before() on. */
typedef struct fa_rotary {
    fa_tensor cos, sin; /* (1, 1, rows, dim / 2); data NULL: no rotation */
    fa_dtype dtype;     /* of both: FA_F32, or that of q */
    int32_t
        interleaved;  /* 1: pairs are (0, 1), (2, 3), ...; 0: (0, dim / 2), (1, dim / 2 + 1), ... */
    int32_t advances; /* 1: row i of q lies where new key i does; 0: all rows where the first */
} fa_rotary;

typedef struct fa_kvcache {
    /* what.k and what.v are the caches, which may share memory; sk is the most keys that a sequence
     * can have, the new ones among them. masks.k_lengths counts those before the new ones; NULL:
     * each sequence has sk in the end. No mask, no dropout, not packed. */
    fa_params forward;
    int32_t s_new;    /* new keys of each sequence; may be 0 */
    fa_tensor k_new;  /* (b, hk, s_new, d)  dtype; data NULL: none. Written to k, rotated; */
    fa_tensor v_new;  /* (b, hk, s_new, dv) dtype; written to v, before k where they overlap */
    fa_rotary rotary; /* of k_new and q */
    fa_tensor mass;   /* (b, hk, room for keys, 1) float32: the sum of p over a group's heads and
                       * rows, 0 where no row sees the key; data NULL: not wanted */
} fa_kvcache;

/* What came from memory is clamped, never trusted. */
FA_INLINE int32_t fa_keys_before(const fa_kvcache *c, int64_t b) {
    const fa_masks *m = &c->forward.masks;
    const int32_t most = c->forward.what.sk - c->s_new;
    const int32_t n = m->k_lengths ? m->k_lengths[b * m->k_lengths_stride] : most;
    return n < 0 ? 0 : n > most ? most : n;
}

FA_OPERATION(kvcache, fa_kvcache);

#endif
