/* sparsek_attention_backward.c - the gradients of attention to the keys that SparseK keeps, on the
 * CPU: those of q, k and v, and the sums over gates, as of lists (sparse_backward.c); then du, by
 * range sums.
 */
#include "backward_tasks.h"
#include "sparsek_means.h"

int fa_open_gate_sums(fa_gate_sums *s, int64_t groups) {
    s->of_keys = calloc((size_t)(groups * s->parts * s->keys) + 1, sizeof *s->of_keys);
    s->of_rows = calloc((size_t)(groups * s->rows) + 1, sizeof *s->of_rows);
    return s->of_keys && s->of_rows;
}

int fa_put_dscores(const fa_sparsek_attention_backward *b, const fa_gate_sums *sums, int64_t at,
                   int64_t h) {
    const fa_sparsek_attention *r = &b->selection;
    const fa_params *p = &b->attention.forward;
    const fa_masks masks = fa_candidate_masks(&p->masks, r->window);
    const fa_sequence q = fa_find_sequence(&p->varlen, &masks, at, p->what.sq, p->what.sk);
    const fa_lengths n = q.lengths;
    const int64_t of_b = p->varlen.cu_q ? 0 : at, group = at * p->what.hk + h;
    const int is_double = p->what.dtype == FA_F64;
    scratch s;
    const int fine = scratch_start(&s, is_double, r->k, n.sq, n.sk);
    if (fine) {
        for (int32_t j = 0; j < n.sk; j++) {
            const int64_t key = q.k + (int64_t)j;
            s.z[j] = score(r->scores.data, r->scores_dtype, element(&r->scores, of_b, h, key));
            s.dz[j] = 0;
            for (int part = 0; part < sums->parts; part++)
                s.dz[j] += sums->of_keys[(group * sums->parts + part) * sums->keys + j];
        }
        for (int32_t i = 0; i < n.sq; i++) {
            const int64_t row = element(&r->tau, of_b, h, q.q + (int64_t)i);
            s.tau[i] = score(r->tau.data, is_double ? FA_F64 : FA_F32, row);
            s.means[i] = sums->of_rows[group * sums->rows + i];
        }
        const int32_t rows = count_rows(&s, &n);
        find_runs(&s, &n, rows);
        take_means(&s, &n, rows);
        for (int32_t j = n.k_start; j < n.sk; j++)
            put(b->dscores.data, r->scores_dtype, element(&b->dscores, of_b, h, q.k + (int64_t)j),
                s.dz[j]);
    }
    scratch_end(&s);
    return fine;
}

fa_status fa_cpu_sparsek_attention_backward(const fa_sparsek_attention_backward *b, fa_level level,
                                            fa_error *error) {
    if (b->dscores.data) fa_clear_tensor(&b->dscores, b->selection.scores_dtype);
    return fa_cpu_kept_backward(b, level, error);
}
