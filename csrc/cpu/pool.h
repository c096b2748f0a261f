/* pool.h - the threads of the CPU backend. */
#ifndef FASTATTN_CPU_POOL_H
#define FASTATTN_CPU_POOL_H

#include <stdint.h>

/* Calls work(context) on this thread and on up to `threads` - 1 others at once; they share out the
 * work themselves. */
void fa_pool_run(int threads, void (*work)(void *), void *context);

int fa_pool_threads(void);                  /* that a call may use, the caller's included */
void fa_pool_set_threads(const int32_t *n); /* NULL: as the environment says */
const char *fa_pool_warnings(void);         /* about the environment, or empty */

#endif
