"""transformers' flash-attention path around fastattn's modules: it finds their keywords by name."""

import fastattn
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.17")
from fastattn import flash_attn, flash_attn_interface  # noqa: E402
from fastattn.flash_attn.bert_padding import pad_input, unpad_input  # noqa: E402
from transformers import modeling_flash_attention_utils as theirs  # noqa: E402

SINK = torch.tensor([0.5, -1.0, 2.0, 0.0])
CASES = {  # transformers' keywords, attention's
    "causal": ({}, {}),
    "window": ({"sliding_window": 3}, {"window": (2, None)}),
    "softcap": ({"softcap": 0.8}, {"softcap": 0.8}),
    "sink": ({"s_aux": SINK.bfloat16()}, {"sink": SINK}),
    "scale": ({"softmax_scale": 0.7}, {"scale": 0.7}),
}


@pytest.fixture(params=[flash_attn, flash_attn_interface], ids=lambda m: m.__name__)
def forward(request, monkeypatch):
    """transformers' function, with a module of ours as its flash-attention."""
    names = ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache")
    functions = *(getattr(request.param, n) for n in names), pad_input, unpad_input
    monkeypatch.setattr(theirs, "_lazy_imports", lambda *_, **__: functions)
    monkeypatch.setattr(theirs, "_loaded_implementation", None)
    return lambda *x, **y: theirs._flash_attention_forward(*x, attn_implementation="ours", **y)


@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("name", CASES)
def test_through_transformers(name, padding, forward):
    said, ours = CASES[name]
    q, k, v = (torch.randn(2, 9, h, 8, dtype=torch.float64) for h in (4, 2, 2))
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, :padding] = 0  # left
    out = forward(q, k, v, mask if padding else None, 9, True, **said)
    start = torch.tensor([padding, 0], dtype=torch.int32)
    want = fastattn.attention(q, k, v, layout="bshd", causal=True, k_start=start, **ours)
    torch.testing.assert_close(out, want * mask[:, :, None, None])


def test_packed_by_positions(forward):
    q, k, v = (torch.randn(1, 9, h, 8) for h in (4, 2, 2))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    out = forward(q, k, v, None, 9, True, position_ids=positions)
    for rows in (slice(0, 4), slice(4, 9)):
        part = (x[:, rows] for x in (q, k, v))
        want = fastattn.attention(*part, layout="bshd", causal=True)
        torch.testing.assert_close(out[:, rows], want)
