/* check_array.h - what every operation asks of one array, and its words in sentences. */
#ifndef FASTATTN_CHECK_ARRAY_H
#define FASTATTN_CHECK_ARRAY_H

#include "check.h"

static const fa_any_dtype fa_int32 = {FA_CODE_INT, 32, 1}, fa_int64 = {FA_CODE_INT, 64, 1},
                          fa_float32 = {FA_CODE_FLOAT, 32, 1};

/* 0 where the contract has no such dtype. */
fa_dtype fa_contract_dtype(fa_any_dtype dtype);
/* lse's: float64 where the arrays' is, else float32. */
fa_any_dtype fa_lse_dtype(fa_dtype dtype);
fa_where fa_where_of(const fa_array *a);

/* "(2, 3)" */
const char *fa_shape_text(int32_t ndim, const int64_t *shape, char buffer[192]);
/* "x.method()" of torch's, else "x.astype(name)" */
const char *fa_array_cast(const fa_array *a, const char *name, const char *torch_method,
                          char buffer[64]);
/* The cast that makes an int or a float of the wrong size the wanted one, as ": pass x.int()". */
const char *fa_size_mend(const fa_array *a, fa_any_dtype want, char buffer[80]);

/* check_out.c: an array that a call writes, of this shape and like's dtype and device: it shares no
 * element with the n inputs, of which some may be NULL, and has distinct ones. */
fa_status fa_check_written(const fa_array *a, int32_t ndim, const int64_t *shape,
                           const fa_array *like, int32_t n, const fa_array *const *inputs,
                           fa_error *error);
enum { FA_MAX_INPUTS = 14 };
void fa_list_inputs(const fa_request *r, const fa_array *inputs[FA_MAX_INPUTS]);

fa_status fa_check_shape(const fa_array *a, int32_t ndim, const int64_t *shape, fa_error *error);
/* One of the four that operations compute in, as the contract's. */
fa_status fa_check_float(const fa_array *a, fa_dtype *dtype, fa_error *error);

/* The checks below run a dozen times a call: the question is inline, the sentence is not. */
fa_status fa_refuse_rank(const fa_array *a, int32_t ndim, const char *dimensions, fa_error *error);
fa_status fa_refuse_dtype(const fa_array *a, fa_any_dtype want, const fa_array *like,
                          fa_error *error);
fa_status fa_refuse_place(const fa_array *a, const fa_array *q, fa_error *error);
fa_status fa_refuse_equal(const fa_array *a, int64_t got, const char *letter, const fa_array *like,
                          int64_t want, fa_error *error);
fa_status fa_refuse_range(const fa_array *a, int64_t got, const char *letter, int64_t lo,
                          int64_t hi, fa_error *error);
fa_status fa_check_some_vector(const fa_array *a, const fa_array *q, fa_any_dtype dtype,
                               int64_t size, const void **data, int64_t *stride, fa_error *error);

/* dimensions: as "(b, h, s, d)", for the sentence. */
static inline fa_status fa_check_rank(const fa_array *a, int32_t ndim, const char *dimensions,
                                      fa_error *error) {
    return a->ndim == ndim ? FA_OK : fa_refuse_rank(a, ndim, dimensions, error);
}

/* like: the argument whose dtype this is, or NULL. */
static inline fa_status fa_check_dtype(const fa_array *a, fa_any_dtype want, const fa_array *like,
                                       fa_error *error) {
    if (!memcmp(&a->dtype, &want, sizeof want)) return FA_OK;
    return fa_refuse_dtype(a, want, like, error);
}

static inline int fa_same_device(const fa_array *a, const fa_array *b) {
    return a->device_type == b->device_type && a->device_id == b->device_id;
}

/* Same device, and on a GPU the same stream: arrays of two streams would need an order between
 * them, and the library synchronises nothing. */
static inline fa_status fa_check_place(const fa_array *a, const fa_array *q, fa_error *error) {
    if (fa_same_device(a, q) && (q->device_type != FA_CUDA || a->stream == q->stream)) return FA_OK;
    return fa_refuse_place(a, q, error);
}

/* A dimension, `letter`, must equal that of `like`. */
static inline fa_status fa_check_equal(const fa_array *a, int64_t got, const char *letter,
                                       const fa_array *like, int64_t want, fa_error *error) {
    return got == want ? FA_OK : fa_refuse_equal(a, got, letter, like, want, error);
}

static inline fa_status fa_check_range(const fa_array *a, int64_t got, const char *letter,
                                       int64_t lo, int64_t hi, fa_error *error) {
    return lo <= got && got <= hi ? FA_OK : fa_refuse_range(a, got, letter, lo, hi, error);
}

/* An optional (b,) int32 or (hq,) float32 argument, into *data and *stride if there. */
static inline fa_status fa_check_vector(const fa_array *a, const fa_array *q, fa_any_dtype dtype,
                                        int64_t size, const void **data, int64_t *stride,
                                        fa_error *error) {
    return a ? fa_check_some_vector(a, q, dtype, size, data, stride, error) : FA_OK;
}

#endif
