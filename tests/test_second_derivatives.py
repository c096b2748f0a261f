"""Derivatives of derivatives, and forward mode: by the formula, in torch's own operators."""

import fastattn
import pytest
from test_autograd import CASES, finite, leaf, qkv

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("name", CASES)
def test_gradgradcheck(name):
    def call(q, k, v):
        return finite(*fastattn.attention(q, k, v, return_lse=True, **CASES[name]))

    assert torch.autograd.gradgradcheck(
        call, qkv() if name in ("lengths", "bool mask") else qkv(sq=3, sk=4)
    )


@pytest.mark.parametrize("name", CASES)
def test_forward_mode(name):
    def call(q, k, v):
        return finite(*fastattn.attention(q, k, v, return_lse=True, **CASES[name]))

    tensors = qkv()
    tangents = [torch.randn_like(x) for x in tensors]
    out, pushed = torch.func.jvp(call, tuple(tensors), tuple(tangents))
    torch.testing.assert_close(out, call(*tensors))
    cotangents = [torch.randn_like(x) for x in out]
    pulled = torch.autograd.grad(call(*tensors), tensors, cotangents)
    forward = sum((x * y).sum() for x, y in zip(cotangents, pushed, strict=True))
    backward = sum((x * y).sum() for x, y in zip(tangents, pulled, strict=True))
    torch.testing.assert_close(forward, backward)


@pytest.mark.parametrize("shape", [(2, 4, 3, 4), (1, 4, 1, 4), (2, 1, 3, 1), (3, 4), ()])
def test_gradgradcheck_of_a_mask_and_a_sink(shape):
    sink = torch.randn(4)

    def call(q, k, v, mask):
        return fastattn.attention(q, k, v, mask=mask, sink=sink, softcap=2.0, return_lse=True)

    assert torch.autograd.gradgradcheck(call, (*qkv(sq=3, sk=4), leaf(*shape)))


def test_gradgradcheck_of_packed_sequences():
    q_ends, k_ends = (torch.tensor(x, dtype=torch.int32) for x in ([0, 2, 2, 4], [0, 2, 3, 5]))
    used = torch.tensor([1, 0, 2], dtype=torch.int32)

    def call(q, k, v, mask):
        found = fastattn.attention_varlen(
            q, k, v, q_ends, k_ends, 2, 2, mask=mask, seqused_q=used, causal=True, return_lse=True
        )
        return finite(*found)

    tensors = leaf(5, 2, 3), leaf(6, 1, 3), leaf(6, 1, 4), leaf(3, 1, 2, 2)
    assert torch.autograd.gradgradcheck(call, tensors)


def test_gradgradcheck_of_the_drop_in():
    tensors = leaf(2, 1, 2, 3, 3), leaf(2, 1, 4, 3), leaf(1, 4, 2)
    assert torch.autograd.gradgradcheck(fastattn.scaled_dot_product_attention, tensors)


def test_a_dual_tensor():
    from torch.autograd import forward_ad

    q, k, v = (x.detach() for x in qkv())
    tangent = torch.randn_like(v)
    with forward_ad.dual_level():
        out = fastattn.attention(q, k, forward_ad.make_dual(v, tangent))
        plain = fastattn.attention(q, k, v)
        found = forward_ad.unpack_dual(out).tangent
    torch.testing.assert_close(found, fastattn.attention(q, k, tangent))
    torch.testing.assert_close(plain, fastattn.attention(q, k, v))


def test_third_derivatives_and_a_hessian():
    q, k, v = qkv(b=1, heads=(1, 1), sq=2, sk=2)
    theirs = torch.nn.functional.scaled_dot_product_attention

    def thrice(attend):
        x = attend(q, k, v).square().sum()
        for _ in range(3):
            (x,) = torch.autograd.grad(x, q, create_graph=True)
            x = x.square().sum()
        return x

    torch.testing.assert_close(thrice(fastattn.attention), thrice(theirs))
    found, want = (
        torch.func.hessian(lambda k, a=a: a(q, k, v).square().sum())(k)
        for a in (fastattn.attention, theirs)
    )
    torch.testing.assert_close(found, want)


def test_blocks_of_rows_are_the_whole(monkeypatch):
    from fastattn import _derivatives

    tensors = qkv()

    def second():
        out = fastattn.attention(*tensors, causal=True, dropout_p=0.3, seed=2)
        first = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), tensors)

    whole = second()
    monkeypatch.setattr(_derivatives, "_BLOCK", 1)
    for x, y in zip(second(), whole, strict=True):
        torch.testing.assert_close(x, y)
