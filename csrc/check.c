/* check.c - from described arrays to one fa_params, or one sentence naming the argument.
 *
 * Stop 3 of 6. Knows no Python and reads no array but lengths and cu_seqlens on the CPU: only
 * shapes, strides, dtypes and devices. Every shape of the public interface (two layouts, packed
 * sequences, any rank for scaled_dot_product_attention) becomes the rank-4 (b, h, s, d) of
 * fastattn.h here; the backends know nothing else.
 */
#include "check.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

fa_status fa_fail(fa_error *error, fa_status status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error->text, sizeof error->text, format, arguments);
    va_end(arguments);
    return status;
}

/* 0 where the contract has no such dtype. */
static fa_dtype contract_dtype(DLDataType t) {
    for (int i = 1; i < FA_DTYPE_COUNT; i++)
        if (t.code == fa_dtypes[i].code && t.bits == 8 * fa_dtypes[i].size && t.lanes == 1)
            return (fa_dtype)i;
    return 0;
}

const char *fa_dtype_name(DLDataType t, char buffer[32]) {
    static const char *const kinds[] = {
        [DL_INT] = "int",       [DL_UINT] = "uint",       [DL_FLOAT] = "float", [3] = "opaque",
        [DL_BFLOAT] = "bfloat", [DL_COMPLEX] = "complex", [DL_BOOL] = "bool",
    };
    const fa_dtype known = contract_dtype(t);
    if (known) return fa_dtypes[known].name;
    if (t.bits == 8 && t.lanes == 1 && (t.code == DL_FLOAT8_E4M3FN || t.code == DL_FLOAT8_E5M2))
        return t.code == DL_FLOAT8_E5M2 ? "float8_e5m2" : "float8_e4m3fn";
    if (t.code < sizeof kinds / sizeof *kinds && t.lanes == 1)
        snprintf(buffer, 32, "%s%d", kinds[t.code], t.bits);
    else
        snprintf(buffer, 32, "dtype (%d, %d, %d)", t.code, t.bits, t.lanes);
    return buffer;
}

static const char *device_name(DLDevice device, char buffer[32]) {
    if (device.device_type == DL_CPU && device.device_id == 0) return "cpu";
    snprintf(buffer, 32, "%s:%d", device.device_type == DL_CPU ? "cpu" : "cuda", device.device_id);
    return buffer;
}

static const char *shape_text(int32_t ndim, const int64_t *shape, char buffer[192]) {
    int used = snprintf(buffer, 192, "(");
    for (int32_t i = 0; i < ndim; i++)
        used += snprintf(buffer + used, 192 - used, i ? ", %lld" : "%lld", (long long)shape[i]);
    snprintf(buffer + used, 192 - used, ndim == 1 ? ",)" : ")");
    return buffer;
}

static fa_status check_rank(const fa_array *a, int32_t ndim, const char *dimensions,
                            fa_error *error) {
    if (a->ndim == ndim) return FA_OK;
    return fa_fail(error, FA_VALUE, "`%s` must have %d dimensions %s, got %d", a->name, ndim,
                   dimensions, a->ndim);
}

static fa_status check_shape(const fa_array *a, int32_t ndim, const int64_t *shape,
                             fa_error *error) {
    if (a->ndim == ndim && !memcmp(a->shape, shape, ndim * sizeof *shape)) return FA_OK;
    char want[192], got[192];
    return fa_fail(error, FA_VALUE, "`%s` must have shape %s, got %s", a->name,
                   shape_text(ndim, shape, want), shape_text(a->ndim, a->shape, got));
}

static const char *array_cast(const fa_array *a, const char *name, const char *torch_method,
                              char buffer[64]) {
    if (a->is_torch)
        snprintf(buffer, 64, "%s.%s()", a->name, torch_method);
    else
        snprintf(buffer, 64, "%s.astype(\"%s\")", a->name, name);
    return buffer;
}

/* The cast that makes an int or a float of the wrong size the wanted one, as ": pass x.int()". */
static const char *size_mend(const fa_array *a, DLDataType want, char buffer[80]) {
    const int ints = want.code == DL_INT && (a->dtype.code == DL_INT || a->dtype.code == DL_UINT);
    const int floats =
        want.code == DL_FLOAT && (a->dtype.code == DL_FLOAT || a->dtype.code == DL_BFLOAT);
    char name[32], cast[64];
    if (!ints && !floats) return "";
    const char *method = floats            ? want.bits == 64   ? "double"
                                             : want.bits == 32 ? "float"
                                                               : "half"
                         : want.bits == 64 ? "long"
                                           : "int";
    snprintf(buffer, 80, ": pass %s", array_cast(a, fa_dtype_name(want, name), method, cast));
    return buffer;
}

/* like: the argument whose dtype this is, or NULL. */
static fa_status check_dtype(const fa_array *a, DLDataType want, const fa_array *like,
                             fa_error *error) {
    if (!memcmp(&a->dtype, &want, sizeof want)) return FA_OK;
    char expected[32], got[32], mend[80];
    const char *name = fa_dtype_name(want, expected);
    if (like)
        return fa_fail(error, FA_TYPE, "`%s` must be %s like `%s`, got %s", a->name, name,
                       like->name, fa_dtype_name(a->dtype, got));
    return fa_fail(error, FA_TYPE, "`%s` must be %s, got %s%s", a->name, name,
                   fa_dtype_name(a->dtype, got), size_mend(a, want, mend));
}

/* Same device, and on a GPU the same stream: arrays of two streams would need an order between
 * them, and the library synchronises nothing. */
static fa_status check_place(const fa_array *a, const fa_array *q, fa_error *error) {
    char want[32], got[32];
    if (memcmp(&a->device, &q->device, sizeof q->device))
        return fa_fail(error, FA_VALUE, "`%s` must be on %s like `%s`, got %s", a->name,
                       device_name(q->device, want), q->name, device_name(a->device, got));
    if (q->device.device_type == DL_CUDA && a->stream != q->stream)
        return fa_fail(error, FA_VALUE,
                       "`%s` must be on the same CUDA stream as `%s`: their frameworks are on "
                       "different current streams",
                       a->name, q->name);
    return FA_OK;
}

/* Dimension `axis` of a must equal that of `like`. */
static fa_status check_equal(const fa_array *a, int64_t got, const char *letter,
                             const fa_array *like, int64_t want, fa_error *error) {
    if (got == want) return FA_OK;
    return fa_fail(error, FA_VALUE, "`%s` must have %s = %lld like `%s`, got %lld", a->name, letter,
                   (long long)want, like->name, (long long)got);
}

static fa_status check_range(const fa_array *a, int64_t got, const char *letter, int64_t lo,
                             int64_t hi, fa_error *error) {
    if (lo <= got && got <= hi) return FA_OK;
    return fa_fail(error, FA_VALUE, "`%s` must have %s from %lld to %lld, got %lld", a->name,
                   letter, (long long)lo, (long long)hi, (long long)got);
}

/* lse's: float64 where the arrays' is, else float32. */
static DLDataType lse_dtype(fa_dtype dtype) {
    return (DLDataType){DL_FLOAT, dtype == FA_F64 ? 64 : 32, 1};
}

/* An array as `lead` leading dimensions and the rank-4 tail of the contract. */
typedef struct view {
    fa_tensor tensor; /* shape[0] and stride[0] are set by fold_batch() */
    int64_t lead_shape[FA_OUTER], lead_stride[FA_OUTER];
} view;

/* The last three dimensions (h, s, d), missing ones of size 1, and the leading ones, right-aligned
 * to n of them; size-1 strides become 0, so that a later broadcast is a change of shape alone. */
static void view_array(const fa_array *a, int32_t n, fa_layout layout, view *out) {
    static const int axis_of[2][4] = {{0, 1, 2, 3}, {0, 2, 1, 3}};
    out->tensor.data = a->data;
    for (int32_t i = 0; i < n + 3; i++) {
        int32_t from = i - (n + 3) + a->ndim;
        if (layout == FA_BSHD) from = axis_of[1][i] - 4 + a->ndim; /* rank 4 or 3, n = 1 */
        int64_t shape = from < 0 ? 1 : a->shape[from];
        int64_t stride = shape == 1 ? 0 : a->stride[from];
        if (i < n)
            out->lead_shape[i] = shape, out->lead_stride[i] = stride;
        else
            out->tensor.shape[i - n + 1] = shape, out->tensor.stride[i - n + 1] = stride;
    }
}

/* Common size of a broadcast dimension; -1 if two sizes other than 1 differ. */
static int64_t broadcast(int64_t a, int64_t b) { return a == b || b == 1 ? a : a == 1 ? b : -1; }

/* Stretches a size-1 dimension (whose stride is 0) to size; 0 if it has another size. */
static int stretch(int64_t *shape, int64_t size) {
    if (*shape == 1) *shape = size;
    return *shape == size;
}

/* Turns the n leading dimensions into b and as few outer dimensions as the strides of all arrays
 * allow. views: q, k, v, mask (or NULL), out. */
static void fold_batch(view *views[5], int32_t n, fa_plan *plan) {
    int64_t shape[FA_OUTER + 1], stride[FA_OUTER + 1][5];
    int32_t kept = 0; /* groups of dimensions, innermost first */
    for (int32_t i = n - 1; i >= 0; i--) {
        int64_t size = views[0]->lead_shape[i];
        if (size == 1) continue;
        int joins = kept > 0;
        for (int t = 0; t < 5 && joins; t++)
            if (views[t] && views[t]->lead_stride[i] != stride[kept - 1][t] * shape[kept - 1])
                joins = 0;
        if (joins) {
            shape[kept - 1] *= size;
            continue;
        }
        for (int t = 0; t < 5; t++) stride[kept][t] = views[t] ? views[t]->lead_stride[i] : 0;
        shape[kept++] = size;
    }
    if (!kept) {
        memset(stride[0], 0, sizeof stride[0]);
        shape[kept++] = 1;
    }
    for (int t = 0; t < 5; t++)
        if (views[t])
            views[t]->tensor.shape[0] = shape[0], views[t]->tensor.stride[0] = stride[0][t];
    plan->outer_ndim = kept - 1;
    for (int32_t i = 1; i < kept; i++) {
        plan->outer_shape[i - 1] = shape[i];
        memcpy(plan->outer_stride[i - 1], stride[i], sizeof stride[i]);
    }
}

/* What would make a mask of (b, sk) or (b, sq, sk) fit, of ints a bool one and of other floats a
 * float32 one, as ": pass mask.bool()[:, None, None, :]"; empty for any other. want: (b, hq, sq,
 * sk). */
static const char *mask_mend(const fa_array *a, const int64_t want[4], int fits_dtype,
                             char buffer[128]) {
    static const DLDataType float32 = {DL_FLOAT, 32, 1};
    const int64_t *shape = a->shape;
    const char *index = "";
    char cast[80] = "";
    if (a->ndim == 2 && shape[0] == want[0] && shape[0] != want[2] && shape[1] == want[3])
        index = "[:, None, None, :]";
    if (a->ndim == 3 && shape[0] == want[0] && shape[0] != want[1] && shape[1] == want[2] &&
        shape[2] == want[3])
        index = "[:, None]";
    if (fits_dtype)
        snprintf(cast, sizeof cast, ": pass %s", a->name);
    else if (a->dtype.code == DL_INT || a->dtype.code == DL_UINT)
        snprintf(cast, sizeof cast, ": pass %s", array_cast(a, "bool", "bool", buffer));
    else
        size_mend(a, float32, cast);
    if (!*cast || (fits_dtype && !*index)) return "";
    snprintf(buffer, 128, "%s%s", cast, index);
    return buffer;
}

static fa_status check_mask(const fa_request *r, int32_t n, const int64_t *lead, fa_plan *plan,
                            view *mask, fa_error *error) {
    const fa_array *a = r->mask;
    const fa_what *w = &plan->params.what;
    fa_dtype dtype = contract_dtype(a->dtype);
    int same = dtype == w->dtype;
    char got[32], want_shape[192], got_shape[192], mend[128];
    int64_t want[FA_MAX_RANK];
    memcpy(want, lead, n * sizeof *lead);
    want[n] = w->hq, want[n + 1] = w->sq, want[n + 2] = w->sk;
    if (r->sdpa && dtype != FA_BOOL && dtype != FA_F32 && !same)
        return fa_fail(error, FA_TYPE, "`%s` must be bool, float32 or of `%s`'s dtype, got %s%s",
                       a->name, r->q->name, fa_dtype_name(a->dtype, got),
                       mask_mend(a, want + n - 1, 0, mend));
    if (!dtype || (dtype == FA_F64 && !same))
        return fa_fail(error, FA_TYPE, "`%s` must be bool, float32, float16 or bfloat16, got %s%s",
                       a->name, fa_dtype_name(a->dtype, got), mask_mend(a, want + n - 1, 0, mend));
    TRY(check_place(a, r->q, error));
    int fits = a->ndim <= n + 3;
    if (fits) view_array(a, n, FA_BHSD, mask);
    for (int32_t i = 0; i < n && fits; i++) fits = stretch(&mask->lead_shape[i], lead[i]);
    for (int i = 0; i < 3 && fits; i++) fits = stretch(&mask->tensor.shape[i + 1], want[n + i]);
    if (!fits) {
        /* Ranks 2 and 3 have no leading dimension, but packed sequences have. */
        int32_t skip = r->cu_q ? 0 : n + 3 - plan->out_ndim;
        return fa_fail(error, FA_VALUE, "`%s` must broadcast to %s, got %s%s", a->name,
                       shape_text(n + 3 - skip, want + skip, want_shape),
                       shape_text(a->ndim, a->shape, got_shape),
                       mask_mend(a, want + n - 1, 1, mend));
    }
    plan->params.scores.mask_dtype = dtype;
    return FA_OK;
}

/* An optional (b,) int32 or (hq,) float32 argument. */
static fa_status check_vector(const fa_array *a, const fa_array *q, DLDataType dtype, int64_t size,
                              const void **data, int64_t *stride, fa_error *error) {
    if (!a) return FA_OK;
    TRY(check_dtype(a, dtype, NULL, error));
    TRY(check_shape(a, 1, &size, error));
    TRY(check_place(a, q, error));
    *data = a->data;
    *stride = size == 1 ? 0 : a->stride[0];
    return FA_OK;
}

/* (b,) int32 of lengths, or places: from 0 to `most`, or to the rows between a sequence's offsets.
 * On a GPU only the kernels see them, and clamp. */
static fa_status check_lengths(const fa_array *a, const fa_request *r, const fa_plan *plan,
                               int64_t most, const int32_t *cu, int64_t cu_stride,
                               const int32_t **data, int64_t *stride, fa_error *error) {
    static const DLDataType int32 = {DL_INT, 32, 1};
    const int64_t b = plan->params.what.b;
    TRY(check_vector(a, r->q, int32, b, (const void **)data, stride, error));
    if (!a || a->device.device_type != DL_CPU) return FA_OK;
    for (int64_t i = 0; i < b; i++) {
        const int32_t length = (*data)[i * *stride];
        if (cu) most = cu[(i + 1) * cu_stride] - cu[i * cu_stride];
        if (length < 0)
            return fa_fail(error, FA_VALUE, "`%s` must be at least 0, got %d for sequence %lld",
                           a->name, length, (long long)i);
        if (length > most)
            return fa_fail(error, FA_VALUE,
                           "`%s` must be at most the %lld %s of sequence %lld, got %d", a->name,
                           (long long)most,
                           cu                  ? "rows"
                           : a == r->q_lengths ? "queries"
                                               : "keys",
                           (long long)i, length);
    }
    return FA_OK;
}

static int32_t clamp_shift(int64_t x) {
    return x < -FA_MAX_SHIFT ? -FA_MAX_SHIFT : x > FA_MAX_SHIFT ? FA_MAX_SHIFT : (int32_t)x;
}

static fa_status check_masks(const fa_request *r, fa_plan *plan, fa_error *error) {
    static const DLDataType int32 = {DL_INT, 32, 1};
    fa_masks *m = &plan->params.masks;
    const fa_varlen *v = &plan->params.varlen;
    const fa_what *w = &plan->params.what;
    m->left = clamp_shift(r->left), m->right = clamp_shift(r->right);
    if (r->has_left && r->has_right && (int64_t)m->left + m->right < 0)
        return fa_fail(error, FA_VALUE, "`window` (%lld, %lld) sees no key; unbounded is None",
                       (long long)r->left, (long long)r->right);
    if (r->causal && (!r->has_right || m->right > 0)) m->right = 0;
    if (r->top_left && (r->has_offset || r->q_offset))
        return fa_fail(error, FA_VALUE,
                       "`q_offset` must be None with causal='top-left', whose offset is 0, got %s",
                       r->q_offset ? "an array" : "an int");
    m->flags = (r->has_left ? FA_HAS_LEFT : 0) | (r->has_right || r->causal ? FA_HAS_RIGHT : 0) |
               (r->has_offset || r->top_left ? FA_HAS_OFFSET : 0);
    m->offset = clamp_shift(r->offset);
    TRY(check_vector(r->q_offset, r->q, int32, w->b, (const void **)&m->q_offset,
                     &m->q_offset_stride, error));
    TRY(check_lengths(r->q_lengths, r, plan, w->sq, v->cu_q, v->cu_q_stride, &m->q_lengths,
                      &m->q_lengths_stride, error));
    TRY(check_lengths(r->k_lengths, r, plan, w->sk, v->cu_k, v->cu_k_stride, &m->k_lengths,
                      &m->k_lengths_stride, error));
    return check_lengths(r->k_start, r, plan, w->sk, NULL, 0, &m->k_start, &m->k_start_stride,
                         error);
}

static fa_status check_scores(const fa_request *r, fa_plan *plan, fa_error *error) {
    static const DLDataType float32 = {DL_FLOAT, 32, 1};
    fa_scores *s = &plan->params.scores;
    const fa_what *w = &plan->params.what;
    s->softcap = r->softcap;
    if (!(r->softcap >= 0) || !isfinite(r->softcap))
        return fa_fail(error, FA_VALUE, "`softcap` must be finite and >= 0, got %g", r->softcap);
    TRY(check_vector(r->sink, r->q, float32, w->hq, (const void **)&s->sink, &s->sink_stride,
                     error));
    const fa_array *slopes = r->alibi_slopes;
    if (!slopes || slopes->ndim != 2)
        return check_vector(slopes, r->q, float32, w->hq, (const void **)&s->alibi_slopes,
                            &s->alibi_stride[1], error);
    int64_t shape[2] = {w->b, w->hq};
    TRY(check_dtype(slopes, float32, NULL, error));
    TRY(check_shape(slopes, 2, shape, error));
    TRY(check_place(slopes, r->q, error));
    s->alibi_slopes = slopes->data;
    for (int i = 0; i < 2; i++) s->alibi_stride[i] = shape[i] == 1 ? 0 : slopes->stride[i];
    return FA_OK;
}

static fa_status check_what(const fa_request *r, const view *q, const view *k, const view *v,
                            fa_plan *plan, fa_error *error) {
    fa_what *w = &plan->params.what;
    TRY(check_range(r->q, q->tensor.shape[3], "d", 0, FA_MAX_LENGTH, error));
    TRY(check_range(r->v, v->tensor.shape[3], "dv", 0, FA_MAX_LENGTH, error));
    TRY(check_equal(r->k, k->tensor.shape[3], "d", r->q, q->tensor.shape[3], error));
    const char *const sq = r->cu_q ? "total_q" : "sq", *const sk = r->cu_q ? "total_k" : "sk";
    const int64_t most = r->cu_q ? INT32_MAX : FA_MAX_LENGTH;
    TRY(check_range(r->q, q->tensor.shape[2], sq, 0, most, error));
    TRY(check_range(r->k, k->tensor.shape[2], sk, 0, most, error));
    TRY(check_equal(r->v, v->tensor.shape[2], sk, r->k, k->tensor.shape[2], error));
    w->sq = (int32_t)q->tensor.shape[2], w->sk = (int32_t)k->tensor.shape[2];
    w->d = (int32_t)q->tensor.shape[3], w->dv = (int32_t)v->tensor.shape[3];
    w->scale = r->has_scale ? r->scale : w->d ? 1 / sqrt(w->d) : 1;
    w->batch_invariant = r->batch_invariant;
    if (!isfinite(w->scale))
        return fa_fail(error, FA_VALUE, "`scale` must be finite, got %g", r->scale);
    return FA_OK;
}

/* Whether the heads would fit if heads and rows changed places; then the layout, as a clause. */
static const char *layout_mend(const fa_request *r, const view *q, const view *k, const view *v) {
    const int64_t hq = q->tensor.shape[2], hk = k->tensor.shape[2], hv = v->tensor.shape[2];
    const int fits = k->tensor.shape[1] == v->tensor.shape[1] && hq && hk && hk == hv && !(hq % hk);
    if (r->cu_q || !fits || r->q->ndim != 4 || (r->sdpa && !r->enable_gqa && hq != hk)) return "";
    if (r->sdpa) return ": attention(layout=\"bshd\") would fit";
    return r->layout == FA_BHSD ? ": layout=\"bshd\" would fit" : ": layout=\"bhsd\" would fit";
}

/* hq, hk and hv. Without grouped heads sdpa broadcasts them like any leading dimension. */
static fa_status check_heads(const fa_request *r, view *q, view *k, view *v, fa_plan *plan,
                             fa_error *error) {
    int64_t hq = q->tensor.shape[1], hk = k->tensor.shape[1], hv = v->tensor.shape[1];
    TRY(check_range(r->q, hq, "hq", 0, INT32_MAX, error));
    TRY(check_range(r->k, hk, "hk", hq > 0, INT32_MAX, error));
    TRY(check_range(r->v, hv, "hk", hq > 0, INT32_MAX, error));
    const int broadcasts = r->sdpa && !r->enable_gqa;
    if (!r->sdpa || (broadcasts && hk != 1 && hv != 1))
        TRY(check_equal(r->v, hv, "hk", r->k, hk, error));
    if (broadcasts) {
        hk = hv = broadcast(hk, hv);
        if (hq == 1) hq = hk;
    }
    const struct {
        const fa_array *a;
        int64_t heads;
    } sides[2] = {{r->k, hk}, {r->v, hv}};
    for (int i = 0; i < 2; i++)
        if (sides[i].heads ? hq % sides[i].heads : hq)
            return fa_fail(
                error, FA_VALUE,
                "`%s` must have a number of heads that is a multiple of `%s`'s %lld, got %lld%s",
                r->q->name, sides[i].a->name, (long long)sides[i].heads, (long long)hq,
                layout_mend(r, q, k, v));
    if (broadcasts && hk != 1 && hk != hq)
        return fa_fail(error, FA_VALUE,
                       "`%s` must have hk = %lld like `%s` or 1 without enable_gqa, got %lld%s",
                       r->k->name, (long long)hq, r->q->name, (long long)hk,
                       layout_mend(r, q, k, v));
    q->tensor.shape[1] = hq, k->tensor.shape[1] = hk, v->tensor.shape[1] = hv;
    fa_what *w = &plan->params.what;
    w->hq = (int32_t)hq, w->hk = hk ? (int32_t)hk : 1, w->hv = hv ? (int32_t)hv : 1;
    return FA_OK;
}

/* The offsets of packed sequences; on a GPU only the kernels see them, and clamp. */
static fa_status check_offsets(const fa_array *cu, const fa_array *packed, int64_t longest,
                               const char *limit, const int32_t **data, int64_t *stride,
                               fa_error *error) {
    const int64_t total = packed->shape[0];
    int64_t before = 0;
    *data = cu->data, *stride = cu->shape[0] == 1 ? 0 : cu->stride[0];
    if (packed->device.device_type != DL_CPU) return FA_OK;
    for (int64_t i = 0; i < cu->shape[0]; i++) {
        const int64_t at = (*data)[i * *stride];
        if (i == 0 && at != 0)
            return fa_fail(error, FA_VALUE, "`%s` must start at 0, got %lld", cu->name,
                           (long long)at);
        if (at < before)
            return fa_fail(error, FA_VALUE, "`%s` must not decrease, got %lld after %lld", cu->name,
                           (long long)at, (long long)before);
        if (at > total)
            return fa_fail(error, FA_VALUE, "`%s` must not run past `%s`'s %lld rows, got %lld",
                           cu->name, packed->name, (long long)total, (long long)at);
        if (at - before > longest)
            return fa_fail(error, FA_VALUE,
                           "`%s` must have sequences of at most `%s` = %lld rows, got %lld",
                           cu->name, limit, (long long)longest, (long long)(at - before));
        before = at;
    }
    return FA_OK;
}

/* From here on sq and sk are the longest lengths, and the rows are total_q and total_k. */
static fa_status check_varlen(const fa_request *r, fa_plan *plan, fa_error *error) {
    static const DLDataType int32 = {DL_INT, 32, 1};
    fa_varlen *v = &plan->params.varlen;
    fa_what *w = &plan->params.what;
    const struct {
        const fa_array *cu;
        const char *limit;
        int64_t longest;
    } sides[2] = {{r->cu_q, "max_seqlen_q", r->max_sq}, {r->cu_k, "max_seqlen_k", r->max_sk}};
    for (int i = 0; i < 2; i++) {
        const fa_array *cu = sides[i].cu;
        TRY(check_dtype(cu, int32, NULL, error));
        TRY(check_rank(cu, 1, "(b + 1,)", error));
        TRY(check_place(cu, r->q, error));
        TRY(check_range(cu, cu->shape[0], "b + 1", 1, INT32_MAX, error));
        TRY(check_equal(cu, cu->shape[0], "b + 1", r->cu_q, r->cu_q->shape[0], error));
        if (sides[i].longest < 0 || sides[i].longest > FA_MAX_LENGTH)
            return fa_fail(error, FA_VALUE, "`%s` must be from 0 to %d, got %lld", sides[i].limit,
                           FA_MAX_LENGTH, (long long)sides[i].longest);
    }
    TRY(check_offsets(r->cu_q, r->q, r->max_sq, "max_seqlen_q", &v->cu_q, &v->cu_q_stride, error));
    TRY(check_offsets(r->cu_k, r->k, r->max_sk, "max_seqlen_k", &v->cu_k, &v->cu_k_stride, error));
    v->total_q = w->sq, v->total_k = w->sk;
    w->sq = (int32_t)r->max_sq, w->sk = (int32_t)r->max_sk;
    w->b = (int32_t)(r->cu_q->shape[0] - 1);
    return FA_OK;
}

static fa_status check_dropout(const fa_request *r, fa_plan *plan, fa_error *error) {
    static const DLDataType int64 = {DL_INT, 64, 1};
    fa_dropout *d = &plan->params.dropout;
    if (!(r->dropout_p >= 0 && r->dropout_p <= 1))
        return fa_fail(error, FA_VALUE, "`dropout_p` must be from 0 to 1, got %g", r->dropout_p);
    d->p = r->dropout_p;
    d->threshold = (uint32_t)lrint(d->p * 65536);
    d->gain = d->threshold == 65536 ? 0 : 1 / (1 - d->p);
    d->seed = r->seed_value;
    if (!r->seed) return FA_OK;
    char got[192];
    TRY(check_dtype(r->seed, int64, NULL, error));
    TRY(check_place(r->seed, r->q, error));
    if (r->seed->ndim > 1 || (r->seed->ndim == 1 && r->seed->shape[0] != 1))
        return fa_fail(error, FA_VALUE, "`%s` must have shape () or (1,), got %s", r->seed->name,
                       shape_text(r->seed->ndim, r->seed->shape, got));
    d->seed_data = r->seed->data;
    return FA_OK;
}

/* Whether axis a of `like` lies outside of axis b: 1, or inside: -1; 0 says nothing. shape is the
 * output's, to which `like` broadcasts. */
static int lies_outside(const fa_array *like, int32_t ndim, const int64_t *shape, int32_t a,
                        int32_t b) {
    const int32_t from = ndim - like->ndim, axis[2] = {a - from, b - from};
    int64_t step[2];
    for (int i = 0; i < 2; i++)
        step[i] = axis[i] < 0 || like->shape[axis[i]] != shape[axis[i] + from]
                      ? 0
                      : llabs(like->stride[axis[i]]);
    if (!step[0] || !step[1]) return 0;
    if (step[0] != step[1]) return step[0] > step[1] ? 1 : -1;
    return shape[a] > shape[b];
}

/* The output's shape in the caller's layout, and its dense strides: contiguous, or its axes in the
 * order of q's, found as torch's empty_like() does. The last one stays innermost, for backends
 * write whole rows. */
static fa_status lay_out(const fa_request *r, const int64_t *lead, int32_t n, int32_t ndim,
                         fa_plan *plan, view *out, fa_error *error) {
    const fa_what *w = &plan->params.what;
    const int64_t tail[2][3] = {{w->hq, w->sq, w->dv}, {w->sq, w->hq, w->dv}};
    int64_t bytes = r->q->dtype.bits / 8, stride = 1;
    int32_t order[FA_MAX_RANK]; /* axes, innermost first */
    fa_array array;
    plan->out_ndim = array.ndim = ndim;
    plan->out_dtype = r->q->dtype, plan->lse_dtype = lse_dtype(w->dtype);
    for (int32_t i = 0; i < ndim; i++) {
        const int32_t at = i - ndim + 3;
        order[i] = ndim - 1 - i;
        array.shape[i] = at < 0 ? lead[n + at] : tail[r->layout][at];
        if (__builtin_mul_overflow(bytes, array.shape[i] ? array.shape[i] : 1, &bytes))
            return fa_fail(error, FA_VALUE, "`%s` is too large for an output", r->q->name);
    }
    for (int32_t i = 2; i < ndim && r->keeps_order; i++)
        for (int32_t j = i - 1, moved = i; j >= 1; j--) {
            const int outside = lies_outside(r->q, ndim, array.shape, order[j], order[moved]);
            if (outside < 0) break;
            if (!outside) continue;
            const int32_t axis = order[j];
            order[j] = order[moved], order[moved] = axis, moved = j;
        }
    for (int32_t i = 0; i < ndim; i++) {
        array.stride[order[i]] = stride;
        if (array.shape[order[i]]) stride *= array.shape[order[i]];
    }
    memcpy(plan->out_shape, array.shape, (size_t)ndim * sizeof *array.shape);
    memcpy(plan->out_stride, array.stride, (size_t)ndim * sizeof *array.stride);
    array.data = NULL; /* no memory yet */
    view_array(&array, n, r->layout, out);
    return FA_OK;
}

fa_status fa_check_attention(const fa_request *r, fa_plan *plan, fa_error *error) {
    const fa_array *arrays[3] = {r->q, r->k, r->v};
    fa_what *w = &plan->params.what;
    fa_clear(plan, sizeof *plan);
    plan->layout = r->layout;

    char got[32];
    w->dtype = contract_dtype(r->q->dtype);
    if (!w->dtype || w->dtype == FA_BOOL)
        return fa_fail(error, FA_TYPE, "`%s` must be float64, float32, float16 or bfloat16, got %s",
                       r->q->name, fa_dtype_name(r->q->dtype, got));
    int32_t ndim = 0;
    for (int i = 0; i < 3; i++) {
        static const char *const dimensions[3][3] = {
            {"(b, hq, sq, d)", "(b, hk, sk, d)", "(b, hk, sk, dv)"},
            {"(b, sq, hq, d)", "(b, sk, hk, d)", "(b, sk, hk, dv)"},
            {"(total_q, hq, d)", "(total_k, hk, d)", "(total_k, hk, dv)"}};
        const fa_array *a = arrays[i];
        const char *const wanted = dimensions[r->cu_q ? 2 : r->layout][i];
        if (!r->sdpa) TRY(check_rank(a, r->cu_q ? 3 : 4, wanted, error));
        if (a->ndim < 2)
            return fa_fail(error, FA_VALUE, "`%s` must have at least 2 dimensions, got %d", a->name,
                           a->ndim);
        TRY(check_dtype(a, r->q->dtype, r->q, error));
        TRY(check_place(a, r->q, error));
        if (a->ndim > ndim) ndim = a->ndim;
    }

    view q, k, v, mask, out;
    int32_t n = ndim > 4 ? ndim - 3 : 1;
    view_array(r->q, n, r->layout, &q);
    view_array(r->k, n, r->layout, &k);
    view_array(r->v, n, r->layout, &v);
    TRY(check_what(r, &q, &k, &v, plan, error));
    TRY(check_heads(r, &q, &k, &v, plan, error));

    /* The leading dimensions: equal for attention, broadcast for sdpa. */
    int64_t lead[FA_OUTER], runs = 1;
    for (int32_t i = 0; i < n; i++) {
        lead[i] = broadcast(q.lead_shape[i], broadcast(k.lead_shape[i], v.lead_shape[i]));
        if (!r->sdpa) {
            TRY(check_equal(r->k, k.lead_shape[i], "b", r->q, q.lead_shape[i], error));
            TRY(check_equal(r->v, v.lead_shape[i], "b", r->q, q.lead_shape[i], error));
        } else if (broadcast(k.lead_shape[i], v.lead_shape[i]) < 0 || lead[i] < 0) {
            return fa_fail(error, FA_VALUE,
                           "`%s`, `%s` and `%s` must have leading dimensions that broadcast, got "
                           "%lld, %lld and %lld",
                           r->q->name, r->k->name, r->v->name, (long long)q.lead_shape[i],
                           (long long)k.lead_shape[i], (long long)v.lead_shape[i]);
        }
        q.lead_shape[i] = k.lead_shape[i] = v.lead_shape[i] = lead[i];
        if (__builtin_mul_overflow(runs, lead[i], &runs) || runs > INT32_MAX)
            return fa_fail(error, FA_VALUE, "`%s` must have a batch of at most %d", r->q->name,
                           INT32_MAX);
    }

    TRY(lay_out(r, lead, n, ndim, plan, &out, error));
    const int64_t lse_shape[3] = {lead[0], w->hq, w->sq};
    plan->lse_ndim = r->cu_q ? 2 : 3;
    memcpy(plan->lse_shape, lse_shape + 3 - plan->lse_ndim, plan->lse_ndim * sizeof *lse_shape);

    if (r->cu_q) {
        TRY(check_varlen(r, plan, error));
        lead[0] = w->b;
    }
    if (r->mask) TRY(check_mask(r, n, lead, plan, &mask, error));
    view *views[5] = {&q, &k, &v, r->mask && !r->cu_q ? &mask : NULL, &out};
    fold_batch(views, n, plan);
    w->q = q.tensor, w->k = k.tensor, w->v = v.tensor, w->out = out.tensor;
    if (r->cu_q) /* the mask alone has a batch */
        mask.tensor.shape[0] = w->b, mask.tensor.stride[0] = mask.lead_stride[0];
    else
        w->b = (int32_t)w->q.shape[0];
    if (r->mask) plan->params.scores.mask = mask.tensor;
    TRY(check_masks(r, plan, error));
    TRY(check_scores(r, plan, error));
    TRY(check_dropout(r, plan, error));
    plan->params.where.device_type = r->q->device.device_type == DL_CPU ? FA_CPU : FA_CUDA;
    plan->params.where.device_id = r->q->device.device_type == DL_CPU ? 0 : r->q->device.device_id;
    plan->params.where.stream = r->q->stream;
    return FA_OK;
}

/* The bytes [lo, hi) that an array lies in; empty if it has no element. tensor.c has seen to it
 * that no sum overflows. */
static void extent(const fa_array *a, uintptr_t *lo, uintptr_t *hi) {
    int64_t size = (a->dtype.bits + 7) / 8, below = 0, above = size;
    *lo = *hi = (uintptr_t)a->data;
    for (int32_t i = 0; i < a->ndim; i++) {
        if (!a->shape[i]) return;
        int64_t reach = (a->shape[i] - 1) * a->stride[i] * size;
        *(reach < 0 ? &below : &above) += reach;
    }
    *lo += (uintptr_t)below, *hi += (uintptr_t)above;
}

/* Whether two indices may be one element: false if each dimension, in the order of their strides,
 * steps over all smaller ones. */
static int overlaps_itself(const fa_array *a) {
    int64_t reach = 0; /* of the dimensions so far, in elements */
    for (int32_t used = 0, next;; used |= 1 << next) {
        int64_t step = INT64_MAX;
        next = -1;
        for (int32_t i = 0; i < a->ndim; i++) {
            int64_t stride = a->stride[i] < 0 ? -a->stride[i] : a->stride[i];
            if (a->shape[i] > 1 && !(used >> i & 1) && stride < step) step = stride, next = i;
        }
        if (next < 0) return 0;
        if (step <= reach) return 1;
        reach += step * (a->shape[next] - 1);
    }
}

/* Sums c_0 s_0 + c_1 s_1 + ... of strides s > 0 in bytes, where c_i is any of low .. high. */
typedef struct lattice {
    int32_t n;
    struct {
        int64_t stride, low, high;
    } step[2 * FA_MAX_RANK]; /* by falling stride */
    int32_t budget;          /* sums that may still be tried */
} lattice;

/* Adds sign * i * stride of each dimension. Equal strides are one step: the differences of all
 * pairs of indices are all numbers between the ends. */
static void add_steps(lattice *l, const fa_array *a, int sign) {
    const int64_t size = (a->dtype.bits + 7) / 8;
    for (int32_t i = 0; i < a->ndim; i++) {
        const int64_t signed_stride = sign * a->stride[i] * size, last = a->shape[i] - 1;
        const int64_t stride = signed_stride < 0 ? -signed_stride : signed_stride;
        int32_t at = 0;
        if (!stride || !last) continue;
        while (at < l->n && l->step[at].stride > stride) at++;
        if (at == l->n || l->step[at].stride != stride) {
            memmove(&l->step[at + 1], &l->step[at], (size_t)(l->n - at) * sizeof *l->step);
            l->step[at].stride = stride, l->step[at].low = l->step[at].high = 0;
            l->n++;
        }
        *(signed_stride < 0 ? &l->step[at].low : &l->step[at].high) +=
            signed_stride < 0 ? -last : last;
    }
}

/* Whether one of the sums of the steps from `at` on is in lo .. hi; yes too once the budget is
 * spent. Exact for what slicing makes: there at most a few multiples of a stride come so close that
 * the smaller ones reach the rest. */
static int reaches(lattice *l, int32_t at, int64_t lo, int64_t hi) {
    if (lo > hi) return 0;
    if (l->budget-- <= 0) return 1;
    if (at == l->n) return lo <= 0 && 0 <= hi;
    int64_t below = 0, above = 0; /* what the smaller strides can add */
    for (int32_t i = at + 1; i < l->n; i++)
        below += l->step[i].low * l->step[i].stride, above += l->step[i].high * l->step[i].stride;
    const int64_t stride = l->step[at].stride, from = lo - above, to = hi - below;
    int64_t first = from / stride + (from % stride > 0), last = to / stride - (to % stride < 0);
    if (first < l->step[at].low) first = l->step[at].low;
    if (last > l->step[at].high) last = l->step[at].high;
    for (int64_t c = first; c <= last; c++)
        if (reaches(l, at + 1, lo - c * stride, hi - c * stride)) return 1;
    return 0;
}

/* Whether an element of a and one of b may share a byte. Exact for arrays that are slices of one
 * buffer (columns, every other row, one of q, k, v and out side by side); a pair of strides so odd
 * that 10,000 sums do not decide counts as sharing. */
static int overlap(const fa_array *a, const fa_array *b) {
    uintptr_t lo, hi, from, to;
    extent(a, &lo, &hi);
    extent(b, &from, &to);
    if (lo == hi || from == to || lo >= to || from >= hi) return 0;
    /* They share one where the address of an element of b less that of one of a, which is the
     * distance of the first ones plus a sum, is more than -(size of b) and less than size of a. */
    lattice l = {.budget = 10000};
    add_steps(&l, b, 1);
    add_steps(&l, a, -1);
    const int64_t distance = (int64_t)((uintptr_t)b->data - (uintptr_t)a->data);
    return reaches(&l, 0, 1 - (b->dtype.bits + 7) / 8 - distance,
                   (a->dtype.bits + 7) / 8 - 1 - distance);
}

fa_status fa_check_out(const fa_request *r, const fa_plan *plan, const fa_array *out,
                       fa_error *error) {
    const fa_array *inputs[] = {r->q,    r->k,         r->v,         r->mask,    r->cu_q,
                                r->cu_k, r->q_lengths, r->k_lengths, r->k_start, r->alibi_slopes,
                                r->sink, r->seed,      r->q_offset};
    TRY(check_shape(out, plan->out_ndim, plan->out_shape, error));
    TRY(check_dtype(out, r->q->dtype, r->q, error));
    TRY(check_place(out, r->q, error));
    for (size_t i = 0; i < sizeof inputs / sizeof *inputs; i++)
        if (inputs[i] && overlap(out, inputs[i]))
            return fa_fail(error, FA_VALUE, "`%s` must not overlap `%s` in memory", out->name,
                           inputs[i]->name);
    uintptr_t lo, hi;
    extent(out, &lo, &hi);
    if (lo < hi && overlaps_itself(out))
        return fa_fail(error, FA_VALUE, "`%s` must have distinct elements, got overlapping strides",
                       out->name);
    return FA_OK;
}

/* An output of rank 4 at most, or a lse (b, h, s) or (h, total) with a last dimension of 1. */
static void bind(fa_tensor *tensor, const fa_array *a, fa_layout layout) {
    view v;
    view_array(a, 1, layout, &v);
    *tensor = v.tensor;
    tensor->shape[0] = v.lead_shape[0], tensor->stride[0] = v.lead_stride[0];
}

static void bind_lse(fa_tensor *tensor, const fa_array *a) {
    fa_array column = *a;
    column.shape[a->ndim] = 1, column.stride[a->ndim] = 0;
    column.ndim++;
    bind(tensor, &column, FA_BHSD);
}

void fa_bind_outputs(fa_plan *plan, const fa_array *out, const fa_array *lse) {
    if (plan->out_ndim <= 4)
        bind(&plan->params.what.out, out, plan->layout);
    else
        plan->params.what.out.data = out->data; /* laid out as fa_check_attention says */
    if (lse) bind_lse(&plan->params.what.lse, lse);
}

fa_status fa_check_merge(int32_t n, const fa_array *outs, const fa_array *lses, fa_layout layout,
                         fa_tensor *tensors, fa_merge *merge, fa_plan *plan, fa_error *error) {
    const fa_array *first = outs;
    char got[32];
    memset(merge, 0, sizeof *merge);
    memset(plan, 0, sizeof *plan);
    merge->dtype = contract_dtype(first->dtype);
    if (!merge->dtype || merge->dtype == FA_BOOL)
        return fa_fail(error, FA_TYPE, "`%s` must be float64, float32, float16 or bfloat16, got %s",
                       first->name, fa_dtype_name(first->dtype, got));
    plan->lse_dtype = lse_dtype(merge->dtype);
    TRY(check_rank(first, 4, layout == FA_BHSD ? "(b, h, s, dv)" : "(b, s, h, dv)", error));
    int64_t lse_shape[3] = {first->shape[0], first->shape[layout == FA_BHSD ? 1 : 2],
                            first->shape[layout == FA_BHSD ? 2 : 1]};
    for (int32_t i = 0; i < n; i++) {
        TRY(check_dtype(&outs[i], first->dtype, first, error));
        TRY(check_shape(&outs[i], 4, first->shape, error));
        TRY(check_place(&outs[i], first, error));
        TRY(check_dtype(&lses[i], plan->lse_dtype, NULL, error));
        TRY(check_shape(&lses[i], 3, lse_shape, error));
        TRY(check_place(&lses[i], first, error));
        bind(&tensors[i], &outs[i], layout);
        bind_lse(&tensors[n + i], &lses[i]);
    }
    merge->n = n, merge->outs = tensors, merge->lses = tensors + n;
    merge->where.device_type = first->device.device_type == DL_CPU ? FA_CPU : FA_CUDA;
    merge->where.device_id = first->device.device_type == DL_CPU ? 0 : first->device.device_id;
    merge->where.stream = first->stream;
    plan->out_dtype = first->dtype;
    plan->out_ndim = 4, plan->lse_ndim = 3;
    memcpy(plan->out_shape, first->shape, 4 * sizeof *first->shape);
    memcpy(plan->lse_shape, lse_shape, sizeof lse_shape);
    return FA_OK;
}

void fa_bind_merge(fa_merge *merge, fa_layout layout, const fa_array *out, const fa_array *lse) {
    bind(&merge->out, out, layout);
    bind_lse(&merge->lse, lse);
}
