/* check_array.c - what every operation asks of one array, and its words in sentences. */
#include "check_array.h"

#include <stdarg.h>
#include <stdio.h>

fa_status fa_fail(fa_error *error, fa_status status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error->text, sizeof error->text, format, arguments);
    va_end(arguments);
    return status;
}

fa_dtype fa_contract_dtype(fa_any_dtype t) {
    for (int i = 1; i < FA_DTYPE_COUNT; i++)
        if (t.code == fa_dtypes[i].code && t.bits == 8 * fa_dtypes[i].size && t.lanes == 1)
            return (fa_dtype)i;
    return 0;
}

const char *fa_dtype_name(fa_any_dtype t, char buffer[32]) {
    static const char *const kinds[] = {
        [FA_CODE_INT] = "int",   [FA_CODE_UINT] = "uint",     [FA_CODE_FLOAT] = "float",
        [3] = "opaque",          [FA_CODE_BFLOAT] = "bfloat", [FA_CODE_COMPLEX] = "complex",
        [FA_CODE_BOOL] = "bool",
    };
    const fa_dtype known = fa_contract_dtype(t);
    if (known) return fa_dtypes[known].name;
    if (t.bits == 8 && t.lanes == 1 &&
        (t.code == FA_CODE_FLOAT8_E4M3FN || t.code == FA_CODE_FLOAT8_E5M2))
        return t.code == FA_CODE_FLOAT8_E5M2 ? "float8_e5m2" : "float8_e4m3fn";
    if (t.code < sizeof kinds / sizeof *kinds && t.lanes == 1)
        snprintf(buffer, 32, "%s%d", kinds[t.code], t.bits);
    else
        snprintf(buffer, 32, "dtype (%d, %d, %d)", t.code, t.bits, t.lanes);
    return buffer;
}

static const char *device_name(const fa_array *a, char buffer[32]) {
    if (a->device_type == FA_CPU && a->device_id == 0) return "cpu";
    snprintf(buffer, 32, "%s:%d", a->device_type == FA_CPU ? "cpu" : "cuda", a->device_id);
    return buffer;
}

const char *fa_shape_text(int32_t ndim, const int64_t *shape, char buffer[192]) {
    int used = snprintf(buffer, 192, "(");
    for (int32_t i = 0; i < ndim; i++)
        used += snprintf(buffer + used, 192 - used, i ? ", %lld" : "%lld", (long long)shape[i]);
    snprintf(buffer + used, 192 - used, ndim == 1 ? ",)" : ")");
    return buffer;
}

fa_status fa_refuse_rank(const fa_array *a, int32_t ndim, const char *dimensions, fa_error *error) {
    return fa_fail(error, FA_VALUE, "`%s` must have %d dimensions %s, got %d", a->name, ndim,
                   dimensions, a->ndim);
}

fa_status fa_check_shape(const fa_array *a, int32_t ndim, const int64_t *shape, fa_error *error) {
    if (a->ndim == ndim && !memcmp(a->shape, shape, ndim * sizeof *shape)) return FA_OK;
    char want[192], got[192];
    return fa_fail(error, FA_VALUE, "`%s` must have shape %s, got %s", a->name,
                   fa_shape_text(ndim, shape, want), fa_shape_text(a->ndim, a->shape, got));
}

const char *fa_array_cast(const fa_array *a, const char *name, const char *torch_method,
                          char buffer[64]) {
    if (a->is_torch)
        snprintf(buffer, 64, "%s.%s()", a->name, torch_method);
    else
        snprintf(buffer, 64, "%s.astype(\"%s\")", a->name, name);
    return buffer;
}

const char *fa_size_mend(const fa_array *a, fa_any_dtype want, char buffer[80]) {
    const int ints =
        want.code == FA_CODE_INT && (a->dtype.code == FA_CODE_INT || a->dtype.code == FA_CODE_UINT);
    const int floats = want.code == FA_CODE_FLOAT &&
                       (a->dtype.code == FA_CODE_FLOAT || a->dtype.code == FA_CODE_BFLOAT);
    char name[32], cast[64];
    if (!ints && !floats) return "";
    const char *method = floats            ? want.bits == 64   ? "double"
                                             : want.bits == 32 ? "float"
                                                               : "half"
                         : want.bits == 64 ? "long"
                                           : "int";
    snprintf(buffer, 80, ": pass %s", fa_array_cast(a, fa_dtype_name(want, name), method, cast));
    return buffer;
}

fa_status fa_check_float(const fa_array *a, fa_dtype *dtype, fa_error *error) {
    char got[32];
    *dtype = fa_contract_dtype(a->dtype);
    if (*dtype && *dtype != FA_BOOL) return FA_OK;
    return fa_fail(error, FA_TYPE, "`%s` must be float64, float32, float16 or bfloat16, got %s",
                   a->name, fa_dtype_name(a->dtype, got));
}

fa_status fa_refuse_dtype(const fa_array *a, fa_any_dtype want, const fa_array *like,
                          fa_error *error) {
    char expected[32], got[32], mend[80];
    const char *name = fa_dtype_name(want, expected);
    if (like)
        return fa_fail(error, FA_TYPE, "`%s` must be %s like `%s`, got %s", a->name, name,
                       like->name, fa_dtype_name(a->dtype, got));
    return fa_fail(error, FA_TYPE, "`%s` must be %s, got %s%s", a->name, name,
                   fa_dtype_name(a->dtype, got), fa_size_mend(a, want, mend));
}

fa_status fa_refuse_place(const fa_array *a, const fa_array *q, fa_error *error) {
    char want[32], got[32];
    if (!fa_same_device(a, q))
        return fa_fail(error, FA_VALUE, "`%s` must be on %s like `%s`, got %s", a->name,
                       device_name(q, want), q->name, device_name(a, got));
    return fa_fail(error, FA_VALUE,
                   "`%s` must be on the same CUDA stream as `%s`: their frameworks are on "
                   "different current streams",
                   a->name, q->name);
}

fa_status fa_refuse_equal(const fa_array *a, int64_t got, const char *letter, const fa_array *like,
                          int64_t want, fa_error *error) {
    return fa_fail(error, FA_VALUE, "`%s` must have %s = %lld like `%s`, got %lld", a->name, letter,
                   (long long)want, like->name, (long long)got);
}

fa_status fa_refuse_range(const fa_array *a, int64_t got, const char *letter, int64_t lo,
                          int64_t hi, fa_error *error) {
    return fa_fail(error, FA_VALUE, "`%s` must have %s from %lld to %lld, got %lld", a->name,
                   letter, (long long)lo, (long long)hi, (long long)got);
}

fa_status fa_check_some_vector(const fa_array *a, const fa_array *q, fa_any_dtype dtype,
                               int64_t size, const void **data, int64_t *stride, fa_error *error) {
    TRY(fa_check_dtype(a, dtype, NULL, error));
    TRY(fa_check_shape(a, 1, &size, error));
    TRY(fa_check_place(a, q, error));
    *data = a->data;
    *stride = size == 1 ? 0 : a->stride[0];
    return FA_OK;
}

fa_any_dtype fa_lse_dtype(fa_dtype dtype) {
    return (fa_any_dtype){FA_CODE_FLOAT, dtype == FA_F64 ? 64 : 32, 1};
}

fa_where fa_where_of(const fa_array *a) {
    return (fa_where){a->device_type, a->device_type == FA_CPU ? 0 : a->device_id, a->stream};
}
