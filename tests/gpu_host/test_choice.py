"""Which variant runs a call."""

import ast
import ctypes
import itertools

import pytest

import gpu_host
from gpu_host import BF16, F16, LOADS, SMS, TESTS, VARIANTS, shapes

pytestmark = gpu_host.marks


@pytest.mark.parametrize("change", range(6))
@pytest.mark.parametrize("odd", [0, 2])
def test_every_head_size_has_its_variant(host, odd, change):
    """The tightest variant that holds d and dv, whatever the rest of the shape. `odd` is
    the address of v: 2 is one that the copy engine cannot load from. What changes scores has
    general variants of its own; a `change` of 0 is none, 4 a sink."""
    dtypes, general = {"FA_F16": F16, "FA_BF16": BF16}, change not in (0, 4)
    way = 0 if not odd else 1 if general else 3
    for (name, dtype), d, dv in itertools.product(
        dtypes.items(), range(1, 257, 5), (64, 128, 192, 256)
    ):
        fits = [
            v["d"] + v["dv"]
            for v in VARIANTS
            if (v["dtype"], v["loads"], v["general"]) == (name, LOADS[way], general)
            and v["d"] >= d
            and v["dv"] >= dv
        ]
        for (b, hq, hk, sq, sk), flags, lse in zip(
            shapes(4), (0, 2, 3, 6), (0, 1, 1, 0), strict=True
        ):
            i = host.choose(dtype, b, hq, hk, sq, sk, d, dv, 0, odd, flags, lse, change, SMS)
            got = [host.variant_field(i, field) for field in range(6)]
            assert got[0] == dtype and got[1] >= d and got[2] >= dv and got[3] == way
            assert got[5] == general
            assert got[1] + got[2] == min(fits) and not (lse and got[4])


def test_heads_that_begin_anywhere_in_a_row(host):
    """The copy engine brings them if rows are multiples of 16 bytes, and a head fits one of the
    table from the 16 bytes on that it begins in; Q's and K's columns must lie in the same places.
    """

    def name(*arguments, softcap=0.0):
        i = host.choose_heads_beside(*arguments, ctypes.c_float(softcap), SMS)
        return host.variant_name(i).decode().split("bf16_")[1]

    for d in range(1, 257):
        slack = 0 if d % 8 == 0 else 7
        fits = [size for size in (64, 128, 256) if size >= d + slack]
        assert name(8, 8, d, d, 8, softcap=1.0).endswith("strided" if d % 8 else "general")
        if d % 8 == 0:
            assert "slices" not in name(8, 8, d, d, 8)
        else:
            assert name(8, 8, d, d, 8) == (f"d{fits[0]}_slices" if fits else "d256_strided")
        if d < 250:  # rows of 2 bytes more than 16
            assert name(8, 8, d, d, 1).endswith("_strided")
    assert name(16, 8, 65, 65, 0) == name(16, 8, 65, 64, 0) == "d128_strided"
    assert name(16, 8, 64, 65, 0) == name(8, 8, 64, 65, 0) == "d128_slices"
    assert name(8, 8, 128, 124, 0) == "d256_slices"
    assert name(1, 1, 65, 65, 7) == "d128_slices"


@pytest.mark.parametrize("which", "kv")
def test_rows_side_by_side_come_as_they_lie(host, which):
    """Those of K and V that begin on less than 8 bytes; whole heads may lie anywhere."""

    def loads(b=2, h=4, s=300, d=64, step=1, pitch=None, base=0, head=None, softcap=0.0):
        pitch = d if pitch is None else pitch
        head = s * pitch if head is None else head
        shape, stride = (b, h, s, d), (h * head, head, pitch, step)
        args = [(ctypes.c_int64 * 4)(*x) for x in (shape, stride)]
        i = host.choose_one(ord(which), ctypes.c_int64(base), *args, ctypes.c_float(softcap))
        return LOADS[host.variant_field(i, 3)].removeprefix("FA_").lower()

    assert loads() == loads(pitch=72) == "boxes"
    assert (
        loads(d=65) == loads(d=66) == loads(pitch=65) == loads(pitch=66) == loads(base=2) == "raw"
    )
    anywhere = "raw" if which == "k" else "slices"  # K's columns must lie where Q's do
    assert loads(head=300 * 64 + 2) == anywhere and loads(head=300 * 64 + 1) == "raw"
    assert loads(pitch=127) == loads(d=1, pitch=2) == loads(d=3, pitch=0, head=3) == "raw"
    assert loads(pitch=129) == loads(d=1, pitch=3) == "strided"  # too far from each other
    assert loads(d=100) == loads(pitch=68) == loads(base=8) == "strided"  # on 8 bytes
    assert loads(step=2, pitch=130) == loads(pitch=-65) == loads(head=-19201) == "strided"
    assert loads(d=65, softcap=1.0) == "strided"
    assert loads(d=1, step=7, pitch=1) == loads(d=1, step=-7, pitch=1) == "strided"


@pytest.mark.parametrize(
    ("d", "base", "expected"),
    [
        (96, 0, "d96_2x128"),
        (88, 0, "d96_3x96"),
        (96, 16, "d96_3x96"),
        (112, 0, "d128_2x128"),
        (104, 0, "d128_3x64"),
    ],
)
def test_rows_that_begin_on_16_bytes_are_read_for_taller_tiles(host, d, base, expected):
    """They come at half the speed (measured: 1.1 to 1.3 times faster by the taller tiles)."""
    shape, stride = (16, 16, 1024, d), (16 * 1024 * d, 1024 * d, d, 1)
    args = [(ctypes.c_int64 * 4)(*x) for x in (shape, stride)]
    i = host.choose_one(ord("k"), ctypes.c_int64(base), *args, ctypes.c_float(0))
    assert host.variant_name(i).decode() == f"sm90_fwd_bf16_{expected}"


CAUSAL = 2
BEST = [  # (b, h, s, d, causal): the variant that was fastest, or nearly, when all were measured
    ((4, 16, 4096, 128, 0), "d128_3x64"),
    ((1, 16, 16384, 128, 0), "d128_3x64"),
    ((1, 16, 16384, 128, CAUSAL), "d128_3x64"),
    ((16, 16, 1024, 128, 0), "d128_2x128"),
    ((4, 16, 4096, 128, CAUSAL), "d128_2x128"),
    ((2, 16, 8192, 128, CAUSAL), "d128_2x128"),
    ((1, 8, 2048, 128, 0), "d128_2x64"),
    ((2, 8, 1024, 128, 0), "d128_2x64"),
    ((32, 16, 512, 128, 0), "d128_2x64"),
    ((32, 16, 512, 128, CAUSAL), "d128_2x64"),
    ((8, 16, 2048, 128, CAUSAL), "d128_2x64"),
    ((4, 8, 1024, 128, CAUSAL), "d128_2x64"),
    ((512, 8, 64, 128, 0), "d128_1x64"),
    ((1, 8, 256, 128, 0), "d128_1x64"),
    ((1, 8, 1024, 128, CAUSAL), "d128_1x64"),
    ((1, 1, 8192, 128, 0), "d128_1x128"),
    ((1, 3, 4096, 128, CAUSAL), "d128_1x128"),
    ((4, 32, 4096, 64, 0), "d64_4x64"),
    ((16, 96, 512, 64, 0), "d64_4x64"),
    ((16, 96, 512, 64, CAUSAL), "d64_4x64"),
    ((64, 8, 256, 64, 0), "d64_4x64"),
    ((64, 8, 128, 64, 0), "d64_2x64"),
    ((8, 8, 256, 64, 0), "d64_2x64"),
    ((4, 8, 512, 64, CAUSAL), "d64_2x64"),
    ((512, 8, 64, 64, 0), "d64_1x64"),
    ((1, 8, 256, 64, 0), "d64_1x64"),
    ((8, 8, 128, 64, 0), "d64_1x64"),
    ((1, 1, 8192, 64, 0), "d64_1x128"),
    ((1, 8, 1024, 64, CAUSAL), "d64_1x128"),
    ((1, 8, 4096, 64, CAUSAL), "d64_1x128"),
    ((4, 16, 4096, 80, CAUSAL), "d80_3x96"),
    ((8, 16, 2048, 80, CAUSAL), "d80_2x128"),
    ((1, 140, 3412, 80, CAUSAL), "d80_2x128"),  # not measured: as its weight says, by little
    ((8, 16, 2048, 96, 0), "d96_3x96"),
    ((16, 8, 1024, 256, 0), "d256_2x64"),
    ((32, 8, 512, 256, 0), "d256_2x64"),
    ((32, 8, 512, 256, CAUSAL), "d256_2x64"),
]


BEST_F16 = [  # where it differs: 128 keys at a time follow P, 64 watch every score
    ((4, 16, 4096, 128, 0), "d128_2x128"),
    ((1, 16, 16384, 128, CAUSAL), "d128_2x128"),
    ((8, 16, 2048, 128, CAUSAL), "d128_2x128"),
    ((32, 16, 512, 128, 0), "d128_2x128"),
    ((32, 16, 512, 128, CAUSAL), "d128_2x64"),
]


@pytest.mark.parametrize(
    ("dtype", "shape", "expected"),
    [("bf16", *best) for best in BEST] + [("f16", *best) for best in BEST_F16],
)
def test_the_fastest_variant_is_chosen(host, dtype, shape, expected):
    b, h, s, d, flags = shape
    number = {"bf16": BF16, "f16": F16}[dtype]
    i = host.choose(number, b, h, h, s, s, d, d, 0, 0, flags, 0, 0, SMS)
    assert host.variant_name(i).decode() == f"sm90_fwd_{dtype}_{expected}"


def constants(name):
    """What a file of tests assigns, {name: its source's tree}: to import it takes a GPU."""
    tree = ast.parse((TESTS / name).read_text())
    return {ast.unparse(n.targets[0]): n.value for n in tree.body if isinstance(n, ast.Assign)}


def check_every_variant(host, shapes):
    """Each variant of boxes without pages is the best for one of (b, h, sq, sk, d, dv), with or
    without a change."""
    chosen = {
        host.choose(dtype, b, h, h, sq, sk, d, dv, 0, 0, 0, lse, change, SMS)
        for dtype, (b, h, sq, sk, d, dv), (lse, change) in itertools.product(
            (F16, BF16), shapes, [(0, 0), (1, 0), (0, 2)]
        )
    }
    boxes = {i for i, v in enumerate(VARIANTS) if v["loads"] == "FA_BOXES" and not v["paged"]}
    assert chosen == boxes, {VARIANTS[i]["name"] for i in boxes - chosen}


def test_small_cases_reach_every_variant(host):
    """The sizes and shapes of small_calls.py, which the sanitizers run."""
    values = constants("gpu/small_calls.py")
    sizes, of_shapes = (ast.literal_eval(values[name]) for name in ("SIZES", "SHAPES"))
    check_every_variant(host, [(*shape, *size) for shape in of_shapes for size in sizes])


def test_hostile_inputs_reach_every_variant(host):
    check_every_variant(host, ast.literal_eval(constants("gpu/test_hostile.py")["SHAPES"]))


def test_no_variant_for_other_dtypes(host):
    for dtype in (1, 2, 5):
        assert host.choose(dtype, 1, 1, 1, 64, 64, 64, 64, 0, 0, 0, 0, 0, SMS) == -1


def test_batch_invariant_choice_sees_one_sequence(host):
    for b, hq, hk, sq, sk in shapes(500):
        for d in (64, 128, 256):
            for change in (0, 1):
                chosen = {
                    host.choose(BF16, n, hq, hk, sq, sk, d, d, 1, base, 0, 0, change, SMS)
                    for n in (1, 2, b, 4096)
                    for base in (0, 16)  # where a part of a batch begins
                }
                assert len(chosen) == 1


def test_tma_limits(host):
    four = ctypes.c_int64 * 4

    def takes(base, shape, stride):
        return bool(host.tma_takes(ctypes.c_int64(base), four(*shape), four(*stride)))

    shape = (2, 3, 100, 64)
    assert takes(1024, shape, (19200, 6400, 64, 1))
    assert takes(1024, shape, (0, 0, 64, 1))  # expanded
    assert not takes(1024, shape, (19200, 6400, 0, 1))  # one row, over and over
    assert takes(1024, (1, 3, 100, 64), (7, 6400, 64, 1))  # the stride of one element means nothing
    assert not takes(1026, shape, (19200, 6400, 64, 1))
    assert not takes(1024, shape, (19200, 6400, 65, 1))
    assert not takes(1024, shape, (19200, 6404, 64, 1))
    assert not takes(1024, shape, (19200, 6400, -64, 1))
    assert not takes(1024, shape, (19200, 6400, 64, 2))
    assert not takes(1024, shape, (1 << 40, 6400, 64, 1))


def test_packed_choice(host):
    """By the mean length; with batch_invariant by no length at all. Score changes have one variant
    per head size and strides."""

    def name(*arguments, softcap=0, odd=0):
        i = host.choose_packed(*arguments, softcap, odd, SMS)
        return host.variant_name(i).decode().split("bf16_")[1]

    assert name(64, 16, 64 * 2048, 8192, 128, 0, CAUSAL) == "d128_2x128"
    assert name(100_000, 2, 100_000 * 32, 64, 128, 0, 0) == "d128_1x64"
    assert name(100_000, 2, 100_000 * 32, 20_000, 64, 0, 0) == "d64_1x64"
    for d in (64, 128, 256):
        assert len({name(b, 8, t, s, d, 1, 2) for b, t, s in [(1, 9, 9), (64, 10**6, 10**5)]}) == 1
        for b, total, longest in [(1, 9, 9), (64, 10**6, 10**5), (100_000, 10**6, 64)]:
            shape = b, 8, total, longest, d, 0, CAUSAL
            assert name(*shape, softcap=5) == f"d{d}_general"
            assert name(*shape, softcap=5, odd=2) == f"d{d}_general_strided"
