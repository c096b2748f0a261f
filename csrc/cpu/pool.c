/* pool.c - threads for the CPU backend: torch's, where torch is in the process
 * (openmp.h), else its own, started at the first call that needs them, asleep in between.
 *
 * One job at a time has them; a caller that finds them busy works alone, so callers never wait for
 * each other. After fork() the child has no threads but the caller: it starts with an empty pool,
 * and stays with threads of its own, for torch's runtime may wait for those of the parent.
 */
#define _GNU_SOURCE
#include "pool.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>

#include "openmp.h"
#include "threads.h"

static struct {
    pthread_mutex_t busy; /* held by the one caller that has the threads; guards openmp, forked */
    pthread_mutex_t lock; /* guards everything below */
    pthread_cond_t wake;  /* a job is open */
    pthread_cond_t done;  /* the last worker left the job */
    int threads;          /* started */
    void (*work)(void *); /* the open job, or NULL */
    void *context;
    int places;  /* workers that may still join it */
    int working; /* workers inside it */
    int forked;  /* this process is a fork */
    fa_openmp openmp;
} fa_pool = {.busy = PTHREAD_MUTEX_INITIALIZER,
             .lock = PTHREAD_MUTEX_INITIALIZER,
             .wake = PTHREAD_COND_INITIALIZER,
             .done = PTHREAD_COND_INITIALIZER};

static pthread_once_t fa_pool_once = PTHREAD_ONCE_INIT;
static atomic_int fa_pool_size;   /* threads a call may use, the caller's included */
static char fa_pool_warning[160]; /* a sentence about the environment, or empty */

/* In the child: locks may be held by threads that are not there any more. */
static void fa_pool_after_fork(void) {
    pthread_mutex_init(&fa_pool.busy, NULL);
    pthread_mutex_init(&fa_pool.lock, NULL);
    pthread_cond_init(&fa_pool.wake, NULL);
    pthread_cond_init(&fa_pool.done, NULL);
    fa_pool.threads = 0;
    fa_pool.work = NULL;
    fa_pool.places = fa_pool.working = 0;
    fa_pool.forked = 1;
}

static int fa_pool_default(char *warning, size_t size) {
    return fa_default_threads(fa_pool.forked ? 0 : fa_openmp_team(), warning, size);
}

static void fa_pool_setup(void) {
    fa_pool.forked = fa_openmp_forked();
    atomic_store(&fa_pool_size, fa_pool_default(fa_pool_warning, sizeof fa_pool_warning));
    pthread_atfork(NULL, NULL, fa_pool_after_fork);
}

static void *fa_pool_thread(void *unused) {
    (void)unused;
    pthread_mutex_lock(&fa_pool.lock);
    for (;;) {
        while (fa_pool.places == 0) pthread_cond_wait(&fa_pool.wake, &fa_pool.lock);
        fa_pool.places--;
        fa_pool.working++;
        void (*work)(void *) = fa_pool.work;
        void *context = fa_pool.context;
        pthread_mutex_unlock(&fa_pool.lock);
        work(context);
        pthread_mutex_lock(&fa_pool.lock);
        if (--fa_pool.working == 0) pthread_cond_signal(&fa_pool.done);
    }
    return NULL;
}

/* Starts workers up to `wanted`; fewer if the system refuses. The lock is held. */
static void fa_pool_start(int wanted) {
    pthread_attr_t attr;
    sigset_t all, before;
    if (fa_pool.threads >= wanted || pthread_attr_init(&attr)) return;
    pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
    sigfillset(&all); /* signals belong to the program's own threads */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_t thread;
    while (fa_pool.threads < wanted && !pthread_create(&thread, &attr, fa_pool_thread, NULL))
        fa_pool.threads++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attr);
}

int fa_pool_threads(void) {
    pthread_once(&fa_pool_once, fa_pool_setup);
    return atomic_load_explicit(&fa_pool_size, memory_order_relaxed);
}

/* A job for this thread and `threads` - 1 of the pool's. */
static void fa_pool_share(int threads, void (*work)(void *), void *context) {
    pthread_mutex_lock(&fa_pool.lock);
    fa_pool_start(threads - 1);
    fa_pool.work = work;
    fa_pool.context = context;
    fa_pool.places = threads - 1 < fa_pool.threads ? threads - 1 : fa_pool.threads;
    if (fa_pool.places == 1)
        pthread_cond_signal(&fa_pool.wake);
    else
        pthread_cond_broadcast(&fa_pool.wake);
    pthread_mutex_unlock(&fa_pool.lock);

    work(context);

    pthread_mutex_lock(&fa_pool.lock);
    fa_pool.places = 0; /* who has not come by now has nothing left to do */
    while (fa_pool.working) pthread_cond_wait(&fa_pool.done, &fa_pool.lock);
    pthread_mutex_unlock(&fa_pool.lock);
}

void fa_pool_run(int threads, void (*work)(void *), void *context) {
    const int most = fa_pool_threads();
    if (threads > most) threads = most;
    if (threads <= 1 || pthread_mutex_trylock(&fa_pool.busy)) {
        work(context);
        return;
    }
    if (fa_pool.forked || !fa_openmp_run(&fa_pool.openmp, threads, work, context))
        fa_pool_share(threads, work, context);
    pthread_mutex_unlock(&fa_pool.busy);
}

void fa_pool_set_threads(const int32_t *n) {
    char unused[160];
    fa_pool_threads(); /* the setup comes first, or it would undo this */
    atomic_store(&fa_pool_size, n ? *n : fa_pool_default(unused, sizeof unused));
}

const char *fa_pool_warnings(void) {
    fa_pool_threads();
    return fa_pool_warning;
}
