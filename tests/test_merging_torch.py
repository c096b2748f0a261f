"""merge_states under torch's transforms: recorded like attention, batched, differentiated."""

import fastattn
import pytest
from test_tracing import RECORDERS

torch = pytest.importorskip("torch")


def parts(*lead, dtype=torch.float32, n=3, requires_grad=False):
    outs = [torch.randn(*lead, 2, 4, 5, 3, dtype=dtype) for _ in range(n)]
    lses = [torch.randn(*lead, 2, 4, 5, dtype=dtype) for _ in range(n)]
    return [x.requires_grad_(requires_grad) for x in (*outs, *lses)]


def merge(*arrays, **keywords):
    n = len(arrays) // 2
    return fastattn.merge_states(arrays[:n], arrays[n:], **keywords)


class Merged(torch.nn.Module):
    def forward(self, a, b, c, d, e, f):
        out, lse = merge(a, b, c, d, e, f)
        return out + lse[..., None]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("recorder", RECORDERS)
def test_a_graph_holds_the_operator(recorder):
    graph = RECORDERS[recorder](Merged(), parts())
    for _ in range(2):
        others = parts()
        assert torch.equal(graph(*others), Merged()(*others))
    shown = str(getattr(graph, "graph", ""))
    assert "merge_states" in shown or "functionalize" in recorder


def test_one_compiled_graph_and_its_gradients():
    import torch._dynamo.testing

    def loss(*arrays):
        out, lse = merge(*arrays, layout="bhsd")
        return out.square().sum() + lse.sum()

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=True, dynamic=True)
    for n in (3, 4):  # no size equals another
        ours = [torch.cat([x] * n).detach().requires_grad_() for x in parts()]
        want = torch.autograd.grad(loss(*ours), ours)
        for x, y in zip(torch.autograd.grad(compiled(*ours), ours), want, strict=True):
            torch.testing.assert_close(x, y)
    assert counter.frame_count == 1


def test_opcheck():
    outs_and_lses = parts(requires_grad=True)
    operator = torch.ops.fastattn.merge_states.default
    torch.library.opcheck(operator, (outs_and_lses[:3], outs_and_lses[3:], "bhsd"))


def test_function_transforms():
    batch = parts(2, dtype=torch.float64)
    apart = [merge(*(x[n] for x in batch)) for n in range(2)]
    want = [torch.stack(x) for x in zip(*apart, strict=True)]
    for found, x in zip(torch.vmap(merge)(*batch), want, strict=True):
        assert torch.equal(found, x)
    whole = tuple(range(6))

    def loss(*arrays):
        out, lse = merge(*arrays)
        return out.square().sum() + lse.sum()

    each = torch.vmap(torch.func.grad(loss, argnums=whole))(*batch)
    for n in range(2):
        for found, x in zip(
            each, torch.func.grad(loss, whole)(*(x[n] for x in batch)), strict=True
        ):
            torch.testing.assert_close(found[n], x)
    arrays, tangents = (tuple(parts(dtype=torch.float64)) for _ in range(2))
    _, pushed = torch.func.jvp(loss, arrays, tangents)
    pulled = torch.func.grad(loss, whole)(*arrays)
    products = [(x * y).sum() for x, y in zip(pulled, tangents, strict=True)]
    torch.testing.assert_close(pushed, sum(products))


def test_wrong_parts_are_refused_under_transforms_too():
    outs = parts()
    outs[1] = outs[1][:1]
    sentence = r"^`outs\[1\]` must have shape \(2, 4, 5, 3\), got \(1, 4, 5, 3\)"
    with pytest.raises(ValueError, match=sentence):
        merge(*(x.requires_grad_() for x in outs))
    with pytest.raises(ValueError, match=sentence):
        torch.func.grad(lambda x: merge(x, *outs[1:])[0].sum())(outs[0].detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradients_of_low_dtypes(dtype):
    arrays = [x.detach() for x in parts()]
    low = [x.to(dtype).requires_grad_() for x in arrays[:3]] + [
        x.clone().requires_grad_() for x in arrays[3:]
    ]
    exact = [x.detach().double().requires_grad_() for x in low]
    weights = torch.randn(2, 4, 5, 3).to(dtype)
    found = torch.autograd.grad((merge(*low)[0] * weights).sum(), low)
    want = torch.autograd.grad((merge(*exact)[0] * weights.double()).sum(), exact)
    for x, y, leaf in zip(found, want, low, strict=True):
        assert x.dtype == leaf.dtype
        assert (x.double() - y).abs().max() <= 4 * torch.finfo(dtype).eps * y.abs().max()


@pytest.mark.parametrize("which", range(6))
def test_one_part_alone_that_requires_grad(which):
    """Whichever it is, an output or an lse, its gradient is what it is where all have one."""
    arrays = parts(requires_grad=True)
    out, lse = merge(*arrays)
    (wanted,) = torch.autograd.grad(out.sum() + lse.square().sum(), arrays[which])
    alone = [x.detach() for x in arrays]
    alone[which].requires_grad_()
    out, lse = merge(*alone)
    assert out.requires_grad and lse.requires_grad
    (got,) = torch.autograd.grad(out.sum() + lse.square().sum(), alone[which])
    assert torch.equal(got, wanted)
