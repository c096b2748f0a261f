/* blocks.cuh - the blocks of a general row's item: their order and tags, and their scores.
 *
 * A part of fwd.cu, which includes it behind the servers, for general rows.
 */
#ifndef FASTATTN_SM90_BLOCKS_CUH
#define FASTATTN_SM90_BLOCKS_CUH

/* The tag of the i-th block of an item, as a loader would have written it. */
DEVICE uint32_t interval_tag(const work_tile &t, int32_t i, int warpgroup) {
    int32_t block = key_block(t, i), last = i + 1 == t.end - t.begin;
    uint32_t tag = (uint32_t)block << TAG_BLOCK | (last ? TAG_LAST : 0);
    return (uint32_t)uniform(tag | block_visibility(t, block, warpgroup) << 2 * warpgroup);
}

/* The tag of the block of K in the next stage, once it is there. */
DEVICE uint32_t peek_tag(smem_layout &smem, const cursor &kv) {
    mbarrier_wait(smem_address(&smem.k_full[kv.stage]), kv.parity);
    return (uint32_t)uniform(*(volatile int32_t *)&smem.tags[kv.stage]);
}

/* The tag of the next block: the i-th, unless a bool mask hides some. */
DEVICE uint32_t read_tag(const kernel_args &a, smem_layout &smem, const work_tile &t,
                         const cursor &kv, int32_t i, int warpgroup) {
    return a.scores.mask == BITS ? peek_tag(smem, kv) : interval_tag(t, i, warpgroup);
}

DEVICE enum visibility tag_visibility(uint32_t tag, int warpgroup) {
    return (enum visibility)(tag >> 2 * warpgroup & 3);
}

/* How many blocks, from the i-th on, lie side by side and are seen whole, if that one is. */
DEVICE int32_t whole_blocks(const work_tile &t, int32_t i, int32_t block, int warpgroup) {
    int32_t low = i < t.score.split - t.begin ? t.begin : t.score.split;
    int32_t whole = (t.whole[warpgroup].begin + BLOCK_N - 1) / BLOCK_N;
    return uniform(block - max(low, whole) + 1);
}

/* The tile of a mask of 16 bits that comes with a block: there is one, so that its phase is the
 * block's number's parity. */
DEVICE mask_tile mask_tile_of(smem_layout &smem, const cursor &kv, int warpgroup) {
    return {smem_address(smem.mask[warpgroup]), smem_address(&smem.mask_full[warpgroup]),
            smem_address(&smem.mask_empty[warpgroup]), (kv.stage + STAGES * kv.parity) & 1};
}

/* Scores as the definition has them, of the sign that `scale` would have. */
template <enum changes ONLY>
DEVICE void final_scores(const kernel_args &a, const work_tile &t, float (&s)[BLOCK_N / 2],
                         const mask_tile &tile, int32_t key, int warpgroup) {
    const int32_t row = first_row(t, warpgroup), top = t.row + 64 * warpgroup;
    change_scores<ONLY>(a.scores, t.score, s, tile, row, key, a.sq, a.sk,
                        fa_row_position(t.lengths, top), row - top);
    if (ONLY == ANY && a.scores.scale < 0.f)
#pragma unroll
        for (int i = 0; i < BLOCK_N / 2; ++i) s[i] = -s[i];
}

/* As look(), of a bool mask. */
DEVICE row_mask bool_row_mask(const kernel_args &a, const work_tile &t, int32_t row, int32_t key,
                              int warpgroup) {
    row_mask seen;
    load_row_mask(a.scores, t.score, seen.rows, row, key);
    if (a.scores.bits.mask_only && visibility_of(t, key / BLOCK_N, warpgroup) != WHOLE) {
        const row_mask inside = row_mask_of(a, t, row, key, warpgroup);
#pragma unroll
        for (int r = 0; r < 2; ++r) seen.rows[r] &= inside.rows[r];
    }
    return seen;
}

/* clear_holes() where a bool mask and intervals hide keys, each its own: a row and a thread of the
 * warpgroup at a time, for what both together leave to the tile's rows is in no array. */
DEVICE void clear_holes_of_both(const kernel_args &a, const work_tile &t, smem_layout &smem,
                                uint8_t *v, int32_t key, int warpgroup) {
    static_assert(BLOCK_M == 128, "a row a thread");
    const int32_t thread = thread_here();
    const int32_t row = t.row + thread % 128, warp = thread % 128 / 32;
    const int32_t skip = key % FA_BITS_KEYS;
    const uint4 mask = load_v4(
        a.scores.words + 4 * fa_bits_at(&a.scores.bits, t.score.plane, key / FA_BITS_KEYS, row));
    const fa_interval inside = fa_row_interval(t.lengths, row);
    uint32_t seen[4] = {mask.x, mask.y, mask.z, mask.w};
#pragma unroll
    for (int c = 0; c < 4; ++c) {
        const int32_t column = key + 2 * c;
        const uint32_t keys = scores_of(inside.begin - column, inside.end - column);
        seen[c] = __reduce_or_sync(~0u, seen[c] & keys << skip / 4);
    }
    uint4(&columns)[4] = smem.columns[warpgroup];
    if (thread % 32 == 0) columns[warp] = make_uint4(seen[0], seen[1], seen[2], seen[3]);
    bar_sync(1 + warpgroup, 128);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
        const uint4 x = columns[w];
        seen[0] |= x.x, seen[1] |= x.y, seen[2] |= x.z, seen[3] |= x.w;
    }
    clear_unseen(seen, v, key, warpgroup);
}

#endif
