"""What records or replaces torch's operators: a result is never baked into a graph as a constant.

Modes that only look on, a default device and plain torch.compile go on working.
"""

import fastattn
import numpy as np
import pytest
from conftest import needs

torch = pytest.importorskip("torch")

NO_OPERATOR = "fastattn is no operator of torch yet, which a graph could hold: call it outside"


class Attention(torch.nn.Module):
    def forward(self, q, k, v):
        return fastattn.scaled_dot_product_attention(q, k, v) + 1


class General(torch.nn.Module):
    def forward(self, q, k, v):
        return fastattn.attention(q, k, v, causal=True) + 1


class Packed(torch.nn.Module):
    def forward(self, q, k, v):
        ends = torch.tensor([0, 5], dtype=torch.int32)
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        return fastattn.attention_varlen(q, k, v, ends, ends, 5, 5) + 1


def qkv():
    return [torch.randn(2, 4, 5, 8) for _ in range(3)]


def make_fx(**keywords):
    from torch.fx.experimental.proxy_tensor import make_fx

    return lambda module, arguments: make_fx(module, **keywords)(*arguments)


def functionalized(module, arguments):
    return make_fx()(torch.func.functionalize(module), arguments)


RECORDERS = {
    "jit.trace": (torch.jit.trace, "torch.jit.trace"),
    "make_fx": (make_fx(), "ProxyTorchDispatchMode"),
    "make_fx fake": (make_fx(tracing_mode="fake"), "FakeTensorMode"),
    "make_fx symbolic": (make_fx(tracing_mode="symbolic"), "FakeTensorMode"),
    "make_fx before dispatch": (make_fx(pre_dispatch=True), "PreDispatchTorchFunctionMode"),
    "functionalize": (
        lambda module, arguments: torch.func.functionalize(module)(*arguments),
        "torch.func.functionalize",
    ),
    "make_fx of functionalize": (functionalized, "torch.func.functionalize"),
    "export": (lambda m, a: torch.export.export(m, tuple(a), strict=False), "FakeTensorMode"),
    "symbolic_trace": (lambda m, a: torch.fx.symbolic_trace(m), "torch.fx.symbolic_trace"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("module", [Attention, General], ids=lambda m: m.__name__)
@pytest.mark.parametrize("recorder", RECORDERS)
def test_nothing_is_baked_into_a_graph(recorder, module):
    record, name = RECORDERS[recorder]
    with pytest.raises(NotImplementedError, match=rf"` is traced by {name}, and {NO_OPERATOR}"):
        record(module(), qkv())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("record", [torch.jit.trace, make_fx()])
def test_nor_from_packed_sequences(record):
    with pytest.raises(NotImplementedError, match=f"`q` is traced by .* {NO_OPERATOR}"):
        record(Packed(), qkv())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_after_a_trace_calls_work_again():
    q, k, v = qkv()
    plain = fastattn.attention(q, k, v)
    with pytest.raises(NotImplementedError):
        torch.jit.trace(Attention(), (q, k, v))
    assert torch.equal(fastattn.attention(q, k, v), plain)


def test_plain_tensors_where_fake_ones_are_made():
    """Captured tensors too: what comes of them would be a constant of the graph."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    q, k, v = qkv()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        with pytest.raises(NotImplementedError, match="`q` is traced by FakeTensorMode"):
            fastattn.attention(q, k, v)
        fake = mode.from_tensor(q)
    with pytest.raises(NotImplementedError, match="`k` is a FakeTensor, which has no values"):
        fastattn.attention(q, fake, v)


# -------------------------------------------------------------------------------- torch.func, JAX


def test_function_transforms():
    q, k, v = qkv()
    attend = fastattn.scaled_dot_product_attention
    with pytest.raises(NotImplementedError, match=r"`query` is batched by torch\.vmap.* one call"):
        torch.vmap(attend)(q, k, v)
    with pytest.raises(NotImplementedError, match=r"`key` is batched by torch\.vmap"):
        torch.vmap(lambda k: attend(q[0], k, v[0]))(k)
    gradient = r"` is followed by torch\.func\.grad, vjp or jvp, and the backward pass is not built"
    with pytest.raises(NotImplementedError, match="`query" + gradient):
        torch.func.grad(lambda q: attend(q, k, v).sum())(q)
    with pytest.raises(NotImplementedError, match="`value" + gradient):
        torch.func.jvp(lambda v: attend(q, k, v), (v,), (v,))
    with pytest.raises(NotImplementedError, match="`query" + gradient):
        torch.func.vmap(torch.func.grad(lambda q: attend(q, k[0], v[0]).sum()))(q)


def test_tensors_from_outside_of_a_transform():
    """What vmap does not batch is plain numbers, and so is what comes of it."""
    q, k, v = qkv()
    out = torch.vmap(lambda x: x + fastattn.attention(q, k, v))(torch.zeros(3, 1))
    assert torch.equal(out[1], fastattn.attention(q, k, v))


@needs("jax")
def test_traced_jax_arrays():
    import jax

    q, k, v = (jax.numpy.asarray(x.numpy()) for x in qkv())
    sentence = r"^`q` is traced by JAX \(jit, vmap, grad\), .*: call it outside of what is traced"
    for transform in (jax.jit, jax.vmap, lambda f: jax.grad(lambda *a: f(*a).sum())):
        with pytest.raises(NotImplementedError, match=sentence):
            transform(fastattn.attention)(q, k, v)


# ------------------------------------------------------------------------------ modes that look on


def test_flop_counter():
    from torch.utils.flop_counter import FlopCounterMode

    q, k, v = qkv()
    plain = fastattn.attention(q, k, v)
    with FlopCounterMode(display=False) as counter:
        out = fastattn.attention(q, k, v)
        q @ k.transpose(-1, -2)
    assert torch.equal(out, plain) and counter.get_total_flops() == 2 * 2 * 4 * 5 * 5 * 8


def test_a_dispatch_mode_sees_outputs_made():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Listens(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), keywords=None):
            heard.append(str(function))
            return function(*args, **(keywords or {}))

    heard = []
    q, k, v = qkv()
    with Listens():
        out = fastattn.attention(q, k, v)
    assert any("empty" in name for name in heard) and torch.equal(out, fastattn.attention(q, k, v))


def test_a_function_mode():
    class Passes(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), keywords=None):
            return function(*args, **(keywords or {}))

    q, k, v = qkv()
    plain = fastattn.attention(q, k, v)
    with Passes():
        assert torch.equal(fastattn.attention(q, k, v), plain)


def test_a_default_device():
    q, k, v = qkv()
    plain = fastattn.attention(q, k, v)
    with torch.device("meta"):
        assert torch.equal(fastattn.attention(q, k, v), plain)
    torch.set_default_device("cpu")
    try:
        assert torch.equal(fastattn.attention(q, k, v), plain)
    finally:
        torch.set_default_device(None)


def test_inference_mode():
    q, k, v = qkv()
    plain = fastattn.attention(q, k, v)
    with torch.inference_mode():
        out = fastattn.attention(q, k, v)
        assert out.is_inference() and torch.equal(out, plain)
        fastattn.attention(q, k, v, out=out)
    assert torch.equal(fastattn.attention(out, k, v), fastattn.attention(plain, k, v))


def test_compiled_code_breaks_its_graph_here():
    q, k, v = qkv()
    compiled = torch.compile(Attention(), backend="eager")
    with torch.no_grad():
        for scale in (1, -2):  # no constant: other inputs, other results
            want = Attention()(scale * q, k, v)
            assert torch.equal(compiled(scale * q, k, v), want)
    assert np.isfinite(want.numpy()).all()
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(Attention(), backend="eager", fullgraph=True)(q, k, v)
