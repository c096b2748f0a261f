"""The Hopper forward kernel itself, without a GPU: its threads are fibers (hopper.h).

A fault may end a process, or keep its threads waiting for ever: each variant has a process of its
own.
"""

import ctypes
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import reference
from conftest import python

import gpu_host
from gpu_host import HAS_LEFT, HAS_RIGHT
from gpu_host.test_merging import aligned, described

VARIANTS = (
    "sm90_fwd_bf16_d128_2x128",  # keeps its offsets: tiles come again
    "sm90_fwd_bf16_d64_4x64",  # row sums from a block of ones, no lse
    "sm90_fwd_f16_d64_1x128",  # follows its offsets
    "sm90_fwd_bf16_d64_1x64",  # P V 16 keys at a time
)
CASES = {
    "causal": {"sq": 330, "sk": 460, "hq": 2, "causal": True},
    "window": {"sq": 200, "sk": 300, "window": (70, 20), "k_lengths": [300, 130]},
    "padding": {"sq": 200, "sk": 200, "causal": True, "q_lengths": [150, 0], "k_start": [3, 70]},
    "columns": {"sq": 70, "sk": 130, "d": -8, "dv": -16, "scale": -0.2},
    "large scores": {"sq": 300, "sk": 500, "b": 1, "factor": 60.0},
}
HERE = Path(__file__).parent


def variant_of(name):
    return next(v for v in gpu_host.VARIANTS if v.name == name)


def unseen(x, seen):
    """NaN in the rows that are not: (b, h, s, d), (b, s)."""
    x.transpose(0, 2, 1, 3)[~seen] = np.nan


def run(library, variant, late, sq, sk, b=2, hq=1, d=0, dv=0, factor=1.0, **keywords):
    """Complaints about one call, on two multiprocessors."""
    rng = np.random.default_rng(1)
    dtype = {"FA_BF16": ml_dtypes.bfloat16, "FA_F16": np.float16}[variant["dtype"]]
    d, dv = variant["d"] + d, variant["dv"] + dv

    def normal(*shape):
        x = aligned(shape, dtype)
        x[:] = rng.standard_normal(shape)
        return x

    q, k, v = normal(b, hq, sq, d), normal(b, 1, sk, d), normal(b, 1, sk, dv)
    q *= dtype(factor)
    lengths = [keywords.get(name) for name in ("q_lengths", "k_lengths", "k_start")]
    lengths = [None if x is None else np.array(x, np.int32) for x in lengths]
    if keywords.get("causal"):
        masks = HAS_RIGHT, 0, 0
    else:
        masks = (HAS_LEFT | HAS_RIGHT, *keywords["window"]) if "window" in keywords else (0, 0, 0)
    exact_of = {**keywords, "scale": keywords.get("scale", d**-0.5)}
    wide = reference.widen(v, b * hq * sq)
    exact = reference.attention(q, k, wide, **exact_of)
    low = list(reference.careful(q, k, wide, **exact_of))
    limits = {key: x for key, x in exact_of.items() if key != "scale"}
    seen = reference.visible(b, 1, sq, sk, **limits)[:, 0]
    unseen(q, seen.any(2))
    unseen(k, seen.any(1))
    unseen(v, seen.any(1))
    out, lse = aligned((b, hq, sq, dv), dtype), aligned((b, hq, sq), np.float32)
    arrays = [ctypes.byref(described(x)) for x in (q, k, v, out)]
    arrays.append(None if variant["ones"] else ctypes.byref(described(lse)))
    pointers = (ctypes.c_void_p * 3)(*(None if x is None else x.ctypes.data for x in lengths))
    scale = ctypes.c_double(exact_of["scale"])
    status = library.forward(*arrays, scale, (ctypes.c_int32 * 3)(*masks), pointers, 2, late)
    assert status == 0
    return reference.judge(out, None if variant["ones"] else lse, exact, low, v)


@gpu_host.marks
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
@pytest.mark.parametrize("name", VARIANTS)
def test_forward(name, tmp_path):
    quiet = ("-w", "-O2")  # the build has nvcc warn
    flags = (*variant_of(name).defines(), f"-I{HERE}/include", *quiet)
    gpu_host.library(HERE / "forward_shim.cpp", tmp_path, *flags)
    code = f"from {__name__} import main; main({str(tmp_path / 'forward_shim.so')!r}, {name!r})"
    assert python("-c", code) == "right\n"


def main(path, name):
    library, variant = ctypes.CDLL(path), variant_of(name)
    for late in (0, 1):
        for case, keywords in CASES.items():
            complaints = run(library, variant, late, **keywords)
            assert not complaints, f"{case}, late={late}: {complaints}"
    print("right")
