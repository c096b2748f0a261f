"""torch.func's transforms inside of what torch.compile and make_fx make graphs of."""

import fastattn
import pytest

torch = pytest.importorskip("torch")

sdpa = fastattn.scaled_dot_product_attention


def causal(x):
    return sdpa(x, x, x, is_causal=True)


def loss(x):
    lengths = torch.tensor([2, 4], dtype=torch.int32)
    out, lse = fastattn.attention(x, x, x, k_lengths=lengths, softcap=3.0, return_lse=True)
    return out.square().sum() + lse.sum()


FUNCTIONS = {
    "vmap": lambda x: torch.vmap(causal)(x),
    "grad": lambda x: torch.func.grad(loss)(x[0]),
    "vmap of grad": lambda x: torch.vmap(torch.func.grad(loss))(x),
    "vjp": lambda x: torch.func.vjp(causal, x)[1](x)[0],
    "jacrev": lambda x: torch.func.jacrev(causal)(x[0, :1, :1, :2]),
    "dropout": lambda x: torch.vmap(lambda y: fastattn.attention(y, y, y, dropout_p=0.3, seed=3))(
        x
    ),
}


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True)


def traced(function):
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(function)(torch.ones(3, 2, 2, 4, 3, dtype=torch.float64))
    names = {str(node.target) for node in graph.graph.nodes}
    assert "fastattn.attention.default" in names
    return graph


@pytest.mark.parametrize("make", [compiled, traced])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_as_without_a_graph(name, make):
    function = FUNCTIONS[name]
    x = torch.randn(3, 2, 2, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(make(function)(x), function(x), rtol=1e-10, atol=1e-10)


def test_out_is_refused_in_a_graph():
    x = torch.ones(1, 1, 2, 3)
    function = compiled(lambda x: fastattn.attention(x, x, x, out=torch.empty_like(x)))
    with pytest.raises(Exception, match="`out` must be None where torch records the call"):
        function(x)
