/* fwd_workspace.h - where everything of a forward request lies in its workspace, said once. */
#ifndef FASTATTN_SM90_FWD_WORKSPACE_H
#define FASTATTN_SM90_FWD_WORKSPACE_H

#include "common/empty.h"
#include "common/mask_bits.h"
#include "common/packed.h"

typedef struct fa_forward_workspace {
    int64_t tiles; /* of packed sequences, their list (packed.h); bytes from the start, as `mask` */
    int64_t mask;  /* of a bool mask, its bits (mask_bits.h) */
    int64_t bytes; /* all in all; 0: none */
    int32_t packs; /* whether there is such a mask */
} fa_forward_workspace;

/* block_m: rows of a tile of the variant that runs. */
static inline fa_forward_workspace fa_lay_out_forward(const fa_params *p, int32_t block_m) {
    fa_forward_workspace n = {0, 0, 0, 0};
    const fa_tensor *mask = &p->scores.mask;
    if (fa_is_empty(&p->what)) return n;
    n.packs = mask->data && p->scores.mask_dtype == FA_BOOL;
    n.mask = n.bytes = fa_packed_bytes(&p->varlen, p->what.b, block_m);
    if (n.packs) n.bytes += fa_mask_bits_make(&p->what, &p->masks, &p->varlen, mask).bytes;
    return n;
}

#endif
