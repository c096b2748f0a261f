/* info.c - what this build and this machine have. Called by Python only, by no call of attention.
 */
#include "info.h"

#include <link.h>
#include <stdint.h>
#include <stdio.h>

#include "check.h"
#include "support.h"

/* Appends a str to a list that may be NULL; NULL after a failure. */
static PyObject *add_name(PyObject *list, const char *text) {
    PyObject *name = list ? PyUnicode_FromString(text) : NULL;
    if (name && PyList_Append(list, name) < 0) Py_CLEAR(list);
    if (!name) Py_CLEAR(list);
    Py_XDECREF(name);
    return list;
}

#ifdef FASTATTN_CUDA
static PyObject *cuda_info(void) {
    fa_cuda_state cuda = {0};
    fa_error error;
    fa_cuda_probe(&cuda);
    PyObject *devices = PyList_New(0), *kernels = PyList_New(0);
    for (int32_t i = 0; i < cuda.devices && devices; i++) {
        fa_gpu gpu;
        if (fa_cuda_device(i, &gpu, &error) != FA_OK) continue;
        PyObject *device =
            Py_BuildValue("{s:s, s:(ii), s:i, s:L}", "name", gpu.name, "capability", gpu.major,
                          gpu.minor, "sms", gpu.sms, "memory", (long long)gpu.memory);
        if (!device || PyList_Append(devices, device) < 0) Py_CLEAR(devices);
        Py_XDECREF(device);
    }
    for (int32_t i = 0; i < fa_backend_count(); i++) {
        const char *const *variant = fa_backend_at(i)->variants;
        for (; variant && *variant && kernels; variant++) kernels = add_name(kernels, *variant);
    }
    if (!devices || !kernels) {
        Py_XDECREF(devices);
        Py_XDECREF(kernels);
        return NULL;
    }
    return Py_BuildValue("{s:i, s:i, s:s, s:N, s:N}", "toolkit", cuda.toolkit, "driver",
                         cuda.driver, "error", cuda.error, "devices", devices, "kernels", kernels);
}
#else
static PyObject *cuda_info(void) { return Py_NewRef(Py_None); }
#endif

/* Of this very module, by the linker: its dynamic section, and where it is loaded. */
extern ElfW(Dyn) _DYNAMIC[] __attribute__((visibility("hidden")));
extern const char __ehdr_start[] __attribute__((visibility("hidden")));

/* What an entry points to: some of them the dynamic linker has turned into addresses, some not. */
static const char *entry_data(const ElfW(Dyn) * d) {
    const uintptr_t base = (uintptr_t)__ehdr_start, at = d->d_un.d_ptr;
    return (const char *)(at < base ? base + at : at);
}

/* The newest version of glibc that a symbol of this module asks for, "2.34", from the table that
 * the dynamic linker has checked; NULL: none. */
static const char *glibc_needed(char text[32]) {
    const char *names = NULL, *entry = NULL;
    int needs = 0, major, minor, newest[2] = {0, 0};
    for (const ElfW(Dyn) *d = _DYNAMIC; d->d_tag != DT_NULL; d++) {
        if (d->d_tag == DT_STRTAB) names = entry_data(d);
        if (d->d_tag == DT_VERNEED) entry = entry_data(d);
        if (d->d_tag == DT_VERNEEDNUM) needs = (int)d->d_un.d_val;
    }
    for (; names && entry && needs > 0; needs--) { /* one library each */
        const ElfW(Verneed) *need = (const void *)entry;
        const char *version = entry + need->vn_aux;
        for (int i = 0; i < need->vn_cnt; i++) {
            const ElfW(Vernaux) *aux = (const void *)version;
            if (sscanf(names + aux->vna_name, "GLIBC_%d.%d", &major, &minor) == 2 &&
                (major > newest[0] || (major == newest[0] && minor > newest[1])))
                newest[0] = major, newest[1] = minor;
            version += aux->vna_next;
        }
        entry += need->vn_next;
    }
    snprintf(text, 32, "%d.%d", newest[0], newest[1]);
    return newest[0] ? text : NULL;
}

/* ---- declared support ---- */

static PyObject *dtype_names(uint32_t set) {
    PyObject *list = PyList_New(0);
    for (int32_t i = 1; i < FA_DTYPE_COUNT && list; i++)
        if (set >> i & 1) list = add_name(list, fa_dtypes[i].name);
    return list;
}

static PyObject *feature_names(uint32_t set) {
    PyObject *list = PyList_New(0);
    for (int32_t i = 0; i < FA_FEATURE_COUNT && list; i++)
        if (set >> i & 1) list = add_name(list, fa_features[i].name);
    return list;
}

static PyObject *apart_names(const fa_support *s) {
    PyObject *sets = PyList_New(0);
    for (int32_t i = 0; i < FA_MAX_APART && s->apart[i] && sets; i++) {
        PyObject *set = feature_names(s->apart[i]);
        if (!set || PyList_Append(sets, set) < 0) Py_CLEAR(sets);
        Py_XDECREF(set);
    }
    return sets;
}

/* {backend: {operation: {dtypes, features, apart, d}}}, of the whole table. */
static PyObject *support_info(void) {
    PyObject *all = PyDict_New();
    for (int32_t i = 0; i < FA_SUPPORT_COUNT && all; i++) {
        const fa_support *s = &fa_support_table[i];
        PyObject *of = PyDict_GetItemString(all, s->backend);
        PyObject *operations = of ? Py_NewRef(of) : PyDict_New();
        PyObject *line = Py_BuildValue("{s:N, s:N, s:N, s:(ii)}", "dtypes", dtype_names(s->dtypes),
                                       "features", feature_names(s->features), "apart",
                                       apart_names(s), "d", s->least_d, s->most_d);
        if (!operations || !line || PyDict_SetItemString(operations, s->operation, line) < 0 ||
            PyDict_SetItemString(all, s->backend, operations) < 0)
            Py_CLEAR(all);
        Py_XDECREF(operations);
        Py_XDECREF(line);
    }
    return all;
}

PyObject *info_dict(PyObject *module, PyObject *unused) {
    char glibc[32];
    (void)module, (void)unused;
    PyObject *cuda = cuda_info(), *backends = cuda ? PyList_New(0) : NULL;
    for (int32_t i = 0; i < fa_backend_count() && backends; i++)
        backends = add_name(backends, fa_backend_at(i)->name);
    if (!backends) {
        Py_XDECREF(cuda);
        return NULL;
    }
    return Py_BuildValue("{s:N, s:{s:s, s:i}, s:z, s:N, s:z, s:N}", "backends", backends, "cpu",
                         "level", fa_cpu_level(), "threads", fa_cpu_threads(), "glibc_needed",
                         glibc_needed(glibc), "cuda", cuda, "no_kernels", fa_no_kernels(),
                         "support", support_info());
}
