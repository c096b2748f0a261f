/* sparsek_grad.cuh - the gradient of the SparseK operator on a GPU. A part of backend.cu.
 *
 * As tau never falls, the rows in which a key's gate is between 0 and 1 are one run, found by two
 * searches in tau, and the key takes the rows' means from their prefix sums; in float64. Five
 * launches: runs of keys; sizes of rows; means, and what lists have; prefix sums; keys.
 */
#ifndef FASTATTN_SM90_SPARSEK_GRAD_CUH
#define FASTATTN_SM90_SPARSEK_GRAD_CUH

#include "sm90/sparsek_rows.cuh"

struct sparsek_grad_args {
    fa_sparsek_backward b;
    double *dz, *means;     /* (streams, sk), (streams, sq + 1) */
    int32_t *sizes;         /* (streams, sq + 1): how many more are inside than in the row before */
    int2 *runs;             /* (streams, sk) */
    int64_t streams, bytes; /* of all four */
};

/* Where they lie in the workspace; data NULL: bytes alone. */
static inline void lay_out_sparsek(sparsek_grad_args &a, void *workspace) {
    const fa_sparsek &r = a.b.forward;
    a.streams = 1;
    for (int32_t i = 0; i < r.lead; ++i) a.streams *= r.shape[i];
    const int64_t keys = a.streams * r.sk, rows = a.streams * ((int64_t)r.sq + 1);
    char *at = (char *)workspace;
    a.dz = (double *)at, at += keys * 8;
    a.means = (double *)at, at += rows * 8;
    a.runs = (int2 *)at, at += keys * 8;
    a.sizes = (int32_t *)at, at += rows * 4;
    a.bytes = at - (char *)workspace;
}

DEVICE bool is_inside(const fa_sparsek &r, double z, double tau) {
    const double p = gate_by(r.dtype, z, tau, r.k);
    return p > 0 && p < 1; /* a NaN is not */
}

DEVICE void put_score(void *data, fa_dtype dtype, int64_t at, double x) {
    if (dtype == FA_F64)
        ((double *)data)[at] = x;
    else if (dtype == FA_F32)
        ((float *)data)[at] = (float)x;
    else
        ((uint16_t *)data)[at] = dtype == FA_F16 ? element<FA_F16>::narrow((float)x)
                                                 : element<FA_BF16>::narrow((float)x);
}

/* Of whole rows: a block has one. */
static __global__ void __launch_bounds__(SPARSEK_THREADS)
    sparsek_whole(const __grid_constant__ sparsek_grad_args a) {
    extern __shared__ uint8_t raw[];
    double *const shared = (double *)raw;
    const fa_sparsek &r = a.b.forward;
    let_next_start();
    wait_for_stream();
    const int64_t stream = blockIdx.x, given = fa_stream_place(&r, &a.b.dgates, stream);
    const int64_t to = fa_stream_place(&r, &a.b.dscores, stream);
    const int64_t scores = fa_stream_place(&r, &r.scores, stream);
    const double tau = get_real(r.tau.data, r.dtype, fa_stream_place(&r, &r.tau, stream));
    int32_t n = r.sk;
    if (r.lengths.data)
        n = fa_clamp(((const int32_t *)r.lengths.data)[fa_stream_place(&r, &r.lengths, stream)], 0,
                     r.sk);
    double sum = 0, count = 0;
    for (int32_t j = threadIdx.x; j < n; j += SPARSEK_THREADS)
        if (is_inside(r, read_score(r.scores.data, r.dtype, scores + j * r.scores.column), tau))
            sum += get_real(a.b.dgates.data, r.dtype, given + j * a.b.dgates.column), ++count;
    sum = fold_all<SUM>(sum, shared), count = fold_all<SUM>(count, shared);
    for (int32_t j = threadIdx.x; j < r.sk; j += SPARSEK_THREADS) {
        double dz = 0;
        if (j < n &&
            is_inside(r, read_score(r.scores.data, r.dtype, scores + j * r.scores.column), tau))
            dz = get_real(a.b.dgates.data, r.dtype, given + j * a.b.dgates.column) - sum / count;
        put_score(a.b.dscores.data, r.dtype, to + j * a.b.dscores.column, dz);
    }
}

/* ---- lists ------------------------------------------------------------------------------------*/

/* A stream, and what each of its launches knows. */
struct grad_stream {
    int64_t stream, tau;
    fa_lengths n;
    int32_t rows; /* before the first whose tau is NaN */
};

DEVICE double tau_of(const fa_sparsek &r, const grad_stream &s, int32_t row) {
    return get_real(r.tau.data, r.dtype, s.tau + row * r.tau.row);
}

DEVICE grad_stream find_grad_stream(const fa_sparsek &r, int64_t stream) {
    grad_stream s;
    s.stream = stream, s.tau = fa_stream_place(&r, &r.tau, stream);
    s.n = fa_sequence_lengths(&r.masks, stream / r.shape[1], r.sq, r.sk);
    int32_t end = s.n.sq;
    for (s.rows = 0; s.rows < end;) {
        const int32_t middle = (s.rows + end) / 2;
        const double tau = tau_of(r, s, middle);
        if (tau == tau)
            s.rows = middle + 1;
        else
            end = middle;
    }
    return s;
}

/* The first of rows first .. end - 1 whose gate of z is at most p, or below it. */
DEVICE int32_t find_row(const fa_sparsek &r, const grad_stream &s, double z, int32_t first,
                        int32_t end, double p, bool below) {
    while (first < end) {
        const int32_t middle = first + (end - first) / 2;
        const double g = gate_by(r.dtype, z, tau_of(r, s, middle), r.k);
        if (below ? g < p : g <= p)
            end = middle;
        else
            first = middle + 1;
    }
    return first;
}

/* Numbers of one stream after the other: of `each`, a thread's. */
DEVICE int64_t number_of() { return (int64_t)blockIdx.x * SPARSEK_THREADS + threadIdx.x; }
DEVICE int64_t all_threads() { return (int64_t)gridDim.x * SPARSEK_THREADS; }

static __global__ void __launch_bounds__(SPARSEK_THREADS)
    sparsek_clear(const __grid_constant__ sparsek_grad_args a) {
    let_next_start();
    wait_for_stream();
    for (int64_t i = number_of(); i < a.bytes / 4; i += all_threads()) ((int32_t *)a.dz)[i] = 0;
}

static __global__ void __launch_bounds__(SPARSEK_THREADS)
    sparsek_runs(const __grid_constant__ sparsek_grad_args a) {
    const fa_sparsek &r = a.b.forward;
    let_next_start();
    wait_for_stream();
    for (int64_t i = number_of(); i < a.streams * r.sk; i += all_threads()) {
        const grad_stream s = find_grad_stream(r, i / r.sk);
        const int32_t key = (int32_t)(i % r.sk);
        int2 run = {0, 0};
        if (key >= s.n.k_start && key < s.n.sk) {
            const double z = scores_of(r, s.stream, key)(0);
            const int32_t first =
                min(s.rows, fa_rows_seeing_some(s.n, fa_interval{key, key + 1}).begin);
            run.x = find_row(r, s, z, first, s.rows, 1, true);
            run.y = find_row(r, s, z, first, s.rows, 0, false);
            int32_t *const sizes = a.sizes + s.stream * ((int64_t)r.sq + 1);
            if (run.x < run.y) atomicAdd(sizes + run.x, 1), atomicAdd(sizes + run.y, -1);
        }
        if (run.y < run.x) run.y = run.x;
        a.runs[i] = run;
    }
}

/* Sums of what was before: of sizes, themselves included; of means, without. A block has a stream,
 * a thread neighbouring rows. */
template <bool OF_MEANS>
static __global__ void __launch_bounds__(SPARSEK_THREADS)
    sparsek_prefix(const __grid_constant__ sparsek_grad_args a) {
    extern __shared__ uint8_t raw[];
    double *const shared = (double *)raw;
    const int32_t rows = a.b.forward.sq + 1;
    let_next_start();
    wait_for_stream();
    int32_t *const sizes = a.sizes + blockIdx.x * (int64_t)rows;
    double *const means = a.means + blockIdx.x * (int64_t)rows;
    const int32_t share = (rows + SPARSEK_THREADS - 1) / SPARSEK_THREADS;
    const int32_t first = min(rows, (int32_t)threadIdx.x * share), end = min(rows, first + share);
    double own = 0, before = 0;
    for (int32_t i = first; i < end; ++i) own += OF_MEANS ? means[i] : sizes[i];
    shared[threadIdx.x] = own;
    bar_sync(SPARSEK_BARRIER, SPARSEK_THREADS);
    for (int32_t i = 0; i < (int32_t)threadIdx.x; ++i) before += shared[i];
    for (int32_t i = first; i < end; ++i) {
        const double mean = means[i];
        if (OF_MEANS)
            means[i] = before, before += mean;
        else
            before += sizes[i], sizes[i] = (int32_t)before;
    }
}

/* What lists have of gradients, and each row's mean; a warp has a row. */
static __global__ void __launch_bounds__(SPARSEK_THREADS)
    sparsek_means(const __grid_constant__ sparsek_grad_args a) {
    const fa_sparsek &r = a.b.forward;
    let_next_start();
    wait_for_stream();
    for (int64_t i = number_of() / 32; i < a.streams * r.sq; i += all_threads() / 32) {
        const grad_stream s = find_grad_stream(r, i / r.sq);
        const int32_t row = (int32_t)(i % r.sq);
        const int64_t at = s.stream * ((int64_t)r.sq + 1) + row;
        if (row >= s.rows || a.sizes[at] == 0) continue;
        const int64_t lists = fa_stream_place(&r, &r.key_lists, s.stream) + row * r.key_lists.row;
        const int64_t given = fa_stream_place(&r, &a.b.dgates, s.stream) + row * a.b.dgates.row;
        const stream_scores z = scores_of(r, s.stream, 0);
        const double tau = tau_of(r, s, row);
        double sum = 0;
        for (int32_t e = threadIdx.x % 32; e < r.kept; e += 32) {
            const int32_t key = ((const int32_t *)r.key_lists.data)[lists + e * r.key_lists.column];
            if (key < 0 || key >= r.sk || !is_inside(r, z(key), tau)) continue;
            const double dp = get_real(a.b.dgates.data, r.dtype, given + e * a.b.dgates.column);
            atomicAdd(a.dz + s.stream * r.sk + key, dp);
            sum += dp;
        }
        sum = fold_all<SUM>(sum, NULL);
        if (threadIdx.x % 32 == 0) a.means[at] = sum / a.sizes[at];
    }
}

static __global__ void __launch_bounds__(SPARSEK_THREADS)
    sparsek_keys(const __grid_constant__ sparsek_grad_args a) {
    const fa_sparsek &r = a.b.forward;
    let_next_start();
    wait_for_stream();
    for (int64_t i = number_of(); i < a.streams * r.sk; i += all_threads()) {
        const int64_t stream = i / r.sk;
        const double *means = a.means + stream * ((int64_t)r.sq + 1);
        const double dz = a.dz[i] - (means[a.runs[i].y] - means[a.runs[i].x]);
        put_score(a.b.dscores.data, r.dtype,
                  fa_stream_place(&r, &a.b.dscores, stream) + i % r.sk * a.b.dscores.column, dz);
    }
}

#endif
