"""Gradients of torch tensors: checked against differences, and what autograd asks of a function."""

import inspect
import itertools

import fastattn
import pytest

torch = pytest.importorskip("torch")

theirs = torch.nn.functional.scaled_dot_product_attention
ours = fastattn.scaled_dot_product_attention


def leaf(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def qkv(dtype=torch.float64, heads=(4, 2), sq=5, sk=6, b=2):
    hq, hk = heads
    return [leaf(b, hq, sq, 3, dtype=dtype), *(leaf(b, hk, sk, n, dtype=dtype) for n in (3, 4))]


def finite(out, lse):
    """A lse of -inf has no differences."""
    return out, torch.where(torch.isinf(lse), 0.0, lse)


CASES = {
    "plain": {},
    "causal": {"causal": True},
    "top left": {"causal": "top-left", "window": (1, None)},
    "window": {"window": (1, 2), "q_offset": -1},
    "empty rows": {"causal": True, "q_offset": -3},
    "offsets": {"causal": True, "q_offset": torch.tensor([2, -1], dtype=torch.int32)},
    "lengths": {
        "q_lengths": torch.tensor([5, 2], dtype=torch.int32),
        "k_lengths": torch.tensor([3, 6], dtype=torch.int32),
        "k_start": torch.tensor([0, 2], dtype=torch.int32),
    },
    "bool mask": {"mask": torch.arange(30).view(5, 6) % 3 > 0},
    "softcap": {"softcap": 0.8},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.1, 0.3, 0.0])},
    "scale": {"scale": -0.7},
    "dropout": {"dropout_p": 0.4, "seed": 11},
    "dropout by an array": {"dropout_p": 0.4, "seed": torch.tensor(11)},
    "all dropped": {"dropout_p": 1.0, "seed": 1},
}


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name):
    def call(q, k, v):
        return finite(*fastattn.attention(q, k, v, return_lse=True, **CASES[name]))

    assert torch.autograd.gradcheck(call, qkv())


def test_gradcheck_in_the_other_layout():
    def call(q, k, v):
        return fastattn.attention(*(x.transpose(1, 2) for x in (q, k, v)), layout="bshd")

    assert torch.autograd.gradcheck(call, qkv())


BROADCASTS = list(itertools.product((1, 2), (1, 4), (1, 5), (1, 6)))


@pytest.mark.parametrize("shape", [*BROADCASTS, (5, 6), (6,), ()])
def test_gradcheck_of_a_mask(shape):
    def call(q, k, v, mask):
        return fastattn.attention(q, k, v, mask=mask, causal=True, return_lse=True)

    assert torch.autograd.gradcheck(call, (*qkv(), leaf(*shape)))


def test_gradient_of_a_sink():
    q, k, v = qkv()
    sink = torch.randn(4, requires_grad=True)
    out, lse = fastattn.attention(q, k, v, sink=sink, causal=True, return_lse=True)
    (found,) = torch.autograd.grad(out.square().sum() + lse.sum(), sink)
    scores = q @ k.repeat_interleave(2, 1).transpose(2, 3) * 3**-0.5
    scores = scores.masked_fill(~torch.ones(5, 6, dtype=bool).tril(1), -torch.inf)
    scores = torch.cat([scores, sink.double().view(4, 1, 1).expand(2, 4, 5, 1)], 3)
    p = scores.softmax(3)[..., :-1]
    loss = (p @ v.repeat_interleave(2, 1)).square().sum() + scores.logsumexp(3).sum()
    torch.testing.assert_close(found, torch.autograd.grad(loss, sink)[0])
    assert found.dtype == torch.float32


def test_gradcheck_of_packed_sequences():
    q_ends, k_ends = (torch.tensor(x, dtype=torch.int32) for x in ([0, 2, 2, 5], [0, 3, 4, 6]))

    def call(q, k, v, mask):
        found = fastattn.attention_varlen(
            q, k, v, q_ends, k_ends, 3, 3, mask=mask, causal=True, return_lse=True
        )
        return finite(*found)

    tensors = leaf(6, 4, 3), leaf(7, 2, 3), leaf(7, 2, 4), leaf(3, 1, 3, 3)
    assert torch.autograd.gradcheck(call, tensors)


SHAPES = [
    [(5, 3), (6, 3), (6, 4)],
    [(2, 5, 3), (6, 3), (2, 6, 4)],
    [(2, 1, 4, 5, 3), (3, 1, 6, 3), (1, 6, 4)],
    [(2, 1, 5, 3), (2, 4, 6, 3), (2, 4, 6, 4)],
    [(1, 4, 5, 3), (3, 4, 6, 3), (3, 1, 6, 4)],
    [(0, 4, 5, 3), (0, 4, 6, 3), (0, 4, 6, 4)],
    [(2, 2, 0, 3), (2, 2, 6, 3), (2, 2, 6, 4)],
    [(2, 2, 5, 3), (2, 2, 0, 3), (2, 2, 0, 4)],
]


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_gradients_have_the_shape_that_came(shapes):
    tensors = [leaf(*shape) for shape in shapes]
    out = ours(*tensors)
    found = torch.autograd.grad(out.square().sum(), tensors)
    assert [x.shape for x in found] == [x.shape for x in tensors]
    if all(x.numel() for x in tensors):
        assert torch.autograd.gradcheck(ours, tensors)


def test_different_heads_of_keys_and_values():
    q, k, v = leaf(2, 4, 5, 3), leaf(2, 2, 6, 3), leaf(2, 4, 6, 4)
    assert torch.autograd.gradcheck(lambda *x: ours(*x, enable_gqa=True), (q, k, v))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_against_torchs_own(dtype, is_causal):
    tensors = [torch.randn(2, 4, 33, 16, dtype=dtype, requires_grad=True) for _ in range(3)]
    dout = torch.randn(2, 4, 33, 16, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    want = torch.autograd.grad(theirs(*exact, is_causal=is_causal), exact, dout.double())
    found = torch.autograd.grad(ours(*tensors, is_causal=is_causal), tensors, dout)
    eps = torch.finfo(dtype).eps
    for x, y in zip(found, want, strict=True):
        assert x.dtype == dtype and (x.double() - y).abs().max() <= 8 * eps * y.abs().max()


def test_the_output_lies_as_without_a_gradient():
    q, k, v = (torch.randn(2, 5, 4, 8).transpose(1, 2) for _ in range(3))
    plain = ours(q, k, v)
    followed = ours(q.clone(memory_format=torch.preserve_format).requires_grad_(), k, v)
    assert followed.stride() == plain.stride() and torch.equal(followed, plain)


def test_only_what_is_asked_for():
    q, k, v = (x.detach() for x in qkv())
    for n in range(3):
        tensors = [q, k, v]
        tensors[n] = tensors[n].clone().requires_grad_()
        ours(*tensors, enable_gqa=True).sum().backward()
        assert [x.grad is not None for x in tensors] == [n == m for m in range(3)]
    out, lse = fastattn.attention(q.requires_grad_(), k, v, return_lse=True)
    (alone,) = torch.autograd.grad(lse.sum(), q, retain_graph=True)
    (both,) = torch.autograd.grad(lse.sum() + 0 * out.sum(), q)
    torch.testing.assert_close(alone, both)


def test_one_array_in_three_places():
    x = leaf(2, 4, 5, 3)
    assert torch.autograd.gradcheck(lambda x: ours(x, x, x), (x,))
    assert torch.autograd.gradcheck(lambda x: ours(x, x[:, :, :4], x[:, :, :4]), (x,))


def test_a_second_backward():
    q, k, v = qkv()
    loss = fastattn.attention(q, k, v).square().sum()
    first = torch.autograd.grad(loss, q, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(loss, q)[0])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, q)


@pytest.mark.parametrize("which", ["q", "mask", "k_lengths", "alibi_slopes", "seed", "out"])
def test_saved_tensors_that_change_are_noticed(which):
    made = dict(zip("qkv", (x.detach() for x in qkv()), strict=True))
    made["mask"] = torch.zeros(5, 6)
    made["k_lengths"] = torch.tensor([6, 6], dtype=torch.int32)
    made["alibi_slopes"] = torch.zeros(4)
    made["seed"] = torch.tensor(3)
    made["v"].requires_grad_()
    out = fastattn.attention(**made, dropout_p=0.5)
    changed = out.detach() if which == "out" else made[which]
    changed.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_written_outputs_have_no_gradient():
    q, k, v = qkv()
    out = torch.ones(2, 4, 5, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="`out` must be None where a gradient is asked for"):
        fastattn.attention(q, k, v, out=out)
    assert (out == 1).all()


def test_sentences_are_those_of_the_plain_call():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="`k` must have d = 3 like `q`, got 2"):
        fastattn.attention(q, k[..., :2], v)
    with pytest.raises(RuntimeError, match="`key` must have d = 3 like `query`, got 2"):
        ours(q[0], k[0, ..., :2], v[0])
    with pytest.raises(TypeError, match="`v` must be float64 like `q`, got float32"):
        fastattn.attention(q, k, v.float())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_repeats_dropout(reentrant):
    from torch.utils.checkpoint import checkpoint

    tensors = [torch.randn(2, 4, 9, 8, requires_grad=True) for _ in range(3)]

    def call(q, k, v):
        return ours(q, k, v, dropout_p=0.5) * 2

    grads = []
    for run in (call, lambda *x: checkpoint(call, *x, use_reentrant=reentrant)):
        torch.manual_seed(5)
        out = run(*tensors)
        grads.append(
            (out.detach(), *torch.autograd.grad(out.sum(), tensors))
            if not reentrant
            else (out.detach(), *backward(out, tensors))
        )
    for x, y in zip(*grads, strict=True):
        assert torch.equal(x, y)


def backward(out, tensors):
    for x in tensors:
        x.grad = None
    out.sum().backward()
    return [x.grad for x in tensors]


def test_dropout_keeps_what_the_forward_kept():
    q, k, v = qkv()
    torch.manual_seed(1)
    first = ours(q, k, v, dropout_p=0.5, enable_gqa=True)
    torch.manual_seed(1)
    assert torch.equal(ours(q, k, v, dropout_p=0.5, enable_gqa=True), first)
    seed = torch.randint(1 << 60, ())
    known = torch.autograd.grad(fastattn.attention(q, k, v, dropout_p=0.5, seed=seed).sum(), q)
    again = torch.autograd.grad(fastattn.attention(q, k, v, dropout_p=0.5, seed=int(seed)).sum(), q)
    assert torch.equal(known[0], again[0])


def test_autocast():
    q, k, v = [torch.randn(2, 4, 9, 8, requires_grad=True) for _ in range(3)]
    mask = torch.randn(9, 9, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ours(q, k, v, mask)
        loss = out.float().square().sum()
    assert out.dtype == torch.bfloat16
    found = torch.autograd.grad(loss, (q, k, v, mask))
    assert all(x.dtype == torch.float32 for x in found)
    cast = [x.detach().bfloat16().requires_grad_() for x in (q, k, v, mask)]
    want = torch.autograd.grad(ours(*cast).float().square().sum(), cast)
    for x, y in zip(found, want, strict=True):
        assert torch.equal(x, y.float())


def test_deterministic_algorithms(monkeypatch):
    at = list(inspect.signature(fastattn.attention).parameters).index("deterministic")
    heard, plain = [], fastattn._C.gradients

    def listen(call, *rest):
        heard.append(rest[-1] or call[1][at])
        return plain(call, *rest)

    monkeypatch.setattr(fastattn._C, "gradients", listen)
    q, k, v = qkv()
    for wanted, warns in ((False, False), (True, False), (True, True)):
        torch.use_deterministic_algorithms(wanted, warn_only=warns)
        try:
            fastattn.attention(q, k, v).sum().backward()
            fastattn.attention(q, k, v, deterministic=True).sum().backward()
        finally:
            torch.use_deterministic_algorithms(False)
    assert heard == [False, True, True, True, False, True]


def test_dynamo_hears_deterministic_algorithms():
    from fastattn._derivatives import are_deterministic

    call = torch.compile(lambda x: x + are_deterministic(), backend="eager", fullgraph=True)
    for wanted, warns in ((False, False), (True, False), (True, True)):
        torch.use_deterministic_algorithms(wanted, warn_only=warns)
        try:
            assert call(torch.zeros(1)).item() == (wanted and not warns)
        finally:
            torch.use_deterministic_algorithms(False)


def test_attention_backward_of_what_requires_grad():
    q, k, v = qkv()
    out, lse = fastattn.attention(q, k, v, return_lse=True)
    dout = torch.randn_like(out).requires_grad_()
    dq, dk, dv, *rest = fastattn.attention_backward(dout, q, k, v, out, lse)
    assert rest == [None, None] and dq.requires_grad
    (want,) = torch.autograd.grad(out, q, dout, retain_graph=True)
    torch.testing.assert_close(dq, want)
    with torch.no_grad():
        plain = fastattn.attention_backward(dout, q, k, v, out, lse)
    assert not plain[0].requires_grad and torch.equal(plain[1], dk) and torch.equal(plain[2], dv)


def test_explain_of_what_requires_grad():
    q, k, v = qkv()
    assert fastattn.explain(fastattn.attention, q, k, v).backend == "cpu"
    out, lse = fastattn.attention(q, k, v, return_lse=True)
    said = fastattn.explain(fastattn.attention_backward, out, q, k, v, out, lse)
    assert said.backend == "cpu" and "bwd" in said.kernel


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_gradcheck_of_merging(layout):
    shape = (2, 4, 5, 3) if layout == "bhsd" else (2, 5, 4, 3)
    outs, lses = [leaf(*shape) for _ in range(3)], [leaf(2, 4, 5) for _ in range(3)]

    def merge(*x):
        return fastattn.merge_states(x[:3], x[3:], layout=layout)

    plain = fastattn.merge_states(*([x.detach() for x in y] for y in (outs, lses)), layout=layout)
    for x, y in zip(merge(*outs, *lses), plain, strict=True):
        torch.testing.assert_close(x, y)
    assert torch.autograd.gradcheck(merge, (*outs, *lses))
    assert torch.autograd.gradgradcheck(merge, (*outs, *lses))


@pytest.mark.parametrize("empty", [-torch.inf, torch.inf])
def test_empty_parts_have_no_gradient(empty):
    outs, lses = [leaf(1, 1, 2, 3) for _ in range(2)], [torch.zeros(1, 1, 2).double() for _ in "ab"]
    lses[0][..., 0] = empty
    lses[1][..., 0] = lses[1][..., 1] = empty
    with torch.no_grad():
        outs[1].fill_(torch.nan)
    lses = [x.requires_grad_() for x in lses]
    out, lse = fastattn.merge_states(outs, lses)
    assert (out[..., 0, :] == 0).all() and lse[0, 0, 0] == -torch.inf
    found = torch.autograd.grad(out.sum() + lse[..., 1].sum(), [*outs, *lses])
    assert (found[0][..., 1, :] == 1).all() and (found[0][..., 0, :] == 0).all()
    assert (found[1] == 0).all() and (found[3] == 0).all() and (found[2][..., 0] == 0).all()
