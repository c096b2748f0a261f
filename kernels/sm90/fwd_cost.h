/* fwd_cost.h - what a request costs on a variant, by measured weights. Plain C, tested on the host.
 */
#ifndef FASTATTN_SM90_FWD_COST_H
#define FASTATTN_SM90_FWD_COST_H

#include "sm90/fwd_columns.h"
#include "sm90/loads.h"

static inline int64_t fa_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline double fa_greater(double a, double b) { return a > b ? a : b; }

/* What a score costs, in percent of the 128 x 128 tile's cost (of head size 64: of 4x64's, which is
 * 108), measured: where each SM has as many tiles as it has room for, and where it has one, so that
 * a tile of 64 rows leaves it half idle. */
typedef struct fa_weight {
    int32_t together, alone;
} fa_weight;

static inline fa_weight fa_variant_weight(const fa_variant *v, int32_t causal, int32_t sk) {
    const int32_t block_m = fa_block_m(v), small = v->d <= 64, wide = v->block_n > 64;
    if (block_m == 64 && small) return wide ? (fa_weight){112, 190} : (fa_weight){165, 243};
    if (block_m == 64) return wide ? (fa_weight){160, 151} : (fa_weight){125, 177};
    /* More rows share a load of K and V, but waste more at the diagonal, which matters less the
     * longer the rows are. */
    const int32_t tall = (causal && sk <= 8192 ? 103 : 95) + (v->block_n == 96 ? 3 : 0);
    if (block_m == 192) return (fa_weight){tall, tall};
    if (block_m == 256) return (fa_weight){108, 108};
    /* Fewer keys mean more turns of the loop; fp16's watches every score. */
    if (!wide && small) return (fa_weight){138, 140};
    if (!wide && v->dtype == FA_F16) return (fa_weight){115, 115};
    if (!wide) return (fa_weight){causal ? 104 : 107, 98};
    return v->d < 128 ? (fa_weight){115, 115} : (fa_weight){100, 100}; /* more of it is softmax */
}

/* The time of a request on one variant, in units of one query row times one key on one SM. A tile
 * is as long as its keys, in blocks, plus a prologue and an epilogue that weigh about as much as
 * one block, two if it has 192 rows, and one more where the diagonal cuts blocks askew; the code of
 * the wide tiles of 64 rows is fetched anew for few keys. The SMs work through the tiles in rounds,
 * of which the last may be ragged, as many at a time as there are blocks on an SM; the first block
 * of all is waited for. Under a causal mask a tile has half of the keys in the mean; the longest
 * takes its time, and may have others that are as long on its SM. */
static inline double fa_variant_cost(const fa_variant *v, const fa_what *w, const fa_masks *m,
                                     int32_t sms) {
    const int32_t block_m = fa_block_m(v);
    const int32_t causal = (m->flags & FA_HAS_RIGHT) != 0,
                  window = causal && m->flags & FA_HAS_LEFT;
    int32_t sk = w->sk;
    if (window) { /* of the tile's rows, through a window; a causal one may be empty */
        const int64_t width = (int64_t)m->left + m->right + block_m;
        if (sk > width) sk = width > 0 ? (int32_t)width : 0;
    }
    const int32_t askew = causal && block_m > v->block_n && block_m % v->block_n;
    const double more = 1 + (block_m == 192) + askew + (block_m == 64 && v->block_n > 64 ? 1.5 : 0);
    const double longest = (double)fa_ceil_div(sk, v->block_n) + more;
    double mean = longest;
    if (causal && !window) {
        double keys = (w->sq < sk ? sk - w->sq / 2 : sk / 2) + block_m / 2;
        if (keys < sk) mean = keys / v->block_n + more;
    }
    fa_weight weight = fa_variant_weight(v, causal, sk);
    /* Where K and V come slowly and are read for few rows, they are waited for. */
    const int32_t slowly = !fa_is_of_bytes(&w->k, 32) || !fa_is_of_bytes(&w->v, 32);
    if (slowly && block_m < 192 && !w->batch_invariant) {
        const int32_t percent = block_m == 64 ? 140 : v->d > 64 ? 110 : 100;
        weight.together = weight.together * percent / 100;
        weight.alone = weight.alone * percent / 100;
    }
    const double area = block_m * v->block_n;
    const int64_t tiles = fa_ceil_div(w->sq, block_m), together = v->blocks_per_sm;
    /* A batch-invariant choice sees one sequence only: as if every SM were always busy. */
    if (w->batch_invariant) return (double)tiles * mean * area * weight.together;
    const int64_t rounds = fa_ceil_div(tiles * w->b * w->hq, sms);
    const int64_t long_ones = rounds < together ? rounds : together;
    const double work = (double)rounds * mean, crowd = (double)long_ones * (longest - mean);
    const double shared = together > 1 ? work + crowd : fa_greater(work, longest);
    const double lone = fa_greater((double)fa_ceil_div(rounds, together) * mean, longest);
    double cost = lone * weight.alone;
    if (rounds > 1) cost = fa_greater(cost, shared * weight.together);
    return area * (cost + weight.together);
}

#endif
