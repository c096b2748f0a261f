"""Gradients on a GPU: until a kernel has them a call says so, and explain() says it before."""

import fastattn
import pytest

import gpu
from gpu import torch

HAVE = "backward" in fastattn.info()["support"]["sm90"]
pytestmark = [*gpu.marks, pytest.mark.skipif(HAVE, reason="kernels have gradients")]

ADVICE = (
    r"sm90: it computes no gradients; .*where no gradient is wanted call it under torch\.no_grad"
)


def calls():
    q, k, v = (x.requires_grad_() for x in gpu.inputs(1, 2, 2, 9, 9, 64))
    ends = torch.tensor([0, 4, 9], dtype=torch.int32, device="cuda")
    flat = [x[0].transpose(0, 1) for x in (q, k, v)]
    return [
        (fastattn.attention, q, k, v),
        (fastattn.scaled_dot_product_attention, q, k, v),
        (fastattn.scaled_dot_product_attention, q[:, :1], k, v[0]),
        (fastattn.attention_varlen, *flat, ends, ends, 5, 5),
    ]


@pytest.mark.parametrize("n", range(4))
def test_a_call_is_refused_with_advice_and_explained_so(n):
    function, *arguments = calls()[n]
    before = torch.cuda.memory_allocated()
    with pytest.raises(NotImplementedError, match=ADVICE):
        function(*arguments)
    said = fastattn.explain(function, *arguments)
    assert said.backend is said.kernel is None
    assert said.reasons["sm90"] == "it computes no gradients"
    assert said.reasons["cpu"] == "the arrays are on a GPU"
    assert torch.cuda.memory_allocated() == before
    with torch.no_grad():
        assert fastattn.explain(function, *arguments).backend == "sm90"
        assert not function(*arguments).requires_grad


def test_merging_has_a_gradient_in_torchs_operators():
    outs = [torch.randn(2, 4, 5, 16, device="cuda", requires_grad=True) for _ in range(3)]
    lses = [torch.randn(2, 4, 5, device="cuda", requires_grad=True) for _ in range(3)]
    weights = torch.softmax(torch.stack(lses), 0)
    want = (weights[..., None] * torch.stack(outs)).sum(0), torch.logsumexp(torch.stack(lses), 0)
    got = fastattn.merge_states(outs, lses)
    torch.testing.assert_close(got, want)
    ours, theirs = (
        torch.autograd.grad(out.sin().sum() + lse.cos().sum(), [*outs, *lses])
        for out, lse in (got, want)
    )
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint32])
def test_a_seed_of_32_bits_is_refused(dtype):
    q, k, v = gpu.inputs(1, 2, 2, 9, 9, 64)
    seed = torch.tensor(7, dtype=dtype, device="cuda")
    with pytest.raises(NotImplementedError, match=r"`seed` must be int64 on a GPU, .*seed\.long"):
        fastattn.attention(q, k, v, dropout_p=0.5, seed=seed)
