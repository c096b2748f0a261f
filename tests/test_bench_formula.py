"""fastattn.bench.formula against the reference: what the benchmark and the GPU's tests judge by."""

import numpy as np
import pytest
import reference
from conftest import needs
from fastattn.bench import formula

B, HQ, HK, SQ, SK, D, DV = 2, 4, 2, 9, 21, 8, 5
RNG = np.random.default_rng(0)
Q, K, V = (
    RNG.standard_normal(shape) for shape in ((B, HQ, SQ, D), (B, HK, SK, D), (B, HK, SK, DV))
)
SLOPES, SINK = 0.5 ** np.arange(1.0, HQ + 1), np.linspace(-2, 2, HQ)
BIAS = np.where(RNG.random((SQ, SK)) < 0.3, -np.inf, RNG.standard_normal((SQ, SK)))
CASES = {
    "plain": {},
    "scale": {"scale": -0.7},
    "causal": {"causal": True},
    "rows that see nothing": {"window": (15, -14)},
    "bool mask": {"mask": BIAS > 0},
    "float mask": {"mask": BIAS},
    "softcap": {"softcap": 1.5},
    "softcap that no float holds": {"softcap": 1e-40},
    "alibi": {"alibi_slopes": SLOPES, "causal": True},
    "sink": {"sink": SINK, "window": (15, -14)},
    "dropout": {"dropout_p": 0.3, "seed": 2**40 + 3},
    "everything dropped": {"dropout_p": 1.0, "seed": 5},
    "no keys": {"sk": 0},
    "no keys, a sink": {"sk": 0, "sink": SINK},
}


def heads(xp, array, k, v, *, mask=None, alibi_slopes=None, sink=None, seed=0, **keywords):
    """The formula on all heads of the batch, with the keywords of the reference."""
    b, h = (x.ravel() for x in np.indices((B, HQ)))
    sk = k.shape[2]
    limits = {name: keywords.pop(name) for name in ("causal", "window") if name in keywords}
    inside, position = reference.interval(1, SQ, sk, **limits)
    more = {}
    if mask is not None and mask.dtype == bool:
        inside = inside & mask
    elif mask is not None:
        more["added"] = array(mask)
    if alibi_slopes is not None:
        distance = np.abs(position - np.arange(sk))
        more["added"] = array(-alibi_slopes[h][:, None, None] * distance)
    if sink is not None:
        more["sink"] = array(sink[h][:, None, None])
    if "dropout_p" in keywords:
        more["kept"] = array(formula.kept(b, h, np.arange(SQ), sk, keywords["dropout_p"], seed))
    inputs = (array(x) for x in (Q[b, h], k[b, h * HK // HQ], v[b, h * HK // HQ]))
    return formula.attention(xp, *inputs, array(inside), **more, **keywords)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["numpy", pytest.param("torch", marks=needs("torch"))])
def test_it_is_the_reference(kind, case):
    keywords = dict(CASES[case])
    sk = keywords.pop("sk", SK)
    k, v = K[:, :, :sk], V[:, :, :sk].copy()
    if "window" in keywords:
        v[:, :, 10:] = np.inf  # where nobody looks
    xp = pytest.importorskip(kind)
    got = heads(xp, np.asarray if kind == "numpy" else xp.from_numpy, k, v, **keywords)
    want = reference.attention(Q, k, v, **keywords)
    assert got.biggest == pytest.approx(want.biggest)
    for name in ("out", "lse", "empty"):
        mine, theirs = np.asarray(getattr(got, name)), getattr(want, name)
        np.testing.assert_allclose(mine.reshape(theirs.shape), theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("seed", [0, 7, 2**40 + 3, 2**64 - 1])
def test_dropout_leaves_what_the_reference_says(seed):
    b, h = (x.ravel() for x in np.indices((B, HQ)))
    rows = np.array([0, 3, 8])
    got = formula.kept(b, h, rows, SK, 0.3, seed)
    want = reference.kept(B, HQ, SQ, SK, 0.3, seed)
    assert 0 < want.sum() < want.size
    np.testing.assert_array_equal(got.reshape(B, HQ, 3, SK), want[:, :, rows])


@pytest.mark.parametrize("dtype", ["fp32", "fp16", pytest.param("bf16", marks=needs("ml_dtypes"))])
def test_the_careful_path_rounds_as_hardware_does(dtype):
    kind = {"fp32": np.float32, "fp16": np.float16}.get(dtype)
    kind = kind or pytest.importorskip("ml_dtypes").bfloat16
    halves = np.array([1 + 2.0**-9, 1 + 3 * 2.0**-9, 1 + 2.0**-12, -3.0, 0.0])  # ties to even
    x = np.r_[halves, RNG.standard_normal(1000)]
    np.testing.assert_array_equal(
        formula.rounded(x, dtype), x.astype(np.float32).astype(kind).astype(np.float64)
    )
