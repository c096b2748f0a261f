/* info.h - what this build and this machine have. */
#ifndef FASTATTN_INFO_H
#define FASTATTN_INFO_H

#include <Python.h>

/* _C.info(): what only C knows; python/fastattn/_attention.py makes the public dict of it. */
PyObject *info_dict(PyObject *module, PyObject *unused);

#endif
