/* jax_ffi.c - what XLA calls while a program runs that fastattn.jax has put an operation into: on
 * whatever thread and stream XLA is, without Python. Next: jax_run() in csrc/binding/jax_run.c.
 *
 * Seen with JAX 0.6 to 0.12.
 */
#include "jax_ffi.h"

#include <stdio.h>
#include <stdlib.h>

/* ---- what XLA gives ---- */

static fa_any_dtype dtype_of(int32_t xla) {
    static const struct {
        int32_t xla;
        fa_any_dtype dtype;
    } dtypes[] = {{XLA_PRED, {FA_CODE_BOOL, 8, 1}},   {XLA_S8, {FA_CODE_INT, 8, 1}},
                  {XLA_S16, {FA_CODE_INT, 16, 1}},    {XLA_S32, {FA_CODE_INT, 32, 1}},
                  {XLA_S64, {FA_CODE_INT, 64, 1}},    {XLA_U8, {FA_CODE_UINT, 8, 1}},
                  {XLA_U16, {FA_CODE_UINT, 16, 1}},   {XLA_U32, {FA_CODE_UINT, 32, 1}},
                  {XLA_U64, {FA_CODE_UINT, 64, 1}},   {XLA_F16, {FA_CODE_FLOAT, 16, 1}},
                  {XLA_F32, {FA_CODE_FLOAT, 32, 1}},  {XLA_F64, {FA_CODE_FLOAT, 64, 1}},
                  {XLA_BF16, {FA_CODE_BFLOAT, 16, 1}}};
    for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; i++)
        if (dtypes[i].xla == xla) return dtypes[i].dtype;
    return (fa_any_dtype){3, 8, 1}; /* DLPack's opaque ones */
}

/* names: a text of which the next word is cut off, or NULL. */
static fa_status read_array(const xla_buffer *b, char **names, const jax_call *c, int has_axis,
                            fa_where where, jax_array *to, fa_error *error) {
    fa_array *a = &to->array;
    char *name = *names ? *names : "";
    *names = strchr(name, ' ');
    if (*names) *(*names)++ = 0;
    a->name = name;
    a->data = b->data;
    a->device_type = where.device_type, a->device_id = where.device_id;
    a->stream = where.stream;
    a->dtype = dtype_of(b->dtype);
    a->ndim = (int32_t)b->rank;
    if (b->rank > FA_MAX_RANK)
        return fa_fail(error, FA_VALUE, "`%s` must have at most %d dimensions, got %lld", name,
                       FA_MAX_RANK, (long long)b->rank);
    memcpy(a->shape, b->dims, (size_t)b->rank * sizeof *a->shape);
    return jax_lay_out(c, to, has_axis, error);
}

/* Attributes that are texts; the caller frees them. */
typedef struct {
    char *operands, *results, *backend;
} jax_texts;

static fa_status copy_text(const xla_span *from, char **to, fa_error *error) {
    free(*to);
    *to = calloc(from->size + 1, 1);
    if (!*to) return fa_fail(error, FA_MEMORY, "no memory for an attribute");
    memcpy(*to, from->data, from->size);
    return FA_OK;
}

static fa_status read_attributes(const xla_attributes *given, jax_call *c, jax_texts *to,
                                 fa_error *error) {
    const struct {
        const char *name;
        char **to;
    } texts[] = {{"operands", &to->operands}, {"results", &to->results}, {"backend", &to->backend}};
    for (int64_t i = 0; i < given->count; i++) {
        const xla_span *name = given->names[i];
        const xla_scalar *scalar = given->values[i];
        const jax_attribute *known = jax_find_attribute(name->data, name->size);
        int read = 0;
        for (size_t t = 0; t < sizeof texts / sizeof *texts && given->types[i] == XLA_STRING; t++)
            if (strlen(texts[t].name) == name->size &&
                !memcmp(texts[t].name, name->data, name->size)) {
                TRY(copy_text(given->values[i], texts[t].to, error));
                read = 1;
            }
        if (known && given->types[i] == XLA_SCALAR &&
            scalar->dtype == (known->kind == JAX_DOUBLE ? XLA_F64 : XLA_S64)) {
            char *field = (char *)c + known->offset;
            const int small = known->kind == JAX_INT ? (int)*(const int64_t *)scalar->value : 0;
            memcpy(field, known->kind == JAX_INT ? (const void *)&small : scalar->value,
                   known->kind == JAX_INT ? sizeof small : sizeof(int64_t));
            read = 1;
        }
        if (!read)
            return fa_fail(error, FA_TYPE, "there is no attribute `%.*s` of its type",
                           (int)name->size, name->data);
    }
    return FA_OK;
}

static fa_status run_frame(const xla_frame *frame, jax_target target, fa_where where,
                           fa_error *error) {
    jax_texts texts = {NULL, NULL, NULL};
    jax_call c = {.target = target,
                  .operand_count = (int32_t)frame->arguments.count,
                  .result_count = (int32_t)frame->results.count};
    jax_array *arrays = calloc((size_t)(c.operand_count + c.result_count), sizeof *arrays);
    if (!arrays) return fa_fail(error, FA_MEMORY, "no memory for the operands");
    c.operands = arrays, c.results = arrays + c.operand_count;
    fa_status status = read_attributes(&frame->attributes, &c, &texts, error);
    if (texts.backend) snprintf(c.backend, sizeof c.backend, "%s", texts.backend);
    char *next = texts.operands;
    for (int32_t i = 0; i < c.operand_count && status == FA_OK; i++) {
        const int has_axis = c.runs && (i >= 63 || c.stepped >> i & 1);
        status = read_array(frame->arguments.buffers[i], &next, &c, has_axis, where, &c.operands[i],
                            error);
    }
    next = texts.results;
    for (int32_t i = 0; i < c.result_count && status == FA_OK; i++)
        status = read_array(frame->results.buffers[i], &next, &c, c.runs != 0, where, &c.results[i],
                            error);
    if (status == FA_OK) status = jax_run(&c, NULL, error);
    free(arrays);
    free(texts.operands);
    free(texts.results);
    free(texts.backend);
    return status;
}

/* ---- the handlers ---- */

static void tell_metadata(const xla_frame *frame, int on_cuda) {
    xla_metadata *to = ((xla_metadata_extension *)frame->extensions)->metadata;
    to->version.major = XLA_MAJOR, to->version.minor = XLA_MINOR;
    to->traits = on_cuda ? XLA_COMMAND_BUFFER_COMPATIBLE : 0;
    if (to->struct_size > offsetof(xla_metadata, state_type)) to->state_type = 0;
}

static xla_error *fail(const xla_api *api, fa_status status, const fa_error *error) {
    static const int32_t codes[] = {[FA_VALUE] = XLA_INVALID_ARGUMENT,
                                    [FA_TYPE] = XLA_INVALID_ARGUMENT,
                                    [FA_UNSUPPORTED] = XLA_UNIMPLEMENTED,
                                    [FA_RUNTIME] = XLA_INTERNAL,
                                    [FA_MEMORY] = XLA_RESOURCE_EXHAUSTED};
    xla_error_create args = {sizeof args, NULL, error->text, codes[status]};
    return api->create_error(&args);
}

static xla_error *handle(xla_frame *frame, jax_target target, int on_cuda) {
    const xla_api *api = frame->api;
    fa_where where = {FA_CPU, 0, NULL};
    fa_error error = {""};
    if (frame->extensions && frame->extensions->type == XLA_METADATA) {
        tell_metadata(frame, on_cuda);
        return NULL;
    }
    if (on_cuda) {
        xla_stream_get stream = {sizeof stream, NULL, frame->context, NULL};
        xla_ordinal_get ordinal = {sizeof ordinal, NULL, frame->context, 0};
        xla_error *failure = api->get_stream(&stream);
        if (!failure) failure = api->get_ordinal(&ordinal);
        if (failure) return failure;
        where = (fa_where){FA_CUDA, ordinal.ordinal, stream.stream};
    }
    const fa_status status = run_frame(frame, target, where, &error);
    return status == FA_OK ? NULL : fail(api, status, &error);
}

#define HANDLERS(name, target)                                                          \
    static xla_error *name##_cpu(xla_frame *frame) { return handle(frame, target, 0); } \
    static xla_error *name##_cuda(xla_frame *frame) { return handle(frame, target, 1); }
HANDLERS(forward, JAX_FORWARD)
HANDLERS(backward, JAX_BACKWARD)
HANDLERS(merge, JAX_MERGE)
HANDLERS(sparsek, JAX_SPARSEK)
HANDLERS(sparsek_backward, JAX_SPARSEK_BACKWARD)
HANDLERS(sparse, JAX_SPARSE)
HANDLERS(sparse_backward, JAX_SPARSE_BACKWARD)
HANDLERS(selection, JAX_SPARSEK_ATTENTION)
HANDLERS(selection_backward, JAX_SPARSEK_ATTENTION_BACKWARD)
#undef HANDLERS

xla_handler *const jax_handler[JAX_TARGETS][2] = {
    [JAX_FORWARD] = {forward_cpu, forward_cuda},
    [JAX_BACKWARD] = {backward_cpu, backward_cuda},
    [JAX_MERGE] = {merge_cpu, merge_cuda},
    [JAX_SPARSEK] = {sparsek_cpu, sparsek_cuda},
    [JAX_SPARSEK_BACKWARD] = {sparsek_backward_cpu, sparsek_backward_cuda},
    [JAX_SPARSE] = {sparse_cpu, sparse_cuda},
    [JAX_SPARSE_BACKWARD] = {sparse_backward_cpu, sparse_backward_cuda},
    [JAX_SPARSEK_ATTENTION] = {selection_cpu, selection_cuda},
    [JAX_SPARSEK_ATTENTION_BACKWARD] = {selection_backward_cpu, selection_backward_cuda},
};
