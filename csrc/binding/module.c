/* module.c - PyInit__C: the methods, what is kept for them, its life.
 *
 * The public functions themselves are made by call.c as python/fastattn/_attention.py asks.
 */
#include "call.h"
#include "info.h"

#include <stdio.h>

static PyMethodDef methods[] = {
    {"function", call_function, METH_VARARGS, NULL},
    {"forward", (PyCFunction)(void (*)(void))autograd_forward, METH_FASTCALL, NULL},
    {"gradients", (PyCFunction)(void (*)(void))autograd_gradients, METH_FASTCALL, NULL},
    {"explain", (PyCFunction)(void (*)(void))call_explain, METH_FASTCALL | METH_KEYWORDS, NULL},
    {"explain_forward", (PyCFunction)(void (*)(void))call_explain_forward, METH_FASTCALL, NULL},
    {"merge_states", (PyCFunction)(void (*)(void))merge_states, METH_FASTCALL, NULL},
    {"sparsek", (PyCFunction)(void (*)(void))sparsek, METH_FASTCALL, NULL},
    {"sparsek_lists", (PyCFunction)(void (*)(void))sparsek_lists, METH_FASTCALL, NULL},
    {"sparsek_backward", (PyCFunction)(void (*)(void))sparsek_backward, METH_FASTCALL, NULL},
    {"sparsek_lists_backward", (PyCFunction)(void (*)(void))sparsek_lists_backward, METH_FASTCALL,
     NULL},
    {"jax_plan", (PyCFunction)(void (*)(void))jax_plan, METH_FASTCALL, NULL},
    {"jax_workspace", jax_workspace, METH_VARARGS, NULL},
    {"jax_handlers", jax_handlers, METH_NOARGS, NULL},
    {"info", info_dict, METH_NOARGS, NULL},
    {"get_num_threads", threads_get, METH_NOARGS, NULL},
    {"set_num_threads", threads_set, METH_O, NULL},
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
    return state->value_error && state->type_error ? state_init(state) : -1;
}

static int module_traverse(PyObject *module, visitproc visit, void *arg) {
    return state_traverse(PyModule_GetState(module), visit, arg);
}

static int module_clear(PyObject *module) {
    state_clear(PyModule_GetState(module));
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
