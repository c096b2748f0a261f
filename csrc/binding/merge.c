/* merge.c - merge_states: any number of parts, borrowed, merged, handed over. */
#include "call.h"
#include "options.h"

#include <stdio.h>
#include <stdlib.h>

typedef struct merge_call {
    module_state *state;
    torch_now now;
    Py_ssize_t n;
    borrowed *parts;  /* 2 * n: outs, then lses */
    Py_ssize_t count; /* borrowed so far */
    fa_array *arrays; /* 2 * n, the same order */
    fa_tensor *tensors;
    char (*names)[32];
    fa_error error;
} merge_call;

static fa_status merge_parts(merge_call *c, PyObject *outs, PyObject *lses, fa_layout layout,
                             output *out, output *lse) {
    fa_merge merge;
    fa_plan plan;
    for (Py_ssize_t i = 0; i < 2 * c->n; i++) {
        PyObject *sequence = i < c->n ? outs : lses;
        Py_ssize_t at = i < c->n ? i : i - c->n;
        snprintf(c->names[i], sizeof c->names[i], "%s[%zd]", i < c->n ? "outs" : "lses", at);
        TRY(tensor_borrow(c->state, &c->now, PyTuple_GetItem(sequence, at), c->names[i],
                          &c->parts[i], &c->error));
        c->count++;
        c->arrays[i] = c->parts[i].array;
        if (c->parts[i].requires_grad) return FA_TO_TORCH;
    }
    TRY(fa_check_merge((int32_t)c->n, c->arrays, c->arrays + c->n, layout, c->tensors, &merge,
                       &plan, &c->error));
    if (c->parts->kind == KIND_DESCRIBED) return FA_OK; /* that was all that was asked */
    fa_chosen chosen;
    if (!fa_choose_merge(&merge, &chosen, &c->error)) return FA_UNSUPPORTED;
    TRY(tensor_new(c->state, c->parts, plan.out_ndim, plan.out_shape, NULL, plan.out_dtype, out,
                   &c->error));
    TRY(tensor_new(c->state, c->parts, plan.lse_ndim, plan.lse_shape, NULL, plan.lse_dtype, lse,
                   &c->error));
    merge.out.data = out->memory.array.data, merge.lse.data = lse->memory.array.data;
    const int64_t bytes = fa_merge_workspace(&merge, &chosen);
    call_work work;
    TRY(call_begin_work(&work, c->state, c->parts, bytes, NULL, &c->error));
    fa_status status = fa_run_merge(&merge, &chosen, work.memory, &c->error);
    call_end_work(&work);
    return status;
}

enum { OUTS, LSES, LAYOUT, ARGUMENTS };

PyObject *merge_states(PyObject *module, PyObject *const *arguments, Py_ssize_t count) {
    if (count != ARGUMENTS)
        return PyErr_Format(PyExc_TypeError, "_C.merge_states() takes %d arguments, got %zd",
                            ARGUMENTS, count);
    PyObject *outs = arguments[OUTS], *lses = arguments[LSES];
    merge_call c = {.state = PyModule_GetState(module), .n = PyTuple_Size(outs)};
    output out = {0}, lse = {0};
    fa_layout layout;
    PyObject *result = NULL;
    if (c.n < 0 || PyTuple_Size(lses) < 0) return NULL;
    fa_status status = option_layout(arguments[LAYOUT], &layout, &c.error);
    if (status == FA_OK && (c.n < 1 || c.n > INT32_MAX / 2))
        status = fa_fail(&c.error, FA_VALUE, "`outs` must hold at least one array, got %zd", c.n);
    if (status == FA_OK && PyTuple_Size(lses) != c.n)
        status = fa_fail(&c.error, FA_VALUE, "`lses` must hold %zd arrays like `outs`, got %zd",
                         c.n, PyTuple_Size(lses));
    if (status == FA_OK) {
        size_t n = 2 * (size_t)c.n;
        c.parts = calloc(n, sizeof *c.parts);
        c.arrays = calloc(n, sizeof *c.arrays);
        c.tensors = calloc(n, sizeof *c.tensors);
        c.names = calloc(n, sizeof *c.names);
        status = c.parts && c.arrays && c.tensors && c.names
                     ? merge_parts(&c, outs, lses, layout, &out, &lse)
                     : fa_fail(&c.error, FA_MEMORY, "no memory for %zd parts", c.n);
    }
    if (status == FA_OK && c.parts->kind == KIND_DESCRIBED) {
        result = Py_NewRef(Py_None);
    } else if (status == FA_OK) {
        result = call_hand_over(c.state, c.parts, &out, &lse, NULL, 1);
    } else {
        tensor_drop(&out);
        tensor_drop(&lse);
    }
    for (Py_ssize_t i = 0; i < c.count; i++) tensor_release(&c.parts[i]);
    free(c.parts);
    free(c.arrays);
    free(c.tensors);
    free(c.names);
    if (call_is_elsewhere(status))
        return state_hand_on(c.state, status, "merge_parts",
                             PyTuple_Pack(ARGUMENTS, outs, lses, arguments[LAYOUT]));
    return call_finish(c.state, result, status, 0, &c.error);
}
