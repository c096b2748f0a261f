"""Training with use_fastattn(): torch.nn's modules, checkpoints, two processes with DDP."""

import threading

import fastattn
import pytest
from conftest import python

torch = pytest.importorskip("torch")
from fastattn import _routing  # noqa: E402
from fastattn.torch import use_fastattn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402


@pytest.fixture
def threads(monkeypatch):
    """The thread of each call of ours."""
    seen = []

    def counted(*args, **keywords):
        seen.append(threading.get_ident())
        return fastattn.scaled_dot_product_attention(*args, **keywords)

    monkeypatch.setattr(_routing, "scaled_dot_product_attention", counted)
    return seen


def step(module, *args, **keywords):
    """The loss, and the gradient of each parameter."""
    out = module(*args, **keywords)
    loss = (out[0] if isinstance(out, tuple) else out).square().mean()
    return loss, *torch.autograd.grad(loss, list(module.parameters()))


CAUSAL = torch.ones(5, 5).triu(1).bool()
PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
SIZES = {"d_model": 32, "nhead": 4, "dim_feedforward": 64, "dropout": 0.0, "batch_first": True}


def test_modules_of_torch(threads):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 32)
    encoder = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(**SIZES), 2)
    decoder = torch.nn.TransformerDecoder(torch.nn.TransformerDecoderLayer(**SIZES), 2)
    heads = torch.nn.MultiheadAttention(32, 4, batch_first=True, add_bias_kv=True)
    steps = (
        (2, encoder, (x,), {"mask": CAUSAL, "src_key_padding_mask": PADDING}),
        (4, decoder, (x, torch.randn(2, 7, 32)), {"tgt_mask": CAUSAL, "tgt_is_causal": True}),
        (1, heads, (x, x, x), {"need_weights": False, "key_padding_mask": PADDING}),
    )
    for calls, module, args, keywords in steps:
        want = step(module, *args, **keywords)
        threads.clear()
        with use_fastattn("raise"):
            got = step(module, *args, **keywords)
        assert len(threads) == calls
        torch.testing.assert_close(got, want)


def test_autocast_and_torch_func(threads):
    q, k, v = (torch.randn(2, 4, 9, 16) for _ in range(3))
    by_name = torch.nn.functional.scaled_dot_product_attention

    def loss(q):
        return by_name(q, k, v, is_causal=True).float().square().sum()

    want = torch.func.grad(loss)(q)
    each = torch.stack([torch.func.grad(loss)(x) for x in (q, -q)])
    with use_fastattn("raise"):
        torch.testing.assert_close(torch.func.grad(loss)(q), want)
        got = torch.vmap(torch.func.grad(loss))(torch.stack([q, -q]))
        slope = torch.func.jvp(loss, (q,), (k,))[1]  # torch has none on the CPU
    assert len(threads) == 3
    torch.testing.assert_close(got, each)
    torch.testing.assert_close(slope, (want * k).sum(), rtol=1e-4, atol=1e-4)
    threads.clear()
    with torch.autocast("cpu", torch.bfloat16), use_fastattn("raise"):
        leaf = q.clone().requires_grad_()
        loss(leaf).backward()
    assert len(threads) == 1
    assert leaf.grad.dtype == torch.float32
    torch.testing.assert_close(leaf.grad, want, rtol=0.1, atol=0.1)


def test_a_graph_made_inside_keeps_fastattn(threads):
    x, by_name = torch.randn(2, 4, 9, 16), torch.nn.functional.scaled_dot_product_attention
    leaf, same = (x.clone().requires_grad_() for _ in range(2))
    compiled = torch.compile(lambda x: by_name(x, x, x) * 2, backend="aot_eager", fullgraph=True)
    with use_fastattn("raise"):
        compiled(leaf)
    traced = len(threads)
    compiled(leaf).square().sum().backward()  # outside
    (by_name(same, same, same) * 2).square().sum().backward()
    assert traced and len(threads) == traced
    torch.testing.assert_close(leaf.grad, same.grad, rtol=1e-4, atol=1e-4)


def test_checkpoints_are_recomputed_by_the_same(threads):
    """So deep that torch's engine goes on in threads of its own."""
    weight = torch.randn(1, 1, 4, 8, requires_grad=True)

    def nested(depth, x):
        if depth:
            return checkpoint(nested, depth - 1, x, use_reentrant=True)
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    with use_fastattn("raise"):
        nested(70, weight).sum().backward()
    assert len(threads) > 70 and len(set(threads)) > 1
    x = weight.detach().requires_grad_()
    torch.nn.functional.scaled_dot_product_attention(x, x, x).sum().backward()
    torch.testing.assert_close(weight.grad, x.grad)


RANK = """
import os, sys
import torch
from fastattn.torch import use_fastattn

rank, port = int(sys.argv[1]), sys.argv[2]
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
torch.manual_seed(0)
layer = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
batch, target = torch.randn(2, 4, 9, 32)
alone = [torch.autograd.grad((layer(batch) - target).square().mean(), list(layer.parameters()))]
model = torch.nn.parallel.DistributedDataParallel(layer)
half = slice(2 * rank, 2 * rank + 2)
with use_fastattn("raise"):
    (model(batch[half]) - target[half]).square().mean().backward()
torch.testing.assert_close([x.grad for x in layer.parameters()], list(alone[0]))
torch.distributed.destroy_process_group()
print("the same gradients")
"""


def test_two_processes(tmp_path):
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "rank.py").write_text(RANK)
    said = [None, None]

    def run(rank):
        said[rank] = python(tmp_path / "rank.py", rank, port)

    ranks = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    assert said == ["the same gradients\n"] * 2
