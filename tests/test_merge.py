"""merge_states: attention over parts of the keys, merged, is attention over all of them."""

import itertools

import cases
import fastattn
import numpy as np
import pytest
import reference
from cases import DTYPES
from conftest import needs
from declared import served
from storage import STORAGES


def parts(dtype, cuts, layout="bhsd", sk=60):
    """outs and lses over the key ranges between cuts, and the result over all keys at once."""
    rng = np.random.default_rng(0)
    shape = {"bhsd": (2, 3, sk, 16), "bshd": (2, sk, 3, 16)}[layout]
    q, k, v = (rng.standard_normal(shape).astype(cases.dtype_of(dtype)) for _ in range(3))
    axis = 2 if layout == "bhsd" else 1
    ranges = [range(begin, end) for begin, end in itertools.pairwise(cuts)]
    keys = [(k.take(r, axis), v.take(r, axis)) for r in ranges]
    *found, whole = (
        fastattn.attention(q, *each, layout=layout, return_lse=True) for each in (*keys, (k, v))
    )
    return *zip(*found, strict=True), whole


def merged(framework, outs, lses, storage="plain", **keywords):
    """merge_states of these arrays in a framework, and its results as NumPy arrays."""
    rng = np.random.default_rng(3)
    given = [[framework.array(cases.store(x, storage, rng)) for x in xs] for xs in (outs, lses)]
    results = fastattn.merge_states(*given, **keywords)
    assert type(results[0]) is type(results[1]) is type(given[0][0])
    return tuple(framework.numpy(x) for x in results)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cuts", [(0, 60), (0, 7, 60), (0, 1, 2, 30, 59, 60), (0, 0, 60, 60)])
def test_parts_of_the_keys(cuts, dtype, layout, place):
    framework, backend = place
    outs, lses, (out, lse) = parts(dtype, cuts, layout)
    with served(backend, "merge", dtype=dtype):
        got, got_lse = merged(framework, outs, lses, layout=layout)
    assert got.shape == out.shape and got_lse.shape == lse.shape
    assert got.dtype == out.dtype and got_lse.dtype == reference.lse_dtype(out.dtype)
    exact = out.astype(np.float64)
    size = np.abs(exact).max()
    # The weights are exp(lse_i - lse), and a lse is rounded: |lse| * eps / 2 each.
    eps = float(np.finfo(lse.dtype).eps)
    bound = 2 * float(reference.finfo(out.dtype).eps) + 2 * eps * np.abs(lse).max()
    assert np.abs(got.astype(np.float64) - exact).max() <= bound * size
    assert np.abs(got_lse - lse).max() <= 84 * eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_formula_on_any_states(dtype, place):
    """Random states, whole rows and single parts empty, logits far apart, against float64."""
    framework, backend = place
    rng = np.random.default_rng(1)
    for n in (1, 2, 3, 17):
        outs = [rng.standard_normal((2, 3, 9, 5)).astype(cases.dtype_of(dtype)) for _ in range(n)]
        dtype_of_lse = reference.lse_dtype(outs[0].dtype)
        lses = [rng.normal(0, 40, (2, 3, 9)).astype(dtype_of_lse) for _ in range(n)]
        for out, lse in zip(outs, lses, strict=True):
            empty = rng.random(lse.shape) < 0.3
            empty[0, 0, 4] = True
            out[empty], lse[empty] = 0, rng.choice([-np.inf, np.inf], empty.sum())
        want, want_lse = reference.merge_states(outs, lses)
        for storage in STORAGES[: None if framework.flips else 4]:
            with served(backend, "merge", dtype=dtype):
                got, lse = merged(framework, outs, lses, storage)
            assert (got[0, 0, 4] == 0).all() and lse[0, 0, 4] == -np.inf
            assert (np.isinf(lse) == np.isinf(want_lse)).all()
            finite = np.isfinite(want_lse)
            double = outs[0].dtype == np.float64
            assert np.abs(lse[finite] - want_lse[finite]).max() <= (1e-13 if double else 1e-4)
            bound = 2 * float(reference.finfo(outs[0].dtype).eps) + (1e-13 if double else 1e-6)
            assert np.abs(got.astype(np.float64) - want).max() <= bound * np.abs(want).max()


@pytest.mark.parametrize("part", range(3))
def test_a_nan_lse_makes_its_row_nan(part):
    outs = [np.ones((1, 2, 3, 4), np.float32) for _ in range(3)]
    lses = [np.zeros((1, 2, 3), np.float32) for _ in range(3)]
    lses[part][0, 1, 2] = np.nan
    out, lse = fastattn.merge_states(outs, lses)
    rows = np.isnan(lse)
    assert rows[0, 1, 2] and rows.sum() == 1
    assert np.array_equal(np.isnan(out).all(-1), rows)
    assert np.isfinite(out[~rows]).all() and np.isfinite(lse[~rows]).all()


def test_a_sink_belongs_to_one_part(place):
    framework, backend = place
    rng = np.random.default_rng(2)
    q, k, v = (rng.standard_normal((1, 2, 8, 16)).astype(np.float32) for _ in range(3))
    sink = np.array([1.5, -2], np.float32)
    first = fastattn.attention(q, k[:, :, :3], v[:, :, :3], sink=sink, return_lse=True)
    second = fastattn.attention(q, k[:, :, 3:], v[:, :, 3:], return_lse=True)
    with served(backend, "merge", dtype="float32"):
        out, lse = merged(framework, *zip(first, second, strict=True))
    assert not reference.check(out, lse, q, k, v, sink=sink)


def test_sentences():
    out, lse = np.ones((1, 2, 3, 4), np.float32), np.zeros((1, 2, 3), np.float32)
    wrong = [
        (None, [lse], TypeError, "`outs` must be a sequence of arrays, got NoneType"),
        ([out], 3, TypeError, "`lses` must be a sequence of arrays, got int"),
        ([out], lse[0, 0, 0], TypeError, "`lses` must be a sequence of arrays, got float32"),
        (np.array(1.0), [lse], TypeError, "`outs` must be a sequence of arrays, got ndarray"),
        ([], [], ValueError, "`outs` must hold at least one array, got 0"),
        ([out, out], [lse], ValueError, "`lses` must hold 2 arrays like `outs`, got 1"),
        ([out[0]], [lse], ValueError, r"`outs\[0\]` must have 4 dimensions"),
        ([out], [lse[0]], ValueError, r"`lses\[0\]` must have shape \(1, 2, 3\), got \(2, 3\)"),
        ([out, out[:, :1]], [lse, lse], ValueError, r"`outs\[1\]` must have shape"),
        ([out, out.astype("f2")], [lse, lse], TypeError, r"`outs\[1\]` must be float32 like"),
        ([out], [lse.astype("f8")], TypeError, r"`lses\[0\]` must be float32, got float64"),
        ([out.astype("i4")], [lse], TypeError, r"`outs\[0\]` must be float64, float32"),
    ]
    for outs, lses, exception, sentence in wrong:
        with pytest.raises(exception, match=sentence):
            fastattn.merge_states(outs, lses)
    with pytest.raises(ValueError, match="`layout` must be"):
        fastattn.merge_states([out], [lse], layout="hsd")


@needs("torch")
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_gradients(layout):
    """Of outs and lses, against torch's own of the definition."""
    import torch

    random = torch.Generator().manual_seed(4)
    outs = torch.randn(3, 2, 5, 5, 4, generator=random, requires_grad=True)
    lses = torch.randn(3, 2, 5, 5, generator=random, requires_grad=True)
    weights = torch.softmax(lses, 0)
    if layout == "bshd":
        weights = weights.transpose(2, 3)
    want = (weights[..., None] * outs).sum(0), torch.logsumexp(lses, 0)
    got = fastattn.merge_states(list(outs), list(lses), layout=layout)
    torch.testing.assert_close(got, want)
    grads = [
        torch.autograd.grad(out.sin().sum() + lse.cos().sum(), (outs, lses))
        for out, lse in (want, got)
    ]
    torch.testing.assert_close(*grads)
