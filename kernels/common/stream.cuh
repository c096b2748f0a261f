/* stream.cuh - what every kernel owes its stream, and how device functions are declared.
 *
 * A kernel may start before those before it in the stream have ended (programmatic launch,
 * launch.cuh), from sm_90 on; on others both functions do nothing. tests/gpu_host/fibers.h stands
 * in for this header on the host.
 */
#ifndef FASTATTN_STREAM_CUH
#define FASTATTN_STREAM_CUH

#define DEVICE static __device__ __forceinline__

/* What every kernel calls before it reads or writes global memory: those before it in the stream
 * have ended. Until then only its arguments are there. */
DEVICE void wait_for_stream() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* Once all blocks have said so, or ended, the next kernel's blocks start where there is room. */
DEVICE void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#endif
