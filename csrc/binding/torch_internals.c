/* torch_internals.c - plain torch tensors: what they hide, and what only torch knows.
 *
 * Through torch_abi.c, or where that does not serve through DLPack's C exchange table and Python,
 * seen with torch 2.4 (no table: __dlpack__) to 2.14. Both ways see no more than memory: a
 * gradient, a negative bit, a tensor that is being traced are asked for here. What is not simply
 * numbers in memory gets its sentence from fastattn._frameworks.
 */
#include "internals.h"

#include <string.h>

static PyObject *call_is_neg(PyObject *tensor, PyObject *unused) {
    (void)unused;
    return PyObject_CallMethod(tensor, "is_neg", NULL);
}

int torch_learn(module_state *state, PyObject *parts) {
    PyObject *tensor, *parameter, *is_neg, *enabled, *forward_ad, *transformed, *table, *impl;
    if (!PyArg_ParseTuple(parts, "OOOOOOOO", &tensor, &parameter, &is_neg, &enabled, &forward_ad,
                          &transformed, &table, &impl))
        return 0;
    const int is_c = PyCFunction_Check(is_neg) && PyCFunction_GetFlags(is_neg) == METH_NOARGS;
    state->is_neg = is_c ? PyCFunction_GetFunction(is_neg) : call_is_neg;
    state->exchange = dlpack_table(table);
    if (is_c)
        state->abi = torch_abi_find(PyCFunction_GetSelf(is_neg), (uintptr_t)PyLong_AsVoidPtr(impl));
    if (PyErr_Occurred()) return 0;
    state->is_grad_enabled = Py_NewRef(enabled);
    state->forward_ad = Py_NewRef(forward_ad);
    state->is_transformed = Py_NewRef(transformed);
    state->parameter = (PyTypeObject *)Py_NewRef(parameter);
    __atomic_store_n(&state->tensor, (PyTypeObject *)Py_NewRef(tensor), __ATOMIC_RELEASE);
    return 1;
}

fa_status torch_refuse(module_state *state, PyObject *object, const char *name, fa_error *error) {
    PyObject *refusal = state_call(state, "refusal", "(O)", object);
    if (!refusal) return FA_RAISED;
    fa_status status = refusal == Py_True ? FA_TO_GRAPH : FA_OK;
    if (refusal != Py_None && refusal != Py_True) {
        char text[384];
        status = fa_fail(error, FA_TYPE, "`%s` %s", name,
                         state_text(Py_NewRef(refusal), sizeof text, text));
    }
    Py_DECREF(refusal);
    return status;
}

int torch_is_transformed(const module_state *state) {
    PyObject *answer = PyObject_CallObject(state->is_transformed, NULL);
    Py_XDECREF(answer); /* a bool, kept by the interpreter */
    return answer ? answer == Py_True : -1;
}

PyObject *torch_resolve(const module_state *state, PyObject *gradient) {
    if (!torch_owns(state, gradient) ||
        (state->abi.offset && !state->abi.is_neg((const char *)gradient + state->abi.offset)))
        return Py_NewRef(gradient);
    return PyObject_CallMethod(gradient, "resolve_neg", NULL);
}

static fa_status ask_torch(module_state *state, torch_now *now) {
    const torch_abi *abi = &state->abi;
    if (abi->offset) {
        /* Nothing is recorded in inference mode, whatever enable_grad() in it says. */
        now->grad_enabled = abi->grad_mode_is_enabled() && !abi->inference_mode_is_enabled();
        now->dispatch_modes = abi->dispatch_modes() > 0;
        now->is_seen = now->dispatch_modes || abi->function_modes() || *abi->tracing_state();
    } else {
        PyObject *enabled = PyObject_CallObject(state->is_grad_enabled, NULL);
        if (!enabled) return FA_RAISED;
        Py_DECREF(enabled);
        now->grad_enabled = enabled == Py_True;
        now->is_seen = 1; /* fastattn._frameworks will know */
    }
    PyObject *level = PyDict_GetItemWithError(state->forward_ad, state->current_level);
    now->dual_level = level && PyLong_AsLong(level) >= 0;
    if (PyErr_Occurred()) return FA_RAISED;
    now->asked = 1;
    return FA_OK;
}

static fa_status ask_tensor(module_state *state, const torch_now *now, PyObject *object,
                            int *requires_grad, int *neg) {
    *requires_grad = 0;
    if (state->abi.offset) {
        const void *tensor = (const char *)object + state->abi.offset, *impl;
        memcpy(&impl, tensor, sizeof impl);
        if (now->grad_enabled) *requires_grad = state->abi.requires_grad(impl);
        *neg = state->abi.is_neg(tensor);
        return FA_OK;
    }
    PyObject *answer;
    if (now->grad_enabled) {
        if (!(answer = PyObject_GetAttr(object, state->requires_grad))) return FA_RAISED;
        Py_DECREF(answer); /* a bool, immortal or at least kept by the interpreter */
        *requires_grad = answer == Py_True;
    }
    if (!(answer = state->is_neg(object, NULL))) return FA_RAISED;
    Py_DECREF(answer);
    *neg = answer == Py_True;
    return FA_OK;
}

/* What the exchange table and DLPack lose silently: the negative bit, which is refused (the
 * conjugate bit needs a complex dtype, which check_attention.c refuses), and a gradient. */
static fa_status check_torch(module_state *state, torch_now *now, PyObject *object,
                             const char *name, int *requires_grad, fa_error *error) {
    if (!now->asked) {
        TRY(ask_torch(state, now));
        if (now->is_seen) TRY(torch_refuse(state, object, name, error));
    }
    int neg;
    TRY(ask_tensor(state, now, object, requires_grad, &neg));
    if (neg)
        return fa_fail(
            error, FA_TYPE,
            "`%s` must not be a lazily negated view (the imaginary part of a conjugate): "
            "pass `%s`.resolve_neg()",
            name, name);
    if (!now->dual_level) return FA_OK;
    PyObject *dual = state_call(state, "has_tangent", "(O)", object);
    if (!dual) return FA_RAISED;
    Py_DECREF(dual);
    if (dual == Py_True) *requires_grad = 1;
    return FA_OK;
}

/* torch's current stream is one per device, and a call has one device. */
static fa_status find_stream(module_state *state, torch_now *now, fa_array *a) {
    if (!now->has_stream || now->device_id != a->device_id) {
        if (state->exchange->current_stream(DL_CUDA, a->device_id, &now->stream) < 0)
            return FA_RAISED;
        now->device_id = a->device_id;
        now->has_stream = 1;
    }
    a->stream = now->stream;
    return FA_OK;
}

fa_status torch_borrow(module_state *state, torch_now *now, PyObject *object, borrowed *b,
                       fa_error *error) {
    DLTensor t;
    b->array.is_torch = 1;
    if (!state->exchange) {
        TRY(check_torch(state, now, object, b->array.name, &b->requires_grad, error));
        return dlpack_borrow(state, object, b, error);
    }
    if (!torch_abi_view(&state->abi, object, &t) &&
        state->exchange->borrow_from_object(object, &t) < 0) {
        /* A tensor without strided memory: sparse, meta, or under a functorch transform. */
        if (!PyErr_ExceptionMatches(PyExc_Exception)) return FA_RAISED;
        PyErr_Clear();
        TRY(torch_refuse(state, object, b->array.name, error));
        return fa_fail(error, FA_TYPE,
                       "`%s` must be a strided tensor with memory of its own, got one without",
                       b->array.name);
    }
    if (!t.data) TRY(torch_refuse(state, object, b->array.name, error)); /* or it is empty */
    fa_status status = tensor_describe(&t, &b->array, error);
    if (status == FA_OK)
        status = check_torch(state, now, object, b->array.name, &b->requires_grad, error);
    if (status != FA_OK) return status;
    b->kind = now->dispatch_modes ? KIND_DLPACK : KIND_TABLE;
    return b->array.device_type == FA_CUDA ? find_stream(state, now, &b->array) : FA_OK;
}

fa_status torch_autocast(module_state *state, torch_now *now, borrowed *b, fa_error *error) {
    const fa_array *a = &b->array;
    if (!torch_owns(state, b->object) || a->dtype.code == FA_CODE_BOOL) return FA_OK;
    if (state->abi.offset) {
        const int8_t device = a->device_type == FA_CUDA;
        if (now->autocast_device != device + 1) {
            const bool enabled = state->abi.autocast_is_enabled(device);
            now->autocast_device = device + 1;
            now->autocast_dtype = enabled ? state->abi.autocast_dtype(device) : -1;
        }
        if (now->autocast_dtype < 0 || now->autocast_dtype == torch_abi_dtype(a->dtype))
            return FA_OK;
    }
    PyObject *cast = state_call(state, "autocast", "(O)", b->object);
    if (!cast || cast == b->object) {
        Py_XDECREF(cast);
        return cast ? FA_OK : FA_RAISED;
    }
    tensor_release(b);
    fa_status status = tensor_borrow(state, now, cast, a->name, b, error);
    b->cast = cast;
    return status;
}

int torch_is_number(module_state *state, PyObject *object) {
    if (!state->tensor && state_learn(state) < 0) return -1;
    if (!state->tensor || !PyType_IsSubtype(Py_TYPE(object), state->tensor)) return 1;
    PyObject *answer = state_call(state, "is_number", "(O)", object);
    Py_XDECREF(answer); /* a bool, kept by the interpreter */
    return answer ? answer == Py_True : -1;
}

fa_status torch_causal_bias(module_state *state, PyObject *object, int *is_one, int *top_left,
                            int64_t *sq, int64_t *sk) {
    PyTypeObject *type = Py_TYPE(object);
    long long rows, keys;
    *is_one = 0;
    if (!state->tensor || type == state->tensor || !PyType_IsSubtype(type, state->tensor))
        return FA_OK;
    PyObject *found = state_call(state, "causal_bias", "(O)", object);
    *is_one = found && found != Py_None;
    fa_status status = found ? FA_OK : FA_RAISED;
    if (*is_one && !PyArg_ParseTuple(found, "pLL", top_left, &rows, &keys)) status = FA_RAISED;
    if (*is_one && status == FA_OK) *sq = rows, *sk = keys;
    Py_XDECREF(found);
    return status;
}

fa_status torch_draw_seed(module_state *state, const borrowed *like, output *out, fa_error *error) {
    memset(out, 0, sizeof *out);
    out->object = state_call(state, "draw_seed", "(O)", like->object);
    if (!out->object) return FA_RAISED;
    torch_now now = {0};
    return tensor_borrow(state, &now, out->object, "seed", &out->memory, error);
}

fa_status torch_check_writable(module_state *state, const borrowed *out, fa_error *error) {
    if (!torch_owns(state, out->object)) return FA_OK;
    PyObject *frozen = state_call(state, "is_frozen", "(O)", out->object);
    Py_XDECREF(frozen); /* a bool, kept by the interpreter */
    if (!frozen) return FA_RAISED;
    if (frozen != Py_True) return FA_OK;
    return fa_fail(error, FA_VALUE,
                   "`%s` must not be an inference tensor outside of torch.inference_mode(): pass "
                   "its clone()",
                   out->array.name);
}

fa_status torch_mark_written(module_state *state, const borrowed *out) {
    if (!torch_owns(state, out->object)) return FA_OK;
    PyObject *done = state_call(state, "mark_written", "(O)", out->object);
    Py_XDECREF(done);
    return done ? FA_OK : FA_RAISED;
}
