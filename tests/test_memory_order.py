"""How the drop-in's output lies in memory: its axes in the order of q's, as torch's fused kernels
have it, so that `.transpose(1, 2).view(b, s, h * d)` is legal where it is with torch's."""

import itertools

import fastattn
import numpy as np
import pytest
from conftest import needs

torch = pytest.importorskip("torch")
sdpa = torch.nn.functional.scaled_dot_product_attention
ours = fastattn.scaled_dot_product_attention

B, H, S, D = 2, 4, 6, 8


def normal(*shape, device="cpu", dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(device, dtype)


def lying(shape, order, device="cpu", dtype=torch.float32):
    """A dense tensor of that shape, whose axes lie in that order, the outermost first."""
    x = normal(*(shape[axis] for axis in order), device=device, dtype=dtype)
    return x.permute([order.index(axis) for axis in range(len(shape))])


def queries(b=B, h=H, s=S, d=D, **keywords):
    """q (b, h, s, d) of many strides."""
    found = {
        f"dense in order {order}": lying((b, h, s, d), (*order, 3), **keywords)
        for order in itertools.permutations(range(3))
    }
    make = lambda *shape: normal(*shape, **keywords)  # noqa: E731
    found["packed (b, s, 3, h, d)"] = make(b, s, 3, h, d).permute(2, 0, 3, 1, 4)[0]
    found["packed (b, s, h, 3, d)"] = make(b, s, h, 3, d).permute(3, 0, 2, 1, 4)[1]
    found["part of a row"] = make(b, h, s, d + 8)[..., :d]
    found["every second row"] = make(b, h, 2 * s, d)[:, :, ::2]
    found["every second head"] = make(b, s, 2 * h, d).transpose(1, 2)[:, ::2]
    found["expanded batch"] = make(1, h, s, d).expand(b, h, s, d)
    found["expanded heads"] = make(b, 1, s, d).expand(b, h, s, d)
    found["expanded batch of (b, s, h, d)"] = make(1, s, h, d).transpose(1, 2).expand(b, h, s, d)
    return found


def steps(x):
    """The strides that mean something."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def same(a, b):
    """Equal; on a GPU other strides may run another kernel, which adds in another order."""
    if a.device.type == "cpu":
        return torch.equal(a, b)
    torch.testing.assert_close(a, b, rtol=0.016, atol=0.004)  # two roundings of P and the output
    return True


def check_as_torch(device, dtype, s=S, d=D):
    """Strides and values of the fused path, which torch takes for these."""
    for sizes in ({}, {"b": 1}, {"h": 1}, {"s": 1}, {"b": 1, "s": 1}):
        for name, q in queries(**{"s": s, **sizes}, d=d, device=device, dtype=dtype).items():
            b, h, rows, _ = q.shape
            k, v = (normal(b, h, s, d, device=device, dtype=dtype) for _ in range(2))
            want = sdpa(q, k, v)
            got = ours(q, k, v)
            assert steps(got) == steps(want) == steps(torch.empty_like(q)), (name, sizes)
            plain = ours(q.contiguous(), k, v)
            assert plain.is_contiguous() and same(got, plain), (name, sizes)
            if want.transpose(1, 2).is_contiguous():
                got.transpose(1, 2).view(b, rows, h * d)


def test_as_torch():
    check_as_torch("cpu", torch.float32)
    check_as_torch("cpu", torch.bfloat16)


def check_packed(device, dtype, d):
    """The line that users write, whatever else the call asks for."""
    qkv = normal(B, S, 3, H, d, device=device, dtype=dtype)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    seen = torch.ones(S, S, dtype=torch.bool, device=device).tril()
    grouped = {"enable_gqa": True}
    for keys, keywords in (
        ((k, v), {}),
        ((k, v), {"is_causal": True}),
        ((k, v), {"attn_mask": seen}),
        ((k, v), {"attn_mask": normal(B, 1, S, S, device=device, dtype=dtype)}),
        ((k, v), {"scale": 0.3}),
        ((k[:, ::2], v[:, ::2]), grouped),
        ((k[:, :1], v[:, :1]), grouped),
        ((k.contiguous(), v.contiguous()), {}),
    ):
        out = ours(q, *keys, **keywords)
        assert out.stride() == (S * H * d, d, H * d, 1)
        if device == "cpu":  # on a GPU torch has no fused kernel for some of these
            assert sdpa(q, *keys, **keywords).stride() == out.stride()
        rows = out.transpose(1, 2).view(B, S, H * d)
        plain = ours(q.contiguous(), *keys, **keywords)
        assert same(rows, plain.transpose(1, 2).reshape(B, S, H * d))
    narrow = ours(q, k, v[..., : d // 2])
    assert narrow.transpose(1, 2).is_contiguous()
    assert same(narrow, ours(q.contiguous(), k, v[..., : d // 2]))


def test_packed_qkv():
    check_packed("cpu", torch.float32, D)


def check_ranks(device, dtype, d):
    """Every rank and order of axes: dense, the axes in q's order, the last one innermost."""
    for rank in (2, 3, 4, 5, 6):
        shape = (*(2, 3, 2, 2)[: rank - 2], 5, d)
        for order in itertools.permutations(range(rank - 1)):
            q = lying(shape, (*order, rank - 1), device=device, dtype=dtype)
            k, v = (normal(*shape, device=device, dtype=dtype) for _ in range(2))
            out = ours(q, k, v)
            assert out.stride() == q.stride(), (shape, order)
            assert same(out, ours(q.contiguous(), k, v)), (shape, order)


def test_every_rank():
    check_ranks("cpu", torch.float32, D)


@pytest.mark.parametrize(
    ("q", "k", "want"),
    [
        ((H, S, D), (B, H, S, D), (H * S * D, S * D, D, 1)),
        ((S, D), (B, H, S, D), (H * S * D, S * D, D, 1)),
        ((B, 1, S, D), (B, H, S, D), (H * S * D, S * D, D, 1)),
        ((3, 1, H, S, D), (1, B, H, S, D), (B * H * S * D, H * S * D, S * D, D, 1)),
    ],
)
def test_where_q_is_broadcast(q, k, want):
    """The axes that q lacks lie where a contiguous output has them, as torch has it."""
    q, k = normal(*q), normal(*k)
    assert ours(q, k, k).stride() == sdpa(q, k, k).stride() == want


def test_part_of_q_is_broadcast():
    q = normal(3, 1, S, H, D).transpose(2, 3)
    k = normal(1, B, H, S, D)
    out = ours(q, k, k)
    assert out.shape == (3, B, H, S, D) and out.transpose(2, 3).is_contiguous()
    assert torch.equal(out, ours(q.contiguous(), k, k))


def test_rows_stay_whole():
    """q's last axis may lie outside; the output's never does, as with torch."""
    for order in ((0, 1, 3, 2), (3, 0, 1, 2)):
        q, k = lying((B, H, S, D), order), normal(B, H, S, D)
        assert ours(q, k, k).stride() == sdpa(q, k, k).stride() == k.stride()


@pytest.mark.parametrize("empty", [(0, H, S, D), (B, H, 0, D)])
def test_empty_outputs(empty):
    b, h, s, d = empty
    q, k = normal(b, s, h, d).transpose(1, 2), normal(b, h, 3, d)
    assert ours(q, k, k).shape == empty
    assert (ours(normal(B, S, H, D).transpose(1, 2), *[normal(B, H, 0, D)] * 2) == 0).all()


def test_attention_gives_contiguous_arrays():
    q, k, v = normal(B, S, 3, H, D).permute(2, 0, 3, 1, 4)
    assert fastattn.attention(q, k, v).is_contiguous()
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    assert fastattn.attention(q, k, v, layout="bshd").is_contiguous()


def test_numpy_arrays_are_contiguous():
    q, k, v = normal(B, S, 3, H, D).permute(2, 0, 3, 1, 4)
    out = ours(*(x.numpy() for x in (q, k, v)))
    assert out.flags.c_contiguous and np.array_equal(out, ours(q, k, v).numpy())


@needs("jax")
def test_jax_arrays_are_contiguous():
    import jax

    q, k, v = normal(B, S, 3, H, D).permute(2, 0, 3, 1, 4)
    out = ours(*(jax.numpy.asarray(x.numpy()) for x in (q, k, v)))
    assert np.array_equal(np.asarray(out), ours(q, k, v).numpy())


def test_under_a_mode():
    """Outputs that an operator of torch makes lie the same."""
    from torch.utils.flop_counter import FlopCounterMode

    q, k, v = normal(B, S, 3, H, D).permute(2, 0, 3, 1, 4)
    plain = ours(q, k, v)
    with FlopCounterMode(display=False):
        out = ours(q, k, v)
    assert out.stride() == plain.stride() and torch.equal(out, plain)
