"""Training on a GPU: autograd, autocast, checkpoints, compiled graphs, CUDA graphs, streams."""

import contextlib

import fastattn
import pytest
from fastattn.torch import use_fastattn
from torch.utils.checkpoint import checkpoint

import gpu
from gpu import torch

pytestmark = gpu.marks

CYCLES = 200_000_000  # about 0.1 s of a GPU
F = torch.nn.functional


def leaves(*sizes, dtype=torch.bfloat16, seed=0):
    return [x.requires_grad_() for x in gpu.inputs(*sizes, dtype=dtype, seed=seed)]


def loss(out):
    return out.float().sin().sum()


def close(found, want):
    for x, y in zip(found, want, strict=True):
        torch.testing.assert_close(x.float(), y.float(), rtol=0.05, atol=0.02)


def exact(q, k, v, **keywords):
    """In float64, by torch's formula."""
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*wide, **keywords)
    return torch.autograd.grad(out.sin().sum(), wide)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_public_way_has_the_gradient(dtype):
    q, k, v = leaves(2, 4, 2, 150, 150, 64, dtype=dtype)
    want = exact(q, k, v, is_causal=True, enable_gqa=True)
    options = {"is_causal": True, "enable_gqa": True}
    ways = [
        lambda: fastattn.attention(q, k, v, causal=True),
        lambda: fastattn.scaled_dot_product_attention(q, k, v, **options),
        lambda: checkpoint(fastattn.attention, q, k, v, causal=True, use_reentrant=False),
        lambda: torch.compile(fastattn.attention, backend="aot_eager")(q, k, v, causal=True),
    ]
    for way in ways:
        close(torch.autograd.grad(loss(way()), (q, k, v)), want)
    with use_fastattn("raise"):
        out = F.scaled_dot_product_attention(q, k, v, **options)
    close(torch.autograd.grad(loss(out), (q, k, v)), want)


def test_views_of_a_packed_projection():
    """q, k and v out of one (b, s, 3, h, d), whose gradient comes as one."""
    x = gpu.normal(2, 100, 3, 4, 64).requires_grad_()
    q, k, v = x.transpose(1, 3).unbind(2)
    (found,) = torch.autograd.grad(loss(fastattn.attention(q, k, v, causal=True)), x)
    want = torch.stack(exact(q, k, v, is_causal=True), 2).transpose(1, 3)
    close([found], [want])


def test_heads_that_are_expanded():
    """Key heads of stride 0: their gradient is summed over the heads."""
    q, k, v = leaves(2, 4, 1, 150, 150, 64)
    out = fastattn.attention(q, *(x.expand(2, 4, 150, 64) for x in (k, v)))
    found = torch.autograd.grad(loss(out), (q, k, v))
    close(found, exact(q, k, v, enable_gqa=True))


def test_autocast():
    q, k, v = leaves(2, 4, 4, 150, 150, 64, dtype=torch.float32)
    want = exact(q, k, v, is_causal=True)
    with torch.autocast("cuda", torch.bfloat16):
        out = fastattn.scaled_dot_product_attention(q, k, v, is_causal=True)
        assert out.dtype == torch.bfloat16
    found = torch.autograd.grad(loss(out), (q, k, v))
    assert all(x.dtype == torch.float32 for x in found)
    close(found, want)


def test_a_module_trains():
    """The loss falls as it does by torch's own attention."""
    falls = []
    for route in (False, True):
        torch.manual_seed(0)
        sizes = {"d_model": 128, "nhead": 2, "dropout": 0.0, "batch_first": True}
        layer = torch.nn.TransformerEncoderLayer(**sizes, device="cuda", dtype=torch.bfloat16)
        x, target = torch.randn(2, 2, 70, 128, device="cuda", dtype=torch.bfloat16)
        optimizer, losses = torch.optim.SGD(layer.parameters(), 0.05), []
        for _ in range(10):
            with use_fastattn("raise") if route else contextlib.nullcontext():
                value = F.mse_loss(layer(x).float(), target.float())
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(value.item())
        falls.append(losses)
    assert falls[0][-1] < falls[0][0]
    assert falls[1] == pytest.approx(falls[0], rel=0.02)


def test_deterministic_algorithms_are_not_promised_in_vain():
    q, k, v = leaves(1, 2, 2, 300, 900, 64)
    torch.use_deterministic_algorithms(True)
    try:
        found = [
            torch.autograd.grad(loss(fastattn.attention(q, k, v)), (q, k, v)) for _ in range(100)
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(x, y) for one in found for x, y in zip(one, found[0], strict=True))


# ------------------------------------------------------------------------------- streams and graphs


def passes(q, k, v, dout, **keywords):
    out, lse = fastattn.attention(q, k, v, return_lse=True, **keywords)
    return fastattn.attention_backward(dout, q, k, v, out, lse, **keywords)[:3]


@pytest.mark.parametrize("d", [64, 128, 33])
def test_a_graph_of_both_passes(d):
    """Replayed with other inputs, twice in a row: the sums of dq begin at 0 each time."""
    arrays = gpu.inputs(2, 4, 2, 300, 400, d)
    q, k, v = arrays
    dout = gpu.normal(2, 4, 300, d, seed=9)
    passes(q, k, v, dout, causal=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = passes(q, k, v, dout, causal=True)
    for seed in range(1, 4):
        for room, value in zip(arrays, gpu.inputs(2, 4, 2, 300, 400, d, seed=seed), strict=True):
            room.copy_(value)
        for x in found:
            x.fill_(torch.nan)
        graph.replay()
        graph.replay()
        want = passes(q, k, v, dout, causal=True)
        assert torch.equal(found[1], want[1]) and torch.equal(found[2], want[2])
        torch.testing.assert_close(found[0], want[0], rtol=0.02, atol=1e-3)


def test_autograd_in_a_graph():
    q, k, v = leaves(2, 4, 2, 300, 300, 64)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.autograd.grad(loss(fastattn.attention(q, k, v)), (q, k, v))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = torch.autograd.grad(loss(fastattn.attention(q, k, v)), (q, k, v))
    graph.replay()
    close(found, exact(q, k, v, enable_gqa=True))


def test_the_stream_that_is_current():
    """Inputs come late on a side stream: a launch on any other would read zeros."""
    values = [*gpu.inputs(2, 4, 2, 300, 400, 64), gpu.normal(2, 4, 300, 64, seed=9)]
    want, stream = passes(*values), torch.cuda.Stream()
    rooms = [torch.zeros_like(x) for x in values]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(CYCLES)
        for room, value in zip(rooms, values, strict=True):
            room.copy_(value)
        found = passes(*rooms)
        assert not stream.query()  # it neither waited nor made the host wait
    stream.synchronize()
    assert torch.equal(found[1], want[1]) and torch.equal(found[2], want[2])
    torch.testing.assert_close(found[0], want[0], rtol=0.02, atol=1e-3)


def test_four_streams_at_once():
    requests = [
        [*gpu.inputs(2, 4, 2, 300, 400, 128, seed=n), gpu.normal(2, 4, 300, 128, seed=90 + n)]
        for n in range(4)
    ]
    want, streams = [passes(*x) for x in requests], [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    for _ in range(20):
        found = []
        for stream, request in zip(streams, requests, strict=True):
            with torch.cuda.stream(stream):
                found.append(passes(*request))
        torch.cuda.synchronize()
        for got, same in zip(found, want, strict=True):
            assert torch.equal(got[1], same[1]) and torch.equal(got[2], same[2])
            torch.testing.assert_close(got[0], same[0], rtol=0.02, atol=1e-3)


def test_a_call_allocates_its_gradients_and_one_workspace():
    q, k, v = gpu.inputs(1, 4, 4, 512, 512, 64)
    out, lse = fastattn.attention(q, k, v, return_lse=True)
    fastattn.attention_backward(out, q, k, v, out, lse)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, count = torch.cuda.memory_allocated(), torch.cuda.memory_stats()
    found = fastattn.attention_backward(out, q, k, v, out, lse)
    after = torch.cuda.memory_stats()
    times = after["allocation.all.allocated"] - count["allocation.all.allocated"]
    assert times == 4 and found[3] is found[4] is None
    sums = 4 * 512 * (64 + 2) * 4  # float32, of the rows of q: dq, lse and delta
    made = sum(x.numel() * 2 for x in found[:3])
    assert torch.cuda.max_memory_allocated() - before <= made + sums + 4096


def test_a_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    values = [*gpu.inputs(2, 4, 2, 300, 400, 64), gpu.normal(2, 4, 300, 64, seed=9)]
    want = passes(*values)
    found = passes(*(x.to("cuda:1") for x in values))
    assert all(x.device.index == 1 for x in found) and torch.cuda.current_device() == 0
    assert all(torch.equal(x.cpu(), y.cpu()) for x, y in zip(found[1:], want[1:], strict=True))
