/* state.c - what the module has learnt about the process, and the way to _frameworks.py.
 *
 * No framework is ever imported from here: an array of one is the proof that it is in sys.modules.
 */
#include "state.h"

#include <stdio.h>

#include "internals.h"

const char *state_text(PyObject *text, size_t size, char *buffer) {
    PyObject *bytes = text ? PyUnicode_AsUTF8String(text) : NULL;
    snprintf(buffer, size, "%s", bytes ? PyBytes_AsString(bytes) : "an object");
    /* A sentence without a name is good enough, but no Ctrl-C is lost: call_raise() keeps it. */
    if (!bytes && PyErr_ExceptionMatches(PyExc_Exception)) PyErr_Clear();
    Py_XDECREF(text);
    Py_XDECREF(bytes);
    return buffer;
}

const char *state_repr(PyObject *object, char buffer[64]) {
    return state_text(PyObject_Repr(object), 64, buffer);
}

const char *state_type_name(PyObject *object, char buffer[128]) {
    PyObject *type = (PyObject *)Py_TYPE(object);
    return state_text(PyObject_GetAttrString(type, "__qualname__"), 128, buffer);
}

PyObject *state_call(module_state *state, const char *function, const char *format, ...) {
    if (!state->frameworks) state->frameworks = PyImport_ImportModule("fastattn._frameworks");
    PyObject *callable =
        state->frameworks ? PyObject_GetAttrString(state->frameworks, function) : NULL;
    if (!callable) return NULL;
    va_list values;
    va_start(values, format);
    PyObject *arguments = Py_VaBuildValue(format, values);
    va_end(values);
    PyObject *result = arguments ? PyObject_CallObject(callable, arguments) : NULL;
    Py_XDECREF(arguments);
    Py_DECREF(callable);
    return result;
}

PyObject *state_of(module_state *state, fa_status status, const char *name) {
    const int of_jax = status == FA_TO_JAX;
    PyObject **module = of_jax ? &state->jax : &state->torch;
    if (!*module) *module = PyImport_ImportModule(of_jax ? "fastattn.jax" : "fastattn.torch");
    return *module ? PyObject_GetAttrString(*module, name) : NULL;
}

PyObject *state_hand_on(module_state *state, fa_status status, const char *function,
                        PyObject *arguments) {
    PyObject *callable = arguments ? state_of(state, status, function) : NULL;
    PyObject *result = callable ? PyObject_CallObject(callable, arguments) : NULL;
    Py_XDECREF(callable);
    Py_XDECREF(arguments);
    return result;
}

int state_learn(module_state *state) {
    PyObject *torch, *ndarray;
    if (state->tensor && state->ndarray) return 0;
    PyObject *loaded = state_call(state, "loaded", "()");
    int learnt = loaded && PyArg_ParseTuple(loaded, "OO", &torch, &ndarray);
    if (learnt && !state->tensor && torch != Py_None) learnt = torch_learn(state, torch);
    if (learnt && !state->ndarray && ndarray != Py_None) learnt = numpy_learn(state, ndarray);
    Py_XDECREF(loaded);
    return learnt ? 0 : -1;
}

int state_init(module_state *state) {
    state->requires_grad = PyUnicode_InternFromString("requires_grad");
    state->current_level = PyUnicode_InternFromString("_current_level");
    state->to_save = PyUnicode_InternFromString("to_save");
    state->materialize_grads = PyUnicode_InternFromString("materialize_grads");
    state->call = PyUnicode_InternFromString("call");
    state->top_left = PyUnicode_InternFromString("top-left");
    return state->requires_grad && state->current_level && state->to_save &&
                   state->materialize_grads && state->call && state->top_left
               ? 0
               : -1;
}

int state_traverse(module_state *state, visitproc visit, void *arg) {
    Py_VISIT(state->tensor);
    Py_VISIT(state->parameter);
    Py_VISIT(state->is_grad_enabled);
    Py_VISIT(state->forward_ad);
    Py_VISIT(state->is_transformed);
    Py_VISIT(state->ndarray);
    Py_VISIT(state->frameworks);
    Py_VISIT(state->torch);
    Py_VISIT(state->jax);
    Py_VISIT(state->follow);
    Py_VISIT(state->value_error);
    Py_VISIT(state->type_error);
    return 0;
}

void state_clear(module_state *state) {
    Py_CLEAR(state->tensor);
    Py_CLEAR(state->parameter);
    Py_CLEAR(state->is_grad_enabled);
    Py_CLEAR(state->forward_ad);
    Py_CLEAR(state->is_transformed);
    Py_CLEAR(state->ndarray);
    Py_CLEAR(state->frameworks);
    Py_CLEAR(state->torch);
    Py_CLEAR(state->jax);
    Py_CLEAR(state->follow);
    Py_CLEAR(state->value_error);
    Py_CLEAR(state->type_error);
    Py_CLEAR(state->requires_grad);
    Py_CLEAR(state->current_level);
    Py_CLEAR(state->to_save);
    Py_CLEAR(state->materialize_grads);
    Py_CLEAR(state->call);
    Py_CLEAR(state->top_left);
    for (int i = 0; i < FUNCTIONS; i++) {
        Py_CLEAR(state->signatures[i].function);
        Py_CLEAR(state->signatures[i].text);
        Py_CLEAR(state->signatures[i].names);
        Py_CLEAR(state->signatures[i].values);
    }
}
