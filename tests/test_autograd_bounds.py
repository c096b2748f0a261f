"""Calls with a gradient at the bounds of what goes: wrong records, exceptions on the way, other
arrays, and what else looks into torch's backward pass."""

import importlib.machinery
import importlib.util

import fastattn
import numpy as np
import pytest
import test_memory
from fastattn import _C

torch = pytest.importorskip("torch")

sdpa = fastattn.scaled_dot_product_attention
CALLS = {"attention": fastattn.attention, "drop-in": sdpa}


def qkv(*lead):
    return tuple(torch.randn(*(lead or (2, 4, 5)), 8).double().requires_grad_() for _ in range(3))


def drop_in(is_causal=False, places="\0\1\2"):
    values = (None, None, None, None, 0.0, is_causal, None, False)
    return "scaled_dot_product_attention", values, places


def saved(q, k, v):
    with torch.no_grad():
        return (*_C.forward(None, drop_in(), q, k, v), q, k, v)


# ------------------------------------------------------------------------------- records of a call

WRONG = {
    "behind the last argument": drop_in(places="\0\1\x08"),
    "far behind it": drop_in(places="\0\1\x7f"),
    "no place of ASCII": drop_in(places="\0\1\xff"),
    "too few places": drop_in(places="\0\1"),
    "too many places": drop_in(places="\0\1\2\3"),
    "no function": ("softmax", drop_in()[1], "\0\1\2"),
    "a backward pass": ("attention_backward", drop_in()[1], "\0\1\2"),
    "too few values": ("attention", drop_in()[1], "\0\1\2"),
    "values in a list": ("attention", list(drop_in()[1]), "\0\1\2"),
    "bytes": (*drop_in()[:2], b"\0\1\2"),
    "half of one": drop_in()[:2],
    "no record": None,
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_record(name):
    tensors = qkv()
    results, needs = saved(*tensors), (False, True, True, True)
    with pytest.raises(TypeError):
        _C.forward(None, WRONG[name], *tensors)
    with pytest.raises(TypeError):
        _C.gradients(WRONG[name], results, needs, results[0], None, False)


@pytest.mark.parametrize("change", [{"saved": ()}, {"saved": None}, {"needs": (True,)}], ids=str)
def test_wrong_results(change):
    tensors = qkv()
    given = {"saved": saved(*tensors), "needs": (False, True, True, True)} | change
    with pytest.raises(TypeError, match="takes what forward"):
        _C.gradients(drop_in(), given["saved"], given["needs"], tensors[0], None, False)


def test_a_truth_that_raises():
    class Neither:
        def __bool__(self):
            raise ZeroDivisionError

    tensors = qkv()
    results, needs = saved(*tensors), (False, True, True, True)
    with pytest.raises(ZeroDivisionError):
        _C.gradients(drop_in(Neither()), results, needs, results[0], None, False)


def test_a_module_that_has_learnt_no_function():
    loader = importlib.machinery.ExtensionFileLoader("fastattn._C", _C.__file__)
    spec = importlib.util.spec_from_file_location("fastattn._C", _C.__file__, loader=loader)
    other = importlib.util.module_from_spec(spec)
    loader.exec_module(other)
    with pytest.raises(TypeError, match="_C has no forward 'attention'"):
        other.forward(None, ("attention", (), ""))
    with pytest.raises(TypeError, match="_C has no forward attention"):
        other.explain_forward("attention", ())


def test_a_record_with_an_output():
    q, k, v = (x.detach() for x in qkv())
    given = dict(_C_DEFAULTS, q=q, k=k, v=v, out=torch.empty_like(q))
    out, lse, seed = _C.forward(None, ("attention", tuple(given.values()), ""))
    assert out is given["out"] and lse.shape == (2, 4, 5) and seed is None
    assert torch.equal(out, fastattn.attention(q, k, v))


def _defaults():
    import inspect

    return {n: p.default for n, p in inspect.signature(fastattn.attention).parameters.items()}


_C_DEFAULTS = _defaults()

# ---------------------------------------------------------------------- arrays of other frameworks


def without_gradient(x):
    return x.detach().numpy()


ASKED = {
    "call": lambda f, q, k, v: f(q, k, v),
    "explain": lambda f, *qkv: fastattn.explain(f, *qkv),
    "backward": lambda f, q, k, v: fastattn.attention_backward(k, q, k, v, k, k[..., 0]),
    "transform": lambda f, q, k, v: torch.func.grad(lambda k: f(q, k, v).sum())(k.detach()),
    "tangent": lambda f, q, k, v: torch.func.jvp(lambda k: f(q, k, v), (k,), (k.detach(),)),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("asked", ASKED)
def test_queries_of_another_framework_have_no_gradient_to_give(asked, call):
    q, k, v = qkv()
    of_numpy = without_gradient(q)
    with pytest.raises(
        TypeError, match="must be a torch tensor where a gradient is asked for, got"
    ):
        ASKED[asked](CALLS[call], of_numpy, k, v)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("lead", [(2, 4, 5), (4, 5)], ids=str)
def test_keys_values_and_masks_of_another_framework(lead, call):
    (q, k, v), mask = qkv(*lead), np.tri(5) > 0
    if call == "attention" and len(lead) < 3:
        q, k, v = q[None], k[None], v[None]
    of_torch = CALLS[call](q, k.detach(), v.detach(), **masked(call, torch.from_numpy(mask)))
    out = CALLS[call](q, *map(without_gradient, (k, v)), **masked(call, mask))
    assert torch.equal(out, of_torch)
    found, want = (torch.autograd.grad(x.square().sum(), q)[0] for x in (out, of_torch))
    assert torch.equal(found, want)


def masked(call, mask):
    return {"attn_mask" if call == "drop-in" else "mask": mask}


@pytest.fixture(scope="module")
def leaves(tmp_path_factory):
    return test_memory.compiled(tmp_path_factory.mktemp("leaves"), test_memory.LEAVES)


def test_an_exception_that_a_deleter_leaves_beside_a_gradient(leaves):
    q, k, v = qkv()
    left = test_memory.Leaving(without_gradient(k), leaves, RuntimeError)
    for f in CALLS.values():
        with pytest.raises(RuntimeError, match="left behind"):
            f(q, left, v)
        with pytest.raises(RuntimeError, match="left behind"):
            fastattn.explain(f, q, left, v)
        with pytest.raises(RuntimeError, match="left behind"):
            torch.func.vmap(lambda v: f(q, left, v))(v.detach()[None])  # noqa: B023
    out = fastattn.attention(q, k, v)
    with pytest.raises(RuntimeError, match="left behind"):
        fastattn.attention_backward(out, q, left, v, out, out[..., 0])


# ------------------------------------------------------------------- what looks into the backward


@pytest.mark.parametrize("keywords", [{}, {"dropout_p": 0.5}], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_batches_of_gradients(call, keywords):
    tensors = qkv()
    out = CALLS[call](*tensors, **keywords)
    douts = torch.randn(3, *out.shape).double()
    found = torch.autograd.grad(out, tensors, douts, is_grads_batched=True, retain_graph=True)
    for n, dout in enumerate(douts):
        want = torch.autograd.grad(out, tensors, dout, retain_graph=True)
        torch.testing.assert_close([x[n] for x in found], list(want), rtol=1e-12, atol=1e-12)


COMPILED = {
    "the drop-in": lambda q, k, v: sdpa(q, k, v),
    "the same but causal": lambda q, k, v: sdpa(q, k, v, is_causal=True),
    "and with a scale": lambda q, k, v: sdpa(q, k, v, is_causal=True, scale=0.3),
    "broadcast": lambda q, k, v: sdpa(q[0], k[0], v[0]),
    "dropout": lambda q, k, v: fastattn.attention(q, k, v, dropout_p=0.5, seed=3),
    "another seed": lambda q, k, v: fastattn.attention(q, k, v, dropout_p=0.5, seed=4),
    "lse": lambda q, k, v: fastattn.attention(q, k, v, return_lse=True)[1],
}


def test_compiled_autograd_has_the_operator():
    """A graph of torch's that was made for one call does not serve another one's."""
    from torch._dynamo import compiled_autograd

    tensors, graphs = qkv(), []

    def keep(graph, _):
        graphs.append(graph.print_readable(print_output=False))
        return graph

    for name, call in COMPILED.items():
        want = torch.autograd.grad(call(*tensors).sum(), tensors, allow_unused=True)
        for x in tensors:
            x.grad = None
        out = call(*tensors)
        with compiled_autograd._enable(torch.compile(backend=keep, fullgraph=True)):
            out.sum().backward()
        for x, y in zip(tensors, want, strict=True):
            torch.testing.assert_close(x.grad, y, msg=lambda m, name=name: f"{name}: {m}")
    assert len(graphs) >= len(COMPILED) and all("gradients" in x for x in graphs)


HOOKS = {
    "halved": (lambda x: x.float(), None, "`dout` must be float32 like `q`"),
    "emptied": (lambda x: x[:0], None, "`dout` must have shape"),
    "kept": (lambda x: x.clone(), None, None),
    "on the way there": (lambda x: {}[0], None, "0"),
    "on the way back": (lambda x: x, lambda x: {}[0], "0"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", HOOKS)
def test_hooks_of_saved_tensors(name, call):
    there, back, sentence = HOOKS[name]
    tensors = qkv()

    def both():
        with torch.autograd.graph.saved_tensors_hooks(there, back or (lambda x: x)):
            out = CALLS[call](*tensors)
        return torch.autograd.grad(out.sum(), tensors)

    want = torch.autograd.grad(CALLS[call](*tensors).sum(), tensors)
    if sentence:
        with pytest.raises((KeyError, TypeError, ValueError), match=sentence):
            both()
        found = torch.autograd.grad(CALLS[call](*tensors).sum(), tensors)
    else:
        found = both()
    torch.testing.assert_close(found, want, rtol=0, atol=0)


@pytest.mark.parametrize("call", CALLS)
def test_inference_tensors_beside_a_gradient(call):
    tensors = qkv()
    with torch.inference_mode():
        k = torch.ones(2, 4, 5, 8).double()
        assert not CALLS[call](*tensors).requires_grad
        with torch.enable_grad():  # records nothing here, torch's operators neither
            assert not CALLS[call](*tensors).requires_grad
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        CALLS[call](tensors[0], k, tensors[2])
    assert CALLS[call](tensors[0], k.clone(), tensors[2]).requires_grad


@pytest.mark.parametrize("call", CALLS)
def test_torch_does_not_forget_who_wrote_the_output(call):
    tensors = qkv()
    out = CALLS[call](*tensors)
    with torch.no_grad():
        out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    out = CALLS[call](*tensors)
    out.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        out.sum().backward()
