/* kept.c - the keys that SparseK keeps for a block of queries. */
#include "kept.h"

#include "sparsek_stream.h"

/* A block has the keys of its first row, and one new candidate for each further row. */
static int64_t most_keys(const fa_sparsek_attention *r) {
    const int64_t sk = r->forward.what.sk, most = (int64_t)r->kept + FA_KEPT_ROWS;
    return r->keep_all || most > sk ? sk : most;
}

size_t fa_kept_bytes(const fa_sparsek_attention *r) {
    return (size_t)most_keys(r) * (sizeof(double) + 3 * sizeof(int32_t)) + 64;
}

void fa_open_kept(fa_kept *kept, const fa_sparsek_attention *r, void *memory) {
    const int64_t n = most_keys(r);
    *kept = (fa_kept){.r = r, .z = memory, .next = -1};
    kept->keys = (int32_t *)(kept->z + n);
    kept->begin = kept->keys + n;
    kept->end = kept->begin + n;
}

static void open_sequence(fa_kept *kept, int64_t b, int64_t h) {
    const fa_sparsek_attention *r = kept->r;
    const fa_params *p = &r->forward;
    const fa_masks masks = fa_candidate_masks(&p->masks, r->window);
    const int64_t at = p->varlen.cu_q ? 0 : b;
    const int real = p->what.dtype == FA_F64 ? 8 : 4;
    const fa_sequence s = fa_find_sequence(&p->varlen, &masks, b, p->what.sq, p->what.sk);
    kept->lengths = s.lengths;
    kept->tau = (const char *)r->tau.data + element(&r->tau, at, h, s.q) * real;
    kept->scores = (const char *)r->scores.data +
                   element(&r->scores, at, h, s.k) * fa_dtype_size(r->scores_dtype);
    kept->ends = (const int32_t *)r->ends.data + element(&r->ends, at, h, s.k);
    kept->b = b, kept->h = h;
}

double fa_kept_tau(const fa_kept *kept, int32_t row) {
    const int64_t at = row * kept->r->tau.stride[2];
    return kept->r->forward.what.dtype == FA_F64 ? ((const double *)kept->tau)[at]
                                                 : ((const float *)kept->tau)[at];
}

/* Those of the keys j .. last - 1 that rows from `first` on keep. */
static void add(fa_kept *kept, int32_t j, int32_t last, int32_t first) {
    const fa_sparsek_attention *r = kept->r;
    const int64_t step = r->ends.stride[2], gap = r->scores.stride[2];
    for (; j < last; j++) {
        const int32_t end = kept->ends[j * step];
        if (end <= first) continue;
        const int32_t begin = fa_rows_seeing_some(kept->lengths, (fa_interval){j, j + 1}).begin;
        const int32_t n = kept->count;
        if (end <= begin || n == most_keys(r)) continue; /* as many as that only of foreign ends */
        kept->keys[n] = j, kept->begin[n] = begin, kept->end[n] = end;
        kept->z[n] = score(kept->scores, r->scores_dtype, j * gap);
        kept->count++;
    }
}

void fa_read_kept(fa_kept *kept, int64_t b, int64_t h, int32_t first, int32_t end) {
    const int carries_on = first > 0 && kept->next == first && kept->b == b && kept->h == h;
    const int32_t count = kept->count;
    if (!carries_on) open_sequence(kept, b, h);
    kept->next = end, kept->count = 0;
    if (first >= end) return;
    const fa_lengths n = kept->lengths;
    const int32_t seen = first ? fa_row_interval(n, first - 1).end : n.k_start;
    for (int32_t i = 0; i < count && carries_on; i++) {
        if (kept->end[i] <= first) continue;
        const int32_t to = kept->count++;
        kept->keys[to] = kept->keys[i], kept->begin[to] = kept->begin[i];
        kept->end[to] = kept->end[i], kept->z[to] = kept->z[i];
    }
    if (!carries_on) add(kept, n.k_start, seen, first);
    add(kept, seen, fa_row_interval(n, end - 1).end, first);
}

fa_lists fa_kept_lists(const fa_sparsek_attention *r) {
    fa_lists l = {.q_block = FA_KEPT_ROWS, .k_block = 1, .key_gate = r->key_gate};
    if (r->window) l.has_window = 1, l.window = fa_window_masks(&r->forward.masks, r->window);
    return l;
}
