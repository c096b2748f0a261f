/* cpu.c - the CPU backend (being written; it takes nothing yet). */
#include <stdio.h>

#include "fastattn.h"

const char *fa_cpu_level(void) {
    return "portable";
}

int32_t fa_cpu_threads(void) {
    return 1;
}

static fa_status cpu_reject(const fa_params *p, fa_error *why) {
    (void)p;
    snprintf(why->text, sizeof why->text, "it is being written");
    return FA_UNSUPPORTED;
}

static const char *cpu_kernel(const fa_params *p) {
    (void)p;
    return "cpu_portable";
}

static int64_t cpu_workspace(const fa_params *p) {
    (void)p;
    return 0;
}

static fa_status cpu_run(const fa_params *p, void *workspace, fa_error *error) {
    (void)workspace;
    return cpu_reject(p, error);
}

const fa_backend fa_cpu = {"cpu", cpu_reject, cpu_kernel, cpu_workspace, cpu_run, NULL};
