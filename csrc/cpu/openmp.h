/* openmp.h - the OpenMP runtime that torch computes with, where torch is in this process.
 *
 * After each of torch's operators the threads of its OpenMP runtime spin for some milliseconds, on
 * the cores that threads of ours would need. A model calls both in turn: there the work runs on
 * those threads. The runtime is found at run time, as torch itself found it; none is linked, and
 * none is used but torch's.
 */
#ifndef FASTATTN_CPU_OPENMP_H
#define FASTATTN_CPU_OPENMP_H

#include <dlfcn.h>
#include <link.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

typedef struct fa_openmp {
    /* Calls a function on a team of threads, the caller's among them, and waits for all: what gcc
     * makes of `omp parallel`, and a part of LLVM's and Intel's runtimes too. NULL: not found. */
    void (*parallel)(void (*work)(void *), void *context, unsigned threads, unsigned flags);
    int (*in_parallel)(void);
    int (*max_threads)(void); /* of a team that this thread starts */
    int (*cores)(void); /* that the process had before the runtime bound this thread to some */
    unsigned long long loads; /* by the dynamic linker when torch was last looked for */
} fa_openmp;

typedef struct fa_openmp_visit {
    unsigned long long before, loads;
    const char *torch; /* file name of its library */
} fa_openmp_visit;

/* One object of the process. The first one ends the visit where nothing was loaded meanwhile. */
static int fa_openmp_look(struct dl_phdr_info *object, size_t size, void *context) {
    fa_openmp_visit *visit = context;
    const char *slash = strrchr(object->dlpi_name, '/');
    (void)size;
    visit->loads = object->dlpi_adds;
    if (visit->loads == visit->before) return 1;
    if (strcmp(slash ? slash + 1 : object->dlpi_name, "libtorch_cpu.so") != 0) return 0;
    visit->torch = object->dlpi_name;
    return 1;
}

/* A function of the runtime, as the dynamic linker gave it to torch: what is global comes first
 * (the user may have preloaded another runtime), then what torch's library brings. */
static void *fa_openmp_symbol(void *torch, const char *name) {
    void *found = dlsym(RTLD_DEFAULT, name);
    return found ? found : dlsym(torch, name);
}

static void fa_openmp_find(fa_openmp *openmp) {
    fa_openmp_visit visit = {.before = openmp->loads};
    dl_iterate_phdr(fa_openmp_look, &visit);
    openmp->loads = visit.loads;
    void *torch = visit.torch ? dlopen(visit.torch, RTLD_LAZY | RTLD_NOLOAD) : NULL;
    if (!torch) return;
    *(void **)&openmp->in_parallel = fa_openmp_symbol(torch, "omp_in_parallel");
    *(void **)&openmp->max_threads = fa_openmp_symbol(torch, "omp_get_max_threads");
    *(void **)&openmp->cores = fa_openmp_symbol(torch, "omp_get_num_procs");
    if (openmp->in_parallel && openmp->max_threads && openmp->cores)
        *(void **)&openmp->parallel = fa_openmp_symbol(torch, "GOMP_parallel");
    dlclose(torch);
}

/* Threads of a team that have a core each; 0: there is no runtime. */
static int fa_openmp_team(void) {
    fa_openmp openmp = {0};
    fa_openmp_find(&openmp);
    if (!openmp.parallel) return 0;
    const int team = openmp.max_threads(), cores = openmp.cores();
    return team < cores ? team : cores;
}

typedef struct fa_openmp_job {
    void (*work)(void *);
    void *context;
    atomic_int places;
} fa_openmp_job;

static void fa_openmp_thread(void *argument) {
    fa_openmp_job *job = argument;
    if (atomic_fetch_sub_explicit(&job->places, 1, memory_order_relaxed) > 0)
        job->work(job->context);
}

/* Calls work(context) on up to `threads` threads of torch's runtime; 0: there is none, or it has
 * fewer. The team is as large as torch's own, since a runtime ends the threads that a smaller one
 * leaves out. One caller at a time. */
static int fa_openmp_run(fa_openmp *openmp, int threads, void (*work)(void *), void *context) {
    if (!openmp->parallel) fa_openmp_find(openmp);
    if (!openmp->parallel) return 0;
    if (openmp->in_parallel()) { /* the team's other threads have work of their own */
        work(context);
        return 1;
    }
    const int team = openmp->max_threads();
    if (team < threads) return 0;
    fa_openmp_job job = {work, context, threads};
    openmp->parallel(fa_openmp_thread, &job, (unsigned)team, 0);
    return 1;
}

/* Whether this process is a fork that has executed no program since (PF_FORKNOEXEC among its
 * flags), or may be one: a runtime may then count on threads that only the parent has. */
static int fa_openmp_forked(void) {
    char text[512];
    FILE *file = fopen("/proc/self/stat", "r");
    size_t n = file ? fread(text, 1, sizeof text - 1, file) : 0;
    unsigned flags;
    if (file) fclose(file);
    text[n] = 0;
    const char *name_end = strrchr(text, ')');
    if (!name_end || sscanf(name_end, ") %*c %*d %*d %*d %*d %*d %u", &flags) != 1) return 1;
    return (flags & 0x40) != 0;
}

#endif
