/* check.h - from described arrays to one fa_params, or one sentence. Knows no Python.
 *
 * Stop 3 of 6: binding/ describes the caller's arrays and options in an fa_request,
 * check_*.c turn it into an fa_plan, dispatch.c finds the backend and runs it.
 */
#ifndef FASTATTN_CHECK_H
#define FASTATTN_CHECK_H

#include <string.h>

#include "fastattn.h"

enum { FA_MAX_RANK = 8 };

/* The dtype of an argument, which need not be one of the contract's: a kind, bits and lanes (1 but
 * for vectors), in DLPack's numbers, as fa_dtypes has them. */
typedef struct fa_any_dtype {
    uint8_t code, bits;
    uint16_t lanes;
} fa_any_dtype;

enum {
    FA_CODE_INT = 0,
    FA_CODE_UINT = 1,
    FA_CODE_FLOAT = 2,
    FA_CODE_BFLOAT = 4,
    FA_CODE_COMPLEX = 5,
    FA_CODE_BOOL = 6,
    FA_CODE_FLOAT8_E4M3FN = 10,
    FA_CODE_FLOAT8_E5M2 = 12
};

/* One array as its framework describes it; strides count elements. */
typedef struct fa_array {
    const char *name; /* the argument, for sentences */
    void *data;       /* NULL only if a dimension is 0 */
    fa_device_type device_type;
    int32_t device_id; /* on the CPU too: JAX has more than one */
    fa_any_dtype dtype;
    int32_t ndim;
    int64_t shape[FA_MAX_RANK], stride[FA_MAX_RANK]; /* no sum of them passes 2^60 bytes */
    void *stream; /* the producer's current CUDA stream; NULL is the legacy default stream */
    int is_torch; /* casts are spelled x.float(), else x.astype("float32"), in sentences */
} fa_array;

typedef enum fa_layout { FA_BHSD, FA_BSHD } fa_layout;

/* Arguments of attention(); a NULL array is absent. */
typedef struct fa_request {
    const fa_array *q, *k, *v; /* never NULL */
    const fa_array *mask, *q_lengths, *k_lengths, *k_start, *alibi_slopes, *sink;
    /* Of attention_varlen: q, k, v are (total, h, d), layout FA_BSHD. */
    const fa_array *cu_q, *cu_k; /* cu_k NULL: only queries are packed, the keys are a cache's */
    const fa_array *page_table;  /* of attention_varlen: k and v are (pages, page_size, hk, d) */
    int64_t max_sq, max_sk;      /* of attention_varlen: the longest that a sequence may be */
    double dropout_p;
    const fa_array *seed; /* one integer, or NULL: seed_value */
    int64_t seed_value;
    int sdpa;       /* scaled_dot_product_attention's shapes: any rank >= 2, leading broadcasting */
    int enable_gqa; /* of sdpa */
    int keeps_order; /* the output's axes lie in memory in the order of q's, not contiguous */
    int causal, top_left;
    int has_left, has_right;
    int64_t left, right; /* any; clamped */
    int has_offset;
    int64_t offset;           /* any; clamped */
    const fa_array *q_offset; /* or NULL: offset, where there is one */
    int has_scale;
    double scale, softcap;
    int batch_invariant;
    fa_layout layout;
} fa_request;

enum { FA_OUTER = FA_MAX_RANK - 3 }; /* leading dimensions that one run cannot take */

/* The arrays that have such dimensions. */
enum {
    FA_OPERAND_Q,
    FA_OPERAND_K,
    FA_OPERAND_V,
    FA_OPERAND_MASK,
    FA_OPERAND_OUT,
    FA_OPERANDS,
};

/* The backend that takes a request, and what it found out on the way. */
typedef struct fa_chosen {
    const fa_backend *backend;
    fa_choice choice;
} fa_chosen;

/* One fa_params, run once for every index of the outer dimensions (one run but for scaled dot
 * product attention with more than one batch dimension that no single stride describes). */
typedef struct fa_plan {
    fa_params params; /* outputs that are to come have all but their data */
    fa_chosen chosen; /* set by fa_choose() */
    int32_t outer_ndim;
    int64_t outer_shape[FA_OUTER];
    int64_t outer_stride[FA_OUTER][FA_OPERANDS]; /* elements */
    fa_any_dtype out_dtype, lse_dtype;
    int32_t out_ndim, lse_ndim;
    int64_t out_shape[FA_MAX_RANK], out_stride[FA_MAX_RANK], lse_shape[3];
    fa_layout layout;
} fa_plan;

/* Clears by the C library: a size that compilers see becomes `rep stos`, which takes longer to
 * start than a call of memset takes in all. */
static inline void fa_clear(void *memory, size_t size) {
    __asm__("" : "+r"(size));
    memset(memory, 0, size);
}

/* Writes the sentence, returns the status: `return fa_fail(error, FA_VALUE, "...", ...);` */
fa_status fa_fail(fa_error *error, fa_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* Passes a failure on; the sentence is already written. */
#define TRY(expression)                             \
    do {                                            \
        fa_status try_status = (expression);        \
        if (try_status != FA_OK) return try_status; \
    } while (0)

/* The name that the frameworks give it; buffer is used for what has none. */
const char *fa_dtype_name(fa_any_dtype dtype, char buffer[32]);

/* Shapes, dtypes, devices and options. Reads no array but lengths, cu_seqlens
 * and a seed of 32 bits on the CPU. */
fa_status fa_check_attention(const fa_request *request, fa_plan *plan, fa_error *error);

/* The caller's out=: shape, dtype, device, and that it shares no element with an input and has
 * distinct ones. */
fa_status fa_check_out(const fa_request *request, const fa_plan *plan, const fa_array *out,
                       fa_error *error);

/* Before a backend is chosen: the caller's out=, if there is one (else the plan has the layout of
 * the output to come), and whether there will be an lse. tensor_new() keeps to these layouts, so
 * that later nothing but the address is put in. */
void fa_expect_outputs(fa_plan *plan, const fa_array *out, int wants_lse);

/* dq, dk, dv, dmask and dsink. */
enum { FA_OF_Q, FA_OF_K, FA_OF_V, FA_OF_MASK, FA_OF_SINK, FA_GRADIENTS };

/* Arguments of attention_backward() beside attention's; a NULL array is absent. */
typedef struct fa_backward_request {
    const fa_array *dout, *out, *lse, *dlse;
    int need[FA_GRADIENTS];
    const fa_array *given[FA_GRADIENTS]; /* dq=, dk=, dv=, to be written */
    int deterministic;
} fa_backward_request;

/* A gradient that is asked for, as its array is to be. */
typedef struct fa_gradient {
    int wanted;
    fa_any_dtype dtype;
    int32_t ndim;
    const int64_t *shape; /* of the array that it is the gradient of */
} fa_gradient;

/* After fa_check_attention(), whose plan it completes to a request. */
fa_status fa_check_backward(const fa_request *attention, const fa_backward_request *request,
                            const fa_plan *plan, fa_backward *backward,
                            fa_gradient gradients[FA_GRADIENTS], fa_error *error);

/* Puts the memory of one of them into the request. */
void fa_bind_gradient(fa_backward *backward, int which, const fa_array *a, fa_layout layout);

/* merge_states: outs and lses are n arrays each; tensors is room for 2 * n. The shape and dtype of
 * out and lse are put into the plan (params unused), the request itself into merge, whose outputs
 * are to come. */
fa_status fa_check_merge(int32_t n, const fa_array *outs, const fa_array *lses, fa_layout layout,
                         fa_tensor *tensors, fa_merge *merge, fa_plan *plan, fa_error *error);

/* Arguments of attention_kvcache() beside attention's, of which k and v are the caches and
 * k_lengths is not used; a NULL array is absent. */
typedef struct fa_kvcache_request {
    const fa_array *lengths; /* cache_seqlens, or NULL: `length` */
    int64_t length;          /* any */
    const fa_array *k_new, *v_new;
    const fa_array *page_table, *batch_idx, *cos, *sin;
    int interleaved;
} fa_kvcache_request;

/* check_kvcache.c: both at once. Reads lengths and tables on the CPU. The plan is that of the
 * outputs; mass_shape is (b, hk, room for keys). */
fa_status fa_check_kvcache(const fa_request *attention, const fa_kvcache_request *request,
                           fa_plan *plan, fa_kvcache *cache, int64_t mass_shape[3],
                           fa_error *error);
/* The caller's out=. */
fa_status fa_check_kvcache_out(const fa_request *attention, const fa_kvcache_request *request,
                               const fa_plan *plan, const fa_array *out, fa_error *error);
/* What fa_expect_outputs() says of the plan, and whether there will be a mass. */
void fa_expect_kvcache(const fa_plan *plan, const int64_t mass_shape[3], int wants_mass,
                       fa_kvcache *cache);

/* Arguments of sparsek() and sparsek_lists(), whose lengths and offset are in the fa_request; a
 * NULL array is absent. */
typedef struct fa_sparsek_request {
    const fa_array *scores;
    double k;
    const fa_array *lengths;                  /* of sparsek */
    int has_lists;                            /* sparsek_lists, which has the next two */
    int64_t sq, window;                       /* any */
    const fa_array *tau, *key_lists, *dgates; /* of the gradient */
} fa_sparsek_request;

/* The results, as their arrays are to be: contiguous. */
enum { FA_GATES, FA_TAU, FA_KEY_LISTS, FA_DSCORES, FA_SPARSEK_RESULTS };
typedef struct fa_result {
    fa_any_dtype dtype;
    int32_t ndim;
    int64_t shape[FA_MAX_RANK];
} fa_result;

/* check_sparsek.c. Reads lengths on the CPU. Of the results key_lists are meant with lists, and
 * dscores by the gradient. */
fa_status fa_check_sparsek(const fa_request *keys, const fa_sparsek_request *request,
                           fa_sparsek *sparsek, fa_result results[FA_SPARSEK_RESULTS],
                           fa_error *error);
/* After it, whose request it completes to that of the gradient. */
fa_status fa_check_sparsek_backward(const fa_sparsek_request *request, const fa_sparsek *sparsek,
                                    fa_result results[FA_SPARSEK_RESULTS],
                                    fa_sparsek_backward *backward, fa_error *error);

/* dispatch.c: the ordered table of backends. */
enum { FA_MAX_BACKENDS = 8 };
int32_t fa_backend_count(void);
const fa_backend *fa_backend_at(int32_t i);
/* Why this build has no CUDA kernels, as "it was built with FASTATTN_CUDA=0"; NULL: it has. */
const char *fa_no_kernels(void);
/* The first backend that takes the request (of that name, if name is not NULL), kept in the plan
 * with its choice, or the sentence with every backend's reason. reasons, if not NULL, has one entry
 * per backend; empty: it would run. The outputs are expected before. */
const fa_backend *fa_choose(fa_plan *plan, const char *name, fa_error *reasons, fa_error *error);
/* Of the choice: the kernel's name, the bytes of device workspace. */
const char *fa_kernel(const fa_plan *plan);
int64_t fa_workspace(const fa_plan *plan);
fa_status fa_run(const fa_plan *plan, void *workspace, fa_error *error);

/* The same for the backward pass. */
const fa_backend *fa_choose_backward(const fa_backward *backward, const char *name,
                                     fa_chosen *chosen, fa_error *reasons, fa_error *error);
const char *fa_backward_kernel(const fa_backward *backward, const fa_chosen *chosen);
int64_t fa_backward_workspace(const fa_backward *backward, const fa_chosen *chosen);
fa_status fa_run_backward(const fa_backward *backward, const fa_chosen *chosen, void *workspace,
                          fa_error *error);

/* The same for attention to a cache. */
const fa_backend *fa_choose_kvcache(const fa_kvcache *cache, const char *name, fa_chosen *chosen,
                                    fa_error *reasons, fa_error *error);
const char *fa_kvcache_kernel(const fa_kvcache *cache, const fa_chosen *chosen);
int64_t fa_kvcache_workspace(const fa_kvcache *cache, const fa_chosen *chosen);
fa_status fa_run_kvcache(const fa_kvcache *cache, const fa_chosen *chosen, void *workspace,
                         fa_error *error);

/* The same for merging; the backend, or NULL. */
const fa_backend *fa_choose_merge(const fa_merge *merge, fa_chosen *chosen, fa_error *error);
int64_t fa_merge_workspace(const fa_merge *merge, const fa_chosen *chosen);
fa_status fa_run_merge(const fa_merge *merge, const fa_chosen *chosen, void *workspace,
                       fa_error *error);

/* The same for SparseK and its gradient. */
const fa_backend *fa_choose_sparsek(const fa_sparsek *sparsek, fa_chosen *chosen, fa_error *error);
int64_t fa_sparsek_workspace(const fa_sparsek *sparsek, const fa_chosen *chosen);
fa_status fa_run_sparsek(const fa_sparsek *sparsek, const fa_chosen *chosen, void *workspace,
                         fa_error *error);
const fa_backend *fa_choose_sparsek_backward(const fa_sparsek_backward *backward, fa_chosen *chosen,
                                             fa_error *error);
int64_t fa_sparsek_backward_workspace(const fa_sparsek_backward *backward, const fa_chosen *chosen);
fa_status fa_run_sparsek_backward(const fa_sparsek_backward *backward, const fa_chosen *chosen,
                                  void *workspace, fa_error *error);

#endif
