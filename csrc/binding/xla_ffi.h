/* xla_ffi.h - our declaration of what is used of XLA's FFI, a plain C interface of version 0.
 *
 * Field order and widths are XLA's; a test holds them against the header that jaxlib ships
 * (seen from API 0.1, of JAX 0.6, to 0.5, of JAX 0.12). XLA says how much of a
 * struct it has by its struct_size.
 */
#ifndef FASTATTN_XLA_FFI_H
#define FASTATTN_XLA_FFI_H

#include <stddef.h>
#include <stdint.h>

enum { XLA_MAJOR = 0, XLA_MINOR = 1 };

typedef struct xla_extension {
    size_t struct_size;
    int32_t type; /* XLA_METADATA */
    struct xla_extension *next;
} xla_extension;

enum { XLA_METADATA = 1 };

typedef struct xla_version {
    size_t struct_size;
    xla_extension *extensions;
    int major, minor;
} xla_version;

typedef struct xla_error xla_error;
typedef struct xla_context xla_context;

/* XLA's numbers of dtypes. */
enum {
    XLA_PRED = 1,
    XLA_S8 = 2,
    XLA_S16 = 3,
    XLA_S32 = 4,
    XLA_S64 = 5,
    XLA_U8 = 6,
    XLA_U16 = 7,
    XLA_U32 = 8,
    XLA_U64 = 9,
    XLA_F16 = 10,
    XLA_F32 = 11,
    XLA_F64 = 12,
    XLA_BF16 = 16
};

typedef struct xla_buffer {
    size_t struct_size;
    xla_extension *extensions;
    int32_t dtype;
    void *data;
    int64_t rank;
    int64_t *dims; /* (rank,); contiguous, the last one innermost, as jax.ffi asks for */
} xla_buffer;

typedef struct xla_span {
    const char *data; /* not terminated */
    size_t size;
} xla_span;

typedef struct xla_scalar {
    int32_t dtype;
    void *value;
} xla_scalar;

enum { XLA_SCALAR = 3, XLA_STRING = 4 }; /* types of attributes: xla_scalar, xla_span */

typedef struct xla_arrays { /* arguments, or results */
    size_t struct_size;
    xla_extension *extensions;
    int64_t count;
    int32_t *types; /* all are buffers */
    void **buffers; /* xla_buffer * each */
} xla_arrays;

typedef struct xla_attributes {
    size_t struct_size;
    xla_extension *extensions;
    int64_t count;
    int32_t *types;
    xla_span **names;
    void **values;
} xla_attributes;

typedef struct xla_error_create {
    size_t struct_size;
    xla_extension *extensions;
    const char *message;
    int32_t code;
} xla_error_create;

enum { /* codes of errors */
       XLA_INVALID_ARGUMENT = 3,
       XLA_RESOURCE_EXHAUSTED = 8,
       XLA_UNIMPLEMENTED = 12,
       XLA_INTERNAL = 13
};

typedef struct xla_stream_get {
    size_t struct_size;
    xla_extension *extensions;
    xla_context *context;
    void *stream; /* out */
} xla_stream_get;

typedef struct xla_ordinal_get {
    size_t struct_size;
    xla_extension *extensions;
    xla_context *context;
    int32_t ordinal; /* out */
} xla_ordinal_get;

/* Functions that return an error, or NULL. */
typedef struct xla_api {
    size_t struct_size;
    xla_extension *extensions;
    xla_version version;
    const void *internal;
    xla_error *(*create_error)(xla_error_create *args);
    void *unused[3];
    xla_error *(*get_stream)(xla_stream_get *args);
    void *unused_too[12];
    xla_error *(*get_ordinal)(xla_ordinal_get *args);
} xla_api;

typedef struct xla_frame {
    size_t struct_size;
    xla_extension *extensions;
    const xla_api *api;
    xla_context *context;
    int32_t stage;
    xla_arrays arguments, results;
    xla_attributes attributes;
} xla_frame;

enum { XLA_EXECUTE = 3 }; /* stages */

typedef xla_error *xla_handler(xla_frame *frame);

/* Asked for when a handler is registered, by a frame that has this extension. */
typedef struct xla_metadata {
    size_t struct_size;
    xla_version version;
    uint32_t traits;
    int64_t state_type; /* from API 0.2 on */
} xla_metadata;

enum { XLA_COMMAND_BUFFER_COMPATIBLE = 1 }; /* a trait: may be captured into a CUDA graph */

typedef struct xla_metadata_extension {
    xla_extension extension;
    xla_metadata *metadata;
} xla_metadata_extension;

#endif
