/* The plan of a merge, and its kernels with threads as fibers. */
#include "merge_host.h"

static fa_merge request(int n, const fa_tensor *outs, const fa_tensor *lses, const fa_tensor *out,
                        const fa_tensor *lse, int dtype) {
    fa_merge m = {};
    m.n = n, m.outs = outs, m.lses = lses, m.out = *out, m.lse = *lse, m.dtype = (fa_dtype)dtype;
    return m;
}

/* {batch, many, width, stacked, lanes, share, axes..., tiles, rows, items, workspace} */
extern "C" void plan(int n, const fa_tensor *outs, const fa_tensor *lses, const fa_tensor *out,
                     const fa_tensor *lse, int dtype, const fa_merge_stack *stack,
                     int64_t *fields) {
    fa_merge m = request(n, outs, lses, out, lse, dtype);
    fa_merge_plan p = fa_merge_make(&m, stack, fa_merge_walk(&m, stack));
    int64_t all[] = {p.batch,   p.is_many, p.width, p.is_stacked, p.lanes, p.share, p.axis[0],
                     p.axis[1], p.axis[2], p.tiles, p.rows,       p.items, p.bytes};
    memcpy(fields, all, sizeof all);
}

extern "C" int merge(int n, const fa_tensor *outs, const fa_tensor *lses, const fa_tensor *out,
                     const fa_tensor *lse, int dtype, const fa_merge_stack *stack, void *workspace,
                     int blocks) {
    fa_merge m = request(n, outs, lses, out, lse, dtype);
    fa_merge to_come = m; /* as it is when a kernel is chosen */
    to_come.out.data = to_come.lse.data = FA_TO_COME;
    fa_merge_plan p = fa_merge_make(&m, stack, fa_merge_walk(&to_come, stack));
    if (p.dtype == FA_F32 && m.dtype == FA_F32)
        run_merge<FA_F32, FA_F32>(&m, &p, workspace, blocks);
    else if (p.dtype == FA_F32 && m.dtype == FA_BF16)
        run_merge<FA_F32, FA_BF16>(&m, &p, workspace, blocks);
    else if (p.dtype == FA_F32 && m.dtype == FA_F16)
        run_merge<FA_F32, FA_F16>(&m, &p, workspace, blocks);
    else if (p.dtype == FA_BF16 && m.dtype == FA_BF16)
        run_merge<FA_BF16, FA_BF16>(&m, &p, workspace, blocks);
    else
        return -1;
    return 0;
}

/* Where row `row` of `rows` rows, (size0, size1, size2), lies. */
extern "C" void place(int64_t row, int64_t rows, int64_t size1, int64_t size2, int64_t *at) {
    merge_args<2> a = {};
    a.rows = rows;
    a.size[0] = size1, a.size[1] = size2;
    const row_place p = find_place(a, row);
    memcpy(at, p.at, sizeof p.at);
}
