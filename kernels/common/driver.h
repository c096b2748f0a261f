/* driver.h - why CUDA lists no GPU, as a sentence. Plain C, no CUDA: tested without a driver. */
#ifndef FASTATTN_DRIVER_H
#define FASTATTN_DRIVER_H

#include <stdint.h>
#include <stdio.h>

enum { FA_CUDA_NO_DEVICE = 100 }; /* cudaErrorNoDevice; device.cu asserts it */

/* The oldest driver that runs what this toolkit builds; any driver of the toolkit's major serves.
 */
static inline int32_t fa_driver_floor(int32_t toolkit) { return toolkit >= 13000 ? 580 : 525; }

/* `driver` is cudaDriverGetVersion(), 0 without a driver; `code` is cudaGetDeviceCount()'s answer,
 * which says "insufficient driver" in both cases, and `detail` CUDA's own text for it. */
static inline void fa_driver_sentence(char *text, size_t size, int32_t toolkit, int32_t driver,
                                      int32_t code, const char *detail) {
    if (code == 0)
        text[0] = 0;
    else if (driver == 0)
        snprintf(text, size, "no NVIDIA driver was found");
    else if (driver / 1000 < toolkit / 1000)
        snprintf(text, size,
                 "the NVIDIA driver is too old: it serves CUDA %d.%d, this build needs CUDA %d.0 "
                 "(driver %d or newer)",
                 driver / 1000, driver % 1000 / 10, toolkit / 1000, fa_driver_floor(toolkit));
    else if (code == FA_CUDA_NO_DEVICE)
        snprintf(text, size, "the NVIDIA driver shows no GPU");
    else
        snprintf(text, size, "the NVIDIA driver failed: %s", detail);
}

#endif
