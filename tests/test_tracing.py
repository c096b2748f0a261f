"""What records, replaces or transforms torch's operators: no result becomes a constant of a graph.

Modes that only look on and a default device go on working.
"""

import fastattn
import pytest

torch = pytest.importorskip("torch")


class Attention(torch.nn.Module):
    def forward(self, q, k, v):
        return fastattn.scaled_dot_product_attention(q, k, v) + 1


class General(torch.nn.Module):
    def forward(self, q, k, v):
        out, lse = fastattn.attention(q, k, v, causal=True, window=(3, None), return_lse=True)
        return out + lse[..., None]


class Packed(torch.nn.Module):
    def forward(self, q, k, v):
        n = torch.arange(3, dtype=torch.int32)
        ends = 2 * n + n // 2  # 0, 2, 5
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
    "jit.trace": torch.jit.trace,
    "make_fx": make_fx(),
    "make_fx fake": make_fx(tracing_mode="fake"),
    "make_fx symbolic": make_fx(tracing_mode="symbolic"),
    "make_fx before dispatch": make_fx(pre_dispatch=True),
    "functionalize": lambda module, arguments: torch.func.functionalize(module),
    "make_fx of functionalize": functionalized,
    "export": lambda m, a: torch.export.export(m, tuple(a), strict=False).module(),
    "strict export": lambda m, a: torch.export.export(m, tuple(a), strict=True).module(),
    "symbolic_trace": lambda m, a: torch.fx.symbolic_trace(m),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("module", [Attention, General, Packed], ids=lambda m: m.__name__)
@pytest.mark.parametrize("recorder", RECORDERS)
def test_a_graph_holds_the_operator(recorder, module):
    """Of other inputs it gives other results, those of the eager call."""
    graph = RECORDERS[recorder](module(), qkv())
    for _ in range(2):
        q, k, v = qkv()
        if module is not Attention and recorder == "symbolic_trace":
            graph = torch.fx.symbolic_trace(lambda q, k, v: fastattn.attention(q, k, v) + 1)
            assert torch.equal(graph(q, k, v), fastattn.attention(q, k, v) + 1)
            continue
        assert torch.equal(graph(q, k, v), module()(q, k, v))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_after_a_trace_calls_work_again():
    q, k, v = qkv()
    plain = fastattn.attention(q, k, v)
    torch.jit.trace(Attention(), (q, k, v))
    assert torch.equal(fastattn.attention(q, k, v), plain)


def test_fake_tensors_get_shapes_and_dtypes():
    from torch._subclasses.fake_tensor import FakeTensorMode

    q, k, v = qkv()
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in (q, k, v)]
        out, lse = fastattn.attention(*fake, return_lse=True)
    assert type(out) is type(fake[0]) and out.shape == q.shape and lse.shape == q.shape[:3]
    assert lse.dtype == torch.float32
    swapped = [x.transpose(1, 2) for x in fake]
    assert fastattn.scaled_dot_product_attention(*swapped).stride() == swapped[0].stride()


# -------------------------------------------------------------------------------- torch.func, JAX


def test_function_transforms():
    q, k, v = qkv()
    attend = fastattn.scaled_dot_product_attention
    theirs = torch.nn.functional.scaled_dot_product_attention
    plain = attend(q, k, v)
    close = torch.testing.assert_close
    close(torch.vmap(attend)(q, k, v), plain)
    close(torch.vmap(attend, in_dims=(1, 1, 1), out_dims=1)(q, k, v), plain)
    close(torch.vmap(lambda k: attend(q[0], k, v[0]))(k)[1], attend(q[0], k[1], v[0]))
    close(torch.func.jvp(lambda v: attend(q, k, v), (v,), (v,))[1], plain)
    for transform in (torch.func.grad, lambda f: torch.func.vmap(torch.func.grad(f))):
        found, want = (
            transform(lambda q, a=a: a(q, k[:1], v[:1]).square().sum())(q) for a in (attend, theirs)
        )
        close(found, want)


def test_random_bits_under_vmap():
    q, k, v = qkv()

    def drop(q):
        return fastattn.attention(q[None], k[:1], v[:1], dropout_p=0.5)

    same = q[:1].expand(3, 4, 5, 8)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(drop)(same)
    first, second, _ = torch.vmap(drop, randomness="different")(same)
    assert not torch.equal(first, second)
    first, second, _ = torch.vmap(drop, randomness="same")(same)
    assert torch.equal(first, second)


def test_a_mask_for_each_of_a_batch():
    q, k, v = qkv()
    masks = torch.randn(2, 5, 5)
    found = torch.vmap(lambda q, k, v, m: fastattn.attention(q[None], k[None], v[None], mask=m))(
        q, k, v, masks
    )
    torch.testing.assert_close(found[:, 0], fastattn.attention(q, k, v, mask=masks[:, None]))


def test_tensors_from_outside_of_a_transform():
    """What vmap does not batch is plain numbers, and so is what comes of it."""
    q, k, v = qkv()
    out = torch.vmap(lambda x: x + fastattn.attention(q, k, v))(torch.zeros(3, 1))
    assert torch.equal(out[1], fastattn.attention(q, k, v))


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
