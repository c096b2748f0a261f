/* A variant of the Hopper forward with threads as fibers, one block after the other. */
#define FIBERS (128 * (VARIANT_WARPGROUPS + 1))
#include "hopper.h"

#include <utility>

static fa_status fa_launch_kernel(const void *kernel, int32_t blocks, int32_t threads, int32_t smem,
                                  void *stream, bool early, void *arguments, fa_error *error);

static void st_shared(uint32_t smem, uint32_t x) { memcpy(shared_at(smem), &x, 4); }

/* A thread's own copies: they come when it waits for them. */
static std::vector<std::pair<uint8_t *, std::vector<uint8_t>>> own_copies[FIBERS];

template <int BYTES>
static void cp_async_or_zero(uint32_t smem, const void *from, uint32_t bytes) {
    if (smem % BYTES || (uintptr_t)from % BYTES || bytes > BYTES) abort();
    std::vector<uint8_t> copy(BYTES);
    memcpy(copy.data(), from, bytes);
    memset(shared_at(smem), 0xFF, BYTES);
    own_copies[current].push_back({shared_at(smem), copy});
}
template <int BYTES>
static void cp_async(uint32_t smem, const void *from) {
    cp_async_or_zero<BYTES>(smem, from, BYTES);
}
static void cp_async_wait() {
    for (auto &[to, copy] : own_copies[current]) memcpy(to, copy.data(), copy.size());
    own_copies[current].clear();
}

#include "sm90/fwd.cu"
#include "sm90/fwd_choice.h"

#define NAME_OF_(x) #x
#define NAME_OF(x) NAME_OF_(x)

static const kernel_args *arguments_now;

static fa_status fa_launch_kernel(const void *, int32_t blocks, int32_t, int32_t, void *, bool,
                                  void *arguments, fa_error *) {
    arguments_now = (const kernel_args *)arguments;
    gridDim.x = blocks;
    for (blockIdx.x = blocks - 1; blockIdx.x >= 0; --blockIdx.x) {
        start_block();
        run_block([] { VARIANT_NAME(*arguments_now); });
    }
    return FA_OK;
}

/* Of one batch entry or more, arrays as they are described. masks: flags, left, right; lengths:
 * of queries, of keys, starts, or NULL. */
static fa_params request_of(const fa_tensor *q, const fa_tensor *k, const fa_tensor *v,
                            const fa_tensor *out, const fa_tensor *lse, double scale,
                            const int32_t *masks, const int32_t *const *lengths) {
    fa_params p = {};
    p.what.q = *q, p.what.k = *k, p.what.v = *v, p.what.out = *out;
    if (lse) p.what.lse = *lse;
    p.what.dtype = VARIANT_DTYPE;
    p.what.b = (int32_t)q->shape[0];
    p.what.hq = (int32_t)q->shape[1], p.what.hk = p.what.hv = (int32_t)k->shape[1];
    p.what.sq = (int32_t)q->shape[2], p.what.sk = (int32_t)k->shape[2];
    p.what.d = (int32_t)q->shape[3], p.what.dv = (int32_t)v->shape[3];
    p.what.scale = scale;
    p.masks.flags = (uint32_t)masks[0], p.masks.left = masks[1], p.masks.right = masks[2];
    p.masks.q_lengths = lengths[0], p.masks.q_lengths_stride = 1;
    p.masks.k_lengths = lengths[1], p.masks.k_lengths_stride = 1;
    p.masks.k_start = lengths[2], p.masks.k_start_stride = 1;
    return p;
}

static int launch_here(const fa_params *p, int sms, int is_late, void *workspace) {
    const fa_device device = {sms, 0, encode_host};
    fa_error error = {};
    late = is_late;
    return PASTE(fa_launch_, VARIANT_NAME)(p, &device, workspace, &error);
}

/* Returns a status. */
extern "C" int forward(const fa_tensor *q, const fa_tensor *k, const fa_tensor *v,
                       const fa_tensor *out, const fa_tensor *lse, double scale,
                       const int32_t *masks, const int32_t *const *lengths, int sms, int is_late) {
    const fa_params p = request_of(q, k, v, out, lse, scale, masks, lengths);
    return launch_here(&p, sms, is_late, NULL);
}

#if IS_PAGED
/* The list that list_tiles() would make, without sequences of at most `few` rows. */
static void list_here(const fa_params *p, int32_t few, void *workspace) {
    const fa_packed list = fa_packed_make(&p->what, &p->masks, &p->varlen, BLOCK_M, workspace);
    int32_t n = 0;
    for (int32_t b = 0; b <= list.b; ++b) {
        const fa_sequence s =
            fa_packed_cached(&list, &p->varlen, &p->masks, b, p->what.sq, p->what.sk);
        const int32_t first = n, tiles = fa_packed_m_blocks(&list, s);
        if (b < list.b && fa_is_short(s, few)) continue;
        for (int32_t i = 0; i < tiles; ++i) list.entries[n++] = {b, first};
    }
    *list.counts = {n, 0};
}

/* Keys in pages, of `table` (b, columns), or with a place each. cu_q: of b packed sequences, the
 * longest of sq rows, or NULL. Returns a status; -1: another variant would run. */
extern "C" int forward_pages(const fa_tensor *q, const fa_tensor *k, const fa_tensor *v,
                             const fa_tensor *out, const fa_tensor *lse, double scale,
                             const int32_t *masks, const int32_t *const *lengths,
                             const int32_t *table, int columns, int size, int sk,
                             const int32_t *cu_q, int b, int sq, int few, int is_late) {
    fa_params p = request_of(q, k, v, out, lse, scale, masks, lengths);
    p.what.sk = sk, p.what.b = b, p.what.sq = sq;
    if (table) p.pages = {table, {columns, 1}, size, (int32_t)k->shape[0]};
    if (cu_q) p.varlen = {cu_q, NULL, 1, 1, (int32_t)q->shape[2], 0};
    const int32_t chosen = fa_choose_variant(&p, 2);
    if (chosen < 0 || strcmp(fa_variants[chosen].name, NAME_OF(VARIANT_NAME))) return -1;
    std::vector<int64_t> workspace(cu_q ? fa_packed_bytes(&p.varlen, b, BLOCK_M) / 8 : 0);
    if (cu_q) list_here(&p, few, workspace.data());
    return launch_here(&p, 2, is_late, workspace.data());
}
#endif
