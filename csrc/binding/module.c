/* module.c - PyInit__C: arguments in, one call through the house, a status out as an exception.
 *
 * Stop 2 of 6, with tensor.c and info.c. Names, defaults and documentation of the public functions
 * are written once, in python/fastattn/_attention.py; function() below makes builtins of them.
 */
#include "tensor.h"
#include "info.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The one place where a status becomes an exception. Where torch raises RuntimeError, sdpa's is one
 * too (and Python's NotImplementedError is by itself). */
static PyObject *raise_status(const module_state *state, fa_status status, int sdpa,
                              const fa_error *error) {
    PyObject *type = PyExc_RuntimeError;
    if (PyErr_Occurred()) return NULL; /* FA_RAISED, or a Ctrl-C while the sentence was made */
    switch ((int)status) {
        case FA_VALUE:
            type = sdpa ? state->value_error : PyExc_ValueError;
            break;
        case FA_TYPE:
            type = sdpa ? state->type_error : PyExc_TypeError;
            break;
        case FA_UNSUPPORTED:
            type = PyExc_NotImplementedError;
            break;
        case FA_MEMORY:
            type = PyExc_MemoryError;
            break;
        default:
            break;
    }
    /* A name that was cut to fit may end within a character. */
    PyObject *text = PyUnicode_DecodeUTF8(error->text, (Py_ssize_t)strlen(error->text), "replace");
    if (text) PyErr_SetObject(type, text);
    Py_XDECREF(text);
    return NULL;
}

/* What a call returns, once its arrays are released: a deleter may have left an exception. */
static PyObject *finish(const module_state *state, PyObject *result, fa_status status, int sdpa,
                        const fa_error *error) {
    if (status != FA_OK) return raise_status(state, status, sdpa, error);
    if (result && PyErr_Occurred()) Py_CLEAR(result);
    return result;
}

/* ---- Options ------------------------------------------------------------------------------- */

static const char *repr(PyObject *object, char buffer[64]) {
    return tensor_text(PyObject_Repr(object), 64, buffer);
}

/* *out is NULL where object is neither Python's nor NumPy's bool. */
static fa_status as_bool(module_state *state, PyObject *object, PyObject **out) {
    *out = object == Py_True || object == Py_False ? object : NULL;
    if (*out || PyUnicode_Check(object) || PyLong_Check(object)) return FA_OK;
    const int truth = tensor_truth(state, object);
    if (truth >= 0) *out = truth ? Py_True : Py_False;
    return truth == -2 ? FA_RAISED : FA_OK;
}

static fa_status get_bool(module_state *state, PyObject *object, const char *name, int *out,
                          fa_error *error) {
    char got[64];
    PyObject *value;
    TRY(as_bool(state, object, &value));
    *out = value == Py_True;
    if (value) return FA_OK;
    return fa_fail(error, FA_TYPE, "`%s` must be True or False, got %s", name, repr(object, got));
}

static fa_status get_double(module_state *state, PyObject *object, const char *name, double *out,
                            fa_error *error) {
    char got[64];
    if (!PyFloat_Check(object) && !PyLong_Check(object)) {
        const int is_number = tensor_is_number(state, object);
        if (is_number < 0) return FA_RAISED;
        if (!is_number)
            return fa_fail(error, FA_TYPE,
                           "`%s` must be a float, got a torch tensor that requires grad or has "
                           "dimensions: its gradient would be lost",
                           name);
    }
    *out = PyFloat_AsDouble(object);
    if (*out != -1 || !PyErr_Occurred()) return FA_OK;
    if (PyLong_Check(object) && PyErr_ExceptionMatches(PyExc_OverflowError)) {
        PyErr_Clear();
        return fa_fail(error, FA_VALUE, "`%s` must fit a float, got %s", name, repr(object, got));
    }
    if (!PyErr_ExceptionMatches(PyExc_TypeError)) return FA_RAISED;
    PyErr_Clear();
    return fa_fail(error, FA_TYPE, "`%s` must be a float, got %s", name, repr(object, got));
}

/* Whether a str object has this value; 0 for any other object. */
static int is_text(PyObject *object, const char *text) {
    return PyUnicode_Check(object) && PyUnicode_CompareWithASCIIString(object, text) == 0;
}

static fa_status get_layout(PyObject *object, fa_layout *out, fa_error *error) {
    char got[64];
    *out = is_text(object, "bshd") ? FA_BSHD : FA_BHSD;
    if (*out == FA_BSHD || is_text(object, "bhsd")) return FA_OK;
    return fa_fail(error, FA_VALUE, "`layout` must be 'bhsd' or 'bshd', got %s", repr(object, got));
}

static fa_status get_causal(module_state *state, PyObject *object, fa_request *r, fa_error *error) {
    char got[64];
    PyObject *value;
    TRY(as_bool(state, object, &value));
    r->top_left = is_text(object, "top-left");
    r->causal = r->top_left || value == Py_True;
    if (r->top_left || value) return FA_OK;
    return fa_fail(error, FA_VALUE, "`causal` must be False, True or 'top-left', got %s",
                   repr(object, got));
}

/* Anything with __index__. Where an int64 is too small *out is the nearest, and *overflow -1 or 1.
 */
static fa_status get_int(PyObject *object, const char *name, const char *rule, int64_t *out,
                         int *overflow, fa_error *error) {
    char got[64];
    PyObject *index = PyNumber_Index(object);
    *out = index ? PyLong_AsLongLongAndOverflow(index, overflow) : 0;
    Py_XDECREF(index);
    if (!index) {
        if (!PyErr_ExceptionMatches(PyExc_TypeError)) return FA_RAISED;
        PyErr_Clear();
        return fa_fail(error, FA_TYPE, "`%s` must %s, got %s", name, rule, repr(object, got));
    }
    if (*overflow) *out = *overflow > 0 ? INT64_MAX : INT64_MIN;
    return FA_OK;
}

static fa_status get_bound(PyObject *object, int *has, int64_t *out, fa_error *error) {
    int overflow;
    *has = object != Py_None;
    if (!*has) return FA_OK;
    return get_int(object, "window", "hold two ints or None", out, &overflow, error);
}

static fa_status get_window(PyObject *object, fa_request *r, fa_error *error) {
    char got[64];
    if (object == Py_None) return FA_OK;
    if (!(PyTuple_Check(object) || PyList_Check(object)) || PySequence_Size(object) != 2)
        return fa_fail(error, FA_TYPE, "`window` must be None or (left, right), got %s",
                       repr(object, got));
    for (int i = 0; i < 2; i++) {
        PyObject *bound = PySequence_GetItem(object, i);
        if (!bound) return FA_RAISED;
        fa_status status =
            get_bound(bound, i ? &r->has_right : &r->has_left, i ? &r->right : &r->left, error);
        Py_DECREF(bound);
        TRY(status);
    }
    return FA_OK;
}

/* backend=: *out stays NULL for None. The names of a version to come are legal and not served. */
static fa_status get_backend(PyObject *object, const char **out, fa_error *error) {
    static const char *const names[] = {"sm90", "sm80", "cpu"};
    char got[64];
    if (object == Py_None) return FA_OK;
    for (int32_t i = 0; i < fa_backend_count(); i++)
        if (is_text(object, fa_backend_at(i)->name)) {
            *out = fa_backend_at(i)->name;
            return FA_OK;
        }
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (is_text(object, names[i]))
            return fa_fail(error, FA_UNSUPPORTED, "backend %s is not built into this module%s%s",
                           names[i], i ? "" : ": ", i ? "" : fa_no_kernels());
    return fa_fail(error, FA_VALUE, "`backend` must be None, 'sm90', 'sm80' or 'cpu', got %s",
                   repr(object, got));
}

/* ---- One call ------------------------------------------------------------------------------ */

typedef struct call {
    module_state *state;
    torch_now now;
    borrowed arrays[12]; /* the first is q */
    int count;
    borrowed out; /* out=, if given */
    int has_out, return_lse;
    int draws, drawn; /* dropout's seed is to come, has come, from torch's generator */
    output seed;
    const char *backend;
    fa_request request;
    fa_plan plan;
    fa_error error;
} call;

static fa_status borrow(call *c, PyObject *object, const char *name, const fa_array **out) {
    borrowed *b = &c->arrays[c->count];
    TRY(tensor_borrow(c->state, &c->now, object, name, b, &c->error));
    c->count++;
    *out = &b->array;
    return FA_OK;
}

/* q, k, v or a mask, which torch's autocast casts. */
static fa_status borrow_operand(call *c, PyObject *object, const char *name, const fa_array **out) {
    TRY(borrow(c, object, name, out));
    return tensor_autocast(c->state, &c->now, &c->arrays[c->count - 1], &c->error);
}

/* An argument that may be None. */
static fa_status borrow_some(call *c, PyObject *object, const char *name, const fa_array **out) {
    return object == Py_None ? FA_OK : borrow(c, object, name, out);
}

static void release(call *c) {
    if (c->drawn) tensor_drop(&c->seed);
    for (int i = 0; i < c->count; i++) tensor_release(&c->arrays[i]);
    if (c->has_out) tensor_release(&c->out);
}

/* Whether there is dropout and so a seed has a meaning; check.c refuses what is out of range. */
static int drops(const call *c) { return c->request.dropout_p > 0 && c->request.dropout_p <= 1; }

static int is_torch(const call *c) {
    PyTypeObject *type = Py_TYPE(c->arrays[0].object);
    return type == c->state->tensor || type == c->state->parameter;
}

/* Of an argument that may be an int too; -1 with an exception. */
static int is_array(PyObject *object) {
    PyObject *method = PyObject_GetAttrString(object, "__dlpack__");
    Py_XDECREF(method);
    if (method) return 1;
    if (!PyErr_ExceptionMatches(PyExc_AttributeError)) return -1;
    PyErr_Clear();
    return 0;
}

/* seed=: an int, an array, or None; then run() asks the generator of torch. */
static fa_status get_seed(call *c, PyObject *object) {
    char got[64];
    int overflow;
    int64_t *value = &c->request.seed_value;
    if (!drops(c)) return FA_OK;
    c->draws = object == Py_None && is_torch(c);
    if (c->draws) return FA_OK;
    if (object == Py_None)
        return fa_fail(&c->error, FA_VALUE,
                       "`seed` must be an int or an int64 array where dropout_p > 0 and `q` is no "
                       "torch tensor, got None");
    const int array = is_array(object);
    if (array) return array < 0 ? FA_RAISED : borrow(c, object, "seed", &c->request.seed);
    TRY(get_int(object, "seed", "be an int or an int64 array", value, &overflow, &c->error));
    if (!overflow) return FA_OK;
    return fa_fail(&c->error, FA_VALUE, "`seed` must be from -2^63 to 2^63 - 1, got %s",
                   repr(object, got));
}

/* q_offset=: an int or an array. */
static fa_status get_offset(call *c, PyObject *object) {
    fa_request *r = &c->request;
    int overflow;
    if (object == Py_None) return FA_OK;
    const int array = is_array(object);
    if (array) return array < 0 ? FA_RAISED : borrow(c, object, "q_offset", &r->q_offset);
    r->has_offset = 1;
    return get_int(object, "q_offset", "be an int or an int32 array (b,)", &r->offset, &overflow,
                   &c->error);
}

static fa_status check_out(call *c, PyObject *object) {
    if (object == Py_None) return FA_OK;
    TRY(tensor_borrow(c->state, &c->now, object, "out", &c->out, &c->error));
    c->has_out = 1;
    TRY(tensor_check_writable(c->state, &c->out, &c->error));
    if (!c->out.writeable)
        return fa_fail(&c->error, FA_VALUE, "`out` must be writeable, got a read-only array");
    if (c->out.kind == KIND_DLPACK) {
        PyObject *of = PyObject_CallMethod(c->state->arrays, "never_written", "O", object);
        char name[16];
        if (!of) return FA_RAISED;
        if (of != Py_None) {
            tensor_text(of, sizeof name, name);
            return fa_fail(&c->error, FA_TYPE,
                           "`out` must not be %s %s array: %s arrays are never written",
                           *name == 'M' ? "an" : "a", name, name);
        }
        Py_DECREF(of);
    }
    return fa_check_out(&c->request, &c->plan, &c->out.array, &c->error);
}

/* From mask to seed in the signatures of attention and attention_varlen. */
static fa_status get_scores(call *c, PyObject *const *a) {
    fa_request *r = &c->request;
    fa_error *error = &c->error;
    if (a[0] != Py_None) TRY(borrow_operand(c, a[0], "mask", &r->mask));
    TRY(get_double(c->state, a[1], "softcap", &r->softcap, error));
    TRY(borrow_some(c, a[2], "alibi_slopes", &r->alibi_slopes));
    TRY(borrow_some(c, a[3], "sink", &r->sink));
    r->has_scale = a[4] != Py_None;
    if (r->has_scale) TRY(get_double(c->state, a[4], "scale", &r->scale, error));
    TRY(get_double(c->state, a[5], "dropout_p", &r->dropout_p, error));
    return get_seed(c, a[6]);
}

/* From return_lse to backend there, and the verdict on all arguments. */
static fa_status get_rest(call *c, PyObject *const *a) {
    int deterministic; /* the forward pass always is */
    TRY(get_bool(c->state, a[0], "return_lse", &c->return_lse, &c->error));
    TRY(get_bool(c->state, a[2], "deterministic", &deterministic, &c->error));
    TRY(get_bool(c->state, a[3], "batch_invariant", &c->request.batch_invariant, &c->error));
    TRY(get_backend(a[4], &c->backend, &c->error));
    TRY(fa_check_attention(&c->request, &c->plan, &c->error));
    return check_out(c, a[1]);
}

/* Arguments of attention, in the order of its signature. */
static fa_status prepare_attention(call *c, PyObject *const *a) {
    fa_request *r = &c->request;
    fa_error *error = &c->error;
    TRY(borrow_operand(c, a[0], "q", &r->q));
    TRY(borrow_operand(c, a[1], "k", &r->k));
    TRY(borrow_operand(c, a[2], "v", &r->v));
    TRY(get_causal(c->state, a[3], r, error));
    TRY(get_window(a[4], r, error));
    TRY(get_offset(c, a[5]));
    TRY(borrow_some(c, a[6], "q_lengths", &r->q_lengths));
    TRY(borrow_some(c, a[7], "k_lengths", &r->k_lengths));
    TRY(borrow_some(c, a[8], "k_start", &r->k_start));
    TRY(get_scores(c, a + 9));
    TRY(get_layout(a[16], &r->layout, error));
    return get_rest(c, a + 17);
}

/* Arguments of attention_varlen, in the order of its signature. */
static fa_status prepare_varlen(call *c, PyObject *const *a) {
    fa_request *r = &c->request;
    fa_error *error = &c->error;
    int overflow;
    r->layout = FA_BSHD;
    TRY(borrow_operand(c, a[0], "q", &r->q));
    TRY(borrow_operand(c, a[1], "k", &r->k));
    TRY(borrow_operand(c, a[2], "v", &r->v));
    TRY(borrow(c, a[3], "cu_seqlens_q", &r->cu_q));
    TRY(borrow(c, a[4], "cu_seqlens_k", &r->cu_k));
    TRY(get_int(a[5], "max_seqlen_q", "be an int", &r->max_sq, &overflow, error));
    TRY(get_int(a[6], "max_seqlen_k", "be an int", &r->max_sk, &overflow, error));
    TRY(borrow_some(c, a[7], "seqused_q", &r->q_lengths));
    TRY(borrow_some(c, a[8], "seqused_k", &r->k_lengths));
    TRY(get_offset(c, a[9]));
    if (a[10] != Py_None)
        return fa_fail(error, FA_UNSUPPORTED,
                       "`page_table` is not built yet: no backend reads keys from pages");
    TRY(get_causal(c->state, a[11], r, error));
    TRY(get_window(a[12], r, error));
    TRY(get_scores(c, a + 13));
    return get_rest(c, a + 20);
}

/* attn_mask=: None, an array, or torch's CausalBias, which stands for one. */
static fa_status get_attn_mask(call *c, PyObject *object) {
    fa_request *r = &c->request;
    int64_t sq, sk;
    if (object == Py_None) return FA_OK;
    TRY(tensor_causal_bias(c->state, object, &r->causal, &r->top_left, &sq, &sk));
    if (!r->causal) return borrow_operand(c, object, "attn_mask", &r->mask);
    const int64_t q_rows = r->q->ndim < 2 ? 0 : r->q->shape[r->q->ndim - 2];
    const int64_t k_rows = r->k->ndim < 2 ? 0 : r->k->shape[r->k->ndim - 2];
    if (r->top_left || (sq == q_rows && sk == k_rows)) return FA_OK;
    return fa_fail(&c->error, FA_VALUE,
                   "`attn_mask` must be the CausalBias of %lld queries and %lld keys, got one of "
                   "%lld and %lld",
                   (long long)q_rows, (long long)k_rows, (long long)sq, (long long)sk);
}

/* Arguments of scaled_dot_product_attention, in the order of its signature. */
static fa_status prepare_sdpa(call *c, PyObject *const *a) {
    fa_request *r = &c->request;
    fa_error *error = &c->error;
    r->sdpa = 1;
    TRY(borrow_operand(c, a[0], "query", &r->q));
    TRY(borrow_operand(c, a[1], "key", &r->k));
    TRY(borrow_operand(c, a[2], "value", &r->v));
    r->keeps_order = is_torch(c);
    TRY(get_attn_mask(c, a[3]));
    TRY(get_double(c->state, a[4], "dropout_p", &r->dropout_p, error));
    c->draws = drops(c);
    if (c->draws && !is_torch(c))
        return fa_fail(
            error, FA_VALUE,
            "`dropout_p` > 0 needs a torch generator here: use attention(seed=) for other arrays");
    int is_causal;
    TRY(get_bool(c->state, a[5], "is_causal", &is_causal, error));
    if (is_causal && a[3] != Py_None)
        return fa_fail(error, FA_VALUE, "`attn_mask` must be None with is_causal=True, got both");
    if (is_causal) r->causal = r->top_left = 1;
    r->has_scale = a[6] != Py_None;
    if (r->has_scale) TRY(get_double(c->state, a[6], "scale", &r->scale, error));
    TRY(get_bool(c->state, a[7], "enable_gqa", &r->enable_gqa, error));
    return fa_check_attention(r, &c->plan, error);
}

/* Some microseconds of work: letting another thread in would cost as much. */
static int is_tiny(const fa_params *p) {
    const fa_what *w = &p->what;
    double products = (double)w->b * w->hq * w->sq * w->sk * (w->d + w->dv);
    return p->where.device_type == FA_CPU && products < 3e4;
}

/* Says once what is wrong with FASTATTN_NUM_THREADS, before the first work on the CPU. */
static fa_status warn_once(module_state *state) {
    if (state->warned) return FA_OK;
    state->warned = 1;
    const char *text = fa_cpu_warning();
    return *text && PyErr_WarnEx(PyExc_RuntimeWarning, text, 1) < 0 ? FA_RAISED : FA_OK;
}

/* Outputs and workspace from the caller's allocator, then the backend without the GIL. */
static fa_status run(call *c, output *out, output *lse) {
    static const DLDataType byte = {DL_UINT, 8, 1};
    fa_plan *plan = &c->plan;
    fa_error *error = &c->error;
    const fa_backend *backend = fa_choose(plan, c->backend, NULL, error);
    if (!backend) return FA_UNSUPPORTED;
    if (plan->params.where.device_type == FA_CPU) TRY(warn_once(c->state));
    if (c->draws) {
        c->drawn = 1;
        TRY(tensor_draw_seed(c->state, &c->arrays[0], &c->seed, error));
        plan->params.dropout.seed_data = c->seed.memory.array.data;
    }
    if (!c->has_out)
        TRY(tensor_new(c->state, &c->arrays[0], plan->out_ndim, plan->out_shape, plan->out_stride,
                       plan->out_dtype, out, error));
    if (c->return_lse)
        TRY(tensor_new(c->state, &c->arrays[0], plan->lse_ndim, plan->lse_shape, NULL,
                       plan->lse_dtype, lse, error));
    fa_bind_outputs(plan, c->has_out ? &c->out.array : &out->memory.array,
                    c->return_lse ? &lse->memory.array : NULL);
    int64_t bytes = backend->workspace(&plan->params);
    output workspace;
    fa_clear(&workspace, sizeof workspace);
    if (bytes) TRY(tensor_new(c->state, &c->arrays[0], 1, &bytes, NULL, byte, &workspace, error));
    PyThreadState *thread = is_tiny(&plan->params) ? NULL : PyEval_SaveThread();
    fa_status status = fa_run(backend, plan, workspace.memory.array.data, error);
    if (thread) PyEval_RestoreThread(thread);
    if (bytes) tensor_drop(&workspace); /* a caching allocator orders its reuse after the launch */
    if (status == FA_OK && c->has_out) status = tensor_mark_written(c->state, &c->out);
    return status;
}

/* (out, lse) or out as the caller's kind of array. */
static PyObject *hand_over(module_state *state, const borrowed *like, output *out, output *lse,
                           PyObject *given, int return_lse) {
    PyObject *second = NULL;
    PyObject *first = given ? Py_NewRef(given) : tensor_hand_over(state, like, out);
    if (!first || !return_lse) {
        tensor_drop(lse);
        return first;
    }
    second = tensor_hand_over(state, like, lse);
    PyObject *pair = second ? PyTuple_Pack(2, first, second) : NULL;
    Py_DECREF(first);
    Py_XDECREF(second);
    return pair;
}

static void start(call *c, module_state *state) {
    c->state = state;
    c->now = (torch_now){0};
    c->count = c->has_out = c->return_lse = c->draws = c->drawn = 0;
    c->backend = NULL;
    c->error.text[0] = 0;
    fa_clear(&c->request, sizeof c->request);
}

typedef fa_status prepare_function(call *c, PyObject *const *arguments);

static PyObject *compute(module_state *state, PyObject *const *arguments,
                         prepare_function *prepare) {
    call c;
    output out, lse;
    PyObject *result = NULL;
    start(&c, state);
    fa_clear(&out, sizeof out);
    fa_clear(&lse, sizeof lse);
    fa_status status = prepare(&c, arguments);
    if (status == FA_OK) status = run(&c, &out, &lse);
    if (status == FA_OK) {
        result = hand_over(c.state, &c.arrays[0], &out, &lse, c.has_out ? c.out.object : NULL,
                           c.return_lse);
    } else {
        tensor_drop(&out);
        tensor_drop(&lse);
    }
    release(&c);
    return finish(state, result, status, c.request.sdpa, &c.error);
}

/* ---- Public functions ---------------------------------------------------------------------- */

static const struct {
    const char *name;
    prepare_function *prepare;
    Py_ssize_t count;
} functions[FUNCTIONS] = {
    {"attention", prepare_attention, 22},
    {"scaled_dot_product_attention", prepare_sdpa, 8},
    {"attention_varlen", prepare_varlen, 25},
};

/* The index of a public function, FUNCTIONS if there is none of that name. */
static int find_function(const char *name) {
    int which = 0;
    while (which < FUNCTIONS && strcmp(name, functions[which].name)) which++;
    return which;
}

/* Puts the arguments of a call in the order of the signature, with Python's own complaints. */
static int parse(const signature *s, PyObject *const *arguments, Py_ssize_t count,
                 PyObject *keywords, PyObject **slots) {
    const char *name = s->method.ml_name;
    if (count > s->positional) {
        PyErr_Format(PyExc_TypeError, "%s() takes %zd positional arguments but %zd were given",
                     name, s->positional, count);
        return -1;
    }
    memcpy(slots, arguments, (size_t)count * sizeof *slots);
    memcpy(slots + count, s->value + count, (size_t)(s->count - count) * sizeof *slots);
    Py_ssize_t extra = keywords ? PyTuple_Size(keywords) : 0;
    for (Py_ssize_t i = 0; i < extra; i++) {
        PyObject *keyword = PyTuple_GetItem(keywords, i);
        Py_ssize_t at = 0;
        while (at < s->count && s->name[at] != keyword) at++;
        if (at == s->count) /* a keyword that was made at run time is not interned */
            for (at = 0; at < s->count && PyUnicode_Compare(s->name[at], keyword); at++) continue;
        if (at == s->count) {
            PyErr_Format(PyExc_TypeError, "%s() got an unexpected keyword argument '%U'", name,
                         keyword);
            return -1;
        }
        if (at < count) {
            PyErr_Format(PyExc_TypeError, "%s() got multiple values for argument '%U'", name,
                         keyword);
            return -1;
        }
        slots[at] = arguments[count + i];
    }
    for (Py_ssize_t i = count; i < s->count; i++)
        if (!slots[i]) {
            PyErr_Format(PyExc_TypeError, "%s() missing required argument '%U'", name, s->name[i]);
            return -1;
        }
    return 0;
}

static PyObject *call_public(PyObject *module, int which, PyObject *const *arguments,
                             Py_ssize_t count, PyObject *keywords) {
    module_state *state = PyModule_GetState(module);
    PyObject *slots[MAX_ARGS];
    if (parse(&state->signatures[which], arguments, count, keywords, slots) < 0) return NULL;
    return compute(state, slots, functions[which].prepare);
}

static PyObject *attention(PyObject *module, PyObject *const *arguments, Py_ssize_t count,
                           PyObject *keywords) {
    return call_public(module, 0, arguments, count, keywords);
}

static PyObject *scaled_dot_product_attention(PyObject *module, PyObject *const *arguments,
                                              Py_ssize_t count, PyObject *keywords) {
    return call_public(module, 1, arguments, count, keywords);
}

static PyObject *attention_varlen(PyObject *module, PyObject *const *arguments, Py_ssize_t count,
                                  PyObject *keywords) {
    return call_public(module, 2, arguments, count, keywords);
}

/* function(text, names, defaults, positional) -> the builtin. text is the bytes "name\0doc", where
 * doc starts with the text signature; defaults are those of the last parameters. */
static PyObject *function(PyObject *module, PyObject *arguments) {
    static PyObject *(*const entries[])(PyObject *, PyObject *const *, Py_ssize_t, PyObject *) = {
        attention, scaled_dot_product_attention, attention_varlen};
    PyObject *text, *names, *defaults;
    Py_ssize_t positional;
    if (!PyArg_ParseTuple(arguments, "SO!O!n", &text, &PyTuple_Type, &names, &PyTuple_Type,
                          &defaults, &positional))
        return NULL;
    const char *name = PyBytes_AsString(text);
    Py_ssize_t count = PyTuple_Size(names), required = count - PyTuple_Size(defaults);
    int which = find_function(name);
    if (which == FUNCTIONS || count != functions[which].count || required < 0)
        return PyErr_Format(PyExc_TypeError, "_C has no function %s of %zd arguments", name, count);
    signature *s = &((module_state *)PyModule_GetState(module))->signatures[which];
    if (!s->text) { /* a package that is imported again keeps the first one's */
        for (Py_ssize_t i = 0; i < count; i++) {
            s->name[i] = PyTuple_GetItem(names, i);
            s->value[i] = i < required ? NULL : PyTuple_GetItem(defaults, i - required);
        }
        s->count = count, s->positional = positional;
        s->text = Py_NewRef(text), s->names = Py_NewRef(names), s->defaults = Py_NewRef(defaults);
        s->method = (PyMethodDef){name, (PyCFunction)(void (*)(void))entries[which],
                                  METH_FASTCALL | METH_KEYWORDS, name + strlen(name) + 1};
    }
    PyObject *package = PyUnicode_FromString("fastattn");
    PyObject *result = package ? PyCFunction_NewEx(&s->method, module, package) : NULL;
    Py_XDECREF(package);
    return result;
}

/* For the functions that only our own Python calls. */
static int check_count(const char *name, Py_ssize_t got, Py_ssize_t want) {
    if (got == want) return 1;
    PyErr_Format(PyExc_TypeError, "_C.%s() takes %zd arguments, got %zd", name, want, got);
    return 0;
}

/* explain(name, *arguments) -> (backend or None, kernel or None, {backend: reason}). Runs nothing.
 */
static PyObject *explain(PyObject *module, PyObject *const *arguments, Py_ssize_t count) {
    char name[64] = "";
    if (count) tensor_text(Py_NewRef(arguments[0]), sizeof name, name);
    int which = find_function(name);
    if (which == FUNCTIONS) return PyErr_Format(PyExc_TypeError, "_C has no function %s", name);
    if (!check_count("explain", count, 1 + functions[which].count)) return NULL;
    call c;
    fa_error reasons[8];
    start(&c, PyModule_GetState(module));
    fa_status status = functions[which].prepare(&c, arguments + 1);
    const fa_backend *chosen = NULL;
    const char *kernel = NULL;
    if (status == FA_OK) {
        /* As run() does before the launch: kernels differ by out's strides, and by whether lse is
         * wanted. Any address says so, for nothing is written. */
        if (c.has_out) fa_bind_outputs(&c.plan, &c.out.array, NULL);
        if (c.return_lse) c.plan.params.what.lse.data = &c;
        chosen = fa_choose(&c.plan, c.backend, reasons, &c.error);
        if (chosen) kernel = chosen->kernel(&c.plan.params);
    }
    release(&c);
    if (status != FA_OK || PyErr_Occurred())
        return raise_status(c.state, status, c.request.sdpa, &c.error);
    PyObject *refused = PyDict_New();
    for (int32_t i = 0; i < fa_backend_count() && refused; i++) {
        PyObject *reason = reasons[i].text[0] ? PyUnicode_FromString(reasons[i].text) : NULL;
        if (!reasons[i].text[0]) continue;
        if (!reason || PyDict_SetItemString(refused, fa_backend_at(i)->name, reason) < 0)
            Py_CLEAR(refused);
        Py_XDECREF(reason);
    }
    if (!refused) return NULL;
    return Py_BuildValue("(zzN)", chosen ? chosen->name : NULL, kernel, refused);
}

/* ---- merge_states -------------------------------------------------------------------------- */

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
    }
    TRY(fa_check_merge((int32_t)c->n, c->arrays, c->arrays + c->n, layout, c->tensors, &merge,
                       &plan, &c->error));
    TRY(tensor_new(c->state, c->parts, plan.out_ndim, plan.out_shape, NULL, plan.out_dtype, out,
                   &c->error));
    TRY(tensor_new(c->state, c->parts, plan.lse_ndim, plan.lse_shape, NULL, plan.lse_dtype, lse,
                   &c->error));
    fa_bind_merge(&merge, layout, &out->memory.array, &lse->memory.array);
    PyThreadState *thread = PyEval_SaveThread();
    fa_status status = fa_run_merge(&merge, &c->error);
    PyEval_RestoreThread(thread);
    return status;
}

/* merge_states(outs, lses, layout): two tuples of the same length. */
static PyObject *merge_states(PyObject *module, PyObject *const *arguments, Py_ssize_t count) {
    if (!check_count("merge_states", count, 3)) return NULL;
    merge_call c = {.state = PyModule_GetState(module), .n = PyTuple_Size(arguments[0])};
    output out = {0}, lse = {0};
    fa_layout layout;
    PyObject *result = NULL;
    if (c.n < 0 || PyTuple_Size(arguments[1]) < 0) return NULL;
    fa_status status = get_layout(arguments[2], &layout, &c.error);
    if (status == FA_OK && (c.n < 1 || c.n > INT32_MAX / 2))
        status = fa_fail(&c.error, FA_VALUE, "`outs` must hold at least one array, got %zd", c.n);
    if (status == FA_OK && PyTuple_Size(arguments[1]) != c.n)
        status = fa_fail(&c.error, FA_VALUE, "`lses` must hold %zd arrays like `outs`, got %zd",
                         c.n, PyTuple_Size(arguments[1]));
    if (status == FA_OK) {
        size_t n = 2 * (size_t)c.n;
        c.parts = calloc(n, sizeof *c.parts);
        c.arrays = calloc(n, sizeof *c.arrays);
        c.tensors = calloc(n, sizeof *c.tensors);
        c.names = calloc(n, sizeof *c.names);
        status = c.parts && c.arrays && c.tensors && c.names
                     ? merge_parts(&c, arguments[0], arguments[1], layout, &out, &lse)
                     : fa_fail(&c.error, FA_MEMORY, "no memory for %zd parts", c.n);
    }
    if (status == FA_OK) {
        result = hand_over(c.state, c.parts, &out, &lse, NULL, 1);
    } else {
        tensor_drop(&out);
        tensor_drop(&lse);
    }
    for (Py_ssize_t i = 0; i < c.count; i++) tensor_release(&c.parts[i]);
    free(c.parts);
    free(c.arrays);
    free(c.tensors);
    free(c.names);
    return finish(c.state, result, status, 0, &c.error);
}

/* ---- Threads ------------------------------------------------------------------------------- */

static PyObject *get_num_threads(PyObject *module, PyObject *unused) {
    (void)unused;
    if (warn_once(PyModule_GetState(module)) != FA_OK) return NULL;
    return PyLong_FromLong(fa_cpu_threads());
}

static PyObject *set_num_threads(PyObject *module, PyObject *n) {
    static const char rule[] = "be an int from 1 to 1024 or None";
    char got[64];
    int overflow;
    int64_t value = 0;
    fa_error error;
    fa_status status = FA_OK;
    (void)module;
    if (PyBool_Check(n))
        status = fa_fail(&error, FA_TYPE, "`n` must %s, got %s", rule, repr(n, got));
    else if (n != Py_None)
        status = get_int(n, "n", rule, &value, &overflow, &error);
    if (status == FA_OK && n != Py_None && (value < 1 || value > FA_MAX_THREADS))
        status = fa_fail(&error, FA_VALUE, "`n` must %s, got %s", rule, repr(n, got));
    if (status != FA_OK) return raise_status(NULL, status, 0, &error);
    const int32_t threads = (int32_t)value;
    fa_cpu_set_threads(n == Py_None ? NULL : &threads);
    return Py_NewRef(Py_None);
}

/* ---- The module ---------------------------------------------------------------------------- */

#define FAST(name) {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, NULL}

static PyMethodDef methods[] = {
    FAST(merge_states),
    FAST(explain),
    {"function", function, METH_VARARGS, NULL},
    {"info", info_dict, METH_NOARGS, NULL},
    {"get_num_threads", get_num_threads, METH_NOARGS, NULL},
    {"set_num_threads", set_num_threads, METH_O, NULL},
    {0},
};

/* A name of the module, so that it can be pickled: an exception that is also a RuntimeError. */
static PyObject *add_error(PyObject *module, const char *name, PyObject *base) {
    char full[64];
    snprintf(full, sizeof full, "fastattn._C.%s", name);
    PyObject *bases = PyTuple_Pack(2, base, PyExc_RuntimeError);
    PyObject *error = bases ? PyErr_NewException(full, bases, NULL) : NULL;
    Py_XDECREF(bases);
    if (error && PyModule_AddObjectRef(module, name, error) < 0) Py_CLEAR(error);
    return error;
}

/* NumPy's C API and torch's tensors belong to one interpreter. */
static int module_exec(PyObject *module) {
    if (PyInterpreterState_GetID(PyInterpreterState_Get()) != 0) {
        PyErr_SetString(PyExc_ImportError, "fastattn cannot be imported in a subinterpreter");
        return -1;
    }
    module_state *state = PyModule_GetState(module);
    state->value_error = add_error(module, "SDPAValueError", PyExc_ValueError);
    state->type_error = add_error(module, "SDPATypeError", PyExc_TypeError);
    return state->value_error && state->type_error ? tensor_init(state) : -1;
}

static int module_traverse(PyObject *module, visitproc visit, void *arg) {
    return tensor_traverse(PyModule_GetState(module), visit, arg);
}

static int module_clear(PyObject *module) {
    tensor_clear(PyModule_GetState(module));
    return 0;
}

static void module_free(void *module) { module_clear(module); }

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, module_exec},
#ifdef Py_GIL_DISABLED
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,   .m_name = "fastattn._C", .m_size = sizeof(module_state),
    .m_methods = methods,    .m_slots = slots,        .m_traverse = module_traverse,
    .m_clear = module_clear, .m_free = module_free,
};

PyMODINIT_FUNC PyInit__C(void) { return PyModuleDef_Init(&definition); }
