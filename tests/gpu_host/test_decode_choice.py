"""Which requests the Hopper decode kernels take, on which variant, and how the keys are split."""

import ctypes
import itertools
import shutil
import subprocess

import pytest

import gpu_host
from gpu_host import INCLUDES, SMS
from gpu_host.test_layout import BLOCK_LIMIT, SM_LIMIT, SYSTEM

pytestmark = gpu_host.marks

VARIANTS = [v for v in gpu_host.EVERY_VARIANT if v.name.startswith("sm90_decode_")]
BF16, F16 = 4, 3
SOURCE = """
#include "sm90/decode_choice.h"

/* {rows, d, dv, strided, is_decode} of the choice, or is_decode alone and -1; then {tiles, parts,
 * part_blocks, lse, merged, bytes} of the plan. `change`: what else is asked for; 9: packed
 * queries, as the rest of a prefill. */
void choose(int dtype, int b, int hq, int hk, int sq, int sk, int d, int dv, int size, int columns,
            int invariant, int change, int sms, int64_t *got) {
    static int32_t x;
    int64_t s = size ? size : sk, n = size ? b * columns + 1 : b;
    fa_params p = {.what = {.dtype = dtype, .b = b, .hq = hq, .hk = hk, .hv = hk, .sq = sq,
                            .sk = sk, .d = d, .dv = dv, .batch_invariant = invariant}};
    fa_tensor k = {(void *)4096, {n, hk, s, d}, {hk * s * d, s * d, d, 1}};
    fa_tensor v = {(void *)4096, {n, hk, s, dv}, {hk * s * dv, s * dv, dv, 1}};
    p.what.k = k, p.what.v = v;
    if (size) p.pages = (fa_pages){&x, {columns, 1}, size, n};
    if (change == 7 || change == 9) p.varlen.cu_q = &x, p.varlen.total_q = 1000;
    fa_tensor q = {(void *)4096, {b, hq, sq, d}, {hq * sq * d, sq * d, d, 1}};
    if (change == 8) p.masks.k_lengths = &x;
    if (p.varlen.cu_q) q.shape[0] = 1, q.shape[2] = 1000;
    p.what.q = q;
    if (change == 1) p.scores.mask.data = &x;
    if (change == 2) p.dropout.p = 0.5;
    if (change == 3) p.varlen.cu_q = p.varlen.cu_k = &x;
    if (change == 4) p.what.hv = 1;
    if (change == 5) p.scores.softcap = 3;
    if (change == 6) p.what.k.data = (void *)4098;
    const int i = fa_choose_decode(&p);
    got[4] = fa_is_decode(&p), got[0] = -1, got[14] = fa_few_rows(&p);
    if (i < 0) return;
    const fa_decode_variant *r = &fa_decode_variants[i];
    const fa_decode_plan plan = fa_decode_make(&p, r, change == 9 ? sq : 0, sms);
    got[0] = r->rows, got[1] = r->d, got[2] = r->dv, got[3] = r->strided;
    got[5] = plan.tiles, got[6] = plan.parts, got[7] = plan.part_blocks, got[8] = plan.lse;
    got[9] = plan.merged, got[10] = plan.bytes, got[11] = r->block_n, got[12] = plan.cluster;
    got[13] = plan.deal;
}
"""
FIELDS = ("rows", "d", "dv", "strided", "is_decode", "tiles", "parts", "part_blocks")
FIELDS += ("lse", "merged", "bytes", "block_n", "cluster", "deal", "few")


@pytest.fixture(scope="module")
def choose(tmp_path_factory):
    source = tmp_path_factory.mktemp("decode") / "decode.c"
    source.write_text(SOURCE)
    made = gpu_host.library(source, source.parent)

    def ask(b, hq, hk, sq, sk, d=128, dv=None, size=0, invariant=0, change=0, dtype=BF16):
        got = (ctypes.c_int64 * len(FIELDS))()
        columns = -(-sk // size) if size else 0
        shape = b, hq, hk, sq, sk, d, dv or d, size, columns
        made.choose(dtype, *shape, invariant, change, SMS, got)
        return dict(zip(FIELDS, got, strict=True))

    return ask


def test_the_variant(choose):
    for dtype, d, dv, (sq, rows) in itertools.product(
        (BF16, F16), (1, 64, 72, 128, 129, 256), (8, 64, 80, 256), ((1, 16), (2, 16), (3, 64))
    ):
        got = choose(2, 16, 2, sq, 500, d, dv, dtype=dtype)
        assert got["rows"] == rows and got["strided"] == (d % 8 != 0), (d, dv)
        assert got["d"] == min(x for x in (64, 128, 256) if x >= max(d, dv))


def test_pages_of_whole_blocks_come_in_boxes(choose):
    sizes = (1, 8, 16, 24, 32, 48, 64, 100, 128, 192, 256, 2000)
    boxes = {64: {8, 16, 32, 64, 128, 192, 256, 2000}, 128: {8, 16, 32, 64, 128, 256, 2000}}
    for d, size in itertools.product((64, 128), sizes):
        got = choose(2, 4, 2, 1, 2000, d, size=size)
        assert got["strided"] == (size not in boxes[got["block_n"]]), (d, size)


def test_what_is_not_taken(choose):
    for change in (1, 2, 3, 4):
        assert (got := choose(2, 4, 2, 1, 500, change=change))["rows"] == -1
        assert not got["is_decode"]
    for change, strided in ((5, 0), (6, 1)):
        assert (got := choose(2, 4, 2, 1, 500, change=change))["strided"] == strided
        assert got["is_decode"]
    assert choose(2, 4, 2, 1, 500, d=257)["rows"] == -1
    assert not choose(2, 8, 2, 17, 500)["is_decode"]  # 68 rows
    assert not choose(2, 8, 2, 16, 63)["is_decode"] and choose(2, 8, 2, 16, 64)["is_decode"]
    assert not choose(0, 8, 2, 1, 500)["is_decode"] and not choose(2, 8, 2, 1, 0)["is_decode"]


def test_packed_queries_are_taken_whatever_their_number(choose):
    for b, sq, invariant in itertools.product((1, 3, 100), (1, 2, 700), (0, 1)):
        got = choose(b, 16, 2, sq, 500, size=16, change=7, invariant=invariant)
        rows = 16 if sq * 8 <= 16 and not invariant else 64
        assert got["rows"] == rows  # of a tile: no one else's lengths
        assert got["is_decode"] == (sq < 700 or invariant)
        assert got["tiles"] == 1000 * 8 // rows + b


def test_many_rows_are_the_forward_kernels(choose):
    """Those of a cache too, whatever its pages and strides; what it does not know stays here."""
    for d, size, change in itertools.product((8, 64, 100, 256), (1, 16, 64, 100), (0, 6)):
        asked = {"d": d, "size": size, "change": change}
        assert choose(2, 16, 2, 8, 500, **asked)["is_decode"]
        small = d == 256 and (size in (1, 100) or change)  # pages, and rows that begin anywhere
        assert choose(2, 16, 2, 9, 500, **asked)["is_decode"] == bool(small)
    assert choose(2, 16, 2, 70, 500, size=16, change=5)["is_decode"]  # softcap


def test_few_rows_beside_many(choose):
    """Of packed sequences: a tile each, whose keys are one sum."""
    for group, few in ((1, 16), (4, 4), (5, 3), (16, 1), (17, 3), (64, 1), (65, 0)):
        assert choose(100, 2 * group, 2, 700, 9000, size=16, change=7)["few"] == few
        if few:
            got = choose(100, 2 * group, 2, few, 9000, size=16, change=9)
            assert (got["tiles"], got["bytes"]) == (100, 0)
            assert got["parts"] == got["cluster"] and few * group <= got["rows"]
    assert choose(100, 8, 2, 700, 9000, size=16)["few"] == 0


def test_the_workspace_holds_all_parts(choose):
    split = 0
    for b, hq, hk, sq, sk in gpu_host.shapes(2000):
        got = choose(b, hq, hk, sq % 70, sk)
        rows, parts = b * hq * (sq % 70), got["parts"]
        assert 1 <= parts <= max(1, -(-sk // got["block_n"])) and parts <= 256
        assert parts % got["cluster"] == 0 and got["cluster"] in (1, 2, 4, 8)
        parts //= got["cluster"]
        assert got["tiles"] == -(-(sq % 70) * hq // hk // got["rows"])
        split += parts > 1
        if parts == 1:
            assert got["bytes"] == 0
            continue
        assert got["lse"] >= parts * rows * 128 * 4
        assert got["merged"] >= got["lse"] + parts * rows * 4
        assert got["bytes"] >= got["merged"] + rows * 4 and got["bytes"] % 256 == 0
    assert 100 < split < 1800


def test_few_sequences_fill_the_chip_and_many_are_not_split(choose):
    assert choose(1, 32, 8, 1, 131072)["parts"] * 8 >= SMS
    best = {  # (b, sk): (cluster, sums), the fastest that was measured, or within 5 % of it
        (1, 1024): (4, 1),
        (1, 4096): (1, 8),
        (1, 8192): (1, 16),
        (2, 4096): (1, 8),
        (4, 4096): (1, 8),
        (8, 4096): (2, 1),
        (16, 8192): (2, 1),
        (64, 4096): (1, 1),
    }
    for (b, sk), plan in best.items():
        got = choose(b, 32, 8, 1, sk)
        assert (got["cluster"], got["parts"] // got["cluster"]) == plan, (b, sk)
    assert choose(128, 64, 8, 1, 2048)["parts"] == 1
    before = 128
    for b in (1, 2, 4, 8, 16, 32, 64, 128):
        parts = choose(b, 32, 8, 1, 4096)["parts"]
        assert parts <= before
        before = parts


def test_parts_are_dealt_where_sequences_may_differ(choose):
    """As many to a sequence, were all as long as the cache, as if they were no longer than that."""
    for b, sk in itertools.product((2, 16, 64, 300), (1025, 4096, 70000)):
        whole, dealt = choose(b, 32, 8, 1, sk), choose(b, 32, 8, 1, sk, change=8)
        assert not whole["deal"] and dealt["cluster"] == 1
        parts = dealt["deal"] // b
        assert dealt["deal"] % b == 0 and parts <= 32
        assert dealt["parts"] == min(32, max(8, 2 * parts))
        assert dealt["bytes"] > dealt["parts"] * b * 32 * 128 * 4
    for b, sk, invariant in ((1, 70000, 0), (64, 1024, 0), (64, 4096, 1)):
        assert not choose(b, 32, 8, 1, sk, change=8, invariant=invariant)["deal"]


def test_a_fixed_split_knows_the_keys_alone(choose):
    for sk, d in itertools.product((1, 1000, 1024, 1025, 70000), (64, 128, 256)):
        found = [choose(b, 8, 2, 1, sk, d, invariant=1) for b in (1, 7, 200)]
        assert {x["parts"] for x in found} == {-(-sk // 1024)}
        assert {x["part_blocks"] * x["block_n"] for x in found} == {1024}


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_shared_memory_fits(tmp_path):
    text = ["#include <stdint.h>", "#include <stdio.h>", '#include "dtype.h"', "int main();"]
    prints = []
    for i, v in enumerate(VARIANTS):
        names = dict(x.removeprefix("-D").split("=") for x in v.defines())
        text += [f"#define {name} {value}" for name, value in names.items()]
        text += [f"namespace n{i} {{", '#include "sm90/decode_variant.h"', "}"]
        text += [f"#undef {name}" for name in (*names, "IS_STRIDED")]
        text += [f"#undef FASTATTN_SM90_{x}_H" for x in ("VARIANT", "DECODE_VARIANT")]
        text += ["#undef PASTE", "#undef PASTE_", "#undef PTX_TYPE"]
        text += ["#undef PTX_TYPE_FA_BF16", "#undef PTX_TYPE_FA_F16"]
        prints.append(f'printf("%d ", n{i}::SMEM_BYTES);')
    (tmp_path / "fits.cpp").write_text("\n".join([*text, "int main() {", *prints, "}", ""]))
    command = ["g++", "-std=c++17", *INCLUDES, "fits.cpp", "-o", "fits"]
    subprocess.run(command, cwd=tmp_path, check=True)
    said = subprocess.run([tmp_path / "fits"], capture_output=True, text=True, check=True).stdout
    for v, size in zip(VARIANTS, map(int, said.split()), strict=True):
        assert size <= BLOCK_LIMIT and (size + SYSTEM) * v["blocks_per_sm"] <= SM_LIMIT, v.name
