"""The Hopper backward's kernels themselves, without a GPU: their threads are fibers (hopper.h).

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
import reference_backward
from conftest import python

import gpu_host
from gpu_host import HAS_LEFT, HAS_RIGHT, TOP_LEFT
from gpu_host.test_merging import aligned, described

VARIANTS = [v for v in gpu_host.EVERY_VARIANT if v.name.startswith("sm90_bwd_")]
TESTED = [  # the dtypes share their code
    "sm90_bwd_bf16_d64_128x128",
    "sm90_bwd_f16_d64_128x128_strided",
    "sm90_bwd_bf16_d96_64x128",
    "sm90_bwd_f16_d128_64x128",
    "sm90_bwd_bf16_d192_128_64x64",
    "sm90_bwd_f16_d192_64x64",
    "sm90_bwd_bf16_d256_64x64_strided",
    "sm90_bwd_f16_d256_64x64_pair",
]
CASES = {
    "causal": {"sq": 140, "sk": 200, "hq": 2, "b": 1, "causal": True, "dlse": True},
    "window": {"sq": 150, "sk": 300, "window": (70, 20), "k_lengths": [300, 130]},
    "padding": {
        "sq": 150,
        "sk": 150,
        "causal": "top-left",
        "q_lengths": [110, 0],
        "k_start": [3, 70],
    },
    "columns": {"sq": 70, "sk": 130, "d": -8, "dv": -16, "scale": -0.2},
    "sink": {"sq": 70, "sk": 130, "b": 1, "hq": 2, "window": (-9, 20), "sink": True, "dlse": True},
    "large scores": {"sq": 70, "sk": 130, "b": 1, "factor": 60.0, "causal": True},
    "walks that go round": {"sq": 260, "sk": 130, "b": 1, "hq": 2},
    "only dk": {"sq": 64, "sk": 9, "b": 1, "wanted": ("dk",)},
}
STRIDED = {  # of variants that take any
    "odd": {"sq": 70, "sk": 140, "hq": 2, "d": -3, "dv": -31, "causal": True, "apart": 1},
    "one value, everywhere": {"sq": 70, "sk": 70, "repeated": True, "apart": 8},
    "no dout": {"sq": 70, "sk": 70, "b": 1, "dout": False, "dlse": True},
}
HERE = Path(__file__).parent


def unseen(x, seen):
    """NaN in the rows that are not: (b, h, s, d), (b, s)."""
    x.transpose(0, 2, 1, 3)[~seen] = np.nan


def rows(shape, dtype, apart):
    """An array of NaN with so many elements between its rows, and those."""
    *lead, columns = shape
    whole = aligned((*lead, columns + apart), dtype)
    return whole[..., :columns], whole[..., columns:]


def backward(library, late, scale, masks, lengths, sinks, *arrays, packed=None, scores=None):
    described_ = [None if x is None else described(x) for x in arrays]
    pointers = [None if x is None else ctypes.addressof(x) for x in described_]
    lengths = [None if x is None else np.array(x, np.int32) for x in lengths]
    given = (ctypes.c_void_p * 3)(*(None if x is None else x.ctypes.data for x in lengths))
    masks = (ctypes.c_int32 * 4)(*masks)
    scale = ctypes.c_double(scale)
    both = (ctypes.c_void_p * 2)(*(None if x is None else x.ctypes.data for x in sinks))
    packed = [np.array(x, np.int32) for x in packed or ()]
    cu = (ctypes.c_void_p * 3)(*(x.ctypes.data for x in packed))
    scores = None if scores is None else ctypes.byref(scores)
    return library.backward(
        (ctypes.c_void_p * 10)(*pointers), scale, masks, given, both, cu, scores, late
    )


def run(
    library,
    variant,
    late,
    sq,
    sk,
    b=2,
    hq=1,
    d=0,
    dv=0,
    apart=0,
    dout=True,
    dlse=False,
    repeated=False,
    sink=False,
    factor=1.0,
    wanted=("dq", "dk", "dv"),
    **keywords,
):
    """Complaints about one call."""
    rng = np.random.default_rng(1)
    dtype = {"FA_BF16": ml_dtypes.bfloat16, "FA_F16": np.float16}[variant["dtype"]]
    d, dv = variant["d"] + d, variant["dv"] + dv

    def normal(*shape):
        x, _ = rows(shape, dtype, apart)
        x[:] = rng.standard_normal(shape)
        return x

    q, k, v = normal(b, hq, sq, d), normal(b, 1, sk, d), normal(b, 1, sk, dv)
    q *= dtype(factor)
    dout = normal(b, hq, sq, dv) if dout else None
    if repeated:
        dout = np.broadcast_to(dout[:1, :1, :1, :1], dout.shape)
    dlse = rng.standard_normal((b, hq, sq)).astype(np.float32) if dlse else None
    lengths = [keywords.get(name) for name in ("q_lengths", "k_lengths", "k_start")]
    causal = keywords.get("causal")
    masks = (HAS_RIGHT | (TOP_LEFT if causal == "top-left" else 0), 0, 0, 0) if causal else (0,) * 4
    if "window" in keywords:
        masks = (HAS_LEFT | HAS_RIGHT, *keywords["window"], 0)
    asked = {**keywords, "scale": keywords.get("scale", d**-0.5)}
    sinks = [None, None]
    if sink:
        sinks = [rng.standard_normal(hq).astype(np.float32), np.full(hq, np.nan, np.float32)]
        asked["sink"] = sinks[0]
    exact = reference.attention(q, k, v, **asked)
    limits = {key: x for key, x in asked.items() if key not in ("scale", "sink")}
    seen = reference.visible(b, 1, sq, sk, **limits)[:, 0]
    given = [x if x is None else x.copy() for x in (dout, q, k, v)]
    for x, some in ((q, 2), (k, 1), (v, 1), *([] if dout is None or repeated else [(dout, 2)])):
        unseen(x, seen.any(some))
    out, lse = normal(b, hq, sq, dv), exact.lse.astype(np.float32)
    out[:] = exact.out
    made = {name: rows(x.shape, dtype, apart) for name, x in (("dq", q), ("dk", k), ("dv", v))}
    got = {name: made[name][0] for name in wanted}
    outputs = [got.get(name) for name in made]
    arrays = (q, k, v, out, lse, dout, dlse, *outputs)
    assert backward(library, late, asked["scale"], masks, lengths, sinks, *arrays) == 0
    got |= {"dsink": sinks[1]} if sink else {}
    complaints = [
        f"wrote beside {name}" for name, (_, beside) in made.items() if not np.isnan(beside).all()
    ]
    return complaints + reference_backward.check(got, *given, dlse=dlse, lse=lse, **asked)


def run_apart(module, name, folder):
    """A module's main(), which judges a variant, in a process of its own."""
    variant = next(v for v in VARIANTS if v.name == name)
    flags = (*variant.defines(), f"-I{HERE}/include", "-w", "-O2")  # the build has nvcc warn
    gpu_host.library(HERE / "backward_shim.cpp", folder, *flags)
    code = f"from {module} import main; main({str(folder / 'backward_shim.so')!r}, {name!r})"
    assert python("-c", code) == "right\n"


@gpu_host.marks
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
@pytest.mark.parametrize("name", TESTED)
def test_backward(name, tmp_path):
    run_apart(__name__, name, tmp_path)


def main(path, name):
    library, variant = ctypes.CDLL(path), next(v for v in VARIANTS if v.name == name)
    for late in (0, 1):
        for case, keywords in {**CASES, **(STRIDED if variant["strided"] else {})}.items():
            complaints = run(library, variant, late, **keywords)
            assert not complaints, f"{case}, late={late}: {complaints}"
    print("right")
