"""The ways of a call with a gradient through torch: the short one in C, and those around it."""

import gc
import inspect
import itertools
import sys

import fastattn
import numpy as np
import pytest

torch = pytest.importorskip("torch")

sdpa = fastattn.scaled_dot_product_attention


def leaf(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def qkv(hq=4, hk=4, sq=5, sk=5):
    return leaf(2, hq, sq, 3), leaf(2, hk, sk, 3), leaf(2, hk, sk, 4)


def lower(variant):
    from torch.nn.attention import bias

    return getattr(bias, variant)(5, 5)


DROP_IN = {
    "plain": lambda: {},
    "causal": lambda: {"is_causal": True},
    "float mask": lambda: {"attn_mask": leaf(4, 5, 5)},
    "bool mask": lambda: {"attn_mask": torch.ones(5, 5, dtype=bool).tril(1)},
    "upper left": lambda: {"attn_mask": lower("causal_upper_left")},
    "lower right": lambda: {"attn_mask": lower("causal_lower_right")},
    "scale": lambda: {"scale": 0.3},
    "scale of a tensor": lambda: {"scale": torch.tensor(0.3)},
}


@pytest.mark.parametrize("hk", [1, 2, 4])
@pytest.mark.parametrize("name", DROP_IN)
def test_the_drop_in_against_torchs_own(name, hk):
    tensors, given = list(qkv(hk=hk)), DROP_IN[name]()
    if isinstance(mask := given.get("attn_mask"), torch.Tensor) and mask.requires_grad:
        tensors.append(mask)
    dout = torch.randn(2, 4, 5, 4).double()
    theirs = torch.nn.functional.scaled_dot_product_attention
    found, want = (
        torch.autograd.grad(f(*tensors[:3], **given, enable_gqa=True), tensors, dout)
        for f in (sdpa, theirs)
    )
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)


def test_a_bool_of_numpy():
    tensors = qkv()
    found = (torch.autograd.grad(sdpa(*tensors, is_causal=x).sum(), tensors) for x in CAUSAL)
    torch.testing.assert_close(*found, rtol=0, atol=0)


CAUSAL = (True, np.bool_(True))


def test_attention_and_the_drop_in_draw_the_same():
    tensors = qkv()
    dout, found = torch.randn(2, 4, 5, 4).double(), []
    for call in (sdpa, fastattn.attention):
        torch.manual_seed(3)
        out = call(*tensors, dropout_p=0.5)
        found.append((out, *torch.autograd.grad(out, tensors, dout)))
    for x, y in zip(*found, strict=True):
        assert torch.equal(x, y)


def test_arrays_of_other_frameworks_beside_a_gradient():
    q, k, v = qkv()
    lengths = np.array([3, 5], dtype=np.int32)
    found, want = (
        torch.autograd.grad(fastattn.attention(q, k, v, k_lengths=x).sum(), (q, k, v))
        for x in (lengths, torch.from_numpy(lengths))
    )
    torch.testing.assert_close(found, want, rtol=0, atol=0)
    k = k.detach().numpy()
    (dq,) = torch.autograd.grad(fastattn.attention(q, k, v, causal=True).sum(), q)
    again = fastattn.attention(q, torch.from_numpy(k), v, causal=True)
    assert torch.equal(dq, torch.autograd.grad(again.sum(), q)[0])


@pytest.mark.parametrize("name, value", [("scale", 0.3), ("softcap", 0.7)])
def test_numbers_that_are_tensors_in_second_derivatives(name, value):
    tensors, found = qkv(), []
    for x in (value, torch.tensor(value, dtype=torch.float64)):
        out = fastattn.attention(*tensors, **{name: x})
        first = torch.autograd.grad(out.sum(), tensors, create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in first), tensors)
        found.append((*first, *second))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_each_result_alone_and_both():
    tensors = qkv()
    dout, dlse = torch.randn(2, 4, 5, 4).double(), torch.randn(2, 4, 5).double()
    out, lse = fastattn.attention(*tensors, return_lse=True)
    alone = fastattn.attention(*tensors)
    assert torch.equal(out, alone) and alone.grad_fn is not None and lse.grad_fn is out.grad_fn
    both = torch.autograd.grad((out, lse), tensors, (dout, dlse), retain_graph=True)
    of_lse = torch.autograd.grad(lse, tensors, dlse, allow_unused=True)
    of_out = torch.autograd.grad(alone, tensors, dout)
    for x, y, z in zip(both, of_out, of_lse, strict=True):
        torch.testing.assert_close(x, y + z)


@pytest.mark.parametrize("call", [fastattn.attention, sdpa], ids=["attention", "drop-in"])
def test_autocast_is_followed_to_the_leaf(call):
    tensors = [leaf(2, 4, 9, 8, dtype=torch.float32) for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        out = call(*tensors)
    low = [x.detach().bfloat16().requires_grad_() for x in tensors]
    want = call(*low)
    assert out.dtype == torch.bfloat16 and torch.equal(out, want)
    found = torch.autograd.grad(out.float().square().sum(), tensors)
    again = torch.autograd.grad(want.float().square().sum(), low)
    assert [x.dtype for x in found] == [torch.float32] * 3
    for x, y in zip(found, again, strict=True):
        assert torch.equal(x, y.float())


REFUSED = {
    "`alibi_slopes` requires grad": {"alibi_slopes": leaf(4, dtype=torch.float32)},
    "`out` must be None where a gradient is asked for": {"out": torch.ones(2, 4, 5, 4).double()},
    "`softcap` must be a float, got a torch tensor that requires grad": {"softcap": leaf()},
    "`k_lengths` must be int32": {"k_lengths": torch.tensor([3, 5])},
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_refused_before_a_seed_is_drawn(sentence):
    tensors, before = qkv(), torch.get_rng_state()
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=sentence):
        fastattn.attention(*tensors, dropout_p=0.5, **REFUSED[sentence])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_call_within_a_call():
    """Saving a tensor runs code of the caller's, which may call as well."""
    tensors = qkv()
    dout = torch.randn(2, 4, 5, 4).double()
    want = torch.autograd.grad(sdpa(*tensors), tensors, dout)
    inner = []

    def pack(x):
        if not inner:
            inner.append(None)
            with torch.enable_grad():
                out = sdpa(*tensors, is_causal=True)
            inner[0] = torch.autograd.grad(out, tensors, dout)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = sdpa(*tensors)
    torch.testing.assert_close(torch.autograd.grad(out, tensors, dout), want, rtol=0, atol=0)
    again = torch.autograd.grad(sdpa(*tensors, is_causal=True), tensors, dout)
    torch.testing.assert_close(inner[0], again, rtol=0, atol=0)


@pytest.mark.parametrize("call", ["eager", "create_graph", "in torch.func", "compiled"])
def test_gradients_that_torch_negates_lazily(call):
    """That of conj() is a conjugate, whose imaginary part is a lazily negated view."""

    def function(q, k, v):
        return fastattn.attention(q, k, v, return_lse=True)

    def loss(*tensors):
        both = function(*tensors)
        return sum(torch.complex(torch.ones_like(x), x).conj().abs().sum() for x in both)

    tensors = qkv()
    plain = sum((1 + x * x).sqrt().sum() for x in function(*tensors))
    want = torch.autograd.grad(plain, tensors)
    if call == "in torch.func":
        found = torch.func.grad(loss, (0, 1, 2))(*tensors)
    else:
        if call == "compiled":
            function = torch.compile(function, backend="aot_eager", fullgraph=True)
        found = torch.autograd.grad(loss(*tensors), tensors, create_graph=call == "create_graph")
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)


def test_no_signature_is_read_again(monkeypatch):
    """It takes milliseconds, of a builtin whose text is parsed each time. (torch reads those of
    Python's functions.)"""
    q, k, v = qkv()
    out, lse = (x.detach() for x in fastattn.attention(q, k, v, return_lse=True))
    signature = inspect.signature

    def of_python(function, *arguments, **keywords):
        assert not inspect.isbuiltin(function)
        return signature(function, *arguments, **keywords)

    monkeypatch.setattr("inspect.signature", of_python)
    dq = fastattn.attention_backward(out, q, k, v, out, lse)[0]
    assert dq.requires_grad


def refused(q, k, v):
    with pytest.raises(ValueError, match="`k` must have d = 3"):
        fastattn.attention(q, k[..., :2], v)


CALLS = {
    "both passes": lambda q, k, v: fastattn.attention(q, k, v, dropout_p=0.5).sum().backward(),
    "the drop-in": lambda q, k, v: sdpa(q, k, v, is_causal=True).sum().backward(),
    "lse": lambda q, k, v: fastattn.attention(q, k, v, return_lse=True)[1].sum().backward(),
    "no backward pass": lambda q, k, v: fastattn.attention(q, k, v, mask=torch.zeros(5, 5)),
    "refused": refused,
}


@pytest.mark.parametrize("name", CALLS)
def test_nothing_grows(name):
    tensors = qkv()

    def counts(times):
        for _ in range(times):
            CALLS[name](*tensors)
            for x in tensors:
                x.grad = None
        gc.collect()
        return sys.getallocatedblocks(), [sys.getrefcount(x) for x in tensors]

    counts(300)
    rest = [counts(100) for _ in range(4)]
    assert all(x == rest[0][1] for _, x in rest)
    # Pools fill in some rounds; what leaks grows by 100 in each.
    assert min(y - x for (x, _), (y, _) in itertools.pairwise(rest)) < 100
