/* A variant of the Hopper decode kernel with threads as fibers, one block after the other; its
 * parts are for merge_shim.cpp. */
#include "decode_blocks.h"

/* What a call is made of: as views.c and check_pages.c describe arrays. */
struct decode_call {
    fa_tensor q, k, v, out, lse; /* out and lse: of the result, or of the first part */
    fa_tensor single[2];         /* out and lse of rows that have one of the parts that are dealt */
    int64_t out_step, lse_step;
    const int32_t *lengths[4]; /* of queries, of keys, starts, offsets; or NULL */
    const int32_t *table;
    int32_t columns, size, count; /* of the table; keys in a page; pages */
    int32_t flags, left, right, sk, parts, cluster, deal, invariant;
    double scale, softcap;
    const float *slopes, *sink; /* (hq,), or NULL */
};

static fa_params request_of(const decode_call *c) {
    fa_params p = {};
    fa_what &w = p.what;
    w.q = c->q, w.k = c->k, w.v = c->v, w.out = c->out, w.lse = c->lse;
    w.dtype = VARIANT_DTYPE;
    w.b = (int32_t)c->q.shape[0], w.hq = (int32_t)c->q.shape[1], w.sq = (int32_t)c->q.shape[2];
    w.hk = w.hv = (int32_t)c->k.shape[1], w.sk = c->sk;
    w.d = (int32_t)c->q.shape[3], w.dv = (int32_t)c->v.shape[3];
    w.scale = c->scale, w.batch_invariant = c->invariant;
    fa_masks &m = p.masks;
    m.flags = (uint32_t)c->flags, m.left = c->left, m.right = c->right;
    m.q_lengths = c->lengths[0], m.k_lengths = c->lengths[1];
    m.k_start = c->lengths[2], m.q_offset = c->lengths[3];
    m.q_lengths_stride = m.k_lengths_stride = m.k_start_stride = m.q_offset_stride = 1;
    p.scores.softcap = c->softcap;
    p.scores.alibi_slopes = c->slopes, p.scores.alibi_stride[1] = 1;
    p.scores.sink = c->sink, p.scores.sink_stride = 1;
    if (c->table) p.pages = {c->table, {c->columns, 1}, c->size, c->count};
    return p;
}

/* The variant that is chosen, among those of its dtype. */
extern "C" const char *chosen(const decode_call *c) {
    const fa_params p = request_of(c);
    const int32_t i = fa_choose_decode(&p);
    return i < 0 ? "none" : fa_decode_variants[i].name;
}

/* Returns a status. */
extern "C" int decode(const decode_call *c, int is_late) {
    fa_params p = request_of(c);
    const fa_device device = {2, 0, encode_host};
    const fa_decode_variant *v = &fa_decode_variants[fa_choose_decode(&p)];
    fa_decode_plan plan = fa_decode_make(&p, v, 0, 2);
    if (!c->invariant) plan.parts = c->parts, plan.cluster = c->cluster, plan.deal = c->deal;
    if (plan.parts != c->parts) return -1;
    if (c->deal) p.what.out = c->single[0], p.what.lse = c->single[1];
    fa_error error = {};
    late = is_late;
    return PASTE(fa_launch_, VARIANT_NAME)(&p, &device, &plan, &c->out, c->out_step, &c->lse,
                                           c->lse_step, &error);
}
