"""The GPU's host code under offsets, windows of any sign, and k and v with heads of their own."""

import ctypes
import itertools

import numpy as np
import pytest

import gpu_host
from gpu_host import BF16, VARIANTS, library

pytestmark = gpu_host.marks

SHIM = r"""
#include <string.h>
#include "common/mask_bits.h"
#include "sm90/fwd_choice.h"
#include "common/head_parts.h"
#include "common/schedule.h"

/* Planes of batches that a packed bool mask has, which is the same for all of them. */
int planes(int b, int packed, int flags, int each) {
    static const int32_t some;
    fa_what w = {.b = b, .hq = 2, .hk = 1, .hv = 1, .sq = 70, .sk = 90};
    fa_masks m = {.flags = (uint32_t)flags, .offset = 3, .q_offset = each ? &some : NULL};
    fa_varlen v = {.cu_q = packed ? &some : NULL, .total_q = 70, .total_k = 90};
    fa_tensor mask = {.stride = {0, 0, 90, 1}};
    return fa_mask_bits_make(&w, &m, &v, &mask).batches;
}
/* The variant, and the least and the greatest cost of any that would do. */
int choose(int d, int sq, int sk, int flags, int left, int right, int offset, double *costs) {
    fa_params p = {.what = {.dtype = FA_BF16, .b = 2, .hq = 4, .hk = 4, .hv = 4, .sq = sq,
                            .sk = sk, .d = d, .dv = d},
                   .masks = {.flags = (uint32_t)flags, .left = left, .right = right,
                             .offset = offset}};
    costs[0] = 1e300, costs[1] = -1e300;
    for (int i = 0; i < FA_VARIANTS; ++i) {
        double cost = fa_variant_cost(&fa_variants[i], &p.what, &p.masks, 132);
        if (!(cost >= costs[0])) costs[0] = cost;
        if (!(cost <= costs[1])) costs[1] = cost;
    }
    return fa_choose_variant(&p, 132);
}
/* Where the parts of a request begin, in elements: {q, k, v, out, lse, mask, slopes, sink} of each;
 * returns how many there are. */
int parts(int hq, int hk, int hv, int mask_bytes, int64_t *at) {
    static char base[8];
    fa_params p = {.what = {.dtype = FA_BF16, .hq = hq, .hk = hk, .hv = hv}};
    fa_tensor *all[] = {&p.what.q,   &p.what.k,   &p.what.v,
                        &p.what.out, &p.what.lse, &p.scores.mask};
    const int heads[] = {hq, hk, hv, hq, hq, hq};
    for (int i = 0; i < 6; ++i) {
        fa_tensor t = {base, {1, heads[i], 5, 8}, {0, 1000 * (i + 1), 8, 1}};
        *all[i] = t;
    }
    p.scores.mask_dtype = mask_bytes == 1 ? FA_BOOL : mask_bytes == 2 ? FA_F16 : FA_F32;
    p.scores.alibi_slopes = (const float *)base, p.scores.alibi_stride[1] = 3;
    p.scores.sink = (const float *)base, p.scores.sink_stride = 7;
    const int count = fa_head_parts(&p.what);
    for (int n = 0; n < count; ++n, at += 8) {
        fa_params room;
        const fa_params *part = fa_head_part(&p, n, &room);
        const fa_tensor *mine[] = {&part->what.q,   &part->what.k,   &part->what.v,
                                   &part->what.out, &part->what.lse, &part->scores.mask};
        const int bytes[] = {2, 2, 2, 2, 4, mask_bytes};
        for (int i = 0; i < 6; ++i) {
            const int want = i == 1 ? part->what.hk : i == 2 ? part->what.hv : part->what.hq;
            if (mine[i]->shape[1] != want) return -1;
            at[i] = ((char *)mine[i]->data - base) / bytes[i];
        }
        at[6] = part->scores.alibi_slopes - (const float *)base;
        at[7] = part->scores.sink - (const float *)base;
    }
    return count;
}
/* The longest tile of a head's first and last block of rows, as the schedule takes them. */
int first_tile(int sq, int sk, int flags, int left, int right, int offset) {
    fa_what w = {.b = 1, .hq = 1, .hk = 1, .hv = 1, .sq = sq, .sk = sk, .d = 64, .dv = 64};
    fa_masks m = {.flags = (uint32_t)flags, .left = left, .right = right, .offset = offset};
    fa_schedule s = fa_schedule_make(&w, &m, 64, 132);
    return fa_schedule_tile(&s, 0).m_block;
}
"""
HAS_LEFT, HAS_RIGHT, HAS_OFFSET, SHIFT = 1, 2, 4, 2**30


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    folder = tmp_path_factory.mktemp("positions")
    (folder / "shim.c").write_text(SHIM)
    trap = ("-fsanitize=undefined", "-fsanitize-undefined-trap-on-error")
    return library(folder / "shim.c", folder, *trap)


def test_a_mask_has_a_plane_for_each_offset(host):
    """A mask of all sequences is packed with the rows' intervals, which differ by their offsets."""
    for flags in (0, HAS_OFFSET, HAS_RIGHT):
        assert host.planes(5, 0, flags, 1) == 5
        assert host.planes(5, 0, flags, 0) == 1
        assert host.planes(5, 1, flags, 1) == 1  # of packed sequences the mask alone is packed


def test_any_window_has_a_cost(host):
    """Also one that sees no key, and numbers that an int32 cannot add."""
    ends = (-SHIFT, -1000, -1, 0, 7, 1000, SHIFT)
    costs = (ctypes.c_double * 2)()
    for d, (sq, sk) in itertools.product((64, 128, 256), ((1, 5000), (777, 777), (5000, 20))):
        full = host.choose(d, sq, sk, 0, 0, 0, 0, costs)
        assert VARIANTS[full]["dtype"] == "FA_BF16" and BF16 == 4
        for flags, left, right in itertools.product(range(8), ends, ends):
            row = host.choose(d, sq, sk, flags, left, right, left, costs)
            assert 0 <= row < len(VARIANTS) and int(VARIANTS[row]["d"]) >= d
            assert 0 < costs[0] <= costs[1] < 1e18, (flags, left, right)


def test_the_longest_tiles_come_first_wherever_the_diagonal_is(host):
    """Rows see ever more keys as long as only the right is bounded, whatever the offset."""
    for right, offset in itertools.product((-900, 0, 900), (-500, 0, 5000)):
        assert host.first_tile(1000, 1000, HAS_RIGHT | HAS_OFFSET, 0, right, offset) == 15
        both = HAS_LEFT | HAS_RIGHT | HAS_OFFSET
        assert host.first_tile(1000, 1000, both, 50, max(right, -50), offset) == 0


@pytest.mark.parametrize("mask_bytes", [1, 2, 4])
def test_heads_of_k_and_of_v_are_met_part_by_part(host, mask_bytes):
    """Each query head once, with the key head and the value head that its groups share."""
    strides = 1000 * np.arange(1, 7)
    for hk, hv, factor in itertools.product((1, 2, 3, 4, 6), (1, 2, 3, 4, 6), (1, 2, 5)):
        hq, at = int(np.lcm(hk, hv)) * factor, (ctypes.c_int64 * (8 * 64))()
        count = host.parts(hq, hk, hv, mask_bytes, at)
        assert count == (1 if hk == hv else np.lcm(hk, hv))
        if count == 1:
            continue
        for n in range(count):
            h = n * hq // count
            heads = [h, h // (hq // hk), h // (hq // hv), h, h, h]
            assert list(at[8 * n : 8 * n + 6]) == [
                int(x * y) for x, y in zip(heads, strides, strict=True)
            ]
            assert list(at[8 * n + 6 : 8 * n + 8]) == [3 * h, 7 * h]
            last = h + hq // count - 1  # the part's last query head shares the same
            assert last // (hq // hk) == heads[1] and last // (hq // hv) == heads[2]
