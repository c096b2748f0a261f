/* backend.cu - the Hopper backend: it asks the driver what is there and hands a request to its
 * variant.
 *
 * Stop 5 of 6. Next: fa_launch_<name>() of the variant's object, in kernels/sm90/fwd.cu. */
#include "common/empty.cuh"
#include "common/head_parts.h"
#include "common/launch.cuh"
#include "common/mask_bits.cuh"
#include "common/merge_op.cuh"
#include "common/packed.cuh"
#include "fastattn.h"
#include "support.h"
#include "sm90/bwd_choice.h"
#include "sm90/bwd_sink.cuh"
#include "sm90/decode_append.cuh"
#include "sm90/decode_cache.h"
#include "sm90/decode_mass.cuh"
#include "sm90/decode_run.cuh"
#include "sm90/fwd_choice.h"
#include "sm90/fwd_workspace.h"
#include "sm90/sparse_bwd_run.cuh"
#include "sm90/sparse_run.cuh"
#include "sm90/sparsek_run.cuh"

/* The one function that every variant exports (fwd_launch.cuh): the launch, and the tensor maps
 * before it. The tensors' device is current. */
typedef fa_status fa_launcher(const fa_params *p, const fa_device *device, void *workspace,
                              fa_error *error);

#define FA_VARIANT(name, ...) extern "C" fa_launcher fa_launch_##name;
#include "sm90/fwd.def"
#undef FA_VARIANT

static fa_launcher *const launchers[] = {
#define FA_VARIANT(name, ...) fa_launch_##name,
#include "sm90/fwd.def"
#undef FA_VARIANT
};

typedef fa_status fa_bwd_launcher(const fa_backward *r, const fa_device *device, void *workspace,
                                  fa_error *error);

#define FA_VARIANT(name, ...) extern "C" fa_bwd_launcher fa_launch_##name;
#include "sm90/bwd.def"
#undef FA_VARIANT

static fa_bwd_launcher *const bwd_launchers[] = {
#define FA_VARIANT(name, ...) fa_launch_##name,
#include "sm90/bwd.def"
#undef FA_VARIANT
};

static const char *const names[] = {
#define FA_VARIANT(name, ...) #name,
#include "sm90/fwd.def"
#include "sm90/bwd.def"
#include "sm90/decode.def"
#include "sm90/sparse.def"
#include "sm90/sparse_bwd.def"
#undef FA_VARIANT
    NULL,
};

#ifdef FA_SOME_VARIANTS
#define FA_OF_SOME " among those that FASTATTN_VARIANTS chose"
#else
#define FA_OF_SOME ""
#endif

static fa_status takes_device(const fa_where *where, const void **found, fa_error *why) {
    const fa_device *device;
    if (fa_find_device(where->device_id, &device, why) != FA_OK) return FA_UNSUPPORTED;
    if (device->major != 9)
        return fa_fail(why, FA_UNSUPPORTED,
                       "it runs on compute capability 9.0, and cuda:%d has %d.%d", where->device_id,
                       device->major, device->minor);
    if (!device->encode)
        return fa_fail(why, FA_UNSUPPORTED, "the NVIDIA driver cannot encode tensor maps");
    *found = device;
    return FA_OK;
}

static fa_status no_decode_kernel(const fa_what *w, fa_error *why) {
    return fa_fail(why, FA_UNSUPPORTED,
                   "it has no decode kernel for %s with d = %d and dv = %d" FA_OF_SOME,
                   fa_dtypes[w->dtype].name, w->d, w->dv);
}

static fa_status reject(const fa_params *p, fa_choice *choice, fa_error *why) {
    const fa_what *w = &p->what;
    const int32_t decode = fa_is_decode(p) ? fa_choose_decode(p) : -1;
    if (decode >= 0) {
        choice->variant = &fa_decode_variants[decode];
        return FA_OK;
    }
    if (fa_is_cached(p) && !fa_is_prefill(p)) return no_decode_kernel(w, why);
    const fa_device *device = (const fa_device *)choice->device;
    for (int32_t i = 0, parts = fa_head_parts(w); i < parts; ++i) {
        fa_params part;
        const int32_t variant = fa_choose_variant(fa_head_part(p, i, &part), device->sms);
        if (variant < 0)
            return fa_fail(why, FA_UNSUPPORTED,
                           "it has no kernel for %s with d = %d and dv = %d" FA_OF_SOME,
                           fa_dtypes[w->dtype].name, w->d, w->dv);
        if (i == 0) choice->variant = &fa_variants[variant];
    }
    return FA_OK;
}

static const char *kernel(const fa_params *, const fa_choice *choice) {
    if (decode_variant_of(choice)) return decode_variant_of(choice)->name;
    return ((const fa_variant *)choice->variant)->name;
}

/* The variant of part i of fa_head_parts(): the choice is the first one's; each other begins
 * elsewhere in memory, which may suit another variant. */
static const fa_variant *variant_of(const fa_params *part, int32_t i, const fa_choice *choice) {
    const fa_device *device = (const fa_device *)choice->device;
    return i ? &fa_variants[fa_choose_variant(part, device->sms)]
             : (const fa_variant *)choice->variant;
}

/* The parts of a request share it, one after the other. */
static int64_t workspace(const fa_params *p, const fa_choice *choice) {
    if (decode_variant_of(choice)) return decode_workspace(p, choice);
    int64_t most = 0;
    for (int32_t i = 0, parts = fa_head_parts(&p->what); i < parts; ++i) {
        fa_params memory;
        const fa_params *part = fa_head_part(p, i, &memory);
        int64_t bytes = fa_lay_out_forward(part, fa_block_m(variant_of(part, i, choice))).bytes;
        if (bytes > most) most = bytes;
    }
    return most;
}

/* Before the forward kernel, in the same stream: the list of its tiles. */
static fa_status launch_list(const fa_params *p, const fa_device *device, int32_t block_m,
                             void *workspace, fa_error *error) {
    const fa_what *w = &p->what;
    if (fa_packed_capacity(&p->varlen, w->b, block_m) > INT32_MAX)
        return fa_fail(error, FA_UNSUPPORTED, "sm90 takes at most 2^31 tiles of %d rows", block_m);
    const int32_t cached = fa_is_cached(p);
    packed_args a = {fa_packed_make(w, &p->masks, &p->varlen, block_m, workspace),
                     p->varlen,
                     p->masks,
                     w->sq,
                     w->sk,
                     cached,
                     cached ? fa_few_rows(p) : 0};
    return fa_launch_kernel((const void *)list_tiles, 1, PACKED_THREADS, 0, p->where.stream,
                            device->early, &a, error);
}

static fa_status launch(const fa_params *p, const fa_device *device, const fa_variant *variant,
                        void *workspace, fa_error *error) {
    if (fa_is_empty(&p->what)) return launch_empty(p, device, error);
    const int32_t block_m = fa_block_m(variant);
    const fa_forward_workspace at = fa_lay_out_forward(p, block_m);
    fa_status status = FA_OK;
    if (p->varlen.cu_q) status = launch_list(p, device, block_m, workspace, error);
    if (at.packs && status == FA_OK)
        status = launch_pack_mask(p, device, (char *)workspace + at.mask, error);
    if (status != FA_OK) return status;
    return launchers[variant - fa_variants](p, device, workspace, error);
}

/* The device is current. */
static fa_status launch_all(const fa_params *p, const fa_choice *choice, void *workspace,
                            fa_error *error) {
    const fa_device *device = (const fa_device *)choice->device;
    const fa_decode_variant *decode = decode_variant_of(choice);
    if (decode) return launch_decode(p, device, decode, workspace, error);
    fa_status status = FA_OK;
    const int32_t parts = fa_head_parts(&p->what);
    for (int32_t i = 0; i < parts && status == FA_OK; ++i) {
        fa_params memory;
        const fa_params *part = fa_head_part(p, i, &memory);
        status = launch(part, device, variant_of(part, i, choice), workspace, error);
    }
    if (status == FA_OK && fa_is_cached(p) && fa_few_rows(p) && !fa_is_empty(&p->what))
        status = launch_few(p, device, error);
    return status;
}

static fa_status run(const fa_params *p, const fa_choice *choice, void *workspace,
                     fa_error *error) {
    const fa_device *device = (const fa_device *)choice->device;
    int before;
    fa_status status = fa_enter_device(device, &before, error);
    if (status != FA_OK) return status;
    status = launch_all(p, choice, workspace, error);
    return fa_leave_device(device, before, status, error);
}

static const fa_forward_op forward = {FA_SM90_FORWARD, reject, kernel, workspace, run};

/* ---- the backward pass ---- */

static fa_status reject_backward(const fa_backward *r, fa_choice *choice, fa_error *why) {
    const fa_what *w = &r->forward.what;
    const int32_t variant = fa_choose_bwd_variant(r);
    if (variant < 0)
        return fa_fail(why, FA_UNSUPPORTED,
                       "it has no backward kernel for %s with d = %d and dv = %d" FA_OF_SOME,
                       fa_dtypes[w->dtype].name, w->d, w->dv);
    choice->variant = &fa_bwd_variants[variant];
    return FA_OK;
}

static const char *backward_kernel(const fa_backward *, const fa_choice *choice) {
    return ((const fa_bwd_variant *)choice->variant)->name;
}

static int64_t backward_workspace(const fa_backward *r, const fa_choice *choice) {
    const fa_bwd_variant *v = (const fa_bwd_variant *)choice->variant;
    return 4 * fa_lay_out_backward(&r->forward, v->block_m, fa_bwd_sum_columns(v)).floats;
}

/* Where there is no score to compute, gradients are 0, but for the sinks': of lse. */
static fa_status launch_zeros(const fa_backward *r, const fa_device *device, fa_error *error) {
    const fa_params *p = &r->forward;
    const fa_tensor *gradients[] = {&r->dq, &r->dk, &r->dv, &r->dmask};
    fa_status status = launch_sink(r, NULL, 0, 1, device, error);
    for (int i = 0; i < 4 && status == FA_OK; ++i)
        status = launch_clear(gradients[i], i < 3 ? p->what.dtype : p->scores.mask_dtype, device,
                              p->where.stream, error);
    return status;
}

static fa_status launch_backward(const fa_backward *r, const fa_device *device,
                                 const fa_bwd_variant *v, void *workspace, fa_error *error) {
    const fa_what *w = &r->forward.what;
    if (fa_is_empty(w)) return launch_zeros(r, device, error);
    const fa_backward_workspace at =
        fa_lay_out_backward(&r->forward, v->block_m, fa_bwd_sum_columns(v));
    fa_status status = FA_OK;
    if (fa_bwd_packs(&r->forward))
        status = launch_pack_mask(&r->forward, device, (float *)workspace + at.mask, error);
    if (status == FA_OK) status = bwd_launchers[v - fa_bwd_variants](r, device, workspace, error);
    if (status != FA_OK) return status;
    return launch_sink(r, (const float *)workspace + at.delta, at.head, v->block_m, device, error);
}

static fa_status run_backward(const fa_backward *r, const fa_choice *choice, void *workspace,
                              fa_error *error) {
    const fa_device *device = (const fa_device *)choice->device;
    const fa_bwd_variant *variant = (const fa_bwd_variant *)choice->variant;
    int before;
    fa_status status = fa_enter_device(device, &before, error);
    if (status != FA_OK) return status;
    status = launch_backward(r, device, variant, workspace, error);
    return fa_leave_device(device, before, status, error);
}

static const fa_backward_op backward = {FA_SM90_BACKWARD, reject_backward, backward_kernel,
                                        backward_workspace, run_backward};

/* ---- merging ---- */

static const fa_merge_op merge = {FA_SM90_MERGE, reject_merge, merge_kernel, merge_workspace,
                                  run_merge};

/* ---- attention to a cache ---- */

static fa_status reject_kvcache(const fa_kvcache *c, fa_choice *choice, fa_error *why) {
    const fa_params p = fa_kvcache_params(c, FA_TO_COME);
    if (!fa_kvcache_decodes(&p)) return reject(&p, choice, why);
    const int32_t variant = fa_choose_decode(&p);
    if (variant < 0) return no_decode_kernel(&p.what, why);
    choice->variant = &fa_decode_variants[variant];
    return FA_OK;
}

static const char *kvcache_kernel(const fa_kvcache *c, const fa_choice *choice) {
    return kernel(&c->forward, choice);
}

static int64_t kvcache_workspace(const fa_kvcache *c, const fa_choice *choice) {
    const fa_params p = fa_kvcache_params(c, FA_TO_COME);
    return fa_kvcache_lay_out(c).bytes + workspace(&p, choice);
}

static fa_status launch_kvcache(const fa_kvcache *c, const fa_choice *choice, void *workspace,
                                fa_error *error) {
    const fa_device *device = (const fa_device *)choice->device;
    const fa_kvcache_layout at = fa_kvcache_lay_out(c);
    const fa_params p = fa_kvcache_params(c, workspace);
    const fa_tensor none = {};
    fa_status status =
        launch_append(c, at.q_bytes ? &p.what.q : &none,
                      at.lengths_bytes ? (int32_t *)p.masks.k_lengths : NULL, device, error);
    if (status == FA_OK) status = launch_all(&p, choice, (char *)workspace + at.bytes, error);
    return status == FA_OK ? launch_mass(&p, &c->mass, device, error) : status;
}

static fa_status run_kvcache(const fa_kvcache *c, const fa_choice *choice, void *workspace,
                             fa_error *error) {
    const fa_device *device = (const fa_device *)choice->device;
    int before;
    fa_status status = fa_enter_device(device, &before, error);
    if (status != FA_OK) return status;
    status = launch_kvcache(c, choice, workspace, error);
    return fa_leave_device(device, before, status, error);
}

static const fa_kvcache_op kvcache = {FA_SM90_KVCACHE, reject_kvcache, kvcache_kernel,
                                      kvcache_workspace, run_kvcache};

const fa_backend fa_sm90 = {
    "sm90",   FA_CUDA,           takes_device, &forward,         &backward, &merge, &kvcache,
    &sparsek, &sparsek_backward, &sparse,      &sparse_backward, NULL,      NULL,   names,
};
