"""fastattn.xformers: memory_efficient_attention, forward and backward, by the reference."""

import fastattn
import pytest
import reference

torch = pytest.importorskip("torch")
import fastattn.xformers as xops  # noqa: E402
import shims  # noqa: E402

attend = xops.memory_efficient_attention
SHAPES = (2, 5, 4, 3), (2, 7, 4, 3), (2, 7, 4, 5)


def results(call, tensors):
    out = call(*tensors)
    dout = torch.randn_like(out)
    return out, dout, torch.autograd.grad(out, tensors, dout)


WHOLE = {  # name: the bias, the reference's keywords
    "none": (None, {}),
    "top left": (xops.LowerTriangularMask(), {"causal": "top-left"}),
    "bottom right": (xops.LowerTriangularFromBottomRightMask(), {"causal": True}),
    "local": (xops.attn_bias.LocalAttentionFromBottomRightMask(2, 1), {"window": (2, 1)}),
    "causal local": (
        xops.LowerTriangularFromBottomRightMask().make_local_attention(3),
        {"causal": True, "window": (2, None)},
    ),
}


@pytest.mark.parametrize("sq, sk", [(5, 7), (7, 4)])
@pytest.mark.parametrize("name", WHOLE)
def test_whole_matrices(name, sq, sk):
    bias, keywords = WHOLE[name]
    tensors = shims.leaves((2, sq, 4, 3), (2, sk, 4, 3), (2, sk, 4, 5))
    found = results(lambda *x: attend(*x, attn_bias=bias, scale=0.7), tensors)
    shims.judge(found[0], None, tensors, *found[1:], scale=0.7, **keywords)


@pytest.mark.parametrize("name", WHOLE)
def test_three_dimensions(name):
    bias, keywords = WHOLE[name]
    tensors = shims.leaves((2, 5, 3), (2, 7, 3), (2, 7, 5))
    out, dout, found = results(lambda *x: attend(*x, bias), tensors)
    assert out.shape == (2, 5, 5)
    heads = [[x[:, :, None] for x in y] for y in ((out, dout), tensors, found)]
    shims.judge(heads[0][0], None, heads[1], heads[0][1], heads[2], **keywords)


@pytest.mark.parametrize("expanded", [False, True, None])
@pytest.mark.parametrize("name", WHOLE)
def test_groups(name, expanded):
    """(b, s, g, h, d); a group's keys are their own, one that is expanded, or one."""
    bias, keywords = WHOLE[name]
    q, k, v = shims.leaves((2, 5, 2, 3, 4), *[(2, 7, 2, 1 if expanded is not False else 3, 4)] * 2)
    given = (k.expand(2, 7, 2, 3, 4), v.expand(2, 7, 2, 3, 4)) if expanded else (k, v)
    out = attend(q, *given, bias)
    dout = torch.randn_like(out)
    found = [x.flatten(2, 3) for x in torch.autograd.grad(out, (q, k, v), dout)]
    tensors = [x.flatten(2, 3) for x in (q, k, v)]
    shims.judge(out.flatten(2, 3), None, tensors, dout.flatten(2, 3), found, **keywords)
    with torch.no_grad():
        torch.testing.assert_close(attend(q, *given, bias), out)


def test_expanded_keys_are_not_copied():
    q, k = torch.randn(1, 5, 2, 3, 4), torch.randn(1, 7, 2, 1, 4).expand(1, 7, 2, 3, 4)
    (_, key, _), *_ = xops._prepare(q, k, k, None, 0.0, None, None)
    assert key.shape == (1, 7, 2, 4) and key.data_ptr() == k.data_ptr()
    _, key, _ = xops._prepare(q, k.clone().expand_as(k).requires_grad_(), k, None, 0.0, None, None)[
        0
    ]
    assert key.shape == (1, 7, 6, 4)


def test_each_head_of_an_expanded_key_has_its_gradient():
    q, k, v = shims.leaves((1, 5, 1, 3, 4), (1, 7, 1, 1, 4), (1, 7, 1, 1, 4))
    wide = [x.expand(1, 7, 1, 3, 4) for x in (k, v)]
    copies = [x.detach().clone().requires_grad_() for x in wide]
    want = torch.autograd.grad(attend(q, *copies).square().sum(), copies)
    found = torch.autograd.grad(attend(q, *wide).square().sum(), wide)
    for x, y in zip(found, want, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(2, 4, 5, 7), (1, 4, 1, 7), (2, 1, 5, 1)])
def test_tensors_that_are_added(shape, causal):
    tensors = shims.leaves(*SHAPES)
    (bias,) = shims.leaves(shape, dtype=torch.float32)
    given = xops.LowerTriangularMask().add_bias(bias) if causal else bias
    out = attend(*tensors, given)
    dout = torch.randn_like(out)
    *found, dbias = torch.autograd.grad(out, (*tensors, bias), dout)
    keywords = {"mask": bias.detach().numpy(), "causal": "top-left" if causal else False}
    shims.judge(out, None, tensors, dout, found, **keywords)
    whole = bias.detach().expand(2, 4, 5, 7).requires_grad_()
    want = fastattn.attention(*tensors, mask=whole, causal=keywords["causal"], layout="bshd")
    (dwhole,) = torch.autograd.grad(want, whole, dout)
    torch.testing.assert_close(dbias, dwhole.sum_to_size(shape))


@pytest.mark.parametrize("rank", [3, 5])
def test_tensors_that_are_added_in_other_layouts(rank):
    shapes = {3: ((2, 5, 3), (2, 7, 3)), 5: ((2, 5, 2, 3, 4), (2, 7, 2, 3, 4))}[rank]
    q, k = shims.leaves(*shapes)
    heads = (2, 3) if rank == 5 else ()
    (bias,) = shims.leaves((2, *heads, 5, 7), dtype=torch.float32)
    out = attend(q, k, k, bias)
    dout = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, bias), dout)
    flat = [x.reshape(2, x.shape[1], -1, x.shape[-1]) for x in (q, k)]
    mask = bias.reshape(2, -1, 5, 7)
    want = fastattn.attention(flat[0], flat[1], flat[1], mask=mask, layout="bshd").view_as(out)
    torch.testing.assert_close(out, want)
    for x, y in zip(found, torch.autograd.grad(want, (q, k, bias), dout), strict=True):
        torch.testing.assert_close(x, y)


def test_dropout_is_attentions_own():
    tensors = shims.leaves(*SHAPES, dtype=torch.float32)
    torch.manual_seed(3)
    want = fastattn.attention(*tensors, dropout_p=0.3, causal="top-left", layout="bshd")
    torch.manual_seed(3)
    assert torch.equal(attend(*tensors, xops.LowerTriangularMask(), 0.3), want)
    q, k, v = (x[:1] for x in tensors)
    torch.manual_seed(3)
    want = fastattn.attention(q, k, v, dropout_p=0.3, layout="bshd")
    torch.manual_seed(3)
    found = attend(q, k, v, xops.BlockDiagonalMask.from_seqlens([5], [7]), 0.3)
    torch.testing.assert_close(found, want)


LOW_LEVEL = {
    "plain": (SHAPES, None),
    "three": (((2, 5, 3), (2, 7, 3), (2, 7, 5)), xops.LowerTriangularMask()),
    "groups": (((2, 5, 2, 3, 4), (2, 7, 2, 1, 4), (2, 7, 2, 1, 4)), None),
    "blocks": (
        ((1, 5, 4, 3), (1, 7, 4, 3), (1, 7, 4, 5)),
        xops.BlockDiagonalMask.from_seqlens([2, 3], [1, 6]),
    ),
    "gaps": (
        ((1, 5, 2, 2, 3), (1, 9, 2, 2, 3), (1, 9, 2, 2, 5)),
        xops.attn_bias.BlockDiagonalGappyKeysMask.from_seqlens([2, 3], [1, 4, 9], [2, 4]),
    ),
}


def test_each_head_of_an_expanded_key_has_its_gradient_apart():
    q, k, v = (x.detach() for x in shims.leaves((1, 5, 1, 3, 4), *[(1, 7, 1, 1, 4)] * 2))
    wide = [x.expand(1, 7, 1, 3, 4) for x in (k, v)]
    out, lse = xops.memory_efficient_attention_forward_requires_grad(q, *wide)
    found = xops.memory_efficient_attention_backward(out, out, lse, q, *wide)
    copies = [x.clone() for x in wide]
    want = xops.memory_efficient_attention_backward(out, out, lse, q, *copies)
    for x, y in zip(found, want, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("name", LOW_LEVEL)
def test_forward_and_backward_apart(name):
    shapes, bias = LOW_LEVEL[name]
    tensors = shims.leaves(*shapes)
    out, dout, want = results(lambda *x: attend(*x, bias), tensors)
    plain, lse = xops.memory_efficient_attention_forward_requires_grad(*tensors, bias)
    assert torch.equal(plain, out) and not plain.requires_grad
    assert lse.shape == (shapes[0][0], *(shapes[0][2:-1] or (1,)), 5)
    found = xops.memory_efficient_attention_backward(dout, plain, lse, *tensors, bias)
    for x, y in zip(found, want, strict=True):
        torch.testing.assert_close(x, y)
    alone = xops.memory_efficient_attention_forward(*tensors, bias)
    assert torch.equal(alone, out) and not alone.requires_grad


def test_the_lse():
    tensors = shims.leaves(*SHAPES)
    _, lse = xops.memory_efficient_attention_forward_requires_grad(*tensors)
    want = reference.attention(*map(shims.flipped, tensors)).lse
    torch.testing.assert_close(lse, torch.from_numpy(want.astype(float)))


class Alien:
    pass


def foreign(name, **fields):
    """An object of xFormers' class of that name."""
    made = type(name, (), {"__module__": "xformers.ops.fmha.attn_bias"})()
    vars(made).update(fields)
    return made


def test_objects_of_xformers_itself():
    """By their classes' names and fields, without xFormers."""
    tensors = [x.detach() for x in shims.leaves((1, 5, 4, 3), (1, 9, 4, 3), (1, 9, 4, 5))]
    ours = [
        xops.LowerTriangularMask(),
        xops.LowerTriangularMaskWithTensorBias(torch.randn(1, 4, 5, 9)),
        xops.attn_bias.LocalAttentionFromBottomRightMask(1, 2),
        xops.attn_bias.LowerTriangularFromBottomRightLocalAttentionMask(2),
        xops.BlockDiagonalMask.from_seqlens([2, 3], [5, 4]).make_local_attention(2),
        xops.attn_bias.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens([2, 3], 4, [3, 4]),
        xops.attn_bias.BlockDiagonalGappyKeysMask.from_seqlens([2, 3], [1, 4, 9], [2, 3]),
    ]
    for bias in ours:
        theirs = foreign(type(bias).__name__, **vars(bias))
        keys = 8 if "Padded" in type(bias).__name__ else 9
        given = [x[:, :keys] if x.shape[1] == 9 else x for x in tensors]
        assert torch.equal(attend(*given, theirs), attend(*given, bias))
    older = foreign("LowerTriangularMaskWithTensorBias", _subtensor=ours[1]._bias)
    assert torch.equal(attend(*tensors, older), attend(*tensors, ours[1]))


REFUSED = {
    "op": (ValueError, "`op` must be None: it chooses among xFormers' kernels", {"op": object()}),
    "alien": (TypeError, "`attn_bias` must be None, a tensor or one of xF.*Alien", Alien()),
    "base": (TypeError, "`attn_bias` must be None, a tensor or", xops.AttentionBias()),
    "bool": (TypeError, "`attn_bias` must be of floats", torch.ones(1, 4, 5, 9) > 0),
    "rank": (ValueError, "`attn_bias` must have 4 dim.*, got 3", torch.zeros(4, 5, 9)),
    "pages": (
        NotImplementedError,
        "`attn_bias` of keys in pages is not served yet",
        foreign("PagedBlockDiagonalPaddedKeysMask"),
    ),
    "overlap": (
        NotImplementedError,
        "share none: 0 ends at 4, after 1 starts, at 3",
        xops.attn_bias.BlockDiagonalGappyKeysMask.from_seqlens([2, 3], [0, 3, 9], [4, 3]),
    ),
    "order": (
        NotImplementedError,
        "follow each other and share none: 0 ends at 7, after 1 starts, at 0",
        xops.attn_bias.BlockDiagonalGappyKeysMask.from_seqlens([2, 3], [5, 0, 9], [2, 3]),
    ),
    "queries": (
        ValueError,
        "`query` must have the 6 rows that `attn_bias` divides, got 5",
        xops.BlockDiagonalMask.from_seqlens([2, 4], [5, 4]),
    ),
    "keys": (
        ValueError,
        "`key` must have the 8 rows that `attn_bias` divides, got 9",
        xops.BlockDiagonalMask.from_seqlens([2, 3], [5, 3]),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_by_a_sentence(name):
    error, said, given = REFUSED[name]
    given = given if isinstance(given, dict) else {"attn_bias": given}
    with pytest.raises(error, match=said):
        attend(*(torch.randn(1, n, 4, 8) for n in (5, 9, 9)), **given)


def test_more_sentences():
    q = torch.randn(2, 5, 4, 8)
    with pytest.raises(
        ValueError, match="must have b = 1 with a block-diagonal `attn_bias`, got 2"
    ):
        attend(q, q, q, xops.BlockDiagonalMask.from_seqlens([5]))
    with pytest.raises(ValueError, match="must all have 3, 4 or 5 dimensions, got 4, 4 and 3"):
        attend(q, q, q[0])
    groups = q.view(2, 5, 2, 2, 8)
    with pytest.raises(ValueError, match=r"must have \(2, 2\) heads like `query`, .* \(4, 1\)"):
        attend(groups, q[:, :, :, None], q[:, :, :, None])
    with pytest.raises(NotImplementedError, match="`p` must be 0 outside of memory_efficient_att"):
        xops.memory_efficient_attention_forward_requires_grad(q, q, q, p=0.1)
    with pytest.raises(ValueError, match=r"`lse` must be \(2, 4, 5\), got \(2, 5, 4\)"):
        xops.memory_efficient_attention_backward(q, q, torch.zeros(2, 5, 4), q, q, q)


def test_names():
    assert xops.fmha.attn_bias.BlockDiagonalMask is xops.fmha.BlockDiagonalMask
    assert set(xops.attn_bias.__all__) < set(xops.__all__)
    assert all(hasattr(xops, name) for name in xops.__all__)
