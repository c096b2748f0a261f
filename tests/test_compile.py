"""torch.compile with one graph, forward and backward; opcheck of the operators it holds."""

import inspect

import fastattn
import pytest
from conftest import python

torch = pytest.importorskip("torch")

attend = fastattn.scaled_dot_product_attention


def qkv(b=2, **keywords):
    return [torch.randn(b, 4, 5, 8, **keywords) for _ in range(3)]


def counted(function, **keywords):
    """The compiled function, and what counts its graphs."""
    import torch._dynamo.testing

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    return torch.compile(function, backend=counter, fullgraph=True, **keywords), counter


def test_one_graph_for_every_batch_size_and_its_gradients():
    def loss(q, k, v):
        return (attend(1.5 * q, k, v, is_causal=True) + 1).square().sum()

    compiled, counter = counted(loss, dynamic=True)
    for b in (2, 3, 7):
        ours = qkv(b, requires_grad=True)
        eager = [x.detach().clone().requires_grad_() for x in ours]
        compiled(*ours).backward()
        loss(*eager).backward()
        for x, y in zip(ours, eager, strict=True):
            torch.testing.assert_close(x.grad, y.grad)
    assert counter.frame_count == 1


CALLS = {
    "window and lse": dict(causal=True, window=(2, None), return_lse=True),
    "layout": dict(layout="bshd", softcap=3.0),
    "offset": dict(causal=True, q_offset=2),
    "scale": dict(scale=-0.5, causal="top-left"),
    "a seed": dict(dropout_p=0.5, seed=7),
}


@pytest.mark.parametrize("name", CALLS)
def test_options_reach_the_operator(name):
    def call(q, k, v):
        return fastattn.attention(q, k, v, **CALLS[name])

    compiled, counter = counted(call)
    for _ in range(2):
        tensors = qkv()
        torch.testing.assert_close(compiled(*tensors), call(*tensors))
    assert counter.frame_count == 1


def test_arrays_reach_the_operator():
    def call(q, k, v, mask, sink, slopes, lengths):
        return fastattn.attention(
            q, k, v, mask=mask, sink=sink, alibi_slopes=slopes, k_lengths=lengths
        ).sum()

    compiled, counter = counted(call)
    tensors = [*qkv(requires_grad=True), torch.randn(5, 5, requires_grad=True)]
    tensors.append(torch.randn(4, requires_grad=True))
    rest = torch.rand(4), torch.tensor([5, 3], dtype=torch.int32)
    wanted = torch.autograd.grad(call(*tensors, *rest), tensors)
    found = torch.autograd.grad(compiled(*tensors, *rest), tensors)
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y)
    assert counter.frame_count == 1


def test_packed_sequences():
    ends = torch.tensor([0, 2, 6], dtype=torch.int32)

    def call(q, k, v):
        return fastattn.attention_varlen(q, k, v, ends, ends, 4, 4, causal=True)

    compiled, _ = counted(call)
    tensors = [torch.randn(6, 4, 8, requires_grad=True) for _ in range(3)]
    wanted = torch.autograd.grad(call(*tensors).square().sum(), tensors)
    found = torch.autograd.grad(compiled(*tensors).square().sum(), tensors)
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y)


def test_dropout_draws_in_the_graph():
    compiled, _ = counted(lambda q, k, v: attend(q, k, v, dropout_p=0.5))
    tensors = qkv()
    first, second = compiled(*tensors), compiled(*tensors)
    assert not torch.equal(first, second)


def test_the_output_lies_as_the_eager_one():
    """So that .transpose(1, 2).view(...) stays legal."""

    def call(x):
        q, k, v = (y.view(2, 5, 4, 8).transpose(1, 2) for y in x)
        return attend(q, k, v).transpose(1, 2).view(2, 5, 32)

    compiled, _ = counted(call)
    x = torch.randn(3, 2, 5, 32)
    torch.testing.assert_close(compiled(x), call(x))


@pytest.mark.parametrize("order", ["torch, fastattn", "fastattn, torch", "torch._dynamo, fastattn"])
def test_any_order_of_imports(order):
    python(
        "-c",
        f"import {order}\n"
        "import torch\n"
        "def f(q): return fastattn.attention(q, q, q) + 1\n"
        "q = torch.randn(1, 2, 3, 8)\n"
        "compiled = torch.compile(f, backend='eager', fullgraph=True)\n"
        "assert torch.equal(compiled(q), f(q))\n",
    )


def arguments(**given):
    from fastattn import _operators, torch  # noqa: F401

    defaults = {n: p.default for n, p in inspect.signature(fastattn.attention).parameters.items()}
    return tuple(_operators._values(defaults | given))


OPERATOR_CALLS = {
    "plain": lambda: {},
    "mask and sink": lambda: {
        "mask": torch.randn(4, 1, 5, requires_grad=True),
        "sink": torch.randn(4, requires_grad=True),
        "causal": True,
    },
    "layout": lambda: {"layout": "bshd"},
    "bool mask, lengths": lambda: {
        "mask": torch.rand(5, 5) > 0.3,
        "k_lengths": torch.tensor([5, 2], dtype=torch.int32),
    },
}


@pytest.mark.parametrize("name", OPERATOR_CALLS)
def test_opcheck(name):
    q, k, v = qkv(requires_grad=True)
    values = arguments(q=q, k=k, v=v, **OPERATOR_CALLS[name]())
    torch.library.opcheck(torch.ops.fastattn.attention.default, values)


def test_opcheck_of_the_backward():
    q, k, v = qkv()
    out, lse = fastattn.attention(q, k, v, return_lse=True)
    dout, dlse = torch.randn_like(out).requires_grad_(), torch.zeros_like(lse)
    needs = [True, True, False, False, False]
    values = (dout, dlse, out, lse, needs, *arguments(q=q, k=k, v=v))
    torch.library.opcheck(torch.ops.fastattn.attention_backward.default, values)
