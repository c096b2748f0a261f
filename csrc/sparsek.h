/* sparsek.h - the SparseK operator (Lou et al., 2024) and its gradient: one fa_sparsek, or one
 * fa_sparsek_backward, is one request.
 *
 * Of a row's candidates z, m of them, and a number k:
 *
 *     p_j = clip(z_j - tau, 0, 1)      tau: where the sum of p is k
 *
 * On a plateau, where k is an integer and the k-th greatest z is 1 or more above the next, tau is
 * the middle between them, the upper one less 1. Where k >= m tau is minus infinity and p is 1,
 * where k <= 0 it is plus infinity and p is 0. A z of minus infinity is no candidate; one of plus
 * infinity has p = 1 and takes one of k. A NaN among the candidates makes tau and their p NaN.
 *
 * A stream is one line of scores, of which the rows see candidates of their own: prefixes, which
 * only grow, so that tau never falls from row to row. There are two forms: one row for each stream
 * with the gates of all its scores, or many rows with lists of their greatest keys.
 */
#ifndef FASTATTN_SPARSEK_H
#define FASTATTN_SPARSEK_H

#include "forward.h"

enum { FA_MAX_LEAD = 7 }; /* leading axes, which count the streams */

/* What each stream has: rows and columns of one array. Strides count elements. */
typedef struct fa_streams {
    void *data;
    int64_t lead[FA_MAX_LEAD]; /* of the leading axes; 0 where the array is the same along one */
    int64_t row, column;       /* 0 where there is one */
} fa_streams;

typedef struct fa_sparsek {
    int32_t lead; /* axes */
    int64_t shape[FA_MAX_LEAD];
    int32_t sk;         /* scores of a stream */
    int32_t sq;         /* rows; without lists 1 */
    int32_t has_lists;  /* then the leading axes are (b, h) */
    int32_t kept;       /* of lists: entries, k rounded up, 0 where that is negative */
    double k;           /* finite */
    fa_streams scores;  /* (sk) dtype */
    fa_streams lengths; /* one int32 a stream, how many scores are candidates; data NULL: all.
                         * Without lists only */
    /* Of lists: row i sees the keys that fa_row_interval() in mask.h says, by b; right is minus the
     * window, and there is no left. Without lists all is clear. */
    fa_masks masks;
    fa_dtype dtype;
    /* Written whole, but by the backward pass, which reads tau and the lists. */
    fa_streams tau;       /* (sq) float32, or float64 where dtype is; as are gates */
    fa_streams gates;     /* (kept) of each row; without lists (sk), 0 for what is no candidate */
    fa_streams key_lists; /* (kept) of each row, int32: the greatest candidates, ascending, and then
                           * FA_NO_KEY, whose gates are 0. Of equal scores the lower key number is
                           * the greater, a NaN is like plus infinity. Without lists data is NULL */
    fa_where where;
} fa_sparsek;

enum { FA_NO_KEY = ~0 };

/* With I a row's candidates of 0 < p < 1, by the bits of its tau, and dp 0 for what no list has:
 *
 *     dz_j = sum over the rows with j in I of (dp_j - mean of dp over I)
 */
typedef struct fa_sparsek_backward {
    fa_sparsek forward; /* with the tau and the lists that it gave; gates are not read */
    fa_streams dgates;  /* like gates */
    fa_streams dscores; /* like scores, written whole */
} fa_sparsek_backward;

/* Element (stream, row, column) of an array, counted in elements; streams count row by row. */
FA_INLINE int64_t fa_stream_place(const fa_sparsek *r, const fa_streams *a, int64_t stream) {
    int64_t at = 0;
    for (int32_t i = r->lead; i-- > 0; stream /= r->shape[i])
        at += stream % r->shape[i] * a->lead[i];
    return at;
}

FA_OPERATION(sparsek, fa_sparsek);
FA_OPERATION(sparsek_backward, fa_sparsek_backward);

#endif
