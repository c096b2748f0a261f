/* mask_bits.h - where a packed bool mask lies in the workspace: a pure function of the request.
 *
 * Plain C, compiled by gcc and nvcc alike and tested on the host. kernels/common/mask_bits.cuh
 * packs, the loaders and warpgroups of general variants read.
 *
 * What is packed is what a row sees: the mask and the row's interval, so it is complete. Of packed
 * sequences it is the mask alone, `mask_only`: each has intervals of its own, and there may be
 * 100,000 of them for one mask. There are three arrays over planes (the mask's own batches and
 * heads, 1 where it is broadcast), groups of 64 rows and blocks of 128 keys:
 *
 *   - map, [plane][32 blocks][group] of 4 words: a bit per block, whether some of its scores are
 *     seen, all are, every key is seen by some row; and 0 (the first of these then counts the tiles
 *     that the forward kernel's blocks have claimed)
 *   - columns, [plane][block][group] of 4 words: the keys that some row of the group sees
 *   - bits, [plane][block][group][64 rows] of 4 words: the keys that the row sees
 *
 * Bit i of word c stands for key 8 * (i / 2) + 2 * c + i % 2 of the block: the scores that a thread
 * with lane % 4 == c holds of a row, in their order.
 */
#ifndef FASTATTN_MASK_BITS_H
#define FASTATTN_MASK_BITS_H

#include "mask.h"

enum { FA_BITS_ROWS = 64, FA_BITS_KEYS = 128 };

typedef struct fa_mask_bits {
    int32_t mask_only;             /* the rows' intervals are not in it */
    int32_t batches, heads;        /* planes: batches * heads */
    int32_t rows, keys;            /* of a plane */
    int32_t repeat;                /* row i is packed as row i & repeat */
    int32_t groups, blocks, words; /* words: of 32 blocks */
    int64_t columns, bits, bytes;  /* where those two begin, in bytes (map: at 0); all in all */
} fa_mask_bits;

/* The groups come in pairs, for tiles of 128 rows. No packed sequence is longer than all together,
 * and where its mask is broadcast over the rows, those of one tile stand for all. */
FA_INLINE fa_mask_bits fa_mask_bits_make(const fa_what *w, const fa_masks *m, const fa_varlen *v,
                                         const fa_tensor *mask) {
    fa_mask_bits n;
    n.mask_only = v->cu_q != 0;
    const int32_t differ = m->q_lengths || m->k_lengths || m->k_start || m->q_offset;
    n.batches = mask->stride[0] || (differ && !n.mask_only) ? w->b : 1;
    n.heads = mask->stride[1] ? w->hq : 1;
    const int32_t alike = n.mask_only && !mask->stride[2], two_groups = 2 * FA_BITS_ROWS;
    n.repeat = alike ? two_groups - 1 : INT32_MAX;
    n.rows = alike ? two_groups : n.mask_only && v->total_q < w->sq ? v->total_q : w->sq;
    n.keys = n.mask_only && v->total_k < w->sk ? v->total_k : w->sk;
    n.groups = (n.rows + two_groups - 1) / two_groups * 2;
    n.blocks = (n.keys + FA_BITS_KEYS - 1) / FA_BITS_KEYS;
    n.words = (n.blocks + 31) / 32;
    const int64_t planes = (int64_t)n.batches * n.heads;
    n.columns = planes * n.words * n.groups * 16;
    n.bits = n.columns + planes * n.blocks * n.groups * 16;
    n.bytes = n.bits + planes * n.blocks * n.groups * FA_BITS_ROWS * 16;
    n.bytes = (n.bytes + 255) / 256 * 256;
    return n;
}

FA_INLINE int64_t fa_bits_plane(const fa_mask_bits *n, int32_t b, int32_t h) {
    return (int64_t)(n->batches > 1 ? b : 0) * n->heads + (n->heads > 1 ? h : 0);
}

/* In units of 4 words. */
FA_INLINE int64_t fa_map_at(const fa_mask_bits *n, int64_t plane, int32_t word, int32_t group) {
    return (plane * n->words + word) * n->groups + (group & n->repeat / FA_BITS_ROWS);
}
FA_INLINE int64_t fa_columns_at(const fa_mask_bits *n, int64_t plane, int32_t block,
                                int32_t group) {
    return (plane * n->blocks + block) * n->groups + (group & n->repeat / FA_BITS_ROWS);
}
FA_INLINE int64_t fa_bits_at(const fa_mask_bits *n, int64_t plane, int32_t block, int32_t row) {
    return (plane * n->blocks + block) * n->groups * FA_BITS_ROWS + (row & n->repeat);
}

#endif
