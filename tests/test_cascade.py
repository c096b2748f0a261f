"""A prefix that the batch shares, attended to once and merged with each sequence's own keys: the
result and the gradients of attention to all keys."""

import fastattn
import numpy as np
import pytest

torch = pytest.importorskip("torch")
HQ, HK, D = 6, 2, 16


def made(b, sq, shared, own, dtype):
    torch.manual_seed(shared + own)
    shapes = (b, HQ, sq, D), *2 * [(1, HK, shared, D)], *2 * [(b, HK, own, D)]
    return [torch.randn(s).to(dtype).requires_grad_() for s in shapes]


def cascade(q, prefix_k, prefix_v, k, v, lengths, sink=None, **options):
    """The rows of the batch are rows of one sequence: none of them sees less of the prefix."""
    b, hq, sq, d = q.shape
    rows = q.permute(1, 0, 2, 3).reshape(1, hq, b * sq, d)
    out, lse = fastattn.attention(rows, prefix_k, prefix_v, return_lse=True, **options)
    prefix = (x.unflatten(2, (b, sq))[0].transpose(0, 1) for x in (out, lse))
    own = fastattn.attention(
        q, k, v, causal=True, k_lengths=lengths, sink=sink, return_lse=True, **options
    )
    return fastattn.merge_states(*zip(prefix, own, strict=True))


def whole(q, prefix_k, prefix_v, k, v, lengths, sink=None, **options):
    b, shared = q.shape[0], prefix_k.shape[2]
    k, v = (torch.cat([x.expand(b, -1, -1, -1), y], 2) for x, y in ((prefix_k, k), (prefix_v, v)))
    return fastattn.attention(
        q, k, v, causal=True, k_lengths=shared + lengths, sink=sink, return_lse=True, **options
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("sq", "shared", "own", "options"),
    [
        (1, 300, 20, {}),
        (3, 1500, 9, {"scale": -0.3}),
        (2, 40, 70, {"softcap": 2.0}),
        (4, 1, 4, {}),
    ],
)
def test_result_and_gradients(sq, shared, own, options, dtype):
    b, lengths = 3, torch.tensor([own, sq, (own + sq) // 2]).int()
    inputs = made(b, sq, shared, own, dtype)
    sink = torch.randn(HQ, requires_grad=True)
    found = []
    for function in (cascade, whole):
        out, lse = function(*inputs, lengths, sink, **options)
        weights = torch.linspace(-1, 1, out.numel()).view_as(out)
        loss = (out * weights).sum() + lse.sin().sum()
        found.append([out, lse, *torch.autograd.grad(loss, [*inputs, sink])])
    digits = {torch.float32: 2e-5, torch.float64: 1e-6, torch.bfloat16: 3e-2}[dtype]
    for got, want in zip(*found, strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        assert (got - want).abs().max() <= digits * max(1, want.abs().max())


def test_on_pages():
    """The prefix lies in pages once; the own keys of each sequence in others."""
    rng = np.random.default_rng(0)
    k_cache, v_cache = (rng.standard_normal((9, 8, HK, D), np.float32) for _ in "kv")
    q = rng.standard_normal((3, 1, HQ, D), np.float32)
    prefix = np.array([[4, 0]], np.int32)
    own = np.array([[1, 7], [2, -1], [8, 3]], np.int32)
    lengths = np.array([11, 0, 16], np.int32)
    rows = q.swapaxes(0, 1)
    parts = [
        fastattn.attention_kvcache(
            rows, k_cache, v_cache, 16, page_table=prefix, causal=False, return_lse=True
        ),
        fastattn.attention_kvcache(q, k_cache, v_cache, lengths, page_table=own, return_lse=True),
    ]
    out, lse = parts[0]
    parts[0] = out.swapaxes(0, 1), np.ascontiguousarray(lse.transpose(2, 1, 0))
    got, got_lse = fastattn.merge_states(*zip(*parts, strict=True), layout="bshd")
    table = np.concatenate([np.repeat(prefix, 3, 0), own], 1)
    want, want_lse = fastattn.attention_kvcache(
        q, k_cache, v_cache, 16 + lengths, page_table=table, return_lse=True
    )
    np.testing.assert_allclose(got, want, atol=1e-6)
    np.testing.assert_allclose(got_lse, want_lse, atol=1e-5)
