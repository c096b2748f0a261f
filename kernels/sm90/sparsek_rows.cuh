/* sparsek_rows.cuh - the SparseK operator on a GPU: gates of whole rows, or for every prefix of a
 * stream of scores tau, and the list of its greatest keys. A part of backend.cu.
 *
 * A block has some neighbouring rows of a stream. As tau never falls from row to row, scores below
 * that of its first row are nothing to the others: the block finds that tau once, keeps the keys
 * above it in shared memory, and each warp finds its own rows' among those. Where they are too many
 * (equal scores), warps look at the scores themselves.
 */
#ifndef FASTATTN_SM90_SPARSEK_ROWS_CUH
#define FASTATTN_SM90_SPARSEK_ROWS_CUH

#include "mask.h"
#include "sm90/sparsek_tau.cuh"

enum { SPARSEK_ROWS = 512, SPARSEK_KEPT = 6144 }; /* of a block */

struct sparsek_args {
    fa_sparsek r;
    int32_t streams, chunks; /* chunks of a stream's rows */
};

/* Scores of a stream, where a NaN is +inf. */
struct stream_scores {
    const void *data;
    fa_dtype dtype;
    int64_t first, step;
    __device__ double operator()(int32_t i) const {
        return rank_of(read_score(data, dtype, first + i * step));
    }
};

DEVICE stream_scores scores_of(const fa_sparsek &r, int64_t stream, int32_t key) {
    const int64_t step = r.scores.column;
    return stream_scores{r.scores.data, r.dtype,
                         fa_stream_place(&r, &r.scores, stream) + key * step, step};
}

DEVICE void put_real(void *data, fa_dtype dtype, int64_t at, double x) {
    if (dtype == FA_F64)
        ((double *)data)[at] = x;
    else
        ((float *)data)[at] = (float)x;
}
DEVICE double get_real(const void *data, fa_dtype dtype, int64_t at) {
    return dtype == FA_F64 ? ((const double *)data)[at] : ((const float *)data)[at];
}

/* ---- whole rows: a block has one --------------------------------------------------------------*/

static __global__ void __launch_bounds__(SPARSEK_THREADS)
    sparsek_gates(const __grid_constant__ sparsek_args a) {
    extern __shared__ uint8_t raw[];
    double *const shared = (double *)raw;
    const fa_sparsek &r = a.r;
    let_next_start();
    wait_for_stream();
    const int64_t stream = blockIdx.x;
    int32_t n = r.sk;
    if (r.lengths.data)
        n = fa_clamp(((const int32_t *)r.lengths.data)[fa_stream_place(&r, &r.lengths, stream)], 0,
                     r.sk);
    const stream_scores z = scores_of(r, stream, 0);
    double nans = 0;
    for (int32_t i = threadIdx.x; i < n; i += SPARSEK_THREADS) {
        const double x = read_score(z.data, z.dtype, z.first + i * z.step);
        nans += x != x;
    }
    double tau = NAN;
    if (fold_all<SUM>(nans, shared) == 0) tau = find_tau(r.k, z, n, -INFINITY, NAN, shared);
    const int64_t gates = fa_stream_place(&r, &r.gates, stream);
    if (threadIdx.x == 0) put_real(r.tau.data, r.dtype, fa_stream_place(&r, &r.tau, stream), tau);
    for (int32_t i = threadIdx.x; i < r.sk; i += SPARSEK_THREADS) {
        const double x =
            i < n ? read_score(z.data, z.dtype, z.first + i * z.step) : -(double)INFINITY;
        put_real(r.gates.data, r.dtype, gates + i * r.gates.column, gate_by(r.dtype, x, tau, r.k));
    }
}

/* ---- lists ------------------------------------------------------------------------------------*/

/* What a block keeps: keys in their order. */
struct kept_keys {
    double z[SPARSEK_KEPT];
    int32_t key[SPARSEK_KEPT];
    double shared[SPARSEK_WARPS];
    int32_t counts[2][SPARSEK_WARPS];
};

struct kept_scores {
    const double *z;
    __device__ double operator()(int32_t i) const { return z[i]; }
};

/* A block's rows of a stream. */
struct stream_rows {
    int64_t stream;
    int32_t first, end; /* rows */
    fa_lengths n;
    int32_t before, last; /* keys that the first row sees end here, and those of the last */
    int32_t count;        /* of kept keys; -1: too many */
    double dropped;       /* the greatest of those that are not kept */
};

DEVICE stream_rows find_stream(const sparsek_args &a) {
    const fa_sparsek &r = a.r;
    stream_rows s;
    s.stream = blockIdx.x / a.chunks;
    s.first = (int32_t)(blockIdx.x - s.stream * a.chunks) * SPARSEK_ROWS;
    s.n = fa_sequence_lengths(&r.masks, s.stream / r.shape[1], r.sq, r.sk);
    s.end = min(r.sq, s.first + SPARSEK_ROWS);
    s.before = s.last = s.n.k_start;
    if (s.first < s.n.sq) {
        s.before = fa_row_interval(s.n, s.first).end;
        s.last = fa_row_interval(s.n, min(s.end, s.n.sq) - 1).end;
    }
    return s;
}

/* Keys of the first row that are above `floor`, and all that come after. */
DEVICE void keep_keys(stream_rows &s, const sparsek_args &a, double floor, kept_keys &kept) {
    const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const stream_scores z = scores_of(a.r, s.stream, 0);
    double dropped = -INFINITY;
    s.count = 0;
#pragma unroll 1
    for (int32_t first = s.n.k_start, round = 0; first < s.last;
         first += SPARSEK_THREADS, ++round) {
        const int32_t key = first + (int32_t)threadIdx.x;
        const double x = key < s.last ? z(key) : -(double)INFINITY;
        const bool keeps = x != -INFINITY && (x > floor || key >= s.before);
        if (!keeps) dropped = fmax(dropped, x);
        const uint32_t keepers = __ballot_sync(~0u, keeps);
        if (lane == 0) kept.counts[round % 2][warp] = __popc(keepers);
        bar_sync(SPARSEK_BARRIER, SPARSEK_THREADS);
        int32_t place = s.count + __popc(keepers & ((1u << lane) - 1));
#pragma unroll
        for (int j = 0; j < SPARSEK_WARPS; ++j) {
            if (j < warp) place += kept.counts[round % 2][j];
            s.count += kept.counts[round % 2][j];
        }
        if (keeps && place < SPARSEK_KEPT) kept.z[place] = x, kept.key[place] = key;
    }
    s.dropped = fold_all<GREATEST>(dropped, kept.shared);
    if (s.count > SPARSEK_KEPT) s.count = -1, s.dropped = -INFINITY;
    bar_sync(SPARSEK_BARRIER, SPARSEK_THREADS);
}

/* A little below a tau, which is rounded. */
DEVICE double floor_of(double tau) {
    return tau == INFINITY ? 1.7976931348623157e308 : tau - 1e-6 * (fabs(tau) + 1);
}

/* How many of the kept keys are before `end`. */
DEVICE int32_t count_before(const kept_keys &kept, int32_t count, int32_t end) {
    int32_t low = 0;
    while (low < count) {
        const int32_t middle = (low + count) / 2;
        if (kept.key[middle] < end)
            low = middle + 1;
        else
            count = middle;
    }
    return low;
}

static __global__ void __launch_bounds__(SPARSEK_THREADS)
    sparsek_taus(const __grid_constant__ sparsek_args a) {
    extern __shared__ uint8_t raw[];
    kept_keys &kept = *(kept_keys *)raw;
    const fa_sparsek &r = a.r;
    let_next_start();
    wait_for_stream();
    stream_rows s = find_stream(a);
    const stream_scores z = scores_of(r, s.stream, s.n.k_start);
    double tau = find_tau(r.k, z, s.before - s.n.k_start, -INFINITY, NAN, kept.shared);
    keep_keys(s, a, floor_of(tau), kept);
    const int64_t to = fa_stream_place(&r, &r.tau, s.stream);
#pragma unroll 1
    for (int32_t i = s.first + (int32_t)threadIdx.x / 32; i < s.end; i += SPARSEK_WARPS) {
        const int32_t end = fa_row_interval(s.n, i).end;
        if (i >= s.n.sq)
            tau = r.k > 0 ? -INFINITY : INFINITY;
        else if (s.count < 0)
            tau = find_tau(r.k, z, end - s.n.k_start, -INFINITY, tau, NULL);
        else
            tau = find_tau(r.k, kept_scores{kept.z}, count_before(kept, s.count, end), s.dropped,
                           tau, NULL);
        if (threadIdx.x % 32 == 0) put_real(r.tau.data, r.dtype, to + i * r.tau.row, tau);
    }
}

/* The greatest so far of what a thread's share of a stream has, over all before it. */
DEVICE double rise(double own, double *shared) {
    bar_sync(SPARSEK_BARRIER, SPARSEK_THREADS);
    shared[threadIdx.x] = own;
    bar_sync(SPARSEK_BARRIER, SPARSEK_THREADS);
    double before = -INFINITY;
    for (int32_t i = 0; i < (int32_t)threadIdx.x; ++i) before = fmax(before, shared[i]);
    return before;
}

/* Roundings may not let tau fall. A block has a stream, a thread neighbouring rows. */
static __global__ void __launch_bounds__(SPARSEK_THREADS)
    sparsek_rise(const __grid_constant__ sparsek_args a) {
    extern __shared__ uint8_t raw[];
    double *const shared = (double *)raw;
    const fa_sparsek &r = a.r;
    let_next_start();
    wait_for_stream();
    const int64_t stream = blockIdx.x, at = fa_stream_place(&r, &r.tau, stream);
    const fa_lengths n = fa_sequence_lengths(&r.masks, stream / r.shape[1], r.sq, r.sk);
    const int32_t share = (n.sq + SPARSEK_THREADS - 1) / SPARSEK_THREADS;
    const int32_t first = min(n.sq, (int32_t)threadIdx.x * share), end = min(n.sq, first + share);
    double most = -INFINITY;
    for (int32_t i = first; i < end; ++i)
        most = fmax(most, get_real(r.tau.data, r.dtype, at + i * r.tau.row));
    most = rise(most, shared);
    for (int32_t i = first; i < end; ++i) {
        most = fmax(most, get_real(r.tau.data, r.dtype, at + i * r.tau.row));
        put_real(r.tau.data, r.dtype, at + i * r.tau.row, most);
    }
}

/* Doubles in the order of their bits. */
DEVICE int64_t order_of(double x) {
    const int64_t bits = __double_as_longlong(x);
    return bits < 0 ? INT64_MIN - bits : bits;
}
DEVICE double of_order(int64_t bits) {
    return __longlong_as_double(bits < 0 ? INT64_MIN - bits : bits);
}

template <typename SCORES>
DEVICE int32_t count_above(double c, const SCORES &z, int32_t n) {
    double count = 0;
#pragma unroll 1
    for (int32_t i = threadIdx.x % 32; i < n; i += 32) count += z(i) > c;
    return (int32_t)fold_all<SUM>(count, NULL);
}

/* Where the `room` greatest of z begin: all above it are among them; and how many are. tau: where
 * they are about as many. */
template <typename SCORES>
DEVICE double find_floor(int32_t room, double tau, const SCORES &z, int32_t n, int32_t &above) {
    above = count_above(-(double)INFINITY, z, n);
    if (above <= room) return -INFINITY;
    int64_t low = order_of(-(double)INFINITY), high = order_of((double)INFINITY);
    if (tau == tau && tau < INFINITY && (above = count_above(tau, z, n)) >= room) {
        if (above == room) return tau;
        low = order_of(tau);
    }
    above = 0; /* more than `room` are above `low`, and so many above `high` */
#pragma unroll 1
    while ((uint64_t)high - (uint64_t)low > 1) {
        const int64_t middle = low + (int64_t)(((uint64_t)high - (uint64_t)low) / 2);
        const int32_t count = count_above(of_order(middle), z, n);
        if (count > room) {
            low = middle;
        } else {
            high = middle, above = count;
            if (count == room) break;
        }
    }
    return of_order(high);
}

/* One row's list and gates, by a warp. key_of(i): the key of score i. */
template <typename SCORES, typename KEYS>
DEVICE void fill_row(const fa_sparsek &r, const stream_rows &s, int32_t row, double tau,
                     const SCORES &z, const KEYS &key_of, int32_t n) {
    const int32_t lane = threadIdx.x % 32;
    const int64_t lists = fa_stream_place(&r, &r.key_lists, s.stream) + row * r.key_lists.row;
    const int64_t gates = fa_stream_place(&r, &r.gates, s.stream) + row * r.gates.row;
    const stream_scores all = scores_of(r, s.stream, 0);
    int32_t above, count = 0;
    const double floor = find_floor(r.kept, tau, z, n, above);
    int32_t equal = floor == -INFINITY ? 0 : r.kept - above; /* that are taken of those at it */
#pragma unroll 1
    for (int32_t first = 0; first < n && count < r.kept; first += 32) {
        const double x = first + lane < n ? z(first + lane) : -(double)INFINITY;
        const uint32_t before = (1u << lane) - 1, level = __ballot_sync(~0u, x == floor);
        const bool is_level = x == floor && x != -INFINITY && __popc(level & before) < equal;
        const uint32_t takers = __ballot_sync(~0u, x > floor || is_level);
        equal = max(0, equal - __popc(level));
        if (takers >> lane & 1) {
            const int32_t key = key_of(first + lane), place = count + __popc(takers & before);
            const double score = read_score(all.data, all.dtype, all.first + key * all.step);
            ((int32_t *)r.key_lists.data)[lists + place * r.key_lists.column] = key;
            put_real(r.gates.data, r.dtype, gates + place * r.gates.column,
                     gate_by(r.dtype, score, tau, r.k));
        }
        count += __popc(takers);
    }
    for (int32_t i = count + lane; i < r.kept; i += 32) {
        ((int32_t *)r.key_lists.data)[lists + i * r.key_lists.column] = FA_NO_KEY;
        put_real(r.gates.data, r.dtype, gates + i * r.gates.column, 0);
    }
}

/* The first NaN among a stream's keys. */
DEVICE int32_t find_nan(const fa_sparsek &r, const stream_rows &s, double *shared) {
    const stream_scores z = scores_of(r, s.stream, 0);
    double first = r.sk;
    for (int32_t i = s.n.k_start + (int32_t)threadIdx.x; i < s.last; i += SPARSEK_THREADS) {
        const double x = read_score(z.data, z.dtype, z.first + i * z.step);
        if (x != x) first = fmin(first, (double)i);
    }
    return (int32_t)fold_all<LEAST>(first, shared);
}

/* Lists, and a NaN for the tau and gates of rows that see one. */
static __global__ void __launch_bounds__(SPARSEK_THREADS)
    sparsek_fill(const __grid_constant__ sparsek_args a) {
    extern __shared__ uint8_t raw[];
    kept_keys &kept = *(kept_keys *)raw;
    const fa_sparsek &r = a.r;
    let_next_start();
    wait_for_stream();
    stream_rows s = find_stream(a);
    const int64_t at = fa_stream_place(&r, &r.tau, s.stream);
    const double first =
        s.first < s.n.sq ? get_real(r.tau.data, r.dtype, at + s.first * r.tau.row) : 0;
    const int32_t nan = find_nan(r, s, kept.shared);
    keep_keys(s, a, floor_of(first), kept);
    const int32_t start = s.n.k_start;
    const stream_scores z = scores_of(r, s.stream, start);
#pragma unroll 1
    for (int32_t i = s.first + (int32_t)threadIdx.x / 32; i < s.end; i += SPARSEK_WARPS) {
        const int32_t end = i < s.n.sq ? fa_row_interval(s.n, i).end : start;
        double tau = get_real(r.tau.data, r.dtype, at + i * r.tau.row);
        __syncwarp();
        if (nan < end) {
            tau = NAN;
            if (threadIdx.x % 32 == 0) put_real(r.tau.data, r.dtype, at + i * r.tau.row, tau);
        }
        if (s.count < 0)
            fill_row(r, s, i, tau, z, [&](int32_t n) { return start + n; }, end - start);
        else
            fill_row(
                r, s, i, tau, kept_scores{kept.z}, [&](int32_t n) { return kept.key[n]; },
                count_before(kept, s.count, end));
    }
}

#endif
