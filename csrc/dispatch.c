/* dispatch.c - the ordered table of backends; the first that does not reject runs.
 *
 * Stop 4 of 6. A backend is one entry here and nothing else: its own file says what it takes.
 */
#include "check.h"

#include <stdio.h>
#include <string.h>

static const struct {
    const fa_backend *backend;
    fa_device_type device;
} table[] = {
#ifdef FASTATTN_CUDA
    {&fa_sm90, FA_CUDA},
#endif
    {&fa_cpu, FA_CPU},
};

enum { COUNT = sizeof table / sizeof *table };
_Static_assert((int)COUNT <= (int)FA_MAX_BACKENDS, "fa_choose() writes as many reasons");

const char *fa_no_kernels(void) {
#ifdef FASTATTN_CUDA
    return NULL;
#else
    return FA_NO_KERNELS; /* setup.py's reason */
#endif
}

int32_t fa_backend_count(void) { return COUNT; }

const fa_backend *fa_backend_at(int32_t i) { return table[i].backend; }

/* FA_OK, or the backend's reason in why. */
static fa_status try_backend(int32_t i, const fa_plan *plan, const char *name, fa_error *why) {
    if (name && strcmp(name, table[i].backend->name))
        return fa_fail(why, FA_UNSUPPORTED, "backend=\"%s\" was asked for", name);
    return table[i].backend->reject(&plan->params, why);
}

const fa_backend *fa_choose(const fa_plan *plan, const char *name, fa_error *reasons,
                            fa_error *error) {
    const fa_backend *chosen = NULL;
    /* The usual case first, without a word: a backend of another device is not even asked. */
    for (int32_t i = 0; i < COUNT && !chosen; i++)
        if (table[i].device == plan->params.where.device_type &&
            try_backend(i, plan, name, error) == FA_OK)
            chosen = table[i].backend;
    if (chosen && !reasons) return chosen;

    size_t used = 0, room = sizeof error->text;
    for (int32_t i = 0; i < COUNT; i++) {
        fa_error why = {""};
        if (try_backend(i, plan, name, &why) == FA_OK) why.text[0] = 0;
        if (reasons) reasons[i] = why;
        if (used < room)
            used += (size_t)snprintf(
                error->text + used, room - used, "%s%s: %s",
                used ? "; " : "no backend takes this call: ", table[i].backend->name, why.text);
    }
#ifndef FASTATTN_CUDA
    if (used < room)
        snprintf(error->text + used, room - used, "; no CUDA kernels: %s", fa_no_kernels());
#endif
    return chosen;
}

static int64_t item_size(fa_dtype dtype) {
    switch (dtype) {
        case FA_F64:
            return 8;
        case FA_F32:
            return 4;
        case FA_F16:
        case FA_BF16:
            return 2;
        case FA_BOOL:
            return 1;
    }
    return 0;
}

fa_status fa_run(const fa_backend *backend, const fa_plan *plan, void *workspace, fa_error *error) {
    if (!plan->outer_ndim) return backend->run(&plan->params, workspace, error);
    fa_params p = plan->params;
    void **data[5] = {&p.what.q.data, &p.what.k.data, &p.what.v.data, &p.scores.mask.data,
                      &p.what.out.data};
    int64_t index[FA_OUTER] = {0}, runs = 1;
    int64_t size = item_size(p.what.dtype), mask_size = item_size(p.scores.mask_dtype);
    for (int32_t i = 0; i < plan->outer_ndim; i++) runs *= plan->outer_shape[i];
    for (int64_t run = 0; run < runs; run++) {
        fa_status status = backend->run(&p, workspace, error);
        if (status != FA_OK) return status;
        p.dropout.first_b += p.what.b;
        /* The next index, counted like an odometer, and the arrays' data with it. */
        for (int32_t i = 0; i < plan->outer_ndim; i++) {
            int64_t step = 1;
            if (++index[i] == plan->outer_shape[i]) step = 1 - plan->outer_shape[i], index[i] = 0;
            for (int t = 0; t < 5; t++)
                if (*data[t])
                    *data[t] = (char *)*data[t] +
                               step * plan->outer_stride[i][t] * (t == 3 ? mask_size : size);
            if (index[i]) break;
        }
    }
    return FA_OK;
}

fa_status fa_run_merge(const fa_merge *merge, fa_error *error) {
    for (int32_t i = 0; i < COUNT; i++)
        if (table[i].device == merge->where.device_type && table[i].backend->merge)
            return table[i].backend->merge(merge, error);
    snprintf(error->text, sizeof error->text, "no backend merges partial results on this device");
    return FA_UNSUPPORTED;
}
