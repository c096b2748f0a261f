/* lists.c - lists of key blocks, read and cut into passes. */
#include "kept.h"

enum { BYTES = 8 + 2 * (4 + 4 + 8) }; /* for an entry: cut, and both fa_some */

size_t fa_list_bytes(const fa_lists *lists) {
    return (size_t)BYTES * (size_t)lists->entries.shape[3] + 64;
}

void fa_open_lists(fa_listed *l, const fa_lists *lists, void *memory) {
    const int64_t n = lists->entries.shape[3];
    memset(l, 0, sizeof *l);
    l->lists = lists;
    l->cut = memory;
    l->whole.gates = (double *)(l->cut + n);
    l->layer.gates = l->whole.gates + n;
    l->whole.blocks = (int32_t *)(l->layer.gates + n);
    l->whole.entries = l->whole.blocks + n;
    l->layer.blocks = l->whole.entries + n;
    l->layer.entries = l->layer.blocks + n;
}

/* ---- reading ---- */

static void add(fa_some *to, const fa_listed *l, int32_t block, int32_t entry) {
    const int64_t at = entry * l->lists->gate.stride[3];
    to->blocks[to->count] = block;
    to->entries[to->count] = entry;
    if (l->gate)
        to->gates[to->count] =
            l->gate_type == FA_F64 ? ((const double *)l->gate)[at] : ((const float *)l->gate)[at];
    to->count++;
}

static int compare(const void *x, const void *y) {
    const int64_t a = *(const int64_t *)x, b = *(const int64_t *)y;
    return (a > b) - (a < b);
}

/* Sorts what is cut, and counts the layers. */
static void sort_cut(fa_listed *l) {
    int sorted = 1;
    for (int32_t i = 1; i < l->cut_count && sorted; i++) sorted = l->cut[i - 1] < l->cut[i];
    if (!sorted) qsort(l->cut, (size_t)l->cut_count, sizeof *l->cut, compare);
    l->layers = 0;
    for (int32_t i = 0, times = 0; i < l->cut_count; i++) {
        times = i && l->cut[i] >> 32 == l->cut[i - 1] >> 32 ? times + 1 : 1;
        if (times > l->layers) l->layers = times;
    }
}

/* The keys that SparseK keeps: as blocks that every row sees, for which of them does is known by
 * the kernels. */
static void read_kept(fa_listed *l, int64_t b, int64_t h) {
    fa_read_kept(l->kept, b, h, l->first, l->end);
    l->whole.blocks = l->kept->keys, l->whole.count = l->kept->count;
}

void fa_read_list(fa_listed *l, const fa_params *p, int64_t b, int64_t h, int64_t block,
                  int32_t first, int32_t end) {
    const fa_tensor *t = &l->lists->entries, *c = &l->lists->counts;
    const int64_t at = p->varlen.cu_q ? 0 : b;
    const int32_t size = l->lists->k_block, sk = l->lengths.sk;
    const int32_t blocks = sk / size + (sk % size > 0);
    int32_t length = (int32_t)t->shape[3];
    l->first = first, l->end = end;
    l->step = l->whole.count = l->cut_count = l->layers = 0;
    l->gate_type = fa_gate_dtype(p->what.dtype), l->gate = NULL;
    if (l->kept) {
        read_kept(l, b, h);
        return;
    }
    const int32_t *from = (const int32_t *)t->data + element(t, at, h, block);
    if (c->data) length = fa_clamp(((const int32_t *)c->data)[element(c, at, h, block)], 0, length);
    if (l->lists->gate.data)
        l->gate = (const char *)l->lists->gate.data +
                  element(&l->lists->gate, at, h, block) * fa_dtype_size(l->gate_type);
    if (first >= end) return;
    const fa_interval top = fa_row_interval(l->lengths, first);
    const fa_interval bottom = fa_row_interval(l->lengths, end - 1);
    fa_interval hidden = {0, 0}; /* keys that some row has in its window */
    if (l->lists->has_window)
        hidden = (fa_interval){fa_row_interval(l->window, first).begin,
                               fa_row_interval(l->window, end - 1).end};
    for (int32_t i = 0; i < length; i++) {
        const int32_t n = from[i * t->stride[3]];
        if (n < 0 || n >= blocks) continue;
        const int32_t begin = n * size, stop = sk - begin < size ? sk : begin + size;
        if (begin >= bottom.end || stop <= top.begin) continue; /* no row sees it */
        const int is_whole = stop - begin == size && begin >= bottom.begin && stop <= top.end;
        if (is_whole && (begin >= hidden.end || stop <= hidden.begin))
            add(&l->whole, l, n, i);
        else
            l->cut[l->cut_count++] = (int64_t)n << 32 | i;
    }
    sort_cut(l);
}

/* ---- passes ---- */

/* Of the cut blocks, all that are named for the times-th time. */
static void fill_layer(fa_listed *l, int32_t times) {
    l->layer.count = 0;
    for (int32_t i = 0, seen = 0; i < l->cut_count; i++) {
        seen = i && l->cut[i] >> 32 == l->cut[i - 1] >> 32 ? seen + 1 : 0;
        if (seen == times) add(&l->layer, l, (int32_t)(l->cut[i] >> 32), (int32_t)l->cut[i]);
    }
}

/* Whether rows see keys on this side of their windows. Where none does, their empty intervals would
 * span keys that no row sees. */
static int sees_side(const fa_listed *l, fa_side side) {
    if (!l->lists->has_window) return side == FA_LEFT;
    return side == FA_LEFT ? l->lengths.from < l->window.from : l->window.to < l->lengths.to;
}

int fa_next_pass(fa_listed *l, fa_pass *pass) {
    const int32_t of_layers = 2 * l->layers;
    while (l->step < of_layers + 2) {
        const int32_t step = l->step++;
        const fa_some *some = step ? &l->layer : &l->whole;
        if (step == of_layers + 1) {
            if (!l->lists->has_window) break;
            *pass = (fa_pass){.side = FA_WINDOW, .columns = l->lengths.sk};
            return 1;
        }
        if (step % 2) fill_layer(l, step / 2);
        pass->side = !step ? FA_WHOLE : step % 2 ? FA_LEFT : FA_RIGHT;
        if (!some->count || (step && !sees_side(l, pass->side))) continue;
        pass->kept = step ? NULL : l->kept;
        pass->blocks = some->blocks, pass->entries = some->entries;
        pass->gates = l->gate ? some->gates : NULL;
        pass->count = some->count, pass->columns = some->count * l->lists->k_block;
        return 1;
    }
    return 0;
}

/* The first column whose key is not below `key`, in sorted blocks. */
static int32_t find_column(const fa_pass *pass, int32_t size, int32_t key) {
    const int32_t block = key / size;
    int32_t low = 0, high = pass->count;
    while (low < high) {
        const int32_t middle = (low + high) / 2;
        if (pass->blocks[middle] < block)
            low = middle + 1;
        else
            high = middle;
    }
    return low * size + (low < pass->count && pass->blocks[low] == block ? key % size : 0);
}

fa_interval fa_pass_columns(const fa_listed *l, const fa_pass *pass, int32_t row) {
    if (pass->side == FA_WHOLE) return (fa_interval){0, pass->columns};
    fa_interval keys = fa_row_interval(l->lengths, row);
    if (l->lists->has_window) {
        const fa_interval window = fa_row_interval(l->window, row);
        if (pass->side == FA_WINDOW) return window;
        if (pass->side == FA_LEFT && keys.end > window.begin) keys.end = window.begin;
        if (pass->side == FA_RIGHT && keys.begin < window.end) keys.begin = window.end;
    }
    if (keys.end < keys.begin) keys.end = keys.begin;
    return (fa_interval){find_column(pass, l->lists->k_block, keys.begin),
                         find_column(pass, l->lists->k_block, keys.end)};
}
