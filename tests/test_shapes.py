"""Shapes beyond the usual: heads of any size, none, and keys and values with heads of their own."""

from dataclasses import replace

import cases
import fastattn
import numpy as np
import pytest
import reference
from cases import DTYPES, Case
from conftest import needs
from declared import served, serves
from test_values import right

BASE = Case(b=2, hq=4, hk=2, sq=19, sk=33, d=24, dv=24)
CPU = cases.NumPy(), "cpu"
LARGE = [(257, 257), (512, 512), (300, 64), (16, 999), (4096, 32), (32, 5000)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "dv"), LARGE)
def test_large_heads_on_the_cpu(d, dv, dtype):
    case = replace(BASE, dtype=dtype, d=d, dv=dv)
    right(replace(case, causal=True, storage="padded"), *CPU)
    right(replace(case, softcap=5.0, mask="bool", storage="strided", layout="bshd"), *CPU)
    right(replace(case, packed=((3, 19), (33, 20)), dropout=0.2, storage="swapped"), *CPU)


def test_heads_of_a_million():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 1, n, 10**6), np.float32) for n in (2, 3, 3))
    out, lse = fastattn.attention(q, k, v, return_lse=True)
    s = q.astype(float) @ k.astype(float).swapaxes(2, 3) * 1e-3
    p = np.exp(s - np.logaddexp.reduce(s, axis=3, keepdims=True))
    assert np.abs(out - p @ v.astype(float)).max() < 1e-4
    assert np.abs(lse - np.logaddexp.reduce(s, axis=3)).max() < 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("extra", [{}, {"causal": True}, {"mask": "bool"}, {"alibi": 1}])
def test_heads_of_no_size(extra, dtype):
    """d = 0: every score is 0. dv = 0: an empty output, and the lse that there is."""
    for sizes in ({"d": 0}, {"dv": 0}, {"d": 0, "dv": 0}):
        for storage in ("plain", "padded"):
            right(replace(BASE, dtype=dtype, **sizes, **extra, storage=storage), *CPU)
        packed = {"packed": ((3, 19), (33, 20)), "tail": (2, 1)}
        right(replace(BASE, dtype=dtype, **sizes, **extra, **packed), *CPU)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_heads(dtype):
    kind = cases.dtype_of(dtype)
    q = np.ones((2, 0, 5, 8), kind)
    for hk in (0, 3):
        k, v = np.ones((2, hk, 7, 8), kind), np.ones((2, hk, 7, 6), kind)
        out, lse = fastattn.attention(q, k, v, causal=True, return_lse=True)
        assert out.shape == (2, 0, 5, 6) and lse.shape == (2, 0, 5)
    assert fastattn.scaled_dot_product_attention(q, k[:, :0], v[:, :0]).shape == (2, 0, 5, 6)
    cu = np.array([0, 5], np.int32)
    packed = [x[0].swapaxes(0, 1) for x in (q, k, v)]
    assert fastattn.attention_varlen(*packed, cu, cu, 5, 5).shape == (5, 0, 6)


def chosen(backend, **asked):
    """Whom a function without `backend` calls there: the first of the device's that serves it."""
    others = ("cpu",) if backend == "cpu" else ("sm90", "sm80")
    return next((name for name in others if serves(name, **asked)), backend)


HEADS = [(8, 4, 2), (8, 2, 4), (6, 3, 2), (6, 1, 3), (12, 4, 6), (4, 4, 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hq", "hk", "hv"), HEADS)
def test_keys_and_values_with_heads_of_their_own(hq, hk, hv, dtype, place):
    framework, backend = place
    rng = np.random.default_rng(0)
    shapes = (2, hq, 70, 32), (2, hk, 90, 32), (2, hv, 90, 40)
    q, k, v = (rng.standard_normal(shape).astype(cases.dtype_of(dtype)) for shape in shapes)
    mask = rng.random((2, hq, 70, 90)) < 0.7
    for storage in ("plain", "swapped", "strided"):
        given = [framework.array(cases.store(x, storage, rng)) for x in (q, k, v)]
        for masks in ({}, {"mask": mask}, {"mask": mask[:, :1]}, {"causal": "top-left"}):
            options = {"is_causal": True} if "causal" in masks else {}
            if "mask" in masks:
                options["attn_mask"] = framework.array(cases.store(masks["mask"], "plain", rng))
            asked = {"dtype": dtype, "features": ["kv_heads"]}
            with served(chosen(backend, **asked), **asked):
                out = fastattn.scaled_dot_product_attention(*given, enable_gqa=True, **options)
            repeated = k.repeat(hq // hk, 1), v.repeat(hq // hv, 1)
            assert not reference.check(framework.numpy(out), None, q, *repeated, **masks)


@needs("torch")
def test_as_torch_has_it():
    import torch

    def normal(*shape):
        return torch.randn(shape, dtype=torch.float64)

    theirs, ours = (
        torch.nn.functional.scaled_dot_product_attention,
        fastattn.scaled_dot_product_attention,
    )
    for q, k, v, options in (
        (normal(2, 0, 5, 8), normal(2, 0, 7, 8), normal(2, 0, 7, 8), {}),
        (normal(2, 3, 5, 0), normal(2, 3, 7, 0), normal(2, 3, 7, 8), {}),
        (normal(2, 3, 5, 0), normal(2, 3, 5, 0), normal(2, 3, 5, 8), {"is_causal": True}),
        (normal(2, 3, 5, 8), normal(2, 3, 7, 8), normal(2, 3, 7, 0), {}),
        (normal(1, 1, 64, 512), normal(1, 1, 64, 512), normal(1, 1, 64, 512), {}),
        (normal(2, 8, 5, 8), normal(2, 4, 7, 8), normal(2, 2, 7, 8), {"enable_gqa": True}),
        (normal(2, 6, 5, 8), normal(2, 3, 7, 8), normal(2, 2, 7, 8), {"enable_gqa": True}),
    ):
        want, got = theirs(q, k, v, **options), ours(q, k, v, **options)
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_sentences():
    q, k, v = (np.ones((2, h, 5, 8), np.float32) for h in (6, 3, 4))
    sdpa = fastattn.scaled_dot_product_attention
    wrong = [
        ((q, k, v), True, "`query` must have a number of heads that is a multiple of `value`'s 4"),
        ((q, v, k), True, "`query` must have a number of heads that is a multiple of `key`'s 4"),
        ((q, k, v), False, "`value` must have hk = 3 like `key`, got 4"),
        ((q, k[:, :0], v), True, "`key` must have hk from 1 to .*, got 0"),
        ((q, k, v[:, :0]), True, "`value` must have hk from 1 to .*, got 0"),
        ((q[:, :0], k, k), False, "`key` must have hk = 0 like `query` or 1"),
    ]
    for arrays, enable_gqa, sentence in wrong:
        with pytest.raises(ValueError, match=sentence):
            sdpa(*arrays, enable_gqa=enable_gqa)
    with pytest.raises(ValueError, match="`v` must have hk = 3 like `k`, got 2"):
        fastattn.attention(q, k, v[:, :2])
