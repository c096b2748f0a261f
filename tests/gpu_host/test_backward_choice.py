"""Which variant of the backward runs a call, and its workspace."""

import ctypes
import itertools

import pytest

import gpu_host
from gpu_host import BF16, F16, HAS_LEFT, HAS_RIGHT

pytestmark = gpu_host.marks

VARIANTS = [v for v in gpu_host.EVERY_VARIANT if v.name.startswith("sm90_bwd_")]
SOURCE = """
#include "sm90/bwd_choice.h"

/* Contiguous arrays; `odd`: how many bytes past one of 16 the array `which` begins, q, k, v, dout,
 * or of 4, there is no dout. sizes: b hq sq sk d dv; softcap: 0 is none. */
int choose(int dtype, const int *sizes, int which, int odd, int softcap) {
    const int b = sizes[0], h = sizes[1], d = sizes[4], dv = sizes[5];
    fa_backward r = {.forward.what = {.dtype = dtype, .b = b, .hq = h, .hk = h, .hv = h,
                                      .sq = sizes[2], .sk = sizes[3], .d = d, .dv = dv}};
    fa_what *w = &r.forward.what;
    fa_tensor *all[] = {&w->q, &w->k, &w->v, &r.dout};
    for (int i = 0; i < 4; ++i) {
        const int s = i == 1 || i == 2 ? w->sk : w->sq, n = i < 2 ? d : dv;
        *all[i] = (fa_tensor){(void *)(256 + (long)(i == which) * odd), {b, h, s, n},
                              {(int64_t)h * s * n, (int64_t)s * n, n, 1}};
    }
    if (which == 4) r.dout.data = 0;
    r.forward.scores.softcap = softcap;
    return fa_choose_bwd_variant(&r);
}

/* Contiguous arrays of one head, without dq if `no_dq`. */
int choose_long(int dtype, int d, int sk, unsigned flags, int deterministic, int packed,
                int no_dq) {
    static const int32_t cu[2];
    static int64_t array[2];
    const fa_tensor t = {array, {1, 1, sk, d}, {(int64_t)sk * d, (int64_t)sk * d, d, 1}};
    fa_backward r = {.forward.what = {.dtype = dtype, .b = 1, .hq = 1, .hk = 1, .hv = 1,
                                      .sq = sk, .sk = sk, .d = d, .dv = d, .q = t, .k = t, .v = t},
                     .dout = t, .dq = t, .deterministic = deterministic};
    r.forward.masks.flags = flags;
    if (packed) r.forward.varlen.cu_q = r.forward.varlen.cu_k = cu;
    if (no_dq) r.dq.data = 0;
    return fa_choose_bwd_variant(&r);
}

void lay_out(int b, int h, int sq, int sk, int block_m, int d, int64_t *got) {
    fa_params p = {.what = {.b = b, .hq = h, .sq = sq, .sk = sk}};
    p.what.q.shape[2] = sq, p.what.k.shape[2] = sk;
    const fa_backward_workspace n = fa_lay_out_backward(&p, block_m, d);
    got[0] = n.head, got[1] = n.delta, got[2] = n.sums, got[3] = n.taken, got[4] = n.turns;
    got[5] = n.floats;
}

int section(int heads, int hq, int hk, int sq, int d, int sum_columns, int turns, int flags,
            int sk, int packed) {
    fa_backward r = {.forward.what = {.hq = hq, .hk = hk, .sq = sq, .sk = sk, .d = d, .dv = d}};
    r.deterministic = turns, r.dq.data = turns < 2 ? &r : 0;
    r.forward.masks.flags = flags, r.forward.varlen.cu_k = packed ? (const int32_t *)&r : 0;
    return fa_bwd_section(&r, heads, sum_columns);
}

void place_mask(int sq, int sk, int64_t *got) {
    const fa_tensor mask = {.data = got, .shape = {1, 1, sq, sk}, .stride = {0, 0, sk, 1}};
    fa_params p = {.what = {.b = 1, .hq = 1, .sq = sq, .sk = sk}};
    p.what.q.shape[2] = sq, p.what.k.shape[2] = sk;
    got[0] = fa_lay_out_backward(&p, 64, 64).floats;
    p.scores.mask = mask, p.scores.mask_dtype = FA_BOOL;
    const fa_backward_workspace n = fa_lay_out_backward(&p, 64, 64);
    got[1] = n.mask, got[2] = n.floats;
    got[3] = fa_mask_bits_make(&p.what, &p.masks, &p.varlen, &mask).bytes;
}

int sum_columns(int variant) { return fa_bwd_sum_columns(&fa_bwd_variants[variant]); }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    source = tmp_path_factory.mktemp("backward") / "choice.c"
    source.write_text(SOURCE)
    return gpu_host.library(source, source.parent)


def chosen(library, dtype, d, dv, which=-1, odd=0, softcap=0):
    sizes = (ctypes.c_int * 6)(2, 3, 100, 200, d, dv)
    i = library.choose(dtype, sizes, which, odd, softcap)
    return None if i < 0 else VARIANTS[i]


def test_every_head_size_has_the_variant_of_the_least_padding(library):
    dtypes = {"FA_F16": F16, "FA_BF16": BF16}
    for (name, dtype), d, dv in itertools.product(
        dtypes.items(), range(1, 257), (1, 64, 65, 128, 256)
    ):
        strided = d % 8 > 0 or dv % 8 > 0
        of = [v for v in VARIANTS if v["dtype"] == name and v["strided"] == strided]
        least = min(v["d"] + v["dv"] for v in of if v["d"] >= d and v["dv"] >= dv)
        got = chosen(library, dtype, d, dv)
        assert got["dtype"] == name and got["strided"] == strided
        assert got["d"] >= d and got["dv"] >= dv and got["d"] + got["dv"] == least
    assert chosen(library, BF16, 257, 64) is chosen(library, BF16, 64, 257) is None
    assert chosen(library, 2, 64, 64) is None


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_blocks_work_in_pairs_where_that_is_faster(library, dtype):
    def cluster(d, sk, flags=0, deterministic=0, packed=0, no_dq=0):
        found = library.choose_long(dtype, d, sk, flags, deterministic, packed, no_dq)
        return VARIANTS[found]["cluster"]

    assert [cluster(256, sk) for sk in (1023, 1024, 16384)] == [0, 2, 2]
    assert [cluster(256, sk, HAS_RIGHT) for sk in (1023, 1024, 16384)] == [0, 2, 2]
    assert cluster(200, 4096) == 2
    assert cluster(192, 4096) == cluster(128, 4096) == cluster(64, 4096) == 0
    assert cluster(256, 4096, HAS_LEFT) == cluster(256, 4096, HAS_LEFT | HAS_RIGHT) == 0
    assert cluster(256, 4096, deterministic=1) == cluster(256, 4096, packed=1) == 0
    assert cluster(256, 4096, no_dq=1) == 0


@pytest.mark.parametrize("which", range(5))
def test_what_the_copy_engine_does_not_take_is_strided(library, which):
    assert not chosen(library, BF16, 64, 64)["strided"]
    for odd in (2, 4, 8) if which < 4 else (0,):
        assert chosen(library, BF16, 64, 64, which, odd)["strided"]
    if which < 4:
        assert not chosen(library, BF16, 64, 64, which, 16)["strided"]


def test_what_changes_scores_has_general_variants(library):
    for dtype, d, which in itertools.product((F16, BF16), (1, 64, 65, 128, 256), (-1, 3)):
        kind = [chosen(library, dtype, 8 * -(-d // 8), 64, which, 2, softcap) for softcap in (0, 5)]
        assert [v["general"] for v in kind] == [0, 1]
        assert all(v["strided"] == (which == 3) for v in kind)
        assert kind[0]["d"] == kind[1]["d"] and kind[0]["dtype"] == kind[1]["dtype"]


def test_columns_of_dqs_sums(library):
    """Those that two warpgroups compute, whole panels of 64 each, where they do not share rows."""
    found = {v["d"]: library.sum_columns(i) for i, v in enumerate(VARIANTS)}
    assert found == {64: 64, 96: 128, 128: 128, 192: 256, 256: 256}


def test_workspace(library):
    got = (ctypes.c_int64 * 6)()
    for b, h, sq, block_m, d in itertools.product(
        (1, 3), (1, 5), (1, 64, 65, 700), (64, 128), (64, 128)
    ):
        library.lay_out(b, h, sq, 9, block_m, d, got)
        head = -(-sq // block_m) * block_m
        rows = b * h * head
        taken = rows * (2 + d)
        turns = 4 * -(-rows // block_m // 4)
        assert list(got) == [head, rows, 2 * rows, taken, taken + 4, taken + 4 + turns]
    for empty in range(4):
        sizes = [2, 3, 100, 200]
        sizes[empty] = 0
        library.lay_out(*sizes, 64, 64, got)
        assert list(got) == [0] * 6
    library.lay_out(1, 1, (1 << 30) - 1, 9, 128, 128, got)
    end = (130 << 30) + 4
    assert list(got) == [1 << 30, 1 << 30, 1 << 31, 130 << 30, end, end + (1 << 23)]


@pytest.mark.parametrize(
    ("asked", "want"),
    [
        ((16, 16, 16, 16384, 128, 128), 2),  # rows of 1 KB: 16 MB a head
        ((512, 16, 16, 512, 128, 128), 64),
        ((64, 16, 4, 4096, 128, 128), 2),  # four query heads share one of keys
        ((3, 3, 3, 512, 64, 64), 3),
        ((8, 8, 8, 1 << 20, 256, 256), 1),
    ],
)
def test_a_section_has_the_heads_whose_rows_stay_in_the_l2(library, asked, want):
    assert library.section(*asked, 1, 0, 64, 0) == want
    assert library.section(*asked, 0, HAS_RIGHT, 2048, 0) == want


@pytest.mark.parametrize(
    ("turns", "flags", "sk", "packed", "sections"),
    [
        (0, HAS_RIGHT, 2047, 0, False),
        (0, HAS_RIGHT, 1 << 20, 1, False),  # its tiles are of any sequences
        (0, HAS_LEFT | HAS_RIGHT, 4096, 0, False),  # tiles of a window are equally long
        (0, 0, 4096, 0, False),
        (2, 0, 4096, 0, False),  # no dq, no turns
        (1, 0, 512, 1, True),
        (0, HAS_RIGHT, 2048, 0, True),
    ],
)
def test_which_tiles_lie_side_by_side(library, turns, flags, sk, packed, sections):
    got = library.section(16, 16, 16, 2048, 64, 64, turns, flags, sk, packed)
    assert got == (16 if sections else 1)


@pytest.mark.parametrize(("sq", "sk"), [(1, 9), (65, 200), (700, 129)])
def test_a_packed_mask_lies_behind_on_256_bytes(library, sq, sk):
    got = (ctypes.c_int64 * 4)()
    library.place_mask(sq, sk, got)
    end, mask, floats, size = got
    assert mask == -(-end // 64) * 64 and floats == mask + size // 4 and size > 0
