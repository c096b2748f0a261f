"""The Hopper backward with packed sequences, without a GPU, as test_backward_kernel.py."""

import ctypes
import shutil

import ml_dtypes
import numpy as np
import pytest
import reference
import reference_backward

import gpu_host
from gpu_host import HAS_LEFT, HAS_RIGHT
from gpu_host.test_backward_kernel import VARIANTS, backward, rows, run_apart
from gpu_host.test_backward_scores import DTYPES, Scores
from gpu_host.test_merging import described

TESTED = [
    "sm90_bwd_bf16_d64_general",
    "sm90_bwd_bf16_d128_64x128",
    "sm90_bwd_bf16_d256_64x64_strided",
]
CU_Q, CU_K = [0, 70, 70, 205, 215, 220], [0, 9, 140, 290, 290, 300]
TOTALS = 230, 310  # the last rows belong to none
CASES = {
    "causal": {"causal": True, "dlse": True, "hq": 2},
    "window": {"window": (40, 9), "sink": True},
    "lengths": {"q_lengths": [60, 0, 130, 9, 2], "k_lengths": [9, 100, 131, 0, 10]},
    "some keys": {"q_lengths": [70, 0, 0, 0, 5], "k_start": [3, 0, 9, 0, 9], "sink": True},
}

CHANGED = {  # of general variants
    "alibi": {"alibi": True, "hq": 2, "causal": True},
    "bool mask": {"mask": (5, 1), "sink": True, "q_lengths": [60, 0, 130, 9, 2]},
    "float mask": {"mask": (1, 2), "dmask": True, "hq": 2, "causal": True},
    "heads alike": {"mask": (5, 1), "dmask": True, "hq": 2, "sink": True},
    "one bool mask": {"mask": (1, 2), "hq": 2, "window": (40, 9)},
}


def run(
    library,
    variant,
    late,
    hq=1,
    sink=False,
    dlse=False,
    causal=False,
    window=None,
    alibi=False,
    mask=None,
    dmask=False,
    **lengths,
):
    """Complaints about one call; what no row sees is NaN, and what is written is, before."""
    rng = np.random.default_rng(2)
    dtype, d, dv = ml_dtypes.bfloat16, variant["d"] - 3 * variant["strided"], variant["dv"]

    def normal(*shape):
        x, _ = rows(shape, dtype, 0)
        x[:] = rng.standard_normal(shape)
        return x

    q, k, v = normal(1, hq, TOTALS[0], d), normal(1, 1, TOTALS[1], d), normal(1, 1, TOTALS[1], dv)
    out, dout = (normal(1, hq, TOTALS[0], dv) for _ in range(2))
    lse = np.full((1, hq, TOTALS[0]), -np.inf, np.float32)
    dlse = rng.standard_normal(lse.shape).astype(np.float32) if dlse else None
    asked = {"causal": causal, "window": window, "scale": d**-0.5}
    sinks = [None, None]
    if sink:
        sinks = [rng.standard_normal(hq).astype(np.float32), np.full(hq, np.nan, np.float32)]
        asked["sink"] = sinks[0]
    longest = [len(CU_Q) - 1, max(np.diff(CU_Q)), max(np.diff(CU_K))]
    scores = Scores()
    if alibi:
        slopes = np.abs(rng.standard_normal((longest[0], hq))).astype(np.float32)
        scores.slopes = slopes.ctypes.data
    if mask:
        shape = *mask, *longest[1:]
        if dmask:
            mask, made_mask = rng.standard_normal(shape, np.float32), np.full(shape, np.nan, "f4")
            scores.dmask = ctypes.pointer(described(made_mask))
        else:
            mask = rng.random(shape) < 0.6
            mask[..., 3, :] = mask[..., 5] = False
        scores.mask_dtype = DTYPES[str(mask.dtype)]
        mask = np.broadcast_to(mask, (longest[0], hq, *longest[1:]))
        scores.mask = ctypes.pointer(described(mask))
    out[:] = 0
    made = {name: rows(x.shape, dtype, 0)[0] for name, x in (("dq", q), ("dk", k), ("dv", v))}
    checks, unseen = [], [np.ones((hq, TOTALS[0]), bool), np.ones(TOTALS[1], bool)]
    for n in range(len(CU_Q) - 1):
        i, j = slice(*CU_Q[n : n + 2]), slice(*CU_K[n : n + 2])
        own = {name: x[n : n + 1] for name, x in lengths.items()}
        given = [x[:, :, at].copy() for x, at in ((dout, i), (q, i), (k, j), (v, j))]
        if alibi:
            own["alibi_slopes"] = slopes[n : n + 1]
        if mask is not None:
            own["mask"] = mask[n : n + 1, :, : i.stop - i.start, : j.stop - j.start]
            if dmask and shape[1] == 1:
                own["mask"] = own["mask"][:, :1]
        exact = reference.attention(*given[1:], **asked, **own)
        out[:, :, i], lse[:, :, i] = exact.out, exact.lse
        seen = exact.seen[0]
        unseen[0][:, i], unseen[1][j] = ~seen.any(2), ~seen.any((0, 1))
        checks.append((i, j, given, {**asked, **own}))
    for x in (q, dout):
        x[0, unseen[0]] = np.nan
    for x in (k, v):
        x[:, :, unseen[1]] = np.nan
    masks = (HAS_RIGHT, 0, 0, 0) if causal else (0,) * 4
    if window:
        masks = (HAS_LEFT | HAS_RIGHT, *window, 0)
    given = [lengths.get(name) for name in ("q_lengths", "k_lengths", "k_start")]
    arrays = (q, k, v, out, lse, dout, dlse, *made.values())
    packed = CU_Q, CU_K, longest
    more = {"packed": packed, "scores": scores}
    assert backward(library, late, d**-0.5, masks, given, sinks, *arrays, **more) == 0
    complaints = [
        f"{name} of no sequence is not 0"
        for name, end in (("dq", CU_Q[-1]), ("dk", CU_K[-1]), ("dv", CU_K[-1]))
        if (made[name][:, :, end:] != 0).any()
    ]
    calls = []
    for n, (i, j, arrays, keywords) in enumerate(checks):
        got = {"dq": made["dq"][:, :, i], "dk": made["dk"][:, :, j], "dv": made["dv"][:, :, j]}
        keywords = {**keywords, "dlse": None if dlse is None else dlse[:, :, i]}
        complaints += reference_backward.check(got, *arrays, lse=lse[:, :, i], **keywords)
        first = n if dmask and shape[0] > 1 else 0
        place = (
            slice(first, first + 1),
            slice(None),
            slice(i.stop - i.start),
            slice(j.stop - j.start),
        )
        calls.append((place, lse[:, :, i], arrays, keywords))
    if dmask:
        complaints += reference_backward.check_shared("dmask", made_mask, calls)
    if sink:
        calls = [(slice(None), *call) for _, *call in calls]
        complaints += reference_backward.check_shared("dsink", sinks[1], calls)
    return complaints


@gpu_host.marks
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
@pytest.mark.parametrize("name", TESTED)
def test_packed_backward(name, tmp_path):
    run_apart(__name__, name, tmp_path)


def main(path, name):
    library, variant = ctypes.CDLL(path), next(v for v in VARIANTS if v.name == name)
    for late in (0, 1):
        for case, keywords in {**CASES, **(CHANGED if variant["general"] else {})}.items():
            complaints = run(library, variant, late, **keywords)
            assert not complaints, f"{case}, late={late}: {complaints}"
    print("right")
