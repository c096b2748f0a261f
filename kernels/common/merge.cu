/* merge.cu - merging partial results: from the request to its launches (merge_plan.h plans them).
 *
 * For the backend of every architecture from sm_80 on, and for what splits the keys and merges
 * itself. The caller has made the device current.
 */
#include <string.h>

#include "common/merge.cuh"

/* Kernels of one pair of dtypes and one width: at most 2, 4 and 8 parts; any number. */
enum { FEW_2, FEW_4, FEW_8, MANY, KINDS };
enum { WIDTHS = 3 }; /* 16, 8 and 4 bytes */

struct merge_dtypes {
    fa_dtype in, out;
    fa_merge_variant kinds[WIDTHS][KINDS][2]; /* the parts are stacked: no, yes */
    fa_merge_variant strided[2];
};

/* clang-format off */
#define MERGE_KIND(name, width, ...) \
    {{name, (const void *)__VA_ARGS__, {0, width}}, {name, (const void *)__VA_ARGS__, {1, width}}}
#define MERGE_WIDTH(IN, OUT, name, width)                              \
    {MERGE_KIND(name "_2", width, merge_few<IN, OUT, 2, width>),       \
     MERGE_KIND(name "_4", width, merge_few<IN, OUT, 4, width>),       \
     MERGE_KIND(name "_8", width, merge_few<IN, OUT, 8, width>),       \
     MERGE_KIND(name "_many", width, merge_many<IN, OUT, width>)}
#define MERGE_DTYPES(IN, OUT, name)                                    \
    {IN, OUT,                                                          \
     {MERGE_WIDTH(IN, OUT, "merge_" name, 16),                         \
      MERGE_WIDTH(IN, OUT, "merge_" name "_by_8", 8),                  \
      MERGE_WIDTH(IN, OUT, "merge_" name "_by_4", 4)},                 \
     MERGE_KIND("merge_" name "_strided", 0, merge_many<IN, OUT, 0>)}
/* clang-format on */

static const merge_dtypes table[] = {
    MERGE_DTYPES(FA_BF16, FA_BF16, "bf16"),       MERGE_DTYPES(FA_F16, FA_F16, "fp16"),
    MERGE_DTYPES(FA_F32, FA_F32, "fp32"),         MERGE_DTYPES(FA_F32, FA_BF16, "fp32_to_bf16"),
    MERGE_DTYPES(FA_F32, FA_F16, "fp32_to_fp16"),
};

extern "C" const fa_merge_variant *fa_merge_choose(const fa_merge *m, const fa_merge_stack *stack) {
    const fa_merge_plan p = fa_merge_make(m, stack, fa_merge_walk(m, stack));
    const int32_t few = p.batch == 2 ? FEW_2 : p.batch == 4 ? FEW_4 : FEW_8;
    const int32_t kind = p.is_many ? MANY : few;
    const int32_t width = p.width == 16 ? 0 : p.width == 8 ? 1 : 2;
    for (const merge_dtypes &d : table)
        if (d.in == p.dtype && d.out == m->dtype)
            return p.width ? &d.kinds[width][kind][p.is_stacked] : &d.strided[p.is_stacked];
    return NULL;
}

extern "C" int64_t fa_merge_bytes(const fa_merge *m, const fa_merge_stack *stack,
                                  const fa_merge_variant *variant) {
    return fa_merge_make(m, stack, variant->found).bytes;
}

static fa_status launch_list(const fa_merge *m, const fa_merge_plan *p, const fa_device *device,
                             void *workspace, fa_error *error) {
    fa_status status = FA_OK;
    for (int32_t first = 0; first < m->n && status == FA_OK; first += FA_MERGE_LISTED) {
        merge_list_args a = make_list_args(m, p, first, workspace);
        status = fa_launch_kernel((const void *)merge_list, 1, FA_MERGE_THREADS, 0, m->where.stream,
                                  device->early, &a, error);
    }
    return status;
}

template <int PARTS>
static fa_status launch(const fa_merge *m, const fa_merge_plan *p, const void *kernel,
                        const fa_device *device, void *workspace, fa_error *error) {
    merge_args<PARTS> a = make_merge_args<PARTS>(m, p, workspace);
    /* A block an item; they go round where a grid has no more. */
    const int32_t blocks = p->items < INT32_MAX ? (int32_t)p->items : INT32_MAX;
    return fa_launch_kernel(kernel, blocks, FA_MERGE_THREADS, 0, m->where.stream, device->early, &a,
                            error);
}

extern "C" fa_status fa_merge_launch(const fa_merge *m, const fa_merge_stack *stack,
                                     const fa_merge_variant *variant, const fa_device *device,
                                     void *workspace, fa_error *error) {
    const fa_merge_plan p = fa_merge_make(m, stack, variant->found);
    if (p.rows == 0) return FA_OK;
    if (p.bytes) {
        const fa_status status = launch_list(m, &p, device, workspace, error);
        if (status != FA_OK) return status;
    }
    auto *run = p.batch == 2 ? launch<2> : p.batch == 4 ? launch<4> : launch<8>;
    return run(m, &p, variant->kernel, device, workspace, error);
}
