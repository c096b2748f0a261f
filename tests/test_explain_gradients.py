"""explain() of tensors that require grad: whether the gradient will be served, too."""

import fastattn
import pytest

torch = pytest.importorskip("torch")


def qkv():
    return [torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3)]


CALLS = {
    "attention": lambda q, k, v: (fastattn.attention, q, k, v),
    "the drop-in": lambda q, k, v: (fastattn.scaled_dot_product_attention, q, k, v),
    "the drop-in, broadcast": lambda q, k, v: (
        fastattn.scaled_dot_product_attention,
        *(q[:, :1], k, v[0]),
    ),
    "packed": lambda q, k, v: (
        fastattn.attention_varlen,
        *(x[0].transpose(0, 1) for x in (q, k, v)),
        *(torch.tensor([0, 2, 5], dtype=torch.int32),) * 2,
        *(3, 3),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_runs_is_named(name):
    said = fastattn.explain(*CALLS[name](*qkv()))
    assert said.backend == "cpu" and said.kernel.startswith("cpu_") and "cpu" not in said.reasons
    with torch.no_grad():
        assert fastattn.explain(*CALLS[name](*qkv())) == said


@pytest.mark.parametrize("name", CALLS)
def test_tensors_with_a_tangent(name):
    forward_ad = torch.autograd.forward_ad
    q, k, v = (x.detach() for x in qkv())
    with forward_ad.dual_level():
        q = forward_ad.make_dual(q, torch.randn_like(q))
        assert fastattn.explain(*CALLS[name](q, k, v)).backend == "cpu"
        function, *arguments = CALLS[name](q, k, v)
        assert forward_ad.unpack_dual(function(*arguments)).tangent is not None


def test_what_the_call_refuses_explain_refuses():
    q, k, v = qkv()
    for wrong, error in (
        ({"out": torch.empty_like(q)}, ValueError),
        ({"softcap": -1.0}, ValueError),
    ):
        with pytest.raises(error) as first:
            fastattn.attention(q, k, v, **wrong)
        with pytest.raises(error) as second:
            fastattn.explain(fastattn.attention, q, k, v, **wrong)
        assert str(first.value) == str(second.value)
    slopes = torch.rand(2, requires_grad=True)
    with pytest.raises(NotImplementedError, match="`alibi_slopes` requires grad"):
        fastattn.explain(fastattn.attention, q, k, v, alibi_slopes=slopes)
