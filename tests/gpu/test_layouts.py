"""Layouts, strides, expanded arrays and offsets beyond 2^31, of inputs and of the output."""

import fastattn
import pytest

import gpu
from gpu import DTYPES, inputs, torch
from gpu.calls import SIZES, STRIDES, check, poisoned, restrided

pytestmark = gpu.marks


@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_layouts(layout, d):
    q, k, v = inputs(2, 4, 2, 200, 300, d)
    if layout == "bshd":
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    out, lse = fastattn.attention(q, k, v, layout=layout, return_lse=True, causal=True)
    assert out.is_contiguous() and out.shape == q.shape and lse.shape == (2, 4, 200)
    if layout == "bshd":
        q, k, v, out = (x.transpose(1, 2) for x in (q, k, v, out))
    assert gpu.complaints(out, lse, q, k, v, causal=True) == []


@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("how", STRIDES)
def test_strides(how, d):
    check(*(restrided(x, how) for x in inputs(2, 4, 2, 200, 300, d)), causal=True)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("sq", [64, 200])
@pytest.mark.parametrize("d", [2, 7, 12, 18, 65, 66, 67, 68, 72, 100, 127, 130, 201, 255])
def test_rows_that_the_copy_engine_does_not_take(d, sq, layout):
    """Units of 2 to 16 bytes, by panels of 64 columns, the last of them of one to 63; whole blocks
    and ragged ones; one array alone of 16 bytes."""
    q, k, v = inputs(2, 3, 3, sq, 300, d)
    if layout == "bshd":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    check(q, restrided(k, "odd rows" if d % 8 == 0 else "padded rows"), v)
    check(q, k, restrided(v, "odd rows"), causal=True)
    check(q, k, v, window=(50, 20))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "d, dv, group",
    [(1, 1, 1), (33, 57, 1), (65, 65, 1), (66, 121, 1), (100, 100, 1), (250, 249, 1), (64, 57, 2)],
)
def test_heads_that_begin_anywhere_in_a_row(d, dv, group, dtype):
    """(b, s, h, d) of a head size that is no multiple of 8, every second head NaN: what the copy
    engine brings of other heads reaches nothing."""
    q, k, v = (
        torch.full((2, s, 2 * h, size), torch.nan, dtype=DTYPES[dtype], device="cuda")
        for h, s, size in ((8 * group, 200, d), (8, 300, d), (8, 300, dv))
    )
    views = [x[:, :, ::2].transpose(1, 2) for x in (q, k, v)]
    values = inputs(2, 8 * group, 8, 200, 300, d, dv, dtype=DTYPES[dtype])
    for view, x in zip(views, values, strict=True):
        view.copy_(x)
    check(*views, causal=True)
    check(*views, window=(100, 50), most=4)
    if d < 250:
        row = fastattn.explain(fastattn.attention, *views).kernel
        assert row.endswith("_slices")


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_each_array_may_have_odd_strides(which):
    arrays = dict(zip("qkv", inputs(2, 2, 2, 100, 200, 128), strict=True))
    arrays[which] = restrided(arrays[which], "odd rows")
    check(**arrays)


@pytest.mark.parametrize("how", STRIDES)
def test_strides_of_the_output(how):
    q, k, v = inputs(2, 4, 2, 200, 300, 128)
    out = restrided(poisoned(q, v), how)
    before = torch.as_strided(out, (out.untyped_storage().size() // 2,), (1,), 0)
    got, lse = fastattn.attention(q, k, v, out=out, return_lse=True)
    assert got is out and gpu.complaints(out, lse, q, k, v) == []
    assert (
        torch.isnan(before).sum() == before.numel() - out.numel()
    )  # nothing around it was written


@pytest.mark.parametrize("d", [65, 128, 255])
@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 1), (0, 1, 2), (3,)])
def test_expanded(axes, d):
    plain = inputs(3, 4, 4, 100, 200, d)
    index = tuple(slice(1) if axis in axes else slice(None) for axis in range(4))
    check(*(x[index].expand(x.shape) for x in plain), most=12)


@pytest.mark.parametrize("far", ["heads", "rows"])
def test_offsets_beyond_2_31_elements(far):
    """Elements more than 2^31 from their base, in every array."""
    b, h, s, d = 1, 3, 130, 64
    stride = (0, 2**30 + 64, d, 1) if far == "heads" else (0, d, 2**24 + 128, 1)
    buffers = [torch.empty(2**31 + 2**27, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    plain = inputs(b, h, h, s, s, d)
    q, k, v, out = (buffers[i == 3].as_strided((b, h, s, d), stride, 2**14 * i) for i in range(4))
    for room, values in zip((q, k, v), plain, strict=True):
        room.copy_(values)
    out.fill_(torch.nan)
    assert sum((n - 1) * step for n, step in zip(out.shape, out.stride(), strict=True)) > 2**31
    _, lse = fastattn.attention(q, k, v, causal=True, out=out, return_lse=True)
    assert gpu.complaints(out, lse, *plain, causal=True) == []
