/* options.c - the arguments that are no arrays: bools, numbers, words, the window. */
#include "options.h"

#include "internals.h"

/* *out is NULL where object is neither Python's nor NumPy's bool. */
static fa_status as_bool(module_state *state, PyObject *object, PyObject **out) {
    *out = object == Py_True || object == Py_False ? object : NULL;
    if (*out || PyUnicode_Check(object) || PyLong_Check(object)) return FA_OK;
    const int truth = numpy_truth(state, object);
    if (truth >= 0) *out = truth ? Py_True : Py_False;
    return truth == -2 ? FA_RAISED : FA_OK;
}

fa_status option_bool(module_state *state, PyObject *object, const char *name, int *out,
                      fa_error *error) {
    char got[64];
    PyObject *value;
    TRY(as_bool(state, object, &value));
    *out = value == Py_True;
    if (value) return FA_OK;
    return fa_fail(error, FA_TYPE, "`%s` must be True or False, got %s", name,
                   state_repr(object, got));
}

fa_status option_double(module_state *state, PyObject *object, const char *name, double *out,
                        fa_error *error) {
    char got[64];
    if (PyFloat_CheckExact(object)) {
        *out = PyFloat_AsDouble(object);
        return FA_OK;
    }
    if (!PyFloat_Check(object) && !PyLong_Check(object)) {
        const int is_number = torch_is_number(state, object);
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
        return fa_fail(error, FA_VALUE, "`%s` must fit a float, got %s", name,
                       state_repr(object, got));
    }
    if (!PyErr_ExceptionMatches(PyExc_TypeError)) return FA_RAISED;
    PyErr_Clear();
    return fa_fail(error, FA_TYPE, "`%s` must be a float, got %s", name, state_repr(object, got));
}

/* Whether a str object has this value; 0 for any other object. */
static int is_text(PyObject *object, const char *text) {
    return PyUnicode_Check(object) && PyUnicode_CompareWithASCIIString(object, text) == 0;
}

fa_status option_layout(PyObject *object, fa_layout *out, fa_error *error) {
    char got[64];
    *out = is_text(object, "bshd") ? FA_BSHD : FA_BHSD;
    if (*out == FA_BSHD || is_text(object, "bhsd")) return FA_OK;
    return fa_fail(error, FA_VALUE, "`layout` must be 'bhsd' or 'bshd', got %s",
                   state_repr(object, got));
}

fa_status option_causal(module_state *state, PyObject *object, fa_request *r, fa_error *error) {
    char got[64];
    PyObject *value;
    TRY(as_bool(state, object, &value));
    r->top_left = is_text(object, "top-left");
    r->causal = r->top_left || value == Py_True;
    if (r->top_left || value) return FA_OK;
    return fa_fail(error, FA_VALUE, "`causal` must be False, True or 'top-left', got %s",
                   state_repr(object, got));
}

fa_status option_int(PyObject *object, const char *name, const char *rule, int64_t *out,
                     int *overflow, fa_error *error) {
    char got[64];
    PyObject *index = PyNumber_Index(object);
    *out = index ? PyLong_AsLongLongAndOverflow(index, overflow) : 0;
    Py_XDECREF(index);
    if (!index) {
        if (!PyErr_ExceptionMatches(PyExc_TypeError)) return FA_RAISED;
        PyErr_Clear();
        return fa_fail(error, FA_TYPE, "`%s` must %s, got %s", name, rule, state_repr(object, got));
    }
    if (*overflow) *out = *overflow > 0 ? INT64_MAX : INT64_MIN;
    return FA_OK;
}

static fa_status get_bound(PyObject *object, const char *name, int *has, int64_t *out,
                           fa_error *error) {
    int overflow;
    *has = object != Py_None;
    if (!*has) return FA_OK;
    return option_int(object, name, "hold two ints or None", out, &overflow, error);
}

fa_status option_window(PyObject *object, const char *name, fa_request *r, fa_error *error) {
    char got[64];
    if (object == Py_None) return FA_OK;
    if (!(PyTuple_Check(object) || PyList_Check(object)) || PySequence_Size(object) != 2)
        return fa_fail(error, FA_TYPE, "`%s` must be None or (left, right), got %s", name,
                       state_repr(object, got));
    for (int i = 0; i < 2; i++) {
        PyObject *bound = PySequence_GetItem(object, i);
        if (!bound) return FA_RAISED;
        fa_status status = get_bound(bound, name, i ? &r->has_right : &r->has_left,
                                     i ? &r->right : &r->left, error);
        Py_DECREF(bound);
        TRY(status);
    }
    return FA_OK;
}

/* The names of a version to come are legal and not served. */
fa_status option_backend(PyObject *object, const char **out, fa_error *error) {
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
                   state_repr(object, got));
}
