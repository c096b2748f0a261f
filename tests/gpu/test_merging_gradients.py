"""The gradients of merge_states on a GPU, and of a cascade: parts of attention, merged."""

import fastattn
import pytest

import gpu
from gpu import torch
from gpu.merging import DTYPES, states

pytestmark = gpu.marks


def formula(outs, lses):
    """(out, lse) of (n, b, h, s, dv) and (n, b, h, s), by torch's own functions."""
    gone = lses.isinf()
    lses = torch.where(gone, -torch.inf, lses)
    none = gone.all(0)
    lse = torch.where(none, -torch.inf, torch.where(none, 0.0, lses).logsumexp(0))
    weights = torch.exp(lses - torch.where(none, 0.0, lse))
    return (weights[..., None] * torch.where(gone[..., None], 0.0, outs)).sum(0), lse


def gradients(outs, lses, merge, dout, dlse):
    outs, lses = outs.detach().requires_grad_(), lses.detach().requires_grad_()
    out, lse = merge(outs, lses)
    seen = lse.isfinite()
    loss = (out * dout.to(out)).sum() + torch.where(seen, lse, 0.0).mul(dlse.to(lse)).sum()
    return torch.autograd.grad(loss, (outs, lses))


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 5, 20])
def test_gradients(n, dtype, layout):
    outs, lses = states(n, (2, 3, 40, 64), dtype)
    dout, dlse = torch.randn(2, 3, 40, 64, device="cuda"), torch.randn(2, 3, 40, device="cuda")
    want = gradients(outs.double(), lses.double(), formula, dout, dlse)

    def merge(outs, lses):
        if layout == "bshd":
            outs = outs.transpose(2, 3)
        out, lse = fastattn.merge_states(list(outs), list(lses), layout=layout)
        return out.transpose(1, 2) if layout == "bshd" else out, lse

    got = gradients(outs, lses, merge, dout, dlse)
    for x, y in zip(got, want, strict=True):
        assert x.isfinite().all()
        bound = {"fp32": 1e-5, "fp16": 4e-3, "bf16": 3e-2}[dtype]
        assert (x.double() - y).abs().max() <= bound * y.abs().max()


@pytest.mark.parametrize("mode", ["plain", "compiled"])
def test_a_cascade_has_the_gradients_of_one_call(mode):
    """A prefix that the batch shares, and keys of each sequence's own."""
    q, k, v = gpu.inputs(3, 8, 2, 60, 300, 64)
    prefix = [x[:1, :, :200].clone() for x in (k, v)]
    own = [x[:, :, 200:].clone() for x in (k, v)]
    given = [x.requires_grad_() for x in (q, *prefix, *own)]

    def cascade(q, k, v, own_k, own_v):
        shared = [x.expand(3, -1, -1, -1) for x in (k, v)]
        parts = fastattn.attention(q, *shared, return_lse=True)
        rest = fastattn.attention(q, own_k, own_v, causal=True, return_lse=True)
        return fastattn.merge_states(*zip(parts, rest, strict=True))[0]

    def whole(q, k, v, own_k, own_v):
        k, v = (torch.cat([x.expand(3, -1, -1, -1), y], 2) for x, y in ((k, own_k), (v, own_v)))
        return fastattn.attention(q, k, v, causal=True)

    call = torch.compile(cascade, fullgraph=True) if mode == "compiled" else cascade
    dout = torch.randn_like(q)
    got = torch.autograd.grad(call(*given), given, dout)
    want = torch.autograd.grad(whole(*given), given, dout)
    for x, y in zip(got, want, strict=True):
        assert (x.float() - y.float()).abs().max() <= 2**-5 * y.float().abs().max()


def test_gradients_in_a_graph():
    outs, lses = states(3, (2, 3, 40, 64), "bf16", empty=0.1)
    given = [x.requires_grad_() for x in (*outs.clone(), *lses.clone())]
    dout = torch.randn(2, 3, 40, 64, device="cuda").bfloat16()

    def step():
        out, _ = fastattn.merge_states(given[:3], given[3:])
        return torch.autograd.grad(out, given, dout)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    for x, y in zip(got, step(), strict=True):
        assert torch.equal(x, y)
