/* threads.h - how many threads the CPU backend uses where the program has not said so.
 *
 * FASTATTN_NUM_THREADS, else OMP_NUM_THREADS, else the cores that the process may run on, or fewer
 * where a container grants it less time than these have. An OpenMP runtime may have bound this
 * thread to some of the cores (OMP_PROC_BIND): they count that its team has.
 */
#ifndef FASTATTN_CPU_THREADS_H
#define FASTATTN_CPU_THREADS_H

#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "fastattn.h"

/* The number that text starts with, before spaces and then one of `ends` or its end; 0 if there is
 * none from 1 to FA_MAX_THREADS. */
static int fa_parse_threads(const char *text, const char *ends) {
    char *rest;
    const long n = strtol(text, &rest, 10); /* what overflows is no number of threads either */
    rest += strspn(rest, " \t");
    const int ended = !*rest || strchr(ends, *rest);
    return ended && n >= 1 && n <= FA_MAX_THREADS ? (int)n : 0;
}

/* The CPUs that cpu.max of one group grants, rounded up; 0: no limit. */
static long fa_group_cpus(const char *folder) {
    char path[4200];
    long long quota, period;
    snprintf(path, sizeof path, "%s/cpu.max", folder);
    FILE *file = fopen(path, "re");
    if (!file) return 0;
    const int found = fscanf(file, "%lld %lld", &quota, &period); /* or "max 100000" */
    fclose(file);
    return found == 2 && quota > 0 && period > 0 ? (long)((quota + period - 1) / period) : 0;
}

/* The least that the process's control group and those around it grant; 0: no limit. `self` is
 * /proc/self/cgroup, `root` where the groups are. A container that does not see its own group by
 * the name in `self` has its limit at the root. */
static long fa_cgroup_cpus(const char *self, const char *root) {
    char line[2048] = "", folder[4096];
    FILE *file = fopen(self, "re");
    if (!file) return 0;
    while (fgets(line, sizeof line, file) && strncmp(line, "0::/", 4)) line[0] = 0;
    fclose(file);
    if (!line[0]) return 0;
    line[strcspn(line, "\n")] = 0;
    long least = 0;
    snprintf(folder, sizeof folder, "%s%s", root, line + 3);
    for (;;) {
        const long n = fa_group_cpus(folder);
        if (n && (!least || n < least)) least = n;
        if (strlen(folder) <= strlen(root)) return least;
        *strrchr(folder, '/') = 0;
    }
}

/* team: of the OpenMP runtime that computes, or 0. warning, of `size` bytes, is a sentence where
 * FASTATTN_NUM_THREADS is no such number, else empty. */
static int fa_default_threads(int team, char *warning, size_t size) {
    const char *ours = getenv("FASTATTN_NUM_THREADS"), *openmp = getenv("OMP_NUM_THREADS");
    cpu_set_t set;
    long n = ours ? fa_parse_threads(ours, "") : 0;
    const int bad = ours && *ours && !n;
    /* A list there is one number for each level of nesting. */
    if (!n && openmp) n = fa_parse_threads(openmp, ",");
    if (!n) {
        if (sched_getaffinity(0, sizeof set, &set) == 0) n = CPU_COUNT(&set);
        if (n <= 0) n = sysconf(_SC_NPROCESSORS_ONLN); /* more cores than a cpu_set_t holds */
        if (team > n) n = team;
        const long granted = fa_cgroup_cpus("/proc/self/cgroup", "/sys/fs/cgroup");
        if (granted && granted < n) n = granted;
    }
    if (n < 1) n = 1;
    if (n > FA_MAX_THREADS) n = FA_MAX_THREADS;
    *warning = 0;
    if (bad)
        snprintf(warning, size,
                 "FASTATTN_NUM_THREADS must be a number from 1 to %d, got \"%.40s\": the number "
                 "used is %ld",
                 FA_MAX_THREADS, ours, n);
    return (int)n;
}

#endif
