"""Which portable variant runs, and whether every GPU has the shared memory for one: on the host."""

import ctypes
import itertools

import pytest

import gpu_host
from gpu_host import EVERY_VARIANT

pytestmark = gpu_host.marks

EVERY = [v for v in EVERY_VARIANT if v.architecture == "sm80"]
VARIANTS = [v for v in EVERY if v.name.startswith("sm80_fwd_")]
LEAST = 99 << 10  # shared memory of a block where there is least: 8.6, 8.9 and 12.x
DTYPES = {"f64": 1, "f32": 2, "f16": 3, "bf16": 4}
KINDS = ("plain", "general")
CHANGES = ("", "mask", "softcap", "alibi", "sink", "dropout")
SHIM = r"""
#include "sm80/bwd_choice.h"
#include "sm80/fwd_choice.h"
const char *chosen(int dtype, int d, int dv, int change, int smem) {
    fa_params p = {.what = {.dtype = dtype, .d = d, .dv = dv}};
    p.scores.mask.data = change == 1 ? &p : 0;
    p.scores.softcap = change == 2 ? 50 : 0;
    p.scores.alibi_slopes = change == 3 ? (const float *)&p : 0;
    p.scores.sink = change == 4 ? (const float *)&p : 0;
    p.dropout.p = change == 5 ? 0.1 : 0;
    const int i = fa_sm80_choose(&p, smem);
    return i < 0 ? 0 : fa_sm80_variants[i].name;
}
const char *chosen_backward(int dtype, int d, int dv, int softcap, int smem) {
    fa_backward r = {.forward = {.what = {.dtype = dtype, .d = d, .dv = dv}}};
    r.forward.scores.softcap = softcap;
    const int i = fa_sm80_choose_bwd(&r, smem);
    return i < 0 ? 0 : fa_sm80_bwd_variants[i].name;
}
int smem(int i) { return i < FA_SM80_VARIANTS ? fa_sm80_smem_bytes(&fa_sm80_variants[i], 1) : 0; }
/* Of b sequences and hq heads, whose mask has b and hq of its own or is broadcast. */
int64_t workspace(int dtype, int b, int hq, int sq, int sk, int64_t stride) {
    static int x;
    fa_params p = {.what = {.b = b, .hq = hq, .hk = hq, .hv = hq, .sq = sq, .sk = sk}};
    p.what.q.shape[2] = sq, p.what.k.shape[2] = sk;
    if (dtype) p.scores.mask.data = &x;
    p.scores.mask_dtype = dtype;
    p.scores.mask.stride[0] = p.scores.mask.stride[1] = stride;
    p.scores.mask.stride[2] = sk, p.scores.mask.stride[3] = 1;
    return fa_sm80_workspace(&p);
}
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    folder = tmp_path_factory.mktemp("portable")
    (folder / "choice.c").write_text(SHIM)
    made = gpu_host.library(folder / "choice.c", folder)
    made.chosen.restype = made.chosen_backward.restype = ctypes.c_char_p
    made.workspace.restype = ctypes.c_int64
    made.workspace.argtypes = [ctypes.c_int] * 5 + [ctypes.c_int64]
    return made


FORWARD_SIZES = {
    **{(name, kind): (64, 128, 256, 512) for name in ("bf16", "f16") for kind in KINDS},
    ("f32", "plain"): (64, 128, 256),
    ("f32", "general"): (64, 128, 512),
    ("f64", "general"): (512,),
}
BACKWARD_SIZES = {
    **{(name, "plain"): (64, 128, 256, 512) for name in ("bf16", "f16")},
    **{(name, "general"): (128, 512) for name in ("bf16", "f16", "f32")},
    ("f32", "plain"): (64, 128),
    ("f64", "general"): (256, 512),
}


def narrowest(sizes, name, general, d):
    """(kind, size) of the least that is wide enough; a plain one before a general one."""
    kinds = KINDS[1:] if general else KINDS
    found = [(s, kind) for kind in kinds for s in sizes.get((name, kind), ()) if s >= d]
    size, kind = min(found, key=lambda x: (x[0], KINDS.index(x[1])))
    return kind, size


def test_the_narrowest_that_is_wide_enough(host):
    """Plain where nothing changes scores; each dtype, size and change has one within 99 KB."""
    sizes = (0, 1, 64, 65, 128, 129, 256, 257, 511, 512)
    for name, d, dv, change in itertools.product(DTYPES, sizes, sizes, range(len(CHANGES))):
        found = host.chosen(DTYPES[name], d, dv, change, LEAST).decode()
        general = CHANGES[change] not in ("", "sink") or name == "f64"
        kind, size = narrowest(FORWARD_SIZES, name, general, max(d, dv))
        assert found == f"sm80_fwd_{name}_d{size}_{kind}"


def test_wider_heads_have_none(host):
    for dtype in DTYPES.values():
        assert host.chosen(dtype, 513, 64, 0, LEAST) is None
        assert host.chosen(dtype, 64, 513, 0, LEAST) is None


def test_the_backwards_too(host):
    """But for float64 beyond d 256, which no block of 99 KB holds."""
    for name, d, change in itertools.product(DTYPES, (0, 64, 65, 200, 257, 512), (0, 1)):
        found = host.chosen_backward(DTYPES[name], d, 1, change, LEAST)
        kind, size = narrowest(BACKWARD_SIZES, name, change or name == "f64", d)
        want = f"sm80_bwd_{name}_d{size}_{kind}"
        assert found == (None if (name, size) == ("f64", 512) else want.encode())
        assert host.chosen_backward(DTYPES[name], d, 1, change, 227 << 10) == want.encode()
    assert host.chosen_backward(DTYPES["f64"], 513, 1, 0, 227 << 10) is None


def test_shared_memory_is_the_gpus(host):
    """A variant that asks for more than the GPU has is passed by."""
    most = max(host.smem(i) for i in range(len(VARIANTS)))
    assert LEAST < most <= 163 << 10
    assert host.chosen(DTYPES["f16"], 256, 200, 0, most) == b"sm80_fwd_f16_d256_wide"
    assert host.chosen(DTYPES["f16"], 256, 200, 0, most - 1) == b"sm80_fwd_f16_d256_plain"
    assert host.chosen(DTYPES["bf16"], 128, 128, 0, 64 << 10)
    assert host.chosen(DTYPES["bf16"], 256, 256, 0, 64 << 10) is None
    assert {host.chosen(2, d, d, 0, most) for d in (64, 128, 256)} == {
        f"sm80_fwd_f32_d{d}_plain".encode() for d in (64, 128, 256)
    }


def test_a_bool_mask_is_packed_and_no_other(host):
    boolean, bf16 = 5, DTYPES["bf16"]
    one, all_of_them = (host.workspace(boolean, 2, 3, 200, 300, n) for n in (0, 60000))
    assert 200 * 300 / 8 <= one < all_of_them <= 7 * one
    assert one % 256 == all_of_them % 256 == 0
    assert host.workspace(0, 2, 3, 200, 300, 0) == host.workspace(bf16, 2, 3, 200, 300, 0) == 0
    assert host.workspace(boolean, 2, 3, 0, 300, 0) == host.workspace(boolean, 2, 3, 9, 0, 0) == 0


@pytest.mark.parametrize("variant", EVERY, ids=lambda v: v.name)
def test_the_kernels_own_constants(variant, tmp_path):
    """It asserts them itself: variant.h compiles for each line of the table."""
    (tmp_path / "alone.cpp").write_text(
        '#include "sm80/variant.h"\n'
        'static_assert(THREADS % 32 == 0 && THREADS <= 1024 && BLOCK_M <= 128, "");\n'
        'static_assert(BLOCK_M / 16 * 32 * COLUMN_WARPS >= THREADS, "");\n'
    )
    gpu_host.library(tmp_path / "alone.cpp", tmp_path, *variant.defines(), "-Wno-unused-variable")
