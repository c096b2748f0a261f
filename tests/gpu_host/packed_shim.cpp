/* The kernel that lists the tiles of packed sequences, and what blocks then find by number. */
#include <string.h>
#include "fibers.h"
#include "common/packed.cuh"

static packed_args arguments;

/* cu_k NULL: of a cache, without sequences of at most `few` rows. Returns the number of entries;
 * `visits` (hq, total_q) counts how often a row is in a tile. */
extern "C" int64_t list(int b, int hq, int hk, int total_q, int total_k, int sq, int sk,
                        const int32_t *cu_q, const int32_t *cu_k, int flags, int block_m,
                        int32_t *workspace, int64_t bytes, unsigned char *visits, int32_t *keys,
                        int few) {
    fa_what w = {};
    w.b = b, w.hq = hq, w.hk = hk, w.sq = sq, w.sk = sk, w.d = w.dv = 128;
    fa_masks m = {};
    m.flags = flags;
    fa_varlen v = {cu_q, cu_k, 1, 1, total_q, total_k};
    if (fa_packed_bytes(&v, b, block_m) > bytes) return -1;
    fa_packed p = fa_packed_make(&w, &m, &v, block_m, workspace);
    arguments = packed_args{p, v, m, sq, sk, !cu_k, few};
    run_block([] { list_tiles(arguments); });
    if (p.counts->claimed != 0) return -2;
    int32_t tiles = p.counts->entries * hq;
    for (int32_t n = 0; n < tiles; ++n) {
        fa_packed_entry entry = p.entries[n / hq];
        fa_sequence s = cu_k ? fa_packed_sequence(&p, &v, &m, entry.sequence, sq, sk)
                             : fa_packed_cached(&p, &v, &m, entry.sequence, sq, sk);
        int32_t m_blocks = fa_packed_m_blocks(&p, s);
        fa_tile t = fa_packed_tile(&p, n - entry.first * hq, m_blocks, s.lengths.sk);
        if (t.head < 0 || t.head >= hq || t.m_block < 0 || t.m_block >= m_blocks) return -3;
        keys[n / hq] = s.lengths.sk;
        for (int32_t i = t.m_block * block_m; i < (t.m_block + 1) * block_m; ++i)
            if (i < s.q_end - s.q) visits[(int64_t)t.head * total_q + s.q + i]++;
    }
    return p.counts->entries;
}
extern "C" int sequence_at(const int32_t *cu_q, int b, int total, int row) {
    fa_varlen v = {cu_q, cu_q, 1, 1, total, total};
    return fa_packed_at(&v, b, row);
}
extern "C" int length_class(int sk) { return fa_packed_class(sk); }
