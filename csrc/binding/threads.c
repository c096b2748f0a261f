/* threads.c - how many threads a call on the CPU may use. */
#include "call.h"
#include "options.h"

fa_status threads_warn(module_state *state) {
    if (state->warned) return FA_OK;
    state->warned = 1;
    const char *text = fa_cpu_warning();
    return *text && PyErr_WarnEx(PyExc_RuntimeWarning, text, 1) < 0 ? FA_RAISED : FA_OK;
}

PyObject *threads_get(PyObject *module, PyObject *unused) {
    (void)unused;
    if (threads_warn(PyModule_GetState(module)) != FA_OK) return NULL;
    return PyLong_FromLong(fa_cpu_threads());
}

PyObject *threads_set(PyObject *module, PyObject *n) {
    static const char rule[] = "be an int from 1 to 1024 or None";
    char got[64];
    int overflow;
    int64_t value = 0;
    fa_error error;
    fa_status status = FA_OK;
    (void)module;
    if (PyBool_Check(n))
        status = fa_fail(&error, FA_TYPE, "`n` must %s, got %s", rule, state_repr(n, got));
    else if (n != Py_None)
        status = option_int(n, "n", rule, &value, &overflow, &error);
    if (status == FA_OK && n != Py_None && (value < 1 || value > FA_MAX_THREADS))
        status = fa_fail(&error, FA_VALUE, "`n` must %s, got %s", rule, state_repr(n, got));
    if (status != FA_OK) return call_raise(NULL, status, 0, &error);
    const int32_t threads = (int32_t)value;
    fa_cpu_set_threads(n == Py_None ? NULL : &threads);
    return Py_NewRef(Py_None);
}
