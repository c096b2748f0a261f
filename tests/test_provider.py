"""fastattn in torch's registry of flash-attention providers.

Its operators are registered for CUDA; what they compute is asked of them directly, on any device.
"""

import inspect

import fastattn
import pytest

torch = pytest.importorskip("torch")
import torch.nn.attention as registry  # noqa: E402
from fastattn import _provider  # noqa: E402

pytestmark = pytest.mark.skipif(
    not hasattr(registry, "register_flash_attention_impl"),
    reason="a torch from before the registry",
)
OPERATORS = [x for x in _provider.OPERATORS if hasattr(torch.ops.aten, x.__name__)]
NAMES = [operator.__name__ for operator in OPERATORS]


def rows(*shape):
    return [torch.randn(shape or (2, 9, 4, 16)) for _ in range(4)]


def has_kernel(name):
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "CUDA")


@pytest.fixture
def registered():
    _provider.register()
    yield
    registry.restore_flash_attention_impl(_raise_warn=False)


@pytest.mark.skipif(
    not hasattr(registry, "restore_flash_attention_impl"), reason="torch 2.10 restores nothing"
)
def test_activate_and_restore(registered):
    before = [torch._C._dispatch_dump_table(f"aten::{name}") for name in NAMES]
    assert "fastattn" in registry.list_flash_attention_impls()
    assert registry.current_flash_attention_impl() is None  # nothing is changed unasked
    registry.activate_flash_attention_impl("fastattn")
    assert registry.current_flash_attention_impl() == "fastattn"
    assert all(map(has_kernel, NAMES))
    registry.activate_flash_attention_impl("fastattn")  # twice is once
    registry.restore_flash_attention_impl()
    assert registry.current_flash_attention_impl() is None
    assert [torch._C._dispatch_dump_table(f"aten::{name}") for name in NAMES] == before


@pytest.mark.parametrize("operator", OPERATORS, ids=NAMES)
def test_takes_what_torchs_schema_has(operator):
    assert len(NAMES) >= 4
    schema = getattr(torch.ops.aten, operator.__name__).default._schema
    given = [x.name for x in schema.arguments if not x.kwarg_only]
    by_name = {x.name: None for x in schema.arguments if x.kwarg_only}
    bound = inspect.signature(operator).bind(*given, **by_name)
    for name, value in bound.arguments.items():  # each arrives under its own name
        assert name in ("args", "keywords") or value in (name, None)


@pytest.mark.parametrize("is_causal", [False, True])
def test_dense(is_causal):
    dout, q, k, v = rows()
    k, v = k[:, :, :2], v[:, :, :2]
    masks = {"scale": 0.2, "window_size_left": 5, "window_size_right": -1}
    call = (q, k, v, None, None, 9, 9, 0.0, is_causal)
    out, lse, state, offset, debug = _provider._flash_attention_forward(*call, False, **masks)
    same = {"layout": "bshd", "causal": is_causal, "scale": 0.2, "window": (5, None)}
    want = fastattn.attention(q, k, v, return_lse=True, **same)
    torch.testing.assert_close((out, lse), want)
    assert (state.shape, state.dtype, debug.numel()) == ((2,), torch.uint64, 0)
    got = _provider._flash_attention_backward(
        dout, q, k, v, out, lse, *call[3:], state, offset, **masks
    )
    grads = fastattn.attention_backward(dout, q, k, v, *want, **same)[:3]
    torch.testing.assert_close(got, grads)
    into = torch.empty_like(out)
    lse = _provider._flash_attention_forward_no_dropout_inplace(into, *call, False, **masks)
    torch.testing.assert_close((into, lse), want)


def test_packed():
    dout, q, k, v = rows(14, 4, 16)
    ends = torch.tensor([0, 5, 14], dtype=torch.int32)
    call = (q, k, v, ends, ends, 9, 9, 0.0, True)
    out, lse, state, offset, _ = _provider._flash_attention_forward(*call, False)
    want = fastattn.attention_varlen(*call[:7], causal=True, return_lse=True)
    torch.testing.assert_close((out, lse), want)
    got = _provider._flash_attention_backward(dout, q, k, v, out, lse, *call[3:], state, offset)
    grads = fastattn.attention_varlen_backward(dout, q, k, v, *want, *call[3:7], causal=True)
    torch.testing.assert_close(got, grads[:3])
    used = torch.tensor([3, 9], dtype=torch.int32)
    got = _provider._flash_attention_forward(*call, False, seqused_k=used, num_splits=1)[0]
    torch.testing.assert_close(
        got, fastattn.attention_varlen(*call[:7], causal=True, seqused_k=used)
    )


def test_heads_first_and_dropout():
    dout, q, k, v = (x.transpose(1, 2) for x in rows())
    forward = _provider._scaled_dot_product_flash_attention
    torch.manual_seed(3)
    out, lse, *places, state, offset, _ = forward(q, k, v, 0.25, True)
    assert out.stride() == q.stride() and places == [None, None, 9, 9]
    seed = state.view(torch.int64)[:1]
    same = {"causal": True, "dropout_p": 0.25, "seed": seed}
    want = fastattn.attention(q, k, v, return_lse=True, **same)
    torch.testing.assert_close((out, lse), want)
    assert not torch.equal(forward(q, k, v, 0.25, True)[0], out)
    got = _provider._scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, lse, *places, 0.25, True, state, offset
    )
    torch.testing.assert_close(got, fastattn.attention_backward(dout, q, k, v, *want, **same)[:3])


@pytest.mark.parametrize(
    ("keywords", "name"),
    [
        ({"block_table": torch.zeros(2, 1, dtype=torch.int32)}, "block_table"),
        ({"num_splits": 2}, "num_splits"),
        ({"return_debug_mask": True}, "return_debug_mask"),
    ],
)
def test_refused_by_a_sentence(keywords, name):
    _, q, k, v = rows()
    given = {"return_debug_mask": False, **keywords}
    with pytest.raises(NotImplementedError, match=f"`{name}` is not served by fastattn as torch's"):
        _provider._flash_attention_forward(q, k, v, None, None, 9, 9, 0.0, False, **given)


def test_what_the_backward_operator_is_not_told_of_is_refused():
    _, q, k, v = rows()
    call = (None, None, 9, 9, 0.0, False, False)
    sides = {"alibi_slopes": torch.ones(4), "seqused_k": torch.tensor([9, 3], dtype=torch.int32)}
    for name, value in sides.items():
        _provider._flash_attention_forward(q, k, v, *call, **{name: value})
        for leaf in (q, k, v):
            leaf.requires_grad_()
            with pytest.raises(NotImplementedError, match=f"`{name}` is not served"):
                _provider._flash_attention_forward(q, k, v, *call, **{name: value})
            with torch.no_grad():
                _provider._flash_attention_forward(q, k, v, *call, **{name: value})
            leaf.requires_grad_(False)
    dropped = (*call[:4], 0.5, *call[5:])
    with pytest.raises(NotImplementedError, match="`dropout_p` is not served"):
        _provider._flash_attention_forward_no_dropout_inplace(q, q, k, v, *dropped)


def test_a_gradient_that_no_backend_serves_is_refused_before_it_is_lost(monkeypatch):
    _, q, k, v = rows()

    def refuse(_, call):
        raise NotImplementedError(f"no backward pass of {call[0]}")

    monkeypatch.setattr(_provider._C, "forward", refuse)
    with pytest.raises(NotImplementedError, match="no backward pass of attention"):
        _provider._flash_attention_forward(
            q.requires_grad_(), k, v, None, None, 9, 9, 0.0, False, False
        )
