"""Gradients where scores are so great that an ulp of lse is more than their differences."""

import fastattn
import numpy as np
import pytest
from conftest import LEVELS, python

SIZES = {"float32": (1e5, 1e10, 1e15), "float64": (1e14, 1e19, 1e24), "float16": (1e5, 1e6)}
ROWS, KEYS, D = 40, 150, 48  # whose scale is no power of 2

WAYS = {
    "plain": {},
    "causal": {"causal": "top-left"},
    "window": {"window": (60, 60)},
    "negative scale": {"scale": -0.1},
    "bool mask": {"mask": np.arange(ROWS * KEYS).reshape(ROWS, KEYS) % 3 > 0},
    "float mask": {"mask": np.linspace(-5, 5, KEYS, dtype=np.float32)[None, :]},
    "alibi": {"alibi_slopes": np.array([0.5, 3], np.float32)},
    "small sink": {"sink": np.array([5, -5], np.float32)},
}


def inputs(dtype, size, rows=ROWS):
    """q and k of scores around `size`; v, and a dout by which dv[j, i] is P[i, j]."""
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((1, 2, n, D)) * size**0.5 for n in (rows, KEYS))
    v = rng.standard_normal((1, 2, KEYS, rows))
    dout = np.broadcast_to(np.eye(rows), (1, 2, rows, rows))
    return tuple(x.astype(dtype) for x in (dout, q, k, v))


def weights(q, k, scale=None, **limits):
    """P in extended precision, of the scores that `limits` lets be seen."""
    q, k = q.astype(np.longdouble), k.astype(np.longdouble)
    s = q @ k.swapaxes(2, 3) * (scale or 1 / np.sqrt(np.longdouble(D)))
    row, key = np.arange(s.shape[2])[:, None], np.arange(KEYS)
    at = row + KEYS - s.shape[2]
    if limits.get("causal"):
        s = np.where(key <= row, s, -np.inf)
    if window := limits.get("window"):
        s = np.where((key >= at - window[0]) & (key <= at + window[1]), s, -np.inf)
    mask = limits.get("mask")
    if mask is not None:
        s = np.where(mask, s, -np.inf) if mask.dtype == bool else s + mask
    if "alibi_slopes" in limits:
        s = s - limits["alibi_slopes"][:, None, None] * abs(at - key)
    p = np.exp(s - s.max(axis=3, keepdims=True))
    return p / p.sum(axis=3, keepdims=True)


def check(dtype, way):
    """A row's one great score keeps its weight of 1, in dv and, by dlse, in dq."""
    keywords = WAYS[way]
    for size in SIZES[dtype]:
        dout, q, k, v = inputs(dtype, size)
        p = weights(q, k, **keywords).astype(np.float64)
        assert (p.max(axis=3) > 0.999).mean() > 0.9  # but for a few near ties
        clear = p.max(axis=3) > 0.999
        out, lse = fastattn.attention(q, k, v, return_lse=True, **keywords)
        found = fastattn.attention_backward(dout, q, k, v, out, lse, **keywords)
        got = found[2].swapaxes(2, 3).astype(np.float64)
        assert ((got >= 0) & (got <= 1)).all(), (dtype, size, got.min(), got.max())
        assert abs(got - p)[clear].max() < 2e-3, (dtype, size)
        assert all(np.isfinite(x).all() for x in found[:3])

        one = np.ones(lse.shape, lse.dtype)
        dq, *_ = fastattn.attention_backward(None, q, k, v, out, lse, dlse=one, **keywords)
        scale = keywords.get("scale", D**-0.5)
        want = scale * (p @ k.astype(np.float64))
        assert abs(dq - want)[clear].max() < 4e-3 * abs(want).max(), (dtype, size)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", SIZES)
def test_a_great_score_keeps_its_weight(dtype, way):
    check(dtype, way)


ASK = """
import test_great_scores
for dtype in test_great_scores.SIZES:
    for way in ("plain", "causal", "alibi"):
        test_great_scores.check(dtype, way)
"""


@pytest.mark.parametrize("level", LEVELS)
def test_at_every_level(level, cpu_levels):
    if level not in cpu_levels:
        pytest.skip(f"this CPU has no {level}")
    python("-c", ASK, FASTATTN_CPU_LEVEL=level)


@pytest.mark.parametrize("rows", [1, 3, ROWS])
@pytest.mark.parametrize("dtype", SIZES)
def test_no_weight_is_above_1(dtype, rows):
    """Also by an lse of another order of sums, or one that is off by an ulp."""
    for size in SIZES[dtype]:
        dout, q, k, v = inputs(dtype, size, rows)
        out, lse = fastattn.attention(q, k, v, return_lse=True)
        for given in (lse, np.nextafter(lse, lse.dtype.type(-np.inf))):
            dv = fastattn.attention_backward(dout, q, k, v, out, given)[2]
            assert ((dv >= 0) & (dv <= 1)).all(), (dtype, size, dv.min(), dv.max())


@pytest.mark.parametrize("dtype", SIZES)
def test_a_sink_above_all_scores_has_all_weight(dtype):
    for size in SIZES[dtype]:
        dout, q, k, v = inputs(dtype, size)
        sink = np.array([1e3 * size] * 2, np.float32)
        out, lse = fastattn.attention(q, k, v, return_lse=True, sink=sink)
        dlse = np.ones(lse.shape, lse.dtype)
        keywords = {"dlse": dlse, "sink": sink, "need_dsink": True}
        found = fastattn.attention_backward(dout, q, k, v, out, lse, **keywords)
        assert all(not x.any() for x in (out, *found[:3]))
        assert (found[4] == ROWS).all()
