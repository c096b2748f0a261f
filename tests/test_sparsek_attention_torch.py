"""sparsek_attention of torch tensors: gradients, graphs, autocast."""

import fastattn
import numpy as np
import pytest

torch = pytest.importorskip("torch")

OPTIONS = {"k_keep": 3.5, "window": 2}


def tensors(dtype=torch.float64, sq=20, sk=24):
    random = torch.Generator().manual_seed(0)
    shapes = {"q": (1, 4, sq, 8), "k": (1, 2, sk, 8), "v": (1, 2, sk, 6), "scores": (1, 2, sk)}
    given = {name: torch.randn(x, generator=random, dtype=dtype) for name, x in shapes.items()}
    given["sink"] = torch.randn(4, generator=random)
    return {name: x.requires_grad_() for name, x in given.items()}


MORE = [{}, {"key_gate": True, "softcap": 3.0}, {"keep_all": True}, {"window": 0, "k_keep": 2}]


@pytest.mark.parametrize("more", MORE)
def test_gradcheck(more):
    given = tensors()
    sink = given.pop("sink").detach()
    tau = fastattn.sparsek_lists(
        given["scores"].detach(), {**OPTIONS, **more}["k_keep"], sq=20, window=0
    )[2][..., None]
    z = given["scores"].detach()[:, :, None]
    assert torch.minimum((z - tau).abs(), (z - tau - 1).abs()).min() > 1e-5  # off kinks

    def call(q, k, v, scores):
        return fastattn.sparsek_attention(
            q, k, v, scores, sink=sink, return_lse=True, **{**OPTIONS, **more}
        )

    assert torch.autograd.gradcheck(call, tuple(given.values()), fast_mode=True)


def loss(q, k, v, scores, sink):
    out, lse = fastattn.sparsek_attention(
        q, k, v, scores, 3.5, window=2, sink=sink, return_lse=True
    )
    return out.square().sum() + lse.sum()


def gradients(function, given):
    return torch.autograd.grad(function(*given.values()), list(given.values()))


def test_gradients_are_those_of_the_backward_function():
    given = tensors(torch.float32)
    found = gradients(loss, given)
    *arrays, sink = (x.detach() for x in given.values())
    results = fastattn.sparsek_attention(
        *arrays, sink=sink, return_lse=True, return_selection=True, **OPTIONS
    )
    k_keep, window = OPTIONS.values()
    want = fastattn.sparsek_attention_backward(
        *(2 * results[0], *arrays, k_keep, *results),
        **{"window": window, "dlse": torch.ones_like(results[1]), "sink": sink},
        need_dsink=True,
    )
    for x, y in zip(found, want, strict=True):
        assert torch.equal(x, y)


def test_what_needs_no_gradient_gets_none():
    q, k, v, scores, _ = tensors(torch.float32).values()
    found = fastattn.sparsek_attention(q, k, v, scores, return_selection=True, **OPTIONS)
    assert [x.requires_grad for x in found] == [True, False, False]
    given = {name: x.detach() for name, x in tensors(torch.float32).items()}
    assert not loss(*given.values()).requires_grad
    scores = given["scores"].requires_grad_()
    loss(*given.values()).backward()
    assert scores.grad.shape == scores.shape and given["q"].grad is None


def test_one_compiled_graph_and_its_gradients():
    import torch._dynamo.testing

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=True, dynamic=True)
    for sizes in ((20, 40), (24, 33)):
        given = tensors(torch.float32, *sizes)
        found, want = (gradients(f, given) for f in (compiled, loss))
        for x, y in zip(found, want, strict=True):
            torch.testing.assert_close(x, y)
    assert counter.frame_count == 1


def test_opcheck():
    from fastattn import _operators_sparsek_attention as ours

    given = tensors(torch.float32)
    names = ours._NAMES["sparsek_attention"]
    defaults = {"softcap": 0.0, "layout": "bhsd", "deterministic": False, "backend": None}
    defaults |= {"key_gate": False, "keep_all": False}
    call = dict.fromkeys(names) | defaults | OPTIONS | given
    operator = torch.ops.fastattn.sparsek_attention.default
    torch.library.opcheck(operator, tuple(ours._values(call)))


def test_packed_gradients():
    x = torch.randn(50, 2, 8, dtype=torch.float64, requires_grad=True)
    scores = torch.randn(2, 50, dtype=torch.float64, requires_grad=True)
    cu = torch.tensor([0, 20, 50], dtype=torch.int32)

    def call(x, scores):
        return fastattn.sparsek_attention_varlen(x, x, x, scores, 4.2, cu, cu, 30, 30, window=3)

    assert torch.autograd.gradcheck(call, (x, scores), fast_mode=True)


def test_autocast():
    q, k, v, scores = (x.detach() for x in list(tensors(torch.float32).values())[:4])
    with torch.autocast("cpu", torch.bfloat16):
        out = fastattn.sparsek_attention(q, k, v, scores, **OPTIONS)
    low = [x.bfloat16() for x in (q, k, v)]
    assert torch.equal(out, fastattn.sparsek_attention(*low, scores, **OPTIONS))


def test_explain():
    given = list(tensors(torch.float32).values())[:4]
    assert fastattn.explain(fastattn.sparsek_attention, *given, **OPTIONS).backend == "cpu"


def test_refusals():
    given = tensors(torch.float32)
    arrays = [given[x] for x in ("q", "k", "v", "scores")]
    with pytest.raises(ValueError, match="`out` must be None where a gradient is asked for"):
        fastattn.sparsek_attention(*arrays, **OPTIONS, out=torch.empty(1, 4, 20, 6))
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        out = fastattn.sparsek_attention(*arrays, **OPTIONS)
        first = torch.autograd.grad(out.sum(), arrays[0], create_graph=True)
        first[0].sum().backward()
    with pytest.raises(NotImplementedError, match=r"torch.vmap or torch.func"):
        torch.vmap(lambda q: fastattn.sparsek_attention(q, *arrays[1:], **OPTIONS))(arrays[0][None])


def test_numpy_beside_torch():
    q, k, v, scores = list(tensors(torch.float32).values())[:4]
    plain = np.asarray(scores.detach())
    out = fastattn.sparsek_attention(q, k, v, plain, **OPTIONS)
    assert torch.equal(out, fastattn.sparsek_attention(q, k, v, scores, **OPTIONS))
    assert out.requires_grad
