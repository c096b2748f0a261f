"""The portable forward kernel itself, without a GPU: its threads are fibers (portable.h).

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
from gpu_host import EVERY_VARIANT, HAS_LEFT, HAS_RIGHT, TOP_LEFT
from gpu_host.test_backward_scores import DTYPES as MASK_DTYPES
from gpu_host.test_backward_scores import random_mask
from gpu_host.test_merging import Tensor, aligned, described

HERE = Path(__file__).parent
VARIANTS = {v.name: v for v in EVERY_VARIANT if v.name.startswith("sm80_fwd_")}
TESTED = (
    "sm80_fwd_bf16_d64_plain",  # 32 rows a warp
    "sm80_fwd_bf16_d128_general",
    "sm80_fwd_f32_d64_general",
)
DTYPES = {"FA_BF16": ml_dtypes.bfloat16, "FA_F16": np.float16, "FA_F32": np.float32}
PLAIN = {
    "causal": {"sq": 150, "sk": 210, "hq": 2, "causal": True},
    "top left, odd sizes": {"sq": 70, "sk": 50, "causal": "top-left", "d": -3, "dv": -5},
    "window": {"sq": 130, "sk": 190, "b": 2, "window": (70, 20), "k_lengths": [190, 131]},
    "padding": {"b": 2, "causal": True, "q_lengths": [50, 0], "k_start": [3, 70], "sink": True},
    "padding beside whole blocks": {"b": 2, "q_lengths": [9, 70], "sk": 128},
    "a key a row": {"window": (0, 0), "sq": 100},
    "short heads": {"d": -40, "dv": -40, "sq": 60, "sk": 53},
    "columns": {"sq": 33, "sk": 130, "d": -8, "dv": -16, "scale": -0.2},
    "offsets": {"b": 2, "window": (9, 9), "q_offset": [-20, 45], "apart": 2},
    "large scores": {"sq": 40, "sk": 200, "factor": 60.0},
    "infinite values": {"sq": 20, "sk": 40, "infinite": True},
    "packed": {"lengths": ([40, 0, 70, 1], [50, 9, 0, 130]), "causal": True, "hq": 2},
    "values alike": {"sq": 40, "sk": 200, "alike": True},  # errors of P V's sums do not cancel
}
GENERAL = {
    "softcap": {"softcap": 2.0, "causal": True, "hq": 2},
    "large soft caps": {"softcap": 300.0, "factor": 40.0, "scale": -0.1},
    "alibi": {"alibi": True, "window": (40, 9), "hq": 2},
    "float mask": {"mask": "float32", "b": 2, "hq": 2, "of": (1, 1, 0, 0)},
    "keys alike": {"mask": "float16", "hq": 2, "of": (0, 1, 0, 1), "softcap": 3.0},
    "rows alike": {"mask": "bfloat16", "b": 2, "of": (0, 0, 1, 0), "sk": 130, "apart": 1},
    "bool mask": {"mask": "bool", "hq": 2, "of": (0, 1, 0, 0), "sink": True, "causal": True},
    "hidden blocks": {"mask": "blocks", "hq": 2, "sq": 200, "sk": 400, "b": 2},
    "dropout": {"dropout_p": 0.3, "hq": 2, "b": 2, "causal": True},
    "everything dropped": {"dropout_p": 1.0},
    "all": {"softcap": 5.0, "mask": "float32", "alibi": True, "dropout_p": 0.5, "sink": True},
    "packed mask": {
        "lengths": ([40, 70], [50, 131]),
        "mask": "bool",
        "of": (0, 1, 0, 0),
        "causal": True,
    },
    "packed mask of shorter sequences": {"lengths": ([66, 90], [120, 140]), "mask": "bool"},
}


class Scores(ctypes.Structure):
    _fields_ = [
        ("softcap", ctypes.c_double),
        ("dropout", ctypes.c_double),
        ("seed", ctypes.c_int64),
        ("mask", ctypes.POINTER(Tensor)),
        ("slopes", ctypes.c_void_p),
        ("sink", ctypes.c_void_p),
        ("mask_dtype", ctypes.c_int32),
    ]


def address(x):
    return None if x is None else x.ctypes.data


def masks_of(causal=False, window=None, **_):
    if window:
        return HAS_LEFT | HAS_RIGHT, *window, 0
    return (HAS_RIGHT | (TOP_LEFT if causal == "top-left" else 0) if causal else 0), 0, 0, 0


def forward(library, late, arrays, lengths, cu=None, packed=None, **asked):
    """The status of a call; arrays: q, k, v, out, lse."""
    tensors = (Tensor * 5)(*map(described, arrays))
    pointers = (ctypes.c_void_p * 4)(*map(address, lengths))
    offsets = None if cu is None else (ctypes.c_void_p * 2)(*map(address, cu))
    packed = None if packed is None else (ctypes.c_int32 * 3)(*packed)
    mask = asked.get("mask")
    kind = 0 if mask is None else 5 if mask.dtype == bool else MASK_DTYPES[mask.dtype.name]
    where = None
    if mask is not None:
        whole = np.broadcast_to(mask, (*asked["shape"][:2], *mask.shape[2:]))
        whole = np.broadcast_to(whole, asked["shape"])
        where = ctypes.pointer(described(whole))
    scores = Scores(
        *(asked.get("softcap", 0.0), asked.get("dropout_p", 0.0), asked.get("seed", 0), where),
        *(address(asked.get("alibi_slopes")), address(asked.get("sink")), kind),
    )
    masks = (ctypes.c_int32 * 4)(*masks_of(**asked))
    scale = ctypes.c_double(asked["scale"])
    return library.forward(
        tensors, scale, masks, pointers, offsets, packed, ctypes.byref(scores), late
    )


def inputs(variant, shapes, factor, apart, infinite):
    """q, k and v, columns `apart` bytes from where they would be aligned."""
    rng = np.random.default_rng(1)
    dtype = DTYPES.get(variant["dtype"], np.float64)

    def normal(*shape):
        x = aligned((*shape[:3], shape[3] + apart), dtype)[..., apart:] if apart else None
        x = aligned(shape, dtype) if x is None else x
        x[:] = rng.standard_normal(shape)
        return x

    q, k, v = (normal(*shape) for shape in shapes)
    q *= dtype(factor)
    if infinite:
        v[..., 3, 1], v[..., 5, 2] = np.inf, -np.inf
    return q, k, v


def changes(rng, asked, b, hq, sq, sk, of, mask=None, alibi=False, sink=False, **more):
    asked |= {name: more[name] for name in ("softcap", "dropout_p") if name in more}
    asked |= {"mask": random_mask(rng, mask, b, hq, sq, sk, of)} if mask else {}
    slopes = rng.random((b, hq)).astype(np.float32)
    asked |= {"alibi_slopes": slopes} if alibi else {}
    asked |= {"sink": rng.standard_normal(hq).astype(np.float32)} if sink else {}
    asked |= {"seed": 7} if "dropout_p" in more else {}


LIMITS = ("causal", "window", "q_offset", "q_lengths", "k_lengths", "k_start", "mask")


def run(library, variant, late, b=1, hq=1, sq=70, sk=100, d=0, dv=0, factor=1.0, **keywords):
    """Complaints about one call."""
    rng = np.random.default_rng(2)
    d, dv = variant["d"] + d, variant["d"] + dv
    shapes = (b, hq, sq, d), (b, 1, sk, d), (b, 1, sk, dv)
    apart, infinite = keywords.get("apart", 0), keywords.get("infinite", False)
    q, k, v = inputs(variant, shapes, factor, apart, infinite)
    if keywords.get("alike"):
        v[:] = v[:, :, :1]
    asked = {name: keywords[name] for name in LIMITS if name in keywords and name != "mask"}
    asked["scale"] = keywords.get("scale", d**-0.5)
    changes(rng, asked, b, hq, sq, sk, **{"of": (0, 0, 0, 0), **keywords})
    limits = {name: asked[name] for name in LIMITS if name in asked}
    seen = reference.visible(b, hq, sq, sk, **limits)
    given = [x.copy() for x in (q, k, v)]
    q.transpose(0, 2, 1, 3)[~seen.any((1, 3))] = np.nan
    for x in (k, v):
        x.transpose(0, 2, 1, 3)[~seen.any((1, 2))] = np.nan
    wide = aligned((b, hq, sq, dv + apart), q.dtype)
    out = wide[..., apart:]
    lse = aligned((b, hq, sq), reference.lse_dtype(q.dtype))
    lengths = [asked.get(x) for x in ("q_lengths", "k_lengths", "k_start", "q_offset")]
    lengths = [None if x is None else np.array(x, np.int32) for x in lengths]
    arrays = q, k, v, out, lse
    assert forward(library, late, arrays, lengths, shape=(b, hq, sq, sk), **asked) == 0
    if not np.isnan(wide[..., :apart].astype(float)).all():
        return ["wrote beside out"]
    return reference.check(np.ascontiguousarray(out), lse, *given, **asked)


def run_packed(library, variant, late, lengths, hq=1, **keywords):
    """Complaints about sequences that lie end to end, rows of none behind them."""
    rng = np.random.default_rng(2)
    d, b = variant["d"], len(lengths[0])
    cu = [np.cumsum([0, *x]).astype(np.int32) for x in lengths]
    total_q, total_k = cu[0][-1] + 5, cu[1][-1] + 5
    shapes = (1, hq, total_q, d), (1, 1, total_k, d), (1, 1, total_k, d)
    q, k, v = inputs(variant, shapes, 1.0, 0, False)
    asked = {name: keywords[name] for name in ("causal",) if name in keywords}
    asked["scale"] = d**-0.5
    sq, sk = max(lengths[0]), max(lengths[1])
    changes(rng, asked, b, hq, sq, sk, **{"of": (0, 0, 0, 0), **keywords})
    out = aligned((1, hq, total_q, d), q.dtype)
    lse = aligned((1, hq, total_q), reference.lse_dtype(q.dtype))
    k[:, :, cu[1][-1] :] = v[:, :, cu[1][-1] :] = np.nan
    given = [x.copy() for x in (q, k, v)]
    for n in range(b):
        keys = slice(cu[1][n], cu[1][n + 1])
        own = {"causal": asked.get("causal", False)}
        if "mask" in asked:
            own["mask"] = asked["mask"][n : n + 1, :, : lengths[0][n], : lengths[1][n]]
        seen = reference.visible(1, hq, lengths[0][n], lengths[1][n], **own).any((0, 1, 2))
        for x in (k, v):
            x[0, :, keys][:, ~seen] = np.nan
    arrays, none = (q, k, v, out, lse), [None] * 4
    shape = (b, hq, sq, sk)
    assert forward(library, late, arrays, none, cu, (b, sq, sk), shape=shape, **asked) == 0
    complaints = []
    if out[:, :, cu[0][-1] :].astype(float).any() or (lse[:, :, cu[0][-1] :] > -np.inf).any():
        complaints.append("rows of no sequence are not empty")
    for n in range(b):
        (first, end), (k_first, k_end) = cu[0][n : n + 2], cu[1][n : n + 2]
        own = {**asked}
        if "mask" in own:
            own["mask"] = own["mask"][n : n + 1, :, : end - first, : k_end - k_first]
        parts = given[0][:, :, first:end], *(x[:, :, k_first:k_end] for x in given[1:])
        if end > first:
            complaints += reference.check(out[:, :, first:end], lse[:, :, first:end], *parts, **own)
    return complaints


def cases_of(variant, plain, general):
    """(name, keywords): what a variant of TESTED adds to the others; of wide heads, which take
    long, a few small ones."""
    plain = list(plain.items())
    general = list(general.items()) if variant["general"] else []
    if variant["d"] < 256:
        of_float32 = variant["dtype"] == "FA_F32"
        return plain[:: 2 if general else 1] + general[:: 3 if of_float32 else 1]
    small = {"hq": 1, "sq": 40, "sk": 70}
    packed = {"lengths", "packed"}
    return [(x, y if packed & y.keys() else y | small) for x, y in (plain + general)[::5]]


@gpu_host.marks
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
@pytest.mark.parametrize("name", TESTED)
def test_forward(name, tmp_path):
    quiet = ("-w", "-O2")  # the build has nvcc warn
    gpu_host.library(HERE / "portable_shim.cpp", tmp_path, *VARIANTS[name].defines(), *quiet)
    path = tmp_path / "portable_shim.so"
    assert python("-c", f"from {__name__} import main; main({str(path)!r}, {name!r})") == "right\n"


def main(path, name):
    library, variant = ctypes.CDLL(path), VARIANTS[name]
    for number, (case, keywords) in enumerate(cases_of(variant, PLAIN, GENERAL)):
        runs = run_packed if "lengths" in keywords else run
        complaints = runs(library, variant, number % 2, **keywords)
        assert not complaints, f"{case}: {complaints}"
    print("right")
