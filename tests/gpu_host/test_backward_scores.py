"""The Hopper backward's kernels that change scores, without a GPU, as test_backward_kernel.py."""

import ctypes
import shutil

import ml_dtypes
import numpy as np
import pytest
import reference
import reference_backward

import gpu_host
from gpu_host import BF16, F16, HAS_LEFT, HAS_RIGHT
from gpu_host.test_backward_kernel import VARIANTS, backward, rows, run_apart
from gpu_host.test_merging import Tensor, described

TESTED = [
    "sm90_bwd_f16_d64_general",
    "sm90_bwd_bf16_d128_general_strided",
    "sm90_bwd_bf16_d192_128_general",
]
DTYPES = {"bool": 5, "blocks": 5, "float32": 2, "float16": F16, "bfloat16": BF16}
CASES = {
    "softcap": {"softcap": 2.0, "causal": True, "hq": 2},
    "large soft caps": {"softcap": 300.0, "factor": 40.0},
    "small soft caps": {"softcap": 0.3, "factor": 9.0, "scale": -0.3},
    "alibi": {"alibi": True, "window": (40, 9), "hq": 2},
    "float mask": {"mask": "float32", "dmask": True, "b": 2, "hq": 2, "of": (1, 1, 0, 0)},
    "rows alike": {
        "dmask": True,
        "b": 2,
        "hq": 2,
        "mask": "bfloat16",
        "of": (0, 0, 1, 0),
        "causal": True,
    },
    "keys alike": {"dmask": True, "mask": "float16", "hq": 2, "of": (0, 1, 0, 1), "softcap": 3.0},
    "one number": {"mask": "float32", "of": (1, 1, 1, 1), "hq": 2, "dlse": True, "dmask": True},
    "heads apart": {"mask": "bfloat16", "b": 2, "hq": 2, "q_lengths": [150, 60], "dmask": True},
    "bool mask": {"mask": "bool", "hq": 2, "of": (0, 1, 0, 0), "dlse": True},
    "bool mask and sink": {"mask": "bool", "sink": True, "causal": True, "k_lengths": [130]},
    "hidden blocks": {"mask": "blocks", "hq": 2, "sq": 2200, "sk": 300, "of": (0, 1, 0, 0)},
    "everything dropped": {"dropout_p": 1.0, "dlse": True},
    "dropout": {"dropout_p": 0.3, "hq": 2, "b": 2, "causal": True},
    "hidden blocks of heads": {"mask": "blocks", "b": 2, "hq": 3, "sq": 600, "causal": True},
    "great scores": {"mask": "float32", "of": (1, 1, 0, 0), "factor": 1e4, "scale": 1e5},
    "great scores, bool mask": {"mask": "bool", "factor": 1e4, "scale": 1e5},
    "all": {
        "softcap": 5.0,
        "mask": "float32",
        "dmask": True,
        "alibi": True,
        "dropout_p": 0.5,
        "sink": True,
        "window": (90, 30),
    },
}


class Scores(ctypes.Structure):
    _fields_ = [
        ("softcap", ctypes.c_double),
        ("dropout", ctypes.c_double),
        ("seed", ctypes.c_int64),
        ("mask", ctypes.POINTER(Tensor)),
        ("slopes", ctypes.c_void_p),
        ("mask_dtype", ctypes.c_int32),
        ("dmask", ctypes.POINTER(Tensor)),
    ]


def random_mask(rng, kind, b, hq, sq, sk, of):
    """Broadcast along the axes that `of` names; some rows and keys are hidden from all."""
    shape = [1 if alike else n for n, alike in zip((b, hq, sq, sk), of, strict=True)]
    if kind == "blocks":  # of 64 rows and 128 keys: hidden, whole, or some of it
        shares = rng.choice(
            [0, 1, 0.3], (*shape[:2], sq // 64 + 1, sk // 128 + 1), p=(0.9, 0.06, 0.04)
        )
        return rng.random(shape) < shares.repeat(64, 2).repeat(128, 3)[:, :, :sq, :sk]
    if kind == "bool":
        mask = rng.random(shape) < 0.6
        mask[..., 3, :] = mask[..., 70:, 130:] = mask[..., 17] = False
        mask[..., :64, :128] = False
    else:
        mask = rng.standard_normal(shape).astype(getattr(ml_dtypes, kind, kind))
        if not of[2] and not of[3]:
            mask[..., 5, :] = mask[..., 9:40, 7] = -np.inf
    return mask


def any_of_blocks(seen, block_m, block_n):
    b, h, sq, sk = seen.shape
    padded = np.pad(seen, ((0, 0), (0, 0), (0, -sq % block_m), (0, -sk % block_n)))
    return padded.reshape(b, h, -1, block_m, padded.shape[3] // block_n, block_n).any((3, 5))


def blocks_walked(seen, inside, variant):
    """How many blocks of rows all tiles walk over: inside their keys' intervals, where the mask
    shows one of the 128 keys that these are among."""
    mine = any_of_blocks(inside, variant["block_m"], variant["block_n"])
    shown = any_of_blocks(seen, variant["block_m"], 128).repeat(128 // variant["block_n"], 3)
    return (mine & shown[..., : mine.shape[3]]).sum()


def run(
    library,
    variant,
    late,
    b=1,
    hq=1,
    sq=150,
    sk=200,
    mask=None,
    of=(0, 0, 0, 0),
    alibi=False,
    dmask=False,
    sink=False,
    dlse=False,
    factor=1.0,
    **asked,
):
    """Complaints about one call; what no row sees is NaN."""
    rng = np.random.default_rng(3)
    dtype = {"FA_BF16": ml_dtypes.bfloat16, "FA_F16": np.float16}[variant["dtype"]]
    d, dv = variant["d"] - 3 * variant["strided"], variant["dv"]

    def normal(*shape):
        x, _ = rows(shape, dtype, 0)
        x[:] = rng.standard_normal(shape)
        return x

    q, k, v = normal(b, hq, sq, d), normal(b, 1, sk, d), normal(b, 1, sk, dv)
    q *= dtype(factor)
    out, dout = normal(b, hq, sq, dv), normal(b, hq, sq, dv)
    dlse = rng.standard_normal((b, hq, sq)).astype(np.float32) if dlse else None
    asked = {"scale": d**-0.5, **asked}
    scores, sinks = Scores(asked.get("softcap", 0), asked.get("dropout_p", 0), 7), [None, None]
    if scores.dropout:
        asked["seed"] = 7
    if mask:
        scores.mask_dtype = DTYPES[mask]
        asked["mask"] = random_mask(rng, mask, b, hq, sq, sk, of)
        whole = described(np.broadcast_to(asked["mask"], (b, hq, sq, sk)))
        scores.mask = ctypes.pointer(whole)
    if dmask:
        made = rows(asked["mask"].shape, asked["mask"].dtype, 0)[0]
        scores.dmask = ctypes.pointer(described(made))
    if alibi:
        slopes = np.abs(rng.standard_normal((b, hq))).astype(np.float32)
        asked["alibi_slopes"], scores.slopes = slopes, slopes.ctypes.data
    if sink:
        sinks = [rng.standard_normal(hq).astype(np.float32), np.full(hq, np.nan, np.float32)]
        asked["sink"] = sinks[0]
    exact = reference.attention(q, k, v, **asked)
    out[:], lse = exact.out, exact.lse.astype(np.float32)
    given = [x.copy() for x in (dout, q, k, v)]
    for x in (q, dout):
        x[~exact.seen.any(3)] = np.nan
    for x in (k, v):
        x[~exact.seen.any((1, 2))[:, None]] = np.nan
    masks = (HAS_RIGHT, 0, 0, 0) if asked.get("causal") else (0,) * 4
    if "window" in asked:
        masks = (HAS_LEFT | HAS_RIGHT, *asked["window"], 0)
    lengths = [asked.get(name) for name in ("q_lengths", "k_lengths", "k_start")]
    got = {name: rows(x.shape, dtype, 0)[0] for name, x in (("dq", q), ("dk", k), ("dv", v))}
    arrays = (q, k, v, out, lse, dout, dlse, *got.values())
    scale = asked["scale"]
    assert backward(library, late, scale, masks, lengths, sinks, *arrays, scores=scores) == 0
    got |= {"dsink": sinks[1]} if sink else {}
    got |= {"dmask": made} if dmask else {}
    if mask == "blocks":
        inside = reference.visible(b, hq, sq, sk, causal=asked.get("causal", False))
        want = blocks_walked(exact.seen, inside, variant)
        assert library.walked() == want, (library.walked(), want)
    return reference_backward.check(got, *given, dlse=dlse, lse=lse, **asked)


@gpu_host.marks
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
@pytest.mark.parametrize("name", TESTED)
def test_changed_scores(name, tmp_path):
    run_apart(__name__, name, tmp_path)


def main(path, name):
    library, variant = ctypes.CDLL(path), next(v for v in VARIANTS if v.name == name)
    for late in (0, 1):
        for case, keywords in list(CASES.items())[late * -3 :]:
            complaints = run(library, variant, late, **keywords)
            assert not complaints, f"{case}, late={late}: {complaints}"
    print("right")
