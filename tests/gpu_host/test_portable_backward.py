"""The portable backward's kernels themselves, without a GPU, as test_portable_kernel.py."""

import ctypes
import shutil
from pathlib import Path

import numpy as np
import pytest
import reference
import reference_backward
from conftest import python

import gpu_host
from gpu_host import EVERY_VARIANT
from gpu_host.test_backward_kernel import backward, rows
from gpu_host.test_backward_scores import DTYPES as MASK_DTYPES
from gpu_host.test_backward_scores import Scores
from gpu_host.test_merging import described
from gpu_host.test_portable_kernel import DTYPES, cases_of, changes, masks_of

HERE = Path(__file__).parent
VARIANTS = {v.name: v for v in EVERY_VARIANT if v.name.startswith("sm80_bwd_")}
TESTED = (
    "sm80_bwd_bf16_d128_general",
    "sm80_bwd_f32_d128_general",
)
PLAIN = {
    "causal": {"sq": 100, "sk": 140, "hq": 2, "causal": True, "dlse": True},
    "window": {"sq": 90, "sk": 150, "b": 2, "window": (40, 20), "k_lengths": [150, 70]},
    "padding": {"b": 2, "causal": "top-left", "q_lengths": [50, 0], "k_start": [3, 70]},
    "padding beside whole blocks": {"b": 2, "q_lengths": [9, 70], "k_lengths": [128, 64]},
    "columns": {"sq": 30, "sk": 70, "d": -8, "dv": -16, "scale": -0.2},
    "odd": {"sq": 40, "sk": 70, "d": -3, "dv": -31, "causal": True, "apart": 1},
    "sink": {"sq": 50, "sk": 70, "hq": 2, "window": (-9, 20), "sink": True, "dlse": True},
    "large scores": {"sq": 40, "sk": 70, "factor": 30.0, "causal": True},
    "no dout": {"sq": 40, "sk": 70, "dout": False, "dlse": True},
    "only dk": {"sq": 40, "sk": 9, "wanted": ("dk",)},
    "packed": {"packed": ([40, 0, 70, 1], [50, 9, 0, 130]), "causal": True, "hq": 2},
}
GENERAL = {
    "softcap": {"softcap": 2.0, "causal": True, "hq": 2},
    "softcap of rows without keys": {"softcap": 2.0, "sq": 90, "sk": 40, "causal": True},
    "alibi": {"alibi": True, "window": (40, 9), "hq": 2},
    "float mask": {"mask": "float32", "b": 2, "hq": 2, "of": (1, 1, 0, 0), "dmask": True},
    "keys alike": {"mask": "float16", "hq": 2, "of": (0, 1, 0, 1), "softcap": 3.0, "dmask": True},
    "rows alike": {"mask": "bfloat16", "b": 2, "of": (0, 0, 1, 0), "causal": True, "dmask": True},
    "one number": {"mask": "float32", "hq": 2, "of": (1, 1, 1, 1), "dlse": True, "dmask": True},
    "packed float mask": {"packed": ([40, 0, 90], [50, 9, 70]), "mask": "float32", "dmask": True},
    "bool mask": {"mask": "bool", "hq": 2, "of": (0, 1, 0, 0), "sink": True, "causal": True},
    "dropout": {"dropout_p": 0.3, "hq": 2, "b": 2, "causal": True},
    "everything dropped": {"dropout_p": 1.0, "dlse": True},
    "all": {"softcap": 5.0, "mask": "bool", "alibi": True, "dropout_p": 0.5, "sink": True},
    "packed mask": {"packed": ([40, 70], [50, 131]), "mask": "bool", "causal": True},
    "packed mask of shorter sequences": {"packed": ([66, 90], [120, 140]), "mask": "bool"},
}
LIMITS = ("causal", "window", "q_lengths", "k_lengths", "k_start", "scale")


def scores_of(asked, shape):
    """What changes scores; what it points to is to be kept."""
    scores = Scores(asked.get("softcap", 0), asked.get("dropout_p", 0), asked.get("seed", 0))
    whole = None
    if "mask" in asked:
        scores.mask_dtype = MASK_DTYPES[asked["mask"].dtype.name]
        whole = described(np.broadcast_to(asked["mask"], shape))
        scores.mask = ctypes.pointer(whole)
    if "alibi_slopes" in asked:
        scores.slopes = asked["alibi_slopes"].ctypes.data
    return scores, whole


def wanted_mask(scores, asked):
    made = rows(asked["mask"].shape, asked["mask"].dtype, 0)[0]
    scores.dmask = ctypes.pointer(described(made))
    return made


def run(
    library,
    variant,
    late,
    b=1,
    hq=1,
    sq=70,
    sk=100,
    d=0,
    dv=0,
    apart=0,
    factor=1.0,
    dout=True,
    dlse=False,
    dmask=False,
    wanted=("dq", "dk", "dv"),
    **keywords,
):
    """Complaints about one call; what no row sees is NaN."""
    rng = np.random.default_rng(1)
    dtype = np.dtype(DTYPES.get(variant["dtype"], np.float64))
    real = reference.lse_dtype(dtype)
    d, dv = variant["d"] + d, variant["d"] + dv

    def normal(*shape):
        x, _ = rows(shape, dtype, apart)
        x[:] = rng.standard_normal(shape)
        return x

    q, k, v = normal(b, hq, sq, d), normal(b, 1, sk, d), normal(b, 1, sk, dv)
    q *= dtype.type(factor)
    out, dout = normal(b, hq, sq, dv), normal(b, hq, sq, dv) if dout else None
    dlse = rng.standard_normal((b, hq, sq)).astype(real) if dlse else None
    asked = {name: keywords[name] for name in LIMITS if name in keywords}
    asked.setdefault("scale", d**-0.5)
    changes(rng, asked, b, hq, sq, sk, **{"of": (0, 0, 0, 0), **keywords})
    exact = reference.attention(q, k, v, **asked)
    out[:], lse = exact.out, exact.lse.astype(real)
    given = [x if x is None else x.copy() for x in (dout, q, k, v)]
    for x in (q, *([] if dout is None else [dout])):
        x[~exact.seen.any(3)] = np.nan
    for x in (k, v):
        x[~exact.seen.any((1, 2))[:, None]] = np.nan
    made = {name: rows(x.shape, dtype, apart) for name, x in (("dq", q), ("dk", k), ("dv", v))}
    got = {name: made[name][0] for name in wanted}
    lengths = [asked.get(name) for name in ("q_lengths", "k_lengths", "k_start")]
    sinks = [asked.get("sink"), np.full(hq, np.nan, np.float32) if "sink" in asked else None]
    arrays = q, k, v, out, lse, dout, dlse, *(got.get(name) for name in made)
    scores, _kept = scores_of(asked, (b, hq, sq, sk))
    if dmask:
        got["dmask"] = wanted_mask(scores, asked)
    masks = masks_of(**asked)
    scale = asked["scale"]
    assert backward(library, late, scale, masks, lengths, sinks, *arrays, scores=scores) == 0
    for name, (_, beside) in made.items():
        if not np.isnan(beside.astype(float)).all():
            return [f"wrote beside {name}"]
    got |= {"dsink": sinks[1]} if "sink" in asked else {}
    return reference_backward.check(got, *given, dlse=dlse, lse=lse, **asked)


def run_packed(library, variant, late, packed, hq=1, dmask=False, **keywords):
    """Complaints about sequences that lie end to end, rows of none behind them."""
    rng = np.random.default_rng(1)
    dtype, d, b = np.dtype(DTYPES.get(variant["dtype"], np.float64)), variant["d"], len(packed[0])
    real = reference.lse_dtype(dtype)
    cu = [np.cumsum([0, *x]).astype(np.int32) for x in packed]
    total_q, total_k = cu[0][-1] + 5, cu[1][-1] + 5

    def normal(h, total):
        x, _ = rows((1, h, total, d), dtype, 0)
        x[:] = rng.standard_normal(x.shape)
        return x

    q, k, v, dout = normal(hq, total_q), normal(1, total_k), normal(1, total_k), normal(hq, total_q)
    sq, sk = max(packed[0]), max(packed[1])
    asked = {"causal": keywords.get("causal", False), "scale": d**-0.5}
    changes(rng, asked, b, hq, sq, sk, **{"of": (0, 0, 0, 0), **keywords})
    out, lse = np.zeros_like(q), np.full((1, hq, total_q), -np.inf, real)
    calls = []
    for n in range(b):
        at, keys = (slice(x[n], x[n + 1]) for x in cu)
        own = {**asked}
        if "mask" in own:
            own["mask"] = own["mask"][n : n + 1, :, : packed[0][n], : packed[1][n]]
        parts = [x[:, :, y].copy() for x, y in ((dout, at), (q, at), (k, keys), (v, keys))]
        exact = reference.attention(*parts[1:], **own)
        out[:, :, at], lse[:, :, at] = exact.out, exact.lse
        calls.append((at, keys, parts, own))
        for x in (q, dout):
            x[:, :, at][~exact.seen.any(3)] = np.nan
        for x in (k, v):
            x[:, :, keys][~exact.seen.any((1, 2))[:, None]] = np.nan
    for x, end in ((q, cu[0][-1]), (dout, cu[0][-1]), (k, cu[1][-1]), (v, cu[1][-1])):
        x[:, :, end:] = np.nan
    got = {name: rows(x.shape, dtype, 0)[0] for name, x in (("dq", q), ("dk", k), ("dv", v))}
    scores, _kept = scores_of(asked, (b, hq, sq, sk))
    made_mask = wanted_mask(scores, asked) if dmask else None
    arrays = q, k, v, out, lse, dout, None, *got.values()
    where, none, sinks = (cu[0], cu[1], (b, sq, sk)), [None] * 3, [None, None]
    masks, scale = masks_of(**asked), asked["scale"]
    given = {"packed": where, "scores": scores}
    assert backward(library, late, scale, masks, none, sinks, *arrays, **given) == 0
    complaints = []
    for name, end in (("dq", cu[0][-1]), ("dk", cu[1][-1]), ("dv", cu[1][-1])):
        if got[name][:, :, end:].astype(float).any():
            complaints.append(f"{name} of rows of no sequence is not 0")
    shared = []
    for n, (at, keys, parts, own) in enumerate(calls):
        mine = {name: x[:, :, at if name == "dq" else keys] for name, x in got.items()}
        if parts[1].size and parts[2].size:
            complaints += reference_backward.check(mine, *parts, lse=lse[:, :, at], **own)
            place = slice(n, n + 1), slice(None), slice(packed[0][n]), slice(packed[1][n])
            shared.append((place, lse[:, :, at], parts, own))
        elif any(x.astype(float).any() for x in mine.values()):
            complaints.append("a sequence without scores has gradients")
    if dmask:
        complaints += reference_backward.check_shared("dmask", made_mask, shared)
    return complaints


@gpu_host.marks
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
@pytest.mark.parametrize("name", TESTED)
def test_backward(name, tmp_path):
    flags = (*VARIANTS[name].defines(), "-w", "-O2")  # the build has nvcc warn
    gpu_host.library(HERE / "portable_backward_shim.cpp", tmp_path, *flags)
    path = tmp_path / "portable_backward_shim.so"
    assert python("-c", f"from {__name__} import main; main({str(path)!r}, {name!r})") == "right\n"


def main(path, name):
    library, variant = ctypes.CDLL(path), VARIANTS[name]
    for number, (case, keywords) in enumerate(cases_of(variant, PLAIN, GENERAL)):
        runs = run_packed if "packed" in keywords else run
        complaints = runs(library, variant, number % 2, **keywords)
        assert not complaints, f"{case}: {complaints}"
    print("right")
