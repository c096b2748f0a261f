/* info.c - what this build and this machine have. Called by Python only, by no call of attention.
 */
#include "info.h"

#include <link.h>
#include <stdint.h>
#include <stdio.h>

#include "check.h"

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
    for (const char *const *row = fa_cuda_rows(); *row && kernels; row++) {
        PyObject *name = PyUnicode_FromString(*row);
        if (!name || PyList_Append(kernels, name) < 0) Py_CLEAR(kernels);
        Py_XDECREF(name);
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

PyObject *info_dict(PyObject *module, PyObject *unused) {
    char glibc[32];
    (void)module, (void)unused;
    PyObject *cuda = cuda_info(), *backends = cuda ? PyList_New(0) : NULL;
    for (int32_t i = 0; i < fa_backend_count() && backends; i++) {
        PyObject *name = PyUnicode_FromString(fa_backend_at(i)->name);
        if (!name || PyList_Append(backends, name) < 0) Py_CLEAR(backends);
        Py_XDECREF(name);
    }
    if (!backends) {
        Py_XDECREF(cuda);
        return NULL;
    }
    return Py_BuildValue("{s:N, s:{s:s, s:i}, s:z, s:N, s:z}", "backends", backends, "cpu", "level",
                         fa_cpu_level(), "threads", fa_cpu_threads(), "glibc_needed",
                         glibc_needed(glibc), "cuda", cuda, "no_kernels", fa_no_kernels());
}
