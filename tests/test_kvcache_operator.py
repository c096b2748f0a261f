"""attention_kvcache in graphs of torch: an operator that writes the caches, or one that reads."""

import inspect

import fastattn
import kvcache_cases
import pytest
from kvcache_cases import Case

torch = pytest.importorskip("torch")
import cases  # noqa: E402

PAGED = {"page_size": 16, "room": 48}
CASES = {
    "read": {"s_new": None, "window": (9, 0)},
    "written": {"sq": 3, "s_new": 3, "dtype": "bfloat16", "rotary": 8, "leftpad": True},
    "pages": {**PAGED, "mass": True, "alibi": 1, "sink": True, "hq": 6, "dv": 24},
    "an int": {"lengths": "int", "layout": "bhsd", "softcap": 2.0, "scale": -0.4},
    "entries": {"batch_idx": True, "interleaved": True, "rotary": 16, "causal": "top-left"},
    "packed": {"packed": True, "sq": 3, **PAGED, "mass": True},
    "values of keys": {"shared": True, "invariant": True, "causal": False},
}


def counted(function, **keywords):
    """The compiled function, and what counts its graphs."""
    import torch._dynamo.testing

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    return torch.compile(function, backend=counter, fullgraph=True, **keywords), counter


@pytest.mark.parametrize("name", CASES)
def test_a_graph_by_the_reference(name):
    compiled, counter = counted(lambda *a, **k: fastattn.attention_kvcache(*a, **k))
    assert not kvcache_cases.run(Case(seed=3, **CASES[name]), cases.Torch("cpu"), compiled)
    assert counter.frame_count == 1


def tensors(b=2, room=6):
    """q, k, v, the caches, the lengths."""
    q, *new = (torch.randn(b, 1, h, 8) for h in (4, 2, 2))
    return q, *new, *torch.randn(2, b, room, 2, 8), torch.tensor([3, 5, 1, 0][:b]).int()


def append(q, k, v, k_cache, v_cache, n):
    return fastattn.attention_kvcache(2 * q, k_cache, v_cache, n, k=k, v=v) + 1


def test_one_graph_for_a_growing_int_and_other_batches():
    """After the first number torch makes it a symbol."""
    compiled, counter = counted(append, dynamic=True)
    for b, room, n in ((2, 6, 0), (2, 6, 1), (3, 9, 2), (4, 9, 8)):
        given = [*tensors(b, room)[:-1], n]
        copies = [x.clone() for x in given[:-1]]
        assert torch.equal(compiled(*given), append(*copies, n))
        assert all(map(torch.equal, given[:-1], copies))
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    "options",
    [{"backend": "eager"}, {"backend": "aot_eager"}, {}, {"mode": "reduce-overhead"}],
    ids=str,
)
def test_the_cache_is_written_though_nobody_looks_at_the_result(options):
    def step(*given):
        append(*given)
        return given[0] + 1

    torch._dynamo.reset()
    given = tensors()
    copies = [x.clone() for x in given]
    append(*copies)
    torch.compile(step, fullgraph=True, **options)(*given)
    assert all(map(torch.equal, given, copies))


def test_two_steps_in_one_graph():
    def steps(q, k, v, k_cache, v_cache, n):
        first = append(q, k, v, k_cache, v_cache, n - 1)
        return first + append(q, v, k, k_cache, v_cache, n) + k_cache.sum()

    compiled, counter = counted(steps)
    given = tensors()
    copies = [x.clone() for x in given]
    assert torch.equal(compiled(*given), steps(*copies))
    assert all(map(torch.equal, given, copies)) and counter.frame_count == 1


class Append(torch.nn.Module):
    def forward(self, *given):
        return append(*given)


def recorders():
    from torch.fx.experimental.proxy_tensor import make_fx

    return {
        "make_fx": lambda m, a: make_fx(m)(*a),
        "make_fx symbolic": lambda m, a: make_fx(m, tracing_mode="symbolic")(*a),
        "export": lambda m, a: torch.export.export(m, a, strict=False).module(),
        "jit.trace": lambda m, a: torch.jit.trace(m, a, check_trace=False),
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("recorder", recorders())
def test_a_graph_holds_the_operator(recorder):
    """Of other inputs it gives other results and writes other caches, as the eager call."""
    graph = recorders()[recorder](Append(), tensors())
    for _ in range(2):
        given = tensors()
        copies = [x.clone() for x in given]
        assert torch.equal(graph(*given), append(*copies))
        assert all(map(torch.equal, given, copies))


def test_symbolic_trace_leaves_the_call():
    def step(q, k_cache, v_cache, n):
        return fastattn.attention_kvcache(q, k_cache, v_cache, n) + 1

    given = [tensors()[n] for n in (0, 3, 4, 5)]
    assert torch.equal(torch.fx.symbolic_trace(step)(*given), step(*given))


def arguments(**given):
    """Of the operators, in order."""
    from fastattn import _operators, _operators_kvcache, torch  # noqa: F401

    parameters = inspect.signature(fastattn.attention_kvcache).parameters.values()
    flat = _operators.flat({p.name: p.default for p in parameters} | given)
    return tuple(flat.get(n) for n in _operators_kvcache._KINDS)


def test_opcheck():
    q, k, v, k_cache, v_cache, n = tensors()
    read = arguments(q=q, k_cache=k_cache, v_cache=v_cache, cache_seqlens=n, return_mass=True)
    torch.library.opcheck(torch.ops.fastattn.attention_kvcache.default, read)
    ends = {"cu_seqlens_q": n.new_tensor([0, 1, 2]), "max_seqlen_q": 1}
    packed = {"q": q[:, 0], "k_cache": k_cache, "v_cache": v_cache, "cache_seqlens": n}
    torch.library.opcheck(
        torch.ops.fastattn.attention_kvcache.default, arguments(**packed, **ends, return_mass=True)
    )
    pages = {"page_table": torch.tensor([[0, 1], [3, 2]]).int(), "layout": "bhsd"}
    new = {"q": q.transpose(1, 2), "k": k.transpose(1, 2), "v": v.transpose(1, 2)}
    cache = torch.randn(2, 4, 2, 5, 8)
    written = arguments(k_cache=cache[0], v_cache=cache[1], cache_seqlens=7, **pages, **new)
    torch.library.opcheck(torch.ops.fastattn.attention_kvcache_.default, written)


def test_the_operator_itself():
    """Called eagerly: what it writes, autograd learns of; a gradient is refused."""
    q, k, v, k_cache, v_cache, n = tensors()
    given = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "cache_seqlens": n, "k": k, "v": v}
    copies = {name: x.clone() for name, x in given.items()}
    out, lse, mass = torch.ops.fastattn.attention_kvcache_(*arguments(**given))
    want, want_lse = fastattn.attention_kvcache(**copies, return_lse=True)
    assert torch.equal(out, want) and torch.equal(lse, want_lse) and not mass.numel()
    assert torch.equal(k_cache, copies["k_cache"]) and k_cache._version == 2  # v_cache's, too
    with pytest.raises(NotImplementedError, match="`q` requires grad"):
        torch.ops.fastattn.attention_kvcache_(
            *arguments(**given | {"q": q.clone().requires_grad_()})
        )


def test_what_a_graph_refuses():
    given = tensors()
    before = given[3].clone()
    compiled, _ = counted(append)
    with pytest.raises(Exception, match="`q` requires grad, and its gradient is not served"):
        compiled(given[0].clone().requires_grad_(), *given[1:])
    compiled, _ = counted(append)
    with pytest.raises(ValueError, match="`cache_seqlens` must be from 0 to 5"):
        compiled(*given[:-1], given[-1] + 1)
    out, _ = counted(
        lambda out, q, k, v, k_cache, v_cache, n: fastattn.attention_kvcache(
            q, k_cache, v_cache, n, k=k, v=v, out=out
        )
    )
    with pytest.raises(Exception, match="`out` must be None where torch records the call"):
        out(torch.empty_like(given[0]), *given)
    assert torch.equal(given[3], before)


def test_fake_tensors_get_shapes_and_dtypes():
    from torch._subclasses.fake_tensor import FakeTensorMode

    q, _, _, k_cache, v_cache, n = tensors()
    given = q.bfloat16(), k_cache, v_cache[..., :5], n
    with FakeTensorMode() as mode:
        fake = list(map(mode.from_tensor, given))
        out, lse, mass = fastattn.attention_kvcache(*fake, return_lse=True, return_mass=True)
    assert out.shape == (2, 1, 4, 5) and out.dtype == torch.bfloat16
    assert lse.shape == (2, 4, 1) and mass.shape == (2, 2, 6)
    assert lse.dtype == mass.dtype == torch.float32
    with pytest.raises(NotImplementedError, match="explain needs tensors with values"):
        fastattn.explain(fastattn.attention_kvcache, *fake)
