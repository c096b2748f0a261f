/* pack_host.h - what kernels/common/mask_bits.cuh packs of a bool mask, as the backward reads it:
 * of the map whether some of a block's scores are seen, and whether all are. */
#ifndef FASTATTN_TESTS_PACK_HOST_H
#define FASTATTN_TESTS_PACK_HOST_H

#include <string.h>

#include "common/mask_bits.h"

/* A row of a plane of batch b and head h. */
static void pack_row(const fa_params *p, const fa_mask_bits &n, int32_t b, int32_t h, int32_t row,
                     uint32_t *columns, uint32_t *bits) {
    const fa_tensor &mask = p->scores.mask;
    const fa_lengths lengths = fa_sequence_lengths(&p->masks, b, n.rows, n.keys);
    const fa_interval seen = fa_row_interval(lengths, row);
    for (int32_t key = 0; key < n.keys; ++key) {
        const int64_t plane = (int64_t)b * n.heads + h, at = key % 128;
        const bool inside = n.mask_only || (key >= seen.begin && key < seen.end);
        if (!inside || !((const uint8_t *)mask.data)[b * mask.stride[0] + h * mask.stride[1] +
                                                     row * mask.stride[2] + key * mask.stride[3]])
            continue;
        const uint32_t bit = 1u << (at / 8 * 2 + at % 2), word = at % 8 / 2;
        bits[4 * fa_bits_at(&n, plane, key / 128, row) + word] |= bit;
        columns[4 * fa_columns_at(&n, plane, key / 128, row / 64) + word] |= bit;
    }
}

/* 64 rows of a plane: some are no rows of the sequence. */
static void map_group(const fa_params *p, const fa_mask_bits &n, int32_t b, int32_t h,
                      int32_t group, char *to) {
    const int64_t plane = (int64_t)b * n.heads + h;
    const int32_t sq = fa_sequence_lengths(&p->masks, b, n.rows, n.keys).sq;
    const uint32_t *bits = (const uint32_t *)(to + n.bits);
    for (int32_t block = 0; block < n.blocks; ++block) {
        uint32_t some = 0, all = ~0u;
        for (int32_t row = 64 * group; row < 64 * group + 64 && row < n.rows; ++row)
            for (int i = 0; i < 4; ++i) {
                const uint32_t x = bits[4 * fa_bits_at(&n, plane, block, row) + i];
                some |= x;
                if (row < sq) all &= x;
            }
        uint32_t *words = (uint32_t *)to + 4 * fa_map_at(&n, plane, block / 32, group);
        words[0] |= (uint32_t)(some != 0) << block % 32;
        words[1] |= (uint32_t)(all == ~0u) << block % 32;
    }
}

static void pack_host(const fa_params *p, char *to) {
    const fa_mask_bits n = fa_mask_bits_make(&p->what, &p->masks, &p->varlen, &p->scores.mask);
    memset(to, 0, n.bytes);
    for (int32_t b = 0; b < n.batches; ++b)
        for (int32_t h = 0; h < n.heads; ++h) {
            for (int32_t row = 0; row < n.rows; ++row)
                pack_row(p, n, b, h, row, (uint32_t *)(to + n.columns), (uint32_t *)(to + n.bits));
            for (int32_t group = 0; group < n.groups; ++group) map_group(p, n, b, h, group, to);
        }
}

#endif
