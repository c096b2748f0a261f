/* options.h - the arguments that are no arrays. */
#ifndef FASTATTN_OPTIONS_H
#define FASTATTN_OPTIONS_H

#include "state.h"

/* Each names the argument, the rule and what came where the object does not serve. */
fa_status option_bool(module_state *state, PyObject *object, const char *name, int *out,
                      fa_error *error);
fa_status option_double(module_state *state, PyObject *object, const char *name, double *out,
                        fa_error *error);

/* Anything with __index__. Where an int64 is too small *out is the nearest, and *overflow -1 or 1.
 */
fa_status option_int(PyObject *object, const char *name, const char *rule, int64_t *out,
                     int *overflow, fa_error *error);

fa_status option_layout(PyObject *object, fa_layout *out, fa_error *error);
fa_status option_causal(module_state *state, PyObject *object, fa_request *r, fa_error *error);
/* name: of the argument; into r's window. */
fa_status option_window(PyObject *object, const char *name, fa_request *r, fa_error *error);

/* *out stays as it is for None. */
fa_status option_backend(PyObject *object, const char **out, fa_error *error);

#endif
