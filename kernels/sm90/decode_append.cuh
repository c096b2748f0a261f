/* decode_append.cuh - before attention to a cache: new keys, rotated, and values are written into
 * it; q is rotated into the workspace; and how many keys there are then. No variant's business.
 */
#ifndef FASTATTN_SM90_DECODE_APPEND_CUH
#define FASTATTN_SM90_DECODE_APPEND_CUH

#include "common/element.cuh"
#include "common/launch.cuh"
#include "common/packed.h"
#include "common/stream.cuh"
#include "kvcache.h"
#include "mask.h"

enum { APPEND_THREADS = 128, APPEND_WARPS = APPEND_THREADS / 32 };

struct append_args {
    fa_kvcache cache;
    fa_tensor q;                    /* rotated; data NULL: q is not */
    int32_t *lengths;               /* (b,): of the keys in the end; NULL: not wanted */
    int64_t v_rows, k_rows, q_rows; /* that are written, in this order */
};

/* Where a row lies, in elements. */
DEVICE int64_t row_at(const fa_tensor &t, int64_t b, int64_t h, int64_t i) {
    return b * t.stride[0] + h * t.stride[1] + i * t.stride[2];
}
/* Of key j of a sequence. */
DEVICE int64_t key_at(const fa_tensor &t, const fa_pages &pages, int32_t b, int32_t h, int32_t j) {
    if (!pages.table) return row_at(t, b, h, j);
    return row_at(t, fa_find_page(&pages, b, j), h, j % pages.size);
}

template <fa_dtype T>
DEVICE double read_angle(const fa_tensor &t, fa_dtype type, int64_t row, int32_t i) {
    const int64_t at = row * t.stride[2] + i * t.stride[3];
    if (type == FA_F32) return ((const float *)t.data)[at];
    return element<T>::widen(((const uint16_t *)t.data)[at]);
}

/* A warp copies a row; the pairs of a rotary position are turned, where there are any. In doubles
 * products are exact: only the end rounds. */
template <fa_dtype T>
DEVICE void copy_row(uint16_t *to, int64_t to_step, const uint16_t *from, int64_t from_step,
                     int32_t columns, const fa_rotary &r, bool turns, int64_t position) {
    const int32_t lane = threadIdx.x % 32;
    const int64_t rows = r.cos.shape[2], row = position < rows ? position : rows - 1;
    const int32_t pairs = turns && rows ? (int32_t)r.cos.shape[3] : 0;
    const int32_t apart = r.interleaved ? 1 : pairs, step = r.interleaved ? 2 : 1;
    for (int32_t i = lane; i < pairs; i += 32) {
        const double c = read_angle<T>(r.cos, r.dtype, row, i);
        const double s = read_angle<T>(r.sin, r.dtype, row, i);
        const double x = element<T>::widen(from[i * step * from_step]);
        const double y = element<T>::widen(from[(i * step + apart) * from_step]);
        to[i * step * to_step] = element<T>::narrow((float)(x * c - y * s));
        to[(i * step + apart) * to_step] = element<T>::narrow((float)(y * c + x * s));
    }
    for (int32_t i = 2 * pairs + lane; i < columns; i += 32) to[i * to_step] = from[i * from_step];
}

/* Row `row` of the new keys or values, in the order (b, h, i). */
template <fa_dtype T>
DEVICE void append_row(const fa_kvcache &c, const fa_tensor &cache, const fa_tensor &rows,
                       int64_t row, bool turns) {
    const int32_t i = (int32_t)(row % c.s_new), h = (int32_t)(row / c.s_new % rows.shape[1]);
    const int32_t b = (int32_t)(row / c.s_new / rows.shape[1]), j = fa_keys_before(&c, b) + i;
    uint16_t *to = (uint16_t *)cache.data + key_at(cache, c.forward.pages, b, h, j);
    const uint16_t *from = (const uint16_t *)rows.data + row_at(rows, b, h, i);
    copy_row<T>(to, cache.stride[3], from, rows.stride[3], (int32_t)rows.shape[3], c.rotary, turns,
                j);
}

/* Row `row` of q, in the order (b, h, i), packed or not. A row of no sequence goes with one. */
template <fa_dtype T>
DEVICE void rotate_query(const append_args &a, int64_t row) {
    const fa_kvcache &c = a.cache;
    const fa_what &w = c.forward.what;
    const int32_t i = (int32_t)(row % w.q.shape[2]), h = (int32_t)(row / w.q.shape[2] % w.hq);
    const int32_t batch = (int32_t)(row / w.q.shape[2] / w.hq);
    const fa_varlen &v = c.forward.varlen;
    const int32_t b = v.cu_q ? fa_packed_at(&v, w.b, i) : batch;
    const int32_t first = v.cu_q ? fa_first_row(v.cu_q, v.cu_q_stride, b, v.total_q) : 0;
    const int64_t position = (int64_t)fa_keys_before(&c, b) + (c.rotary.advances ? i - first : 0);
    copy_row<T>((uint16_t *)a.q.data + row_at(a.q, batch, h, i), 1,
                (const uint16_t *)w.q.data + row_at(w.q, batch, h, i), w.q.stride[3], w.d, c.rotary,
                true, position);
}

template <fa_dtype T>
static __global__ void __launch_bounds__(APPEND_THREADS)
    kvcache_append(const __grid_constant__ append_args a) {
    const fa_kvcache &c = a.cache;
    const bool turns = c.rotary.cos.data != NULL;
    let_next_start();
    wait_for_stream();
    if (a.lengths && blockIdx.x == 0)
        for (int32_t b = threadIdx.x; b < c.forward.what.b; b += APPEND_THREADS)
            a.lengths[b] = fa_keys_before(&c, b) + c.s_new;
    const int64_t rows = a.v_rows + a.k_rows + a.q_rows;
    for (int64_t row = (int64_t)blockIdx.x * APPEND_WARPS + threadIdx.x / 32; row < rows;
         row += (int64_t)gridDim.x * APPEND_WARPS) {
        if (row < a.v_rows)
            append_row<T>(c, c.forward.what.v, c.v_new, row, false);
        else if (row < a.v_rows + a.k_rows)
            append_row<T>(c, c.forward.what.k, c.k_new, row - a.v_rows, turns);
        else
            rotate_query<T>(a, row - a.v_rows - a.k_rows);
    }
}

/* The bytes of 16-bit elements that lie between the first and the last. */
static inline void span_of(const fa_tensor *t, uintptr_t *first, uintptr_t *last) {
    *first = *last = (uintptr_t)t->data;
    for (int i = 0; i < 4; ++i) {
        const int64_t bytes = t->shape[i] > 1 ? 2 * (t->shape[i] - 1) * t->stride[i] : 0;
        *(bytes < 0 ? first : last) += bytes;
    }
}

/* Whether elements of the caches may be the same, of which keys are written last. */
static inline bool may_share(const fa_tensor *k, const fa_tensor *v) {
    uintptr_t k_first, k_last, v_first, v_last;
    span_of(k, &k_first, &k_last), span_of(v, &v_first, &v_last);
    return k_first <= v_last && v_first <= k_last;
}

static inline fa_status launch_append_rows(const append_args *a, const fa_device *device,
                                           fa_error *error) {
    const int64_t rows = a->v_rows + a->k_rows + a->q_rows, most = 16 * (int64_t)device->sms;
    const int64_t blocks = (rows + APPEND_WARPS - 1) / APPEND_WARPS;
    const void *kernel = a->cache.forward.what.dtype == FA_BF16
                             ? (const void *)kvcache_append<FA_BF16>
                             : (const void *)kvcache_append<FA_F16>;
    if (!rows && !a->lengths) return FA_OK;
    return fa_launch_kernel(kernel,
                            (int32_t)(blocks < 1      ? 1
                                      : blocks > most ? most
                                                      : blocks),
                            APPEND_THREADS, 0, a->cache.forward.where.stream, device->early,
                            (void *)a, error);
}

/* `q`, `lengths`: where they go; see append_args. */
static inline fa_status launch_append(const fa_kvcache *c, const fa_tensor *q, int32_t *lengths,
                                      const fa_device *device, fa_error *error) {
    const fa_what *w = &c->forward.what;
    const int64_t rows = c->k_new.data ? (int64_t)w->b * w->hk * c->s_new : 0;
    append_args a = {*c, *q, lengths, rows, rows, 0};
    if (q->data && w->b) a.q_rows = q->shape[0] * q->shape[1] * q->shape[2];
    if (rows && may_share(&w->k, &w->v)) {
        append_args values = a;
        values.lengths = NULL, values.k_rows = values.q_rows = 0;
        const fa_status status = launch_append_rows(&values, device, error);
        if (status != FA_OK) return status;
        a.v_rows = 0;
    }
    return launch_append_rows(&a, device, error);
}

#endif
