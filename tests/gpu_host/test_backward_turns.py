"""Deterministic gradients of the Hopper backward, without a GPU, as test_backward_kernel.py: its
blocks run side by side, in orders of their own.
"""

import ctypes
import shutil

import ml_dtypes
import numpy as np
import pytest
from conftest import python

import gpu_host
from gpu_host import HAS_LEFT, HAS_RIGHT
from gpu_host.test_backward_kernel import HERE, VARIANTS, backward, rows
from gpu_host.test_backward_scores import DTYPES, Scores
from gpu_host.test_merging import described

TESTED = [
    "sm90_bwd_bf16_d128_64x128",
    "sm90_bwd_bf16_d64_general",
]
CU_Q, CU_K = [0, 20, 20, 150, 160, 165], [0, 9, 140, 400, 400, 410]
CAUSAL = (HAS_RIGHT, 0, 0, 0)
CASES = {
    "grouped heads": {"hq": 4, "hk": 2},
    "lengths": {"b": 2, "lengths": ([140, 60], [300, 200], [0, 150]), "masks": CAUSAL},
    "window": {"masks": (HAS_LEFT | HAS_RIGHT, 130, 20, 0), "hk": 2, "hq": 2},
    "keys on the left": {"masks": (HAS_LEFT, 90, 0, 0), "sk": 260},
    "packed": {"packed": (CU_Q, CU_K), "sq": 170, "sk": 420, "masks": CAUSAL},
}
MASKED = {"bool mask": {"mask": True, "hq": 2, "hk": 2}}  # of general variants


def run(library, variant, late, b=1, hq=1, hk=1, sq=150, sk=300, masks=(0,) * 4, **keywords):
    """dq, dk and dv of a call, and the bits of dQ's sums."""
    rng = np.random.default_rng(3)
    dtype = {"FA_BF16": ml_dtypes.bfloat16, "FA_F16": np.float16}[variant["dtype"]]
    d, dv = variant["d"] - 3 * variant["strided"], variant["dv"]

    def normal(*shape):
        x, _ = rows(shape, dtype, 0)
        x[:] = rng.standard_normal(shape)
        return x

    q, k, v = normal(b, hq, sq, d), normal(b, hk, sk, d), normal(b, hk, sk, dv)
    out, dout = normal(b, hq, sq, dv), normal(b, hq, sq, dv)
    lse = rng.uniform(5, 9, (b, hq, sq)).astype(np.float32)
    made = [rows(x.shape, dtype, 0)[0] for x in (q, k, v)]
    packed, scores = keywords.get("packed"), Scores()
    if packed:
        packed = *packed, [len(CU_Q) - 1, *(max(np.diff(x)) for x in packed)]
    if "mask" in keywords:  # hides whole blocks, too
        mask = rng.random((b, hq, sq, sk)) < 0.5
        mask[:, 0, :128, 128:256] = mask[:, 1, :, :256] = False
        scores.mask, scores.mask_dtype = ctypes.pointer(described(mask)), DTYPES["bool"]
    lengths = keywords.get("lengths", (None,) * 3)
    arrays = (q, k, v, out, lse, dout, None, *made)
    more = {"packed": packed, "scores": scores}
    assert backward(library, late, d**-0.5, masks, lengths, (None, None), *arrays, **more) == 0
    return *made, np.uint64(library.bits_of_sums())


@gpu_host.marks
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
@pytest.mark.parametrize("name", TESTED)
def test_the_same_bits_in_any_order(name, tmp_path):
    variant = next(v for v in VARIANTS if v.name == name)
    flags = (*variant.defines(), f"-I{HERE}/include", "-w", "-O2")
    gpu_host.library(HERE / "backward_shim.cpp", tmp_path, *flags)
    code = f"from {__name__} import main; main({str(tmp_path / 'backward_shim.so')!r}, {name!r})"
    assert python("-c", code) == "right\n"


def main(path, name):
    library, variant = ctypes.CDLL(path), next(v for v in VARIANTS if v.name == name)
    library.bits_of_sums.restype = ctypes.c_uint64

    def ordered(deterministic, seed, late, keywords):
        library.set_order(deterministic, ctypes.c_uint64(seed))
        return run(library, variant, late, **keywords)

    orders_count = False
    for case, keywords in {**CASES, **(MASKED if variant["general"] else {})}.items():
        first, again = ordered(1, 0x1771, 0, keywords), ordered(1, 0x7117, 1, keywords)
        same = [x.tobytes() == y.tobytes() for x, y in zip(first, again, strict=True)]
        assert all(same), f"{case}: {same}"
        # Free, dk and dv have an order of their own, always the same.
        free, other = ordered(0, 0x7117, 0, keywords), ordered(0, 0x1771, 1, keywords)
        assert free[1].tobytes() == other[1].tobytes() and free[2].tobytes() == other[2].tobytes()
        for x, y in zip(first[:3], free[:3], strict=True):
            x, y = x.astype(np.float32), y.astype(np.float32)
            assert np.abs(x - y).max() < 0.01 * np.abs(y).max(), case
        orders_count |= first[-1] != free[-1]
    assert orders_count
    print("right")
