/* merge.cuh - the kernels that merge partial results (merge_plan.h says who does what).
 *
 *     lse = log(sum_i exp(lse_i)),  out = sum_i exp(lse_i - lse) * out_i
 *
 * A part whose lse is -inf or +inf is empty, whatever its out holds. Lane j of each 8 looks up pair
 * j, (row, part): where its out lies and its lse. All lanes of the row then learn the addresses by
 * shuffle and have all fragments on their way before the weights are known. Weights are quotients:
 * what a sum holds is a mean of the outs, which overflows no more than they do. The order of every
 * sum is a function of the number of parts and of dv. A part of merge.cu; tests/gpu_host/fibers.h
 * runs it on the host.
 */
#ifndef FASTATTN_MERGE_CUH
#define FASTATTN_MERGE_CUH

#include "common/compiler.cuh"
#include "common/merge_plan.h"
#ifdef __CUDACC__
#include "common/element.cuh"
#include "common/launch.cuh"
#include "common/stream.cuh"
#endif

template <int PARTS>
struct merge_args {
    fa_merge_part result;
    int64_t rows, items, tiles, size[2]; /* of the faster two axes */
    int64_t dv;
    int32_t n, lanes, share;
    int32_t is_stacked; /* the parts lie these bytes apart, parts[0] the first */
    int64_t out_step, lse_step;
    const fa_merge_part *list; /* on the device; NULL: `parts`, or a stack of them */
    fa_merge_part parts[PARTS];
};

struct merge_list_args {
    fa_merge_part *list;
    int32_t count;
    fa_merge_part parts[FA_MERGE_LISTED];
};

static_assert(sizeof(merge_list_args) <= 4096 && sizeof(merge_args<FA_MERGE_PAIRS>) <= 4096,
              "the arguments of a launch");

template <int PARTS>
static merge_args<PARTS> make_merge_args(const fa_merge *m, const fa_merge_plan *p,
                                         void *workspace) {
    merge_args<PARTS> a = {};
    a.result = fa_merge_describe(p, &m->out, m->dtype, &m->lse);
    a.rows = p->rows;
    a.items = p->items;
    a.tiles = p->tiles;
    for (int i = 0; i < 2; ++i) a.size[i] = m->out.shape[p->axis[i + 1]];
    a.dv = m->out.shape[3];
    a.n = m->n;
    a.lanes = p->lanes;
    a.share = p->share;
    a.is_stacked = p->is_stacked;
    a.out_step = p->out_step;
    a.lse_step = p->lse_step;
    a.list = p->bytes ? (const fa_merge_part *)workspace : NULL;
    for (int i = 0; i < PARTS && i < m->n && !a.list; ++i) a.parts[i] = fa_merge_find(p, m, i);
    return a;
}

/* Of the parts from `first` on. */
static inline merge_list_args make_list_args(const fa_merge *m, const fa_merge_plan *p,
                                             int32_t first, void *workspace) {
    merge_list_args a = {};
    a.list = (fa_merge_part *)workspace + first;
    a.count = m->n - first < FA_MERGE_LISTED ? m->n - first : FA_MERGE_LISTED;
    for (int32_t i = 0; i < a.count; ++i) a.parts[i] = fa_merge_find(p, m, first + i);
    return a;
}

/* Where a row lies: its place along the three axes. */
struct row_place {
    int64_t at[3];
};

template <typename I>
DEVICE row_place divide_row(I row, I size0, I size1) {
    const I rest = row / size1, first = rest / size0;
    return {{(int64_t)first, (int64_t)(rest - first * size0), (int64_t)(row - rest * size1)}};
}

/* The loads wait for it: in 32 bits where these do, by a branch that is the same for all. */
template <int PARTS>
DEVICE row_place find_place(const merge_args<PARTS> &a, int64_t row) {
    if (a.rows <= UINT32_MAX)
        return divide_row((uint32_t)row, (uint32_t)a.size[0], (uint32_t)a.size[1]);
    return divide_row(row, a.size[0], a.size[1]);
}

DEVICE int64_t offset(const int64_t stride[3], const row_place &p) {
    return p.at[0] * stride[0] + p.at[1] * stride[1] + p.at[2] * stride[2];
}

/* One lane's pair. */
struct merge_pair {
    char *out;      /* of the row; NULL: no such row or part */
    int64_t column; /* bytes from one column to the next */
    float lse;      /* -inf: empty */
};

DEVICE merge_pair find_pair(const fa_merge_part &part, const row_place &p) {
    float lse = *(const float *)(part.lse + offset(part.lse_stride, p));
    return {part.out + offset(part.out_stride, p), part.column, lse};
}

/* +inf is how some say that there were no keys. */
DEVICE float known_lse(float lse) { return lse == INFINITY ? -INFINITY : lse; }

/* Of the 8 lanes' pairs, that of lane j. */
template <typename T>
DEVICE T of_pair(T x, int32_t j) {
    return (T)__shfl_sync(~0u, x, j, FA_MERGE_PAIRS);
}
DEVICE char *of_pair(char *x, int32_t j) {
    return (char *)__shfl_sync(~0u, (unsigned long long)x, j, FA_MERGE_PAIRS);
}

DEVICE float power(float lse, float top) {
    return exp2f((lse - top) * 1.4426950408889634f); /* log2 e */
}

/* The part of `sum` that a weight is. Where something is there it never is 0, so that an inf or a
 * NaN comes through; 2^-149 of any other value is nothing. */
DEVICE float portion(bool is_there, float weight, float sum) {
    const float least = 1.4e-45f, part = __fdividef(weight, sum);
    return !is_there ? 0 : part < least ? least : part;
}

/* SIZE elements of a row, as they are stored: those from a column on, BYTES of them at once, or
 * (BYTES 0) every lanes-th. */
template <fa_dtype T, int BYTES>
struct fragment {
    static constexpr int SIZE = BYTES / (int)sizeof(typename element<T>::stored);
    uint32_t x[BYTES / 4];
};
template <fa_dtype T>
struct fragment<T, 0> {
    static constexpr int SIZE = 4;
    typename element<T>::stored x[SIZE];
};

/* The first column of a lane's fragment of a tile. */
template <int SIZE, int BYTES>
DEVICE int64_t first_column(int64_t tile, int32_t lanes, int32_t lane) {
    return BYTES ? (tile * lanes + lane) * SIZE : tile * lanes * SIZE + lane;
}

/* row: NULL for none. */
template <fa_dtype T, int BYTES>
DEVICE void load_fragment(fragment<T, BYTES> &f, const char *row, int64_t, int64_t column, int32_t,
                          int64_t dv) {
#pragma unroll
    for (int i = 0; i < BYTES / 4; ++i) f.x[i] = 0;
    if (row && column < dv)
        load_once(f.x, row + column * (int64_t)sizeof(typename element<T>::stored));
}
template <fa_dtype T>
DEVICE void load_fragment(fragment<T, 0> &f, const char *row, int64_t stride, int64_t column,
                          int32_t lanes, int64_t dv) {
    typedef typename element<T>::stored stored;
#pragma unroll
    for (int e = 0; e < f.SIZE; ++e) {
        f.x[e] = 0;
        if (row && column + e * lanes < dv)
            f.x[e] = *(const stored *)(row + (column + e * lanes) * stride);
    }
}

template <fa_dtype T, int BYTES, int SIZE>
DEVICE void unpack(float (&x)[SIZE], const fragment<T, BYTES> &f) {
    constexpr int EACH = SIZE * 4 / BYTES; /* of 32 bits */
#pragma unroll
    for (int i = 0; i < BYTES / 4; ++i) {
        float some[EACH];
        element<T>::unpack(some, f.x[i]);
#pragma unroll
        for (int e = 0; e < EACH; ++e) x[i * EACH + e] = some[e];
    }
}
template <fa_dtype T, int SIZE>
DEVICE void unpack(float (&x)[SIZE], const fragment<T, 0> &f) {
#pragma unroll
    for (int e = 0; e < SIZE; ++e) x[e] = element<T>::widen(f.x[e]);
}

/* sum += weight * f. Empty parts add nothing, whatever they hold. */
template <fa_dtype T, int BYTES, int SIZE>
DEVICE void add_fragment(float (&sum)[SIZE], float weight, const fragment<T, BYTES> &f) {
    if (weight == 0) return;
    float x[SIZE];
    unpack(x, f);
#pragma unroll
    for (int e = 0; e < SIZE; ++e) sum[e] = fmaf(weight, x[e], sum[e]);
}

template <fa_dtype T, int BYTES, int SIZE>
DEVICE void store_fragment(const float (&x)[SIZE], char *row, int64_t stride, int64_t column,
                           int32_t lanes, int64_t dv) {
    typedef typename element<T>::stored stored;
    struct alignas(SIZE * sizeof(stored)) {
        stored x[SIZE];
    } f;
#pragma unroll
    for (int e = 0; e < SIZE; ++e) f.x[e] = element<T>::narrow(x[e]);
    if (!row) return;
    if constexpr (BYTES != 0) {
        if (column < dv) *(decltype(f) *)(row + column * (int64_t)sizeof(stored)) = f;
    } else {
#pragma unroll
        for (int e = 0; e < SIZE; ++e)
            if (column + e * lanes < dv) *(stored *)(row + (column + e * lanes) * stride) = f.x[e];
    }
}

DEVICE void store_lse(char *to, float top, float total) {
    *(float *)to = total == 0 ? -INFINITY : top + logf(total);
}

/* At most PARTS parts, all at once, of 8 / PARTS rows. */
template <fa_dtype IN, fa_dtype OUT, int PARTS, int BYTES>
static __global__ void __launch_bounds__(FA_MERGE_THREADS, FA_MERGE_BLOCKS)
    merge_few(const __grid_constant__ merge_args<PARTS> a) {
    typedef fragment<IN, BYTES> piece;
    constexpr int ROWS = FA_MERGE_PAIRS / PARTS, WARPS = FA_MERGE_THREADS / 32;
    const int32_t lane = threadIdx.x % a.lanes, warp = threadIdx.x / 32;
    const int32_t groups = 32 / a.lanes, group = threadIdx.x % 32 / a.lanes; /* of the warp */
    const int32_t my_row = threadIdx.x % FA_MERGE_PAIRS / PARTS, my_part = threadIdx.x % PARTS;
    __shared__ fa_merge_part parts[PARTS];
    if (threadIdx.x < PARTS) parts[threadIdx.x] = a.parts[threadIdx.x];
    __syncthreads();
    let_next_start();
    wait_for_stream();

    for (int64_t item = blockIdx.x; item < a.items; item += gridDim.x) {
        const int64_t block = a.tiles == 1 ? item : item / a.tiles, tile = item - block * a.tiles;
        const int64_t column = first_column<piece::SIZE, BYTES>(tile, a.lanes, lane);
        /* The rows of a warp lie together, and of those the ones of a load. */
        const int64_t row = ((block * WARPS + warp) * ROWS + my_row) * groups + group;
        const bool is_row = row < a.rows;
        const row_place place = find_place(a, is_row ? row : 0);
        merge_pair pair = {NULL, 0, -INFINITY};
        if (is_row && my_part < a.n) pair = find_pair(parts[my_part], place);

        piece x[FA_MERGE_PAIRS];
#pragma unroll
        for (int j = 0; j < FA_MERGE_PAIRS; ++j)
            load_fragment<IN>(x[j], of_pair(pair.out, j), 0, column, a.lanes, a.dv);
        if (never(a.n)) return;

        const float lse = known_lse(pair.lse);
        float top = lse;
#pragma unroll
        for (int i = 1; i < PARTS; i *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, i));
        const float weight = lse == -INFINITY ? 0 : power(lse, top == -INFINITY ? 0 : top);
        float total = weight;
#pragma unroll
        for (int i = 1; i < PARTS; i *= 2) total += __shfl_xor_sync(~0u, total, i);
        const float mine = portion(lse != -INFINITY, weight, total);
        if (is_row && my_part == 0 && lane < FA_MERGE_PAIRS && tile == 0)
            store_lse(a.result.lse + offset(a.result.lse_stride, place), top, total);

        char *to = is_row ? a.result.out + offset(a.result.out_stride, place) : NULL;
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            float sum[piece::SIZE] = {};
#pragma unroll
            for (int j = r * PARTS; j < (r + 1) * PARTS; ++j)
                add_fragment(sum, of_pair(mine, j), x[j]);
            store_fragment<OUT, BYTES>(sum, of_pair(to, r * PARTS), 0, column, a.lanes, a.dv);
        }
    }
}

DEVICE fa_merge_part find_part(const merge_args<FA_MERGE_PAIRS> &a, int32_t i) {
    if (a.list) return a.list[i];
    fa_merge_part part = a.parts[a.is_stacked ? 0 : i];
    if (a.is_stacked) part.out += i * a.out_step;
    if (a.is_stacked) part.lse += i * a.lse_step;
    return part;
}

/* What a group of lanes has merged so far: mean of its outs by weight, and the sum of its weights,
 * exp(lse - top). */
template <int SIZE>
struct merge_state {
    float mean[SIZE], top, total;
};

/* Adds 8 parts, of each lane's lse, to a state. */
template <fa_dtype IN, int BYTES, int SIZE>
DEVICE void add_parts(merge_state<SIZE> &s, float lse,
                      const fragment<IN, BYTES> (&x)[FA_MERGE_PAIRS]) {
    float top = lse;
#pragma unroll
    for (int k = 1; k < FA_MERGE_PAIRS; k *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, k));
    top = fmaxf(top, s.top);
    const float shift = top == -INFINITY ? 0 : top;
    const float weight = lse == -INFINITY ? 0 : power(lse, shift);
    float total = weight;
#pragma unroll
    for (int k = 1; k < FA_MERGE_PAIRS; k *= 2) total += __shfl_xor_sync(~0u, total, k);
    const float before = s.total == 0 ? 0 : s.total * power(s.top, shift);
    total += before;
    const float mine = portion(lse != -INFINITY, weight, total);
    const float kept = portion(s.total != 0, before, total);
#pragma unroll
    for (int e = 0; e < SIZE; ++e) s.mean[e] *= kept;
#pragma unroll
    for (int j = 0; j < FA_MERGE_PAIRS; ++j) add_fragment(s.mean, of_pair(mine, j), x[j]);
    s.top = top;
    s.total = total;
}

/* The states of the groups that share a row, merged in the order of the groups; that of the first
 * is the result. Every thread of the block calls it. */
template <int SIZE>
DEVICE void join_groups(merge_state<SIZE> &s, int32_t member, int32_t lanes, int32_t share) {
    __shared__ float means[SIZE][FA_MERGE_THREADS];
    __shared__ float tops[FA_MERGE_THREADS], totals[FA_MERGE_THREADS];
    const int32_t me = threadIdx.x;
#pragma unroll
    for (int e = 0; e < SIZE; ++e) means[e][me] = s.mean[e];
    tops[me] = s.top;
    totals[me] = s.total;
    __syncthreads();
    if (member == 0) {
        float top = -INFINITY, total = 0;
        for (int32_t g = 0; g < share; ++g) top = fmaxf(top, tops[me + g * lanes]);
        const float shift = top == -INFINITY ? 0 : top;
        for (int32_t g = 0; g < share; ++g)
            total += totals[me + g * lanes] * power(tops[me + g * lanes], shift);
        s = {};
        for (int32_t g = 0; g < share; ++g) {
            const int32_t at = me + g * lanes;
            const float weight =
                portion(totals[at] != 0, totals[at] * power(tops[at], shift), total);
            if (weight == 0) continue;
#pragma unroll
            for (int e = 0; e < SIZE; ++e) s.mean[e] = fmaf(weight, means[e][at], s.mean[e]);
        }
        s.top = top;
        s.total = total;
    }
    __syncthreads();
}

/* Any number of parts, 8 a step, and any strides. Of the groups that share a row each takes every
 * share-th step. */
template <fa_dtype IN, fa_dtype OUT, int BYTES>
static __global__ void __launch_bounds__(FA_MERGE_THREADS, FA_MERGE_BLOCKS)
    merge_many(const __grid_constant__ merge_args<FA_MERGE_PAIRS> a) {
    typedef fragment<IN, BYTES> piece;
    const int32_t lane = threadIdx.x % a.lanes, group = threadIdx.x / a.lanes;
    const int32_t member = group % a.share, team = group / a.share;
    const int32_t teams = FA_MERGE_THREADS / (a.lanes * a.share);
    let_next_start();
    wait_for_stream();

    for (int64_t item = blockIdx.x; item < a.items; item += gridDim.x) {
        const int64_t block = a.tiles == 1 ? item : item / a.tiles, tile = item - block * a.tiles;
        const int64_t column = first_column<piece::SIZE, BYTES>(tile, a.lanes, lane);
        const int64_t row = block * teams + team;
        const bool is_row = row < a.rows;
        const row_place place = find_place(a, is_row ? row : 0);
        merge_state<piece::SIZE> s = {};
        s.top = -INFINITY;

        /* All lanes of a warp go round equally often, for they shuffle. */
        for (int64_t step = 0; step < a.n; step += FA_MERGE_PAIRS * a.share) {
            const int64_t i = step + member * FA_MERGE_PAIRS + threadIdx.x % FA_MERGE_PAIRS;
            merge_pair pair = {NULL, 0, -INFINITY};
            if (is_row && i < a.n) pair = find_pair(find_part(a, (int32_t)i), place);

            piece x[FA_MERGE_PAIRS];
#pragma unroll
            for (int j = 0; j < FA_MERGE_PAIRS; ++j)
                load_fragment<IN>(x[j], of_pair(pair.out, j), BYTES ? 0 : of_pair(pair.column, j),
                                  column, a.lanes, a.dv);
            if (never(a.n)) return;

            add_parts(s, known_lse(pair.lse), x);
        }

        if (a.share > 1) join_groups(s, member, a.lanes, a.share);
        if (member != 0 || !is_row) continue;
        if (lane == 0 && tile == 0)
            store_lse(a.result.lse + offset(a.result.lse_stride, place), s.top, s.total);
        store_fragment<OUT, BYTES>(s.mean, a.result.out + offset(a.result.out_stride, place),
                                   a.result.column, column, a.lanes, a.dv);
    }
}

/* Some of the parts of a list that is too long for the arguments of one launch. */
static __global__ void merge_list(const __grid_constant__ merge_list_args a) {
    const int32_t words = sizeof(fa_merge_part) / 8;
    let_next_start();
    wait_for_stream();
    for (int32_t i = threadIdx.x; i < a.count * words; i += blockDim.x)
        ((int64_t *)a.list)[i] = ((const int64_t *)a.parts)[i];
}

#endif
