"""attention_sparse of torch tensors: gradients, graphs, autocast."""

import fastattn
import numpy as np
import pytest

torch = pytest.importorskip("torch")


def tensors(dtype=torch.float64, hk=2, sq=20, sk=40, requires_grad=True):
    random = torch.Generator().manual_seed(0)
    shapes = {"q": (1, 4, sq, 8), "k": (1, hk, sk, 8), "v": (1, hk, sk, 6), "gate": (1, hk, sq, 3)}
    given = {name: torch.randn(x, generator=random, dtype=dtype) for name, x in shapes.items()}
    given["gate"] = given["gate"].to(torch.float64 if dtype == torch.float64 else torch.float32)
    given["sink"] = torch.randn(4, generator=random)
    lists = torch.randint(-1, 3, (1, hk, sq, 3), generator=random, dtype=torch.int32)
    return {n: x.requires_grad_(requires_grad) for n, x in given.items()}, lists


OPTIONS = {"k_block": 16, "causal": True, "window_union": (3, 0)}


@pytest.mark.parametrize(
    "more", [{}, {"key_gate": True, "softcap": 3.0}, {"window_union": None, "causal": False}]
)
def test_gradcheck(more):
    given, lists = tensors(sq=6, sk=36)
    sink = given.pop("sink").detach()

    def call(q, k, v, gate):
        return fastattn.attention_sparse(
            q, k, v, lists, gate=gate, sink=sink, return_lse=True, **{**OPTIONS, **more}
        )

    assert torch.autograd.gradcheck(call, tuple(given.values()), fast_mode=True)


def loss(q, k, v, gate, sink, lists):
    out, lse, mass = fastattn.attention_sparse(
        q, k, v, lists, gate=gate, sink=sink, return_lse=True, return_mass=True, **OPTIONS
    )
    assert not mass.requires_grad
    return out.square().sum() + lse.sum() + mass.sum()


def gradients(function, given, lists):
    return torch.autograd.grad(function(*given.values(), lists), list(given.values()))


def test_gradients_are_those_of_the_backward_function():
    given, lists = tensors(torch.float32)
    found = gradients(loss, given, lists)
    q, k, v, gate, sink = (x.detach() for x in given.values())
    options = {"gate": gate, "sink": sink, **OPTIONS}
    out, lse = fastattn.attention_sparse(q, k, v, lists, return_lse=True, **options)
    want = fastattn.attention_sparse_backward(
        *(2 * out, q, k, v, out, lse, lists),
        dlse=torch.ones_like(lse),
        need_dgate=True,
        need_dsink=True,
        **options,
    )
    for x, y in zip(found, want, strict=True):
        assert torch.equal(x, y)


def test_what_needs_no_gradient_gets_none():
    given, lists = tensors(torch.float32, requires_grad=False)
    assert not loss(*given.values(), lists).requires_grad
    gate = given["gate"].requires_grad_()
    loss(*given.values(), lists).backward()
    assert gate.grad.shape == gate.shape and given["q"].grad is None


def test_one_compiled_graph_and_its_gradients():
    import torch._dynamo.testing

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=True, dynamic=True)
    for sizes in ((20, 40), (24, 33)):
        given, lists = tensors(torch.float32, sq=sizes[0], sk=sizes[1])
        found, want = (gradients(f, given, lists) for f in (compiled, loss))
        for x, y in zip(found, want, strict=True):
            torch.testing.assert_close(x, y)
    assert counter.frame_count == 1


def test_opcheck():
    from fastattn import _operators_sparse as ours

    given, lists = tensors(torch.float32)
    names = ours._NAMES["attention_sparse"]
    defaults = {"softcap": 0.0, "layout": "bhsd", "deterministic": False, "key_gate": False}
    call = dict.fromkeys(names) | defaults | OPTIONS | {"q_block": 1, "key_lists": lists} | given
    operator = torch.ops.fastattn.attention_sparse.default
    torch.library.opcheck(operator, (True, *ours._values(call)))


def test_packed_gradients():
    x = torch.randn(50, 2, 8, dtype=torch.float64, requires_grad=True)
    cu = torch.tensor([0, 20, 50], dtype=torch.int32)
    lists = torch.randint(-1, 3, (2, 2, 2), dtype=torch.int32)

    def call(x):
        given = {"q_block": 64, "k_block": 16, "causal": True}
        return fastattn.attention_sparse_varlen(x, x, x, lists, cu, cu, 30, 30, **given)

    assert torch.autograd.gradcheck(call, (x,), fast_mode=True)


def test_autocast():
    given, lists = tensors(torch.float32, requires_grad=False)
    with torch.autocast("cpu", torch.bfloat16):
        out = fastattn.attention_sparse(given["q"], given["k"], given["v"], lists, k_block=16)
    low = [given[x].bfloat16() for x in "qkv"]
    assert torch.equal(out, fastattn.attention_sparse(*low, lists, k_block=16))


def test_refusals():
    given, lists = tensors(torch.float32)
    q, k, v = (given[x] for x in "qkv")
    with pytest.raises(
        TypeError, match=r"`key_lists` must be int32, got int64: pass key_lists.int"
    ):
        fastattn.attention_sparse(q.detach(), k.detach(), v.detach(), lists.long(), k_block=16)
    with pytest.raises(ValueError, match="must not name a block of keys twice"):
        fastattn.attention_sparse(q, k, v, 0 * lists, k_block=16, validate=True)
    with pytest.raises(ValueError, match="`out` must be None where a gradient is asked for"):
        fastattn.attention_sparse(q, k, v, lists, k_block=16, out=torch.empty(1, 4, 20, 6))
    with pytest.raises(NotImplementedError, match="second derivatives"):
        out = fastattn.attention_sparse(q, k, v, lists, k_block=16)
        first = torch.autograd.grad(out.sum(), q, create_graph=True)
        first[0].sum().backward()
    with pytest.raises(NotImplementedError, match=r"torch.vmap or torch.func"):
        torch.vmap(lambda q: fastattn.attention_sparse(q, k, v, lists, k_block=16))(q[None])


def test_numpy_beside_torch():
    given, lists = tensors(torch.float32)
    q, k, v = (given[x] for x in "qkv")
    out = fastattn.attention_sparse(q, k, v, np.asarray(lists), k_block=16)
    assert torch.equal(out, fastattn.attention_sparse(q, k, v, lists, k_block=16))
    assert out.requires_grad
