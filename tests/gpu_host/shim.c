/* The decisions of kernels/ that are plain C, as functions that ctypes can call: which variant
 * runs, how a mask is packed, in which order tiles come, what the driver's errors say. */
#include <string.h>
#include "common/driver.h"
#include "common/mask_bits.h"
#include "common/packed.h"
#include "sm90/fwd_choice.h"
#include "common/schedule.h"

int choose(int dtype, int b, int hq, int hk, int sq, int sk, int d, int dv, int invariant, int odd,
           int flags, int lse, int change, int sms) {
    fa_params p = {.what = {.dtype = dtype,
                            .b = b,
                            .hq = hq,
                            .hk = hk,
                            .sq = sq,
                            .sk = sk,
                            .d = d,
                            .dv = dv,
                            .batch_invariant = invariant},
                   .masks = {.flags = flags}};
    p.what.v.data = (void *)(int64_t)odd;
    p.what.k.stride[3] = p.what.v.stride[3] = 1;
    p.what.lse.data = lse ? &p : NULL;
    p.scores.mask.data = change == 1 ? &p : NULL;
    p.scores.softcap = change == 2 ? 50 : 0;
    p.scores.alibi_slopes = change == 3 ? (const float *)&p : NULL;
    p.scores.sink = change == 4 ? (const float *)&p : NULL;
    p.dropout.p = change == 5 ? 0.1 : 0;
    return fa_choose_variant(&p, sms);
}
/* The layout of a packed mask as {batches, heads, groups, blocks, words, columns, bits, bytes,
 * mask_only, rows, keys}, and how often each 16 bytes of it belong to something (`uses`, of bytes /
 * 16 elements). `total_q`, `total_k`: of packed sequences, or 0. */
void mask_bits(int b, int hq, int sq, int sk, int64_t stride_b, int64_t stride_h, int stride_q,
               int lengths, int total_q, int total_k, int64_t *layout, unsigned char *uses) {
    fa_what w = {.b = b, .hq = hq, .sq = sq, .sk = sk};
    fa_masks m = {.k_lengths = lengths ? &w.b : NULL};
    fa_varlen v = {.cu_q = total_q ? &w.b : NULL, .total_q = total_q, .total_k = total_k};
    fa_tensor mask = {.stride = {stride_b, stride_h, stride_q, 1}};
    fa_mask_bits n = fa_mask_bits_make(&w, &m, &v, &mask);
    int64_t fields[] = {n.batches, n.heads, n.groups,    n.blocks, n.words, n.columns,
                        n.bits,    n.bytes, n.mask_only, n.rows,   n.keys};
    memcpy(layout, fields, sizeof fields);
    if (!uses) return;
    for (int i = 0; i < n.batches; ++i)
        for (int h = 0; h < n.heads; ++h) {
            int64_t plane = fa_bits_plane(&n, i, h);
            for (int group = 0; group < n.groups; ++group) {
                for (int word = 0; word < n.words; ++word)
                    uses[fa_map_at(&n, plane, word, group)]++;
                for (int block = 0; block < n.blocks; ++block)
                    uses[n.columns / 16 + fa_columns_at(&n, plane, block, group)]++;
            }
            for (int block = 0; block < n.blocks; ++block)
                for (int row = 0; row < 64 * n.groups; ++row)
                    uses[n.bits / 16 + fa_bits_at(&n, plane, block, row)]++;
        }
}
/* A row of the mask that is packed where row i's bits are, of a plane of `sq` rows in all. */
int64_t bits_row(int sq, int stride_q, int total_q, int i) {
    fa_what w = {.b = 1, .hq = 1, .sq = sq, .sk = 1};
    fa_masks m = {0};
    fa_varlen v = {.cu_q = total_q ? &w.b : NULL, .total_q = total_q, .total_k = 1};
    fa_tensor mask = {.stride = {0, 0, stride_q, 1}};
    fa_mask_bits n = fa_mask_bits_make(&w, &m, &v, &mask);
    if (fa_map_at(&n, 0, 0, i / 64) != fa_bits_at(&n, 0, 0, i) / 64 ||
        fa_columns_at(&n, 0, 0, i / 64) != fa_bits_at(&n, 0, 0, i) / 64)
        return -1;
    return fa_bits_at(&n, 0, 0, i);
}
int64_t packed_bytes(int b, int total, int block_m, int is_packed) {
    fa_varlen v = {.cu_q = is_packed ? &b : NULL, .total_q = total};
    return fa_packed_bytes(&v, b, block_m);
}
int choose_packed(int b, int h, int total, int longest, int d, int invariant, int flags,
                  int softcap, int odd, int sms) {
    static const int32_t cu;
    fa_params p = {.what = {.dtype = FA_BF16,
                            .b = b,
                            .hq = h,
                            .hk = h,
                            .sq = longest,
                            .sk = longest,
                            .d = d,
                            .dv = d,
                            .batch_invariant = invariant}};
    p.masks.flags = flags;
    p.scores.softcap = softcap;
    p.what.v.data = (void *)(int64_t)odd;
    p.varlen = (fa_varlen){&cu, &cu, 0, 0, total, total};
    return fa_choose_variant(&p, sms);
}
/* The variant for arrays (b, s, h, d), of rows `padding` elements longer than their heads. */
int choose_heads_beside(int hq, int hk, int d, int dv, int padding, float softcap, int sms) {
    fa_params p = {
        .what = {
            .dtype = FA_BF16, .b = 2, .hq = hq, .hk = hk, .sq = 300, .sk = 300, .d = d, .dv = dv}};
    fa_tensor *t[] = {&p.what.q, &p.what.k, &p.what.v, &p.what.out};
    for (int i = 0; i < 4; ++i) {
        int64_t h = i == 0 || i == 3 ? hq : hk, size = i < 2 ? d : dv, row = h * size + padding;
        fa_tensor x = {(void *)4096, {2, h, 300, size}, {300 * row, size, row, 1}};
        *t[i] = x;
    }
    p.scores.softcap = softcap;
    return fa_choose_variant(&p, sms);
}
/* The variant where K or V is this one; the other is contiguous, Q and out take 256 columns. */
int choose_one(int which, int64_t base, const int64_t *shape, const int64_t *stride,
               float softcap) {
    int b = shape[0], h = shape[1], s = shape[2], d = shape[3];
    fa_params p = {
        .what = {.dtype = FA_BF16, .b = b, .hq = h, .hk = h, .sq = s, .sk = s, .d = d, .dv = d}};
    fa_tensor plain = {(void *)4096, {b, h, s, d}, {h * s * d, s * d, d, 1}};
    fa_tensor wide = {(void *)4096, {b, h, s, d}, {h * s * 256, s * 256, 256, 1}};
    fa_tensor one = {.data = (void *)(4096 + base)};
    memcpy(one.shape, shape, sizeof one.shape);
    memcpy(one.stride, stride, sizeof one.stride);
    p.what.q = p.what.out = wide;
    p.what.k = which == 'k' ? one : plain;
    p.what.v = which == 'v' ? one : plain;
    p.scores.softcap = softcap;
    return fa_choose_variant(&p, 132);
}
int variants(void) { return FA_VARIANTS; }
const char *variant_name(int i) { return fa_variants[i].name; }
int variant_field(int i, int field) {
    const fa_variant *r = &fa_variants[i];
    int fields[] = {r->dtype, r->d, r->dv, r->loads, r->ones, r->general};
    return fields[field];
}
int tma_takes(int64_t base, const int64_t *shape, const int64_t *stride) {
    fa_tensor t = {.data = (void *)base};
    memcpy(t.shape, shape, sizeof t.shape);
    memcpy(t.stride, stride, sizeof t.stride);
    return fa_tma_takes(&t, 2);
}
const char *sentence(int toolkit, int driver, int code, const char *detail) {
    static char text[128];
    fa_driver_sentence(text, sizeof text, toolkit, driver, code, detail);
    return text;
}
int32_t divide(int32_t x, int32_t by) { return fa_divide(x, fa_divisor_make(by)); }
/* Counts how often the blocks of one launch visit each tile (head, m_block); returns the visits
 * outside of all tiles. `order` is the m_block of each tile number. */
int64_t visit(int b, int hq, int hk, int sq, int sk, int d, int flags, int block_m, int blocks,
              unsigned char *visits, int32_t *order) {
    fa_what w = {.b = b, .hq = hq, .hk = hk, .sq = sq, .sk = sk, .d = d, .dv = d};
    fa_masks m = {.flags = flags};
    fa_schedule s = fa_schedule_make(&w, &m, block_m, blocks);
    int64_t outside = 0;
    for (int block = 0; block < blocks; ++block)
        for (int32_t round = 0;;) {
            int32_t tile = fa_schedule_next(&s, blocks, block, &round);
            if (tile >= s.tiles) break;
            fa_tile t = fa_schedule_tile(&s, tile);
            if (t.head < 0 || t.head >= s.heads || t.m_block < 0 || t.m_block >= s.m_blocks) {
                ++outside;
                continue;
            }
            visits[t.head * s.m_blocks + t.m_block]++;
            order[tile] = t.m_block;
        }
    return outside;
}
/* Under a causal mask: what the busiest block computes over what the mean one does, in blocks of 64
 * keys and one for a tile's start and end. Writes how many heads a section has. */
double uneven(int b, int hq, int hk, int s, int d, int block_m, int blocks, int32_t *section) {
    fa_what w = {.b = b, .hq = hq, .hk = hk, .sq = s, .sk = s, .d = d, .dv = d};
    fa_masks m = {.flags = FA_HAS_RIGHT};
    fa_schedule plan = fa_schedule_make(&w, &m, block_m, blocks);
    int64_t most = 0, all = 0;
    for (int block = 0; block < blocks; ++block) {
        int64_t work = 0;
        for (int32_t round = 0;;) {
            int32_t tile = fa_schedule_next(&plan, blocks, block, &round);
            if (tile >= plan.tiles) break;
            int64_t rows = (int64_t)(fa_schedule_tile(&plan, tile).m_block + 1) * block_m;
            work += ((rows < s ? rows : s) + 63) / 64 + 1;
        }
        most = work > most ? work : most, all += work;
    }
    *section = plan.section;
    return (double)most * blocks / all;
}
