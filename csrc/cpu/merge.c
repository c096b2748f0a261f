/* merge.c - merging partial results on the CPU. */
#include "cpu.h"

#define FA_BYTES 16
#define FA_X86 0
#define FA_PAIRS 0
#define FA_NAME f32_portable
#define FA_REAL float
#define FA_INT int32_t
#include "simd.h"
#include "rows.h"
#undef FA_NAME
#undef FA_REAL
#undef FA_INT
#define FA_NAME f64_portable
#define FA_REAL double
#define FA_INT int64_t
#include "simd.h"
#include "rows.h"

/* lse of part i of row (b, h, s); -inf where it is empty, which some call +inf. */
static double part_lse(const fa_merge *m, int i, int64_t b, int64_t h, int64_t s) {
    const fa_tensor *t = &m->lses[i];
    const int64_t at = element(t, b, h, s);
    const double lse =
        m->dtype == FA_F64 ? ((const double *)t->data)[at] : ((const float *)t->data)[at];
    return lse == INFINITY ? -INFINITY : lse;
}

/* One row: out = sum of w_i out_i / sum of w_i with w_i = exp(lse_i - the largest). Empty parts are
 * not read. */
static void merge_row(const fa_merge *m, int64_t b, int64_t h, int64_t s, double *sum,
                      double *row) {
    const int dv = (int)m->out.shape[3];
    const int64_t size = fa_dtype_size(m->dtype);
    double top = -INFINITY, total = 0;
    for (int i = 0; i < m->n; i++) {
        const double lse = part_lse(m, i, b, h, s);
        if (lse > top) top = lse; /* not a NaN, whose own weight will be one: the row is NaN */
    }
    memset(sum, 0, (size_t)dv * sizeof *sum);
    for (int i = 0; i < m->n; i++) {
        const double lse = part_lse(m, i, b, h, s);
        if (lse == -INFINITY) continue;
        double weight =
            power_f64_portable(base_of_f64_portable(FA_LOG2E), (vec_f64_portable){lse - top})[0];
        total += weight;
        read_row_f64_portable(row,
                              (const char *)m->outs[i].data + element(&m->outs[i], b, h, s) * size,
                              m->dtype, m->outs[i].stride[3], dv);
        for (int j = 0; j < dv; j++) sum[j] += weight * row[j];
    }
    float *single = (float *)row; /* write_row of the float kernel for all but float64 */
    for (int j = 0; j < dv; j++) sum[j] = total == 0 ? 0 : sum[j] / total;
    void *out = (char *)m->out.data + element(&m->out, b, h, s) * size;
    if (m->dtype == FA_F64) {
        write_row_f64_portable(out, m->dtype, m->out.stride[3], sum, dv);
    } else {
        for (int j = 0; j < dv; j++) single[j] = (float)sum[j];
        write_row_f32_portable(out, m->dtype, m->out.stride[3], single, dv);
    }
    double lse =
        total == 0 ? -INFINITY : top + log2_f64_portable((vec_f64_portable){total, 1})[0] * FA_LN2;
    put_lse(&m->lse, m->dtype, element(&m->lse, b, h, s), lse);
}

fa_status fa_cpu_merge(const fa_merge *m, fa_error *error) {
    double *memory = malloc(2 * sizeof(double) * (size_t)(m->out.shape[3] + 1));
    if (!memory) {
        snprintf(error->text, sizeof error->text, "no memory for the CPU backend's scratch");
        return FA_MEMORY;
    }
    for (int64_t b = 0; b < m->out.shape[0]; b++)
        for (int64_t h = 0; h < m->out.shape[1]; h++)
            for (int64_t s = 0; s < m->out.shape[2]; s++)
                merge_row(m, b, h, s, memory, memory + m->out.shape[3]);
    free(memory);
    return FA_OK;
}
