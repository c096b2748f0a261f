"""torch's CausalBias in a graph, and what is refused there as it is outside."""

import fastattn
import pytest

torch = pytest.importorskip("torch")
from torch.nn.attention.bias import causal_lower_right, causal_upper_left  # noqa: E402

sdpa = fastattn.scaled_dot_product_attention


def qkv(sq=5, sk=7, **keywords):
    return [torch.randn(2, 3, s, 8, **keywords) for s in (sq, sk, sk)]


def compiled(function, **keywords):
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True, **keywords)


@pytest.mark.parametrize(
    ("bias", "causal"), [(causal_lower_right, True), (causal_upper_left, "top-left")]
)
def test_a_bias_comes_as_an_argument_or_from_outside(bias, causal):
    tensors, mask = qkv(requires_grad=True), bias(5, 7)
    want = fastattn.attention(*tensors, causal=causal)
    of_want = torch.autograd.grad(want.square().sum(), tensors)
    calls = (
        (lambda q, k, v, mask: sdpa(q, k, v, mask), (mask,), {"dynamic": True}),
        (lambda q, k, v: sdpa(q, k, v, attn_mask=mask), (), {}),
    )
    for function, more, keywords in calls:
        out = compiled(function, **keywords)(*tensors, *more)
        torch.testing.assert_close(out, want)
        of_out = torch.autograd.grad(out.square().sum(), tensors)
        torch.testing.assert_close(of_out, of_want)


def test_another_size_is_another_graph():
    function = compiled(lambda q, k, v, mask: sdpa(q, k, v, mask))
    for sq, sk in ((5, 7), (6, 9), (5, 7)):
        tensors = qkv(sq, sk)
        want = fastattn.attention(*tensors, causal=True)
        torch.testing.assert_close(function(*tensors, causal_lower_right(sq, sk)), want)


@pytest.mark.parametrize("rank", [2, 3, 5])
def test_a_bias_of_other_ranks(rank):
    tensors = [x[(None,) * (rank - 4)] if rank > 4 else x[(0,) * (4 - rank)] for x in qkv()]
    mask = causal_lower_right(5, 7)
    out = compiled(lambda q, k, v: sdpa(q, k, v, mask))(*tensors)
    torch.testing.assert_close(out, sdpa(*tensors, mask))


def test_a_plain_mask_beside():
    tensors, mask = qkv(), torch.rand(5, 7) < 0.7
    out = compiled(lambda q, k, v, mask: sdpa(q, k, v, mask, scale=0.3))(*tensors, mask)
    torch.testing.assert_close(out, sdpa(*tensors, mask, scale=0.3))


REFUSED = {
    "a mask and is_causal": (
        lambda q, k, v: sdpa(q, k, v, torch.ones(5, 7, dtype=torch.bool), is_causal=True),
        "`attn_mask` must be None with is_causal=True, got both",
    ),
    "a bias and is_causal": (
        lambda q, k, v: sdpa(q, k, v, LOWER, is_causal=True),
        "`attn_mask` must be None with is_causal=True, got both",
    ),
    "a bias of other sizes": (
        lambda q, k, v: sdpa(q, k, v, OTHER),
        "`attn_mask` must be the CausalBias of 5 queries and 7 keys, got one of 5 and 6",
    ),
}
LOWER, OTHER = causal_lower_right(5, 7), causal_lower_right(5, 6)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("where", ["eager", "grad", "graph", "vmap", "tangent"])
def test_what_is_refused(name, where):
    function, sentence = REFUSED[name]
    tensors = qkv(requires_grad=where == "grad")
    with pytest.raises(Exception, match=sentence):
        if where == "graph":
            compiled(function)(*tensors)
        elif where == "vmap":
            torch.func.vmap(function)(*(x[None] for x in tensors))
        elif where == "tangent":
            torch.func.jvp(function, tuple(tensors), tuple(tensors))
        else:
            function(*tensors)
