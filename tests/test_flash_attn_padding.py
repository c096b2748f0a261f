"""fastattn.flash_attn.bert_padding: a padded batch to its tokens and back, with gradients."""

import pytest

torch = pytest.importorskip("torch")
from fastattn.flash_attn import flash_attn_func, flash_attn_varlen_func  # noqa: E402
from fastattn.flash_attn.bert_padding import (  # noqa: E402
    index_first_axis,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)

KEPT = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32])
def test_unpad_and_pad(dtype):
    x = torch.randn(3, 4, 2, 5, dtype=torch.float64, requires_grad=True)
    rows, indices, ends, longest, used = unpad_input(x, KEPT.to(dtype))
    assert torch.equal(rows, x[KEPT.bool()]) and indices.tolist() == [1, 2, 4, 5, 6, 7]
    assert (ends.tolist(), longest, used.tolist()) == ([0, 2, 6, 6], 4, [2, 4, 0])
    assert ends.dtype == used.dtype == torch.int32 and type(longest) is int
    padded = pad_input(rows, indices, 3, 4)
    assert torch.equal(padded, x * KEPT[..., None, None])
    assert torch.autograd.gradcheck(lambda x: unpad_input(x, KEPT)[0], x)
    assert torch.autograd.gradcheck(lambda rows: pad_input(rows, indices, 3, 4), rows)


def test_rows_that_are_kept_unused():
    x, unused = torch.randn(3, 4, 5), torch.tensor([[0, 0, 0, 1], [0] * 4, [1, 0, 0, 0]])
    rows, indices, ends, longest, used = unpad_input(x, KEPT, unused)
    assert torch.equal(rows, x.flatten(0, 1)[indices]) and len(rows) == 8
    assert (ends.tolist(), longest, used.tolist()) == ([0, 3, 7, 8], 4, [2, 4, 0])


def test_concatenated_sequences():
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]])
    x = torch.randn(3, 6, 5)
    rows, indices, ends, longest = unpad_input_for_concatenated_sequences(x, lengths)
    assert indices.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12]
    assert ends.tolist() == [0, 2, 5, 11, 12] and longest == 6
    assert torch.equal(rows, x.flatten(0, 1)[indices])


def test_rows_of_the_first_axis():
    x = torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([4, 0, 5])
    assert torch.equal(index_first_axis(x, indices), x[indices])
    assert torch.equal(index_first_axis(x, indices.int()), x[indices])
    for rows in (indices, torch.tensor([4, 4, 0])):  # each copy of a row counts
        assert torch.autograd.gradcheck(lambda x, rows=rows: index_first_axis(x, rows), x)
    values = x[:3]
    put = index_put_first_axis(values, indices.int(), 7)
    assert put.shape == (7, 2, 3) and torch.equal(put[indices], values)
    assert not put[[1, 2, 3, 6]].any()
    assert torch.autograd.gradcheck(lambda x: index_put_first_axis(x[:3], indices, 7), x)


def test_a_padded_batch_through_packed_attention():
    """As models do it: tokens alone, and back; gradients of padding are 0."""
    kept = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    x = torch.randn(2, 5, 3, 4, 8, dtype=torch.float64, requires_grad=True)
    rows, indices, ends, longest, _ = unpad_input(x, kept)
    out = flash_attn_varlen_func(*rows.unbind(1), ends, ends, longest, longest, causal=True)
    out = pad_input(out, indices, 2, 5)
    q, k, v = x.unbind(2)
    want = [
        flash_attn_func(*(y[n : n + 1, :s] for y in (q, k, v)), causal=True)
        for n, s in ((0, 3), (1, 5))
    ]
    torch.testing.assert_close(out[0, :3], want[0][0])
    torch.testing.assert_close(out[1], want[1][0])
    assert not out[0, 3:].any()
    (dx,) = torch.autograd.grad(out.square().sum(), x, retain_graph=True)
    (dx_want,) = torch.autograd.grad(sum(y.square().sum() for y in want), x)
    torch.testing.assert_close(dx, dx_want)
    assert not dx[0, 3:].any()
