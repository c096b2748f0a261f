/* mask.h - the key interval of a row, and its inverse, the rows that see a block of keys: the only
 * place that knows causal, window and lengths.
 *
 * Compiled by gcc and nvcc alike (csrc/cpu, kernels/). Includes nothing but forward.h.
 * For the rows 0 .. sq-1 of one sequence (its true length) both ends are non-decreasing in the row,
 * so a block of rows sees exactly [begin of its first row, end of its last row).
 */
#ifndef FASTATTN_MASK_H
#define FASTATTN_MASK_H

#include "forward.h"

typedef struct fa_interval {
    int32_t begin, end; /* keys begin <= j < end, none where equal; 0 <= begin <= end <= sk */
} fa_interval;

/* The true lengths of one sequence, and what its rows see: row i keys from max(k_start, i + from)
 * up to min(sk, i + to). */
typedef struct fa_lengths {
    int32_t sq, sk, k_start;
    int32_t from, to;
    int32_t shift; /* its position on the key axis is i + shift */
} fa_lengths;

FA_INLINE int32_t fa_clamp(int32_t x, int32_t lo, int32_t hi) {
    return x < lo ? lo : x > hi ? hi : x;
}

/* What came from memory is clamped, never trusted. */
FA_INLINE fa_lengths fa_sequence_lengths(const fa_masks *m, int64_t b, int32_t sq, int32_t sk) {
    fa_lengths n = {sq, sk, 0, 0, 0, 0};
    if (m->q_lengths) n.sq = fa_clamp(m->q_lengths[b * m->q_lengths_stride], 0, sq);
    if (m->k_lengths) n.sk = fa_clamp(m->k_lengths[b * m->k_lengths_stride], 0, sk);
    if (m->k_start) n.k_start = fa_clamp(m->k_start[b * m->k_start_stride], 0, n.sk);
    n.shift = m->flags & FA_HAS_OFFSET ? m->offset : n.sk - n.sq;
    if (m->q_offset)
        n.shift = fa_clamp(m->q_offset[b * m->q_offset_stride], -FA_MAX_SHIFT, FA_MAX_SHIFT);
    n.from = -n.sq, n.to = n.sk; /* no row, no key is past these */
    /* Both within these ends. It is the bounds that are clamped: the sums may not fit an int32. */
    if (m->flags & FA_HAS_LEFT)
        n.from = n.shift - fa_clamp(m->left, n.shift - n.sk, n.shift + n.sq);
    if (m->flags & FA_HAS_RIGHT)
        n.to = n.shift + fa_clamp(m->right, -n.sq - 1 - n.shift, n.sk - 1 - n.shift) + 1;
    if (n.to <= n.from) n.from = n.to = -n.sq; /* no row sees a key */
    return n;
}

/* Sequence b of a request: its true lengths, and where its rows lie. */
typedef struct fa_sequence {
    fa_lengths lengths;
    int32_t q, q_end; /* its rows of q, out and lse; those from q + lengths.sq on are padding */
    int32_t k;        /* its first row of k and v */
} fa_sequence;

/* The first row of sequence b of packed ones; of the one past the last, the first row that belongs
 * to none. The first sequence starts at 0 whatever is said. */
FA_INLINE int32_t fa_first_row(const int32_t *cu, int64_t stride, int64_t b, int32_t total) {
    return b ? fa_clamp(cu[b * stride], 0, total) : 0;
}

/* sq and sk: the request's, which bound every sequence's. Where offsets decrease, a sequence is
 * empty; all rows are inside the arrays, whatever the offsets say. */
FA_INLINE fa_sequence fa_find_sequence(const fa_varlen *v, const fa_masks *m, int64_t b, int32_t sq,
                                       int32_t sk) {
    fa_sequence s = {{0, 0, 0, 0, 0, 0}, 0, sq, 0};
    if (v->cu_q) {
        s.q = fa_first_row(v->cu_q, v->cu_q_stride, b, v->total_q);
        s.q_end = fa_clamp(v->cu_q[(b + 1) * v->cu_q_stride], s.q, v->total_q);
        s.k = fa_first_row(v->cu_k, v->cu_k_stride, b, v->total_k);
        sq = fa_clamp(s.q_end - s.q, 0, sq);
        sk = fa_clamp(fa_clamp(v->cu_k[(b + 1) * v->cu_k_stride], s.k, v->total_k) - s.k, 0, sk);
    }
    s.lengths = fa_sequence_lengths(m, b, sq, sk);
    return s;
}

/* The same where the keys are a cache's, from its row 0 on: the queries alone may be packed. */
FA_INLINE fa_sequence fa_find_cached(const fa_varlen *v, const fa_masks *m, int64_t b, int32_t sq,
                                     int32_t sk) {
    fa_sequence s;
    s.q = v->cu_q ? fa_first_row(v->cu_q, v->cu_q_stride, b, v->total_q) : 0;
    s.q_end = v->cu_q ? fa_clamp(v->cu_q[(b + 1) * v->cu_q_stride], s.q, v->total_q) : sq;
    s.k = 0;
    s.lengths = fa_sequence_lengths(m, b, fa_clamp(s.q_end - s.q, 0, sq), sk);
    return s;
}

/* Whether a sequence of packed queries has at most so many rows, no padding among them: then it is
 * left to another kernel. */
FA_INLINE int32_t fa_is_short(fa_sequence s, int32_t rows) {
    return s.q_end - s.q <= rows && s.lengths.sq == s.q_end - s.q;
}

/* The page of key j; where the table names none that there is, the nearest. */
FA_INLINE int32_t fa_find_page(const fa_pages *p, int64_t b, int32_t j) {
    return fa_clamp(p->table[b * p->stride[0] + j / p->size * p->stride[1]], 0, p->count - 1);
}

/* The position i' of row i on the key axis, from which windows and ALiBi count. */
FA_INLINE int32_t fa_row_position(fa_lengths n, int32_t i) { return i + n.shift; }

FA_INLINE fa_interval fa_row_interval(fa_lengths n, int32_t i) {
    fa_interval keys = {n.k_start, n.k_start};
    if (i >= n.sq) return keys; /* padding sees nothing; its position may not even fit an int32 */
    if (i + n.to > n.k_start) keys.end = i + n.to < n.sk ? i + n.to : n.sk;
    if (i + n.from > n.k_start) keys.begin = i + n.from < keys.end ? i + n.from : keys.end;
    return keys;
}

/* The inverse: rows begin <= i < end, none where equal; 0 <= begin <= end <= sq. Both ends are
 * non-decreasing in the ends of the block of keys. */
typedef struct fa_row_range {
    int32_t begin, end;
} fa_row_range;

FA_INLINE fa_row_range fa_rows_between(fa_lengths n, int32_t begin, int32_t end) {
    fa_row_range rows = {fa_clamp(begin, 0, n.sq), fa_clamp(end, 0, n.sq)};
    if (rows.end < rows.begin) rows.end = rows.begin;
    return rows;
}

/* The rows that see some key of a block; 0 <= keys.begin <= keys.end <= FA_MAX_LENGTH. */
FA_INLINE fa_row_range fa_rows_seeing_some(fa_lengths n, fa_interval keys) {
    if (keys.begin < n.k_start) keys.begin = n.k_start;
    if (keys.end > n.sk) keys.end = n.sk;
    if (keys.begin >= keys.end) return fa_rows_between(n, n.sq, n.sq);
    return fa_rows_between(n, keys.begin - n.to + 1, keys.end - n.from);
}

/* The rows that see every key of a block, which is not empty. */
FA_INLINE fa_row_range fa_rows_seeing_all(fa_lengths n, fa_interval keys) {
    if (keys.begin < n.k_start || keys.end > n.sk) return fa_rows_between(n, n.sq, n.sq);
    return fa_rows_between(n, keys.end - n.to, keys.begin - n.from + 1);
}

#endif
