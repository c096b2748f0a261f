"""Dropout's seed as an array of any integer type that frameworks have for one."""

import fastattn
import numpy as np
import pytest
from conftest import needs
from handmade import CUDA, ones

X = np.random.default_rng(0).standard_normal((1, 2, 9, 8)).astype(np.float32)

SEEDS = [
    *(("int32", n) for n in (7, -3, -(2**31))),
    *(("uint32", n) for n in (7, 2**31 + 5, 2**32 - 1)),
    *(("int64", n) for n in (-(2**63), 2**40 + 1)),
]


def drop(seed, x=X, **keywords):
    return fastattn.attention(x, x, x, dropout_p=0.5, seed=seed, **keywords)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize(("dtype", "n"), SEEDS)
def test_an_array_means_its_number(dtype, n, shape):
    seed = np.full(shape, n, dtype)
    assert (drop(seed) == drop(n)).all() and (drop(seed) != drop(n ^ 1)).any()
    out, lse = drop(n, return_lse=True)
    want, got = (
        fastattn.attention_backward(X, X, X, X, out, lse, dropout_p=0.5, seed=s) for s in (n, seed)
    )
    assert all((a == b).all() for a, b in zip(got[:3], want[:3], strict=True))


@needs("torch")
@pytest.mark.parametrize(("dtype", "n"), SEEDS)
def test_gradients_of_torch_tensors(dtype, n):
    """First ones by the backend, second ones by the formula: of the same elements."""
    import torch

    q, k, v = (torch.randn(1, 2, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    kinds = [n, torch.tensor(n, dtype=getattr(torch, dtype))]

    def loss(seed, x):
        return fastattn.attention(x, k, v, dropout_p=0.5, seed=seed).square().sum()

    want, got = (
        torch.autograd.grad(torch.autograd.grad(loss(s, q), q, create_graph=True)[0].sum(), (q, k))
        for s in kinds
    )
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)


@needs("jax")
def test_jax_integers_are_32_bits():
    import jax

    x, seed = jax.numpy.asarray(X), jax.numpy.asarray(-9)
    assert seed.dtype == np.int32 and (np.asarray(drop(seed, x)) == drop(-9)).all()


@pytest.mark.parametrize("dtype", [np.int32, np.uint32])
def test_a_gpu_reads_64_bits(dtype):
    def on_gpu(*shape, **kind):
        return ones(*shape, device=(CUDA, 0), **kind)

    x = on_gpu(1, 2, 5, 64, dtype=np.float16)
    sentence = rf"^`seed` must be int64 on a GPU, got {np.dtype(dtype)}: pass seed\.astype"
    with pytest.raises(NotImplementedError, match=sentence):
        drop(on_gpu(1, dtype=dtype), x)
