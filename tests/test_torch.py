"""What a torch tensor carries besides numbers: gradients, lazy bits, types. Nothing gets lost."""

from pathlib import Path

import fastattn
import numpy as np
import pytest
from conftest import python

torch = pytest.importorskip("torch")

NAMES = ("q", "k", "v")


def qkv(**keywords):
    return [torch.randn(1, 2, 6, 8, **keywords) for _ in NAMES]


def test_arguments_without_a_gradient_that_require_one():
    q, k, v = qkv()
    slopes = torch.zeros(2, requires_grad=True)
    sentence = "^`alibi_slopes` requires grad, and its gradient is not served: pass its detach"
    for tensors in ((q, k, v), (q.clone().requires_grad_(), k, v)):
        with pytest.raises(NotImplementedError, match=sentence):
            fastattn.attention(*tensors, alibi_slopes=slopes)
    out = torch.ones(1, 2, 6, 8)
    with pytest.raises(NotImplementedError, match="`out` requires grad, and what is written has"):
        fastattn.attention(q, k, v, out=out.clone().requires_grad_())
    with pytest.raises(ValueError, match="`out` must be None where a gradient is asked for"):
        fastattn.attention(q, k.clone().requires_grad_(), v, out=out)
    assert (out == 1).all() and not out._version


def test_no_grad_is_enough():
    tensors = qkv(requires_grad=True)
    plain = fastattn.attention(*(x.detach() for x in tensors))
    with torch.no_grad():
        out = fastattn.attention(*tensors)
    assert torch.equal(out, plain) and not out.requires_grad
    with torch.inference_mode():
        assert torch.equal(fastattn.attention(*tensors), plain)
        inside = qkv()  # inference tensors
        fastattn.attention(*inside)
    fastattn.attention(*inside)


def test_conjugate_and_negative_views():
    """z.conj().imag is a view with the negative bit: its memory holds the opposite sign."""
    q, k, v = qkv()
    z = torch.complex(q, q)
    lazy = z.conj().imag
    assert lazy.is_neg()
    with pytest.raises(TypeError, match="`q` must not be a lazily negated view"):
        fastattn.attention(lazy, k, v)
    resolved = fastattn.attention(lazy.resolve_neg(), k, v)
    assert torch.equal(resolved, fastattn.attention(-q, k, v))
    assert torch.equal(fastattn.attention(z.imag, k, v), fastattn.attention(q, k, v))
    for complex_ in (z, z.conj()):
        with pytest.raises(TypeError, match=r"`q` must be float64, .* got complex64"):
            fastattn.attention(complex_, k, v)


def test_memory_that_was_given_back():
    _, k, v = qkv()
    gone = torch.randn(1, 2, 6, 8)
    gone.untyped_storage().resize_(0)
    with pytest.raises(TypeError, match="`q` must have memory"):
        fastattn.attention(gone, k, v)


def test_writing_out_is_seen_by_autograd():
    """A tensor saved for backward and then overwritten through out= must raise there."""
    q, k, v = qkv()
    target = torch.ones(1, 2, 6, 8)
    x = torch.ones(1, 2, 6, 8, requires_grad=True)
    y = x * target  # saves target
    fastattn.attention(q, k, v, out=target)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_refused_out_keeps_its_version():
    q, k, v = qkv()
    out = torch.ones(1, 2, 6, 8)
    version = out._version
    with pytest.raises(ValueError):
        fastattn.attention(q, k, v, softcap=-1.0, out=out)
    assert out._version == version and (out == 1).all()


def test_under_a_default_dtype():
    q, k, v = qkv()
    plain = fastattn.attention(q, k, v)
    torch.set_default_dtype(torch.float64)
    try:
        out, lse = fastattn.attention(q, k, v, return_lse=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert out.dtype == lse.dtype == torch.float32 and torch.equal(out, plain)


def test_outputs_are_torchs_own_memory():
    """Not a view of memory that something else holds, on which record_stream() does nothing."""
    q, k, v = qkv()
    strided = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    for tensors in ((q, k, v), strided):
        for x in fastattn.attention(*tensors, return_lse=True):
            storage = x.untyped_storage()
            assert x.is_contiguous() and x.is_leaf and not x.requires_grad and not x._version
            assert storage.resizable() and storage.nbytes() == x.numel() * x.element_size()
    assert fastattn.attention(q, k[:, :, :0], v[:, :, :0]).stride() == q.stride()
    assert fastattn.attention(q[:0], k[:0], v[:0]).stride() == q[:0].stride()
    assert not fastattn.attention(q, k, v).is_inference()
    with torch.inference_mode():
        assert fastattn.attention(q, k, v).is_inference()


@pytest.mark.parametrize(
    "concern",
    ["torch", "autocast", "memory_order", "tracing", "torch_arguments", "autograd_calls"],
)
def test_without_torchs_c_functions(concern):
    """A torch whose C functions are not found is asked through Python, and refused the same."""
    program = """
import sys
import pytest
from fastattn import _frameworks
found = _frameworks.loaded
def without_address():
    torch, numpy = found()
    return torch and (*torch[:-1], 0), numpy
_frameworks.loaded = without_address
deselected = "not without_torchs_c_functions and not torchs_own_memory"
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", deselected, sys.argv[1]]))
"""
    assert " passed" in python("-c", program, Path(__file__).with_name(f"test_{concern}.py"))


def test_pinned_shared_and_numpy_memory():
    q, k, v = qkv()
    want = fastattn.attention(q, k, v)
    shared = [x.clone().share_memory_() for x in (q, k, v)]
    assert torch.equal(fastattn.attention(*shared), want)
    mine = np.zeros((1, 2, 6, 8), np.float32)
    fastattn.attention(q, k, v, out=torch.from_numpy(mine))
    assert np.array_equal(mine, want.numpy())
