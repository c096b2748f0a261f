/* variant.h - the variant that is compiled, of whatever operation: its name, dtype and kind.
 *
 * setup.py passes each column of a line of <operation>.def as VARIANT_<COLUMN>. What an operation
 * has besides is in its own header, as fwd_variant.h. C++ without CUDA.
 */
#ifndef FASTATTN_SM90_VARIANT_H
#define FASTATTN_SM90_VARIANT_H

#include "dtype.h"

#define PASTE_(a, b) a##b
#define PASTE(a, b) PASTE_(a, b)

/* The dtype's name in PTX. */
#define PTX_TYPE_FA_BF16 "bf16"
#define PTX_TYPE_FA_F16 "f16"
#define PTX_TYPE PASTE(PTX_TYPE_, VARIANT_DTYPE)

static constexpr bool IS_BF16 = VARIANT_DTYPE == FA_BF16;
#ifdef VARIANT_GENERAL                           /* of an operation that has such variants */
static constexpr bool GENERAL = VARIANT_GENERAL; /* it changes scores: softcap, masks, ALiBi, ... */
#endif

#endif
