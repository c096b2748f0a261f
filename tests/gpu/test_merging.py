"""merge_states on a GPU: against float64, into poisoned memory, by any number of parts."""

import fastattn
import pytest

import gpu
from gpu import torch
from gpu.calls import STRIDES, restrided
from gpu.merging import DTYPES, apart, complaints, merge, states

pytestmark = gpu.marks

CYCLES = 200_000_000  # about 0.1 s of a GPU


def check(outs, lses, **keywords):
    out, lse = merge(outs, lses, **keywords)
    assert complaints(out, lse, outs, lses) == []
    assert out.is_contiguous() and lse.is_contiguous() and lse.dtype == torch.float32
    return out, lse


# ----------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 64, 200, 1000, 5000])
def test_any_number_of_parts(n, dtype):
    """As a list and as slices of one array, the same bits: what says where they lie is all."""
    outs, lses = states(n, (2, 3, 50, 128) if n < 100 else (1, 2, 3, 64), dtype)
    out, lse = check(apart(outs), apart(lses))
    again, again_lse = check(list(outs), list(lses))
    assert torch.equal(out, again) and torch.equal(lse, again_lse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [2, 3, 20])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1), (2, 3, 5, 7), (1, 2, 300, 8), (3, 1, 33, 64), (1, 1, 17, 72), (2, 2, 9, 96),
        (1, 3, 11, 100), (1, 3, 11, 102), (1, 1, 5, 256), (2, 1, 3, 264), (1, 2, 3, 1000),
        (1, 1, 2, 4096), (70_001, 1, 1, 8), (1, 70_001, 1, 8), (1, 1, 70_001, 8),
    ],
)  # fmt: skip
def test_shapes(shape, n, dtype):
    check(*map(apart, states(n, shape, dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [2, 30])
@pytest.mark.parametrize("how", STRIDES)
def test_strides(how, n, dtype):
    """The outs in poisoned memory of other strides, the lses every second of a larger array."""
    outs, lses = states(n, (2, 3, 20, 64), dtype)
    expected, expected_lse = merge(apart(outs), apart(lses))
    room = lses.new_full((n, 2, 3, 40), torch.nan)[..., ::2]
    room.copy_(lses)
    out, lse = merge([restrided(x, how) for x in outs], list(room))
    assert torch.equal(lse, expected_lse)
    assert complaints(out, lse, outs, lses) == []
    if (out != expected).any():  # another kernel may have run
        assert complaints(expected, lse, outs, lses) == []


@pytest.mark.parametrize("n", [2, 5, 30])
def test_broadcast_and_mixed_parts(n):
    outs, lses = states(n, (2, 3, 20, 64))
    outs, lses = apart(outs), apart(lses)
    outs[0] = outs[0][:, :1, :1].expand(2, 3, 20, 64)
    lses[0] = lses[0][:1, :, :1].expand(2, 3, 20)
    outs[1] = restrided(outs[1], "odd rows")
    outs[-1], lses[-1] = outs[0], lses[0]
    outs[0] = torch.where(lses[0].isinf()[..., None], torch.nan, outs[0].nan_to_num())
    outs[-1] = outs[0]
    check(outs, lses)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [2, 5, 30])
def test_layouts_agree(n, dtype):
    outs, lses = states(n, (2, 3, 50, 64), dtype)
    out, lse = check(apart(outs), apart(lses))
    other, other_lse = merge(apart(outs.transpose(2, 3)), apart(lses), layout="bshd")
    assert torch.equal(other.transpose(1, 2), out) and torch.equal(other_lse, lse)


@pytest.mark.parametrize("n", [1, 2, 30])
@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (2, 0, 3, 8), (2, 3, 0, 8), (2, 3, 5, 0)])
def test_empty_dimensions(shape, n):
    out, lse = check(*map(apart, states(n, shape)))
    assert out.shape == shape and lse.shape == shape[:3]


@pytest.mark.parametrize("n", [1, 2, 8, 9, 100])
def test_all_parts_empty(n):
    for value in (torch.inf, -torch.inf):
        outs, lses = states(n, (1, 2, 40, 64), empty=0)
        lses[:, :, :, ::3], outs[:, :, :, ::3] = value, torch.nan
        out, lse = check(apart(outs), apart(lses))
        assert (out[:, :, ::3] == 0).all() and (lse[:, :, ::3] == -torch.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [2, 5, 20])
def test_what_is_not_finite_as_on_the_cpu(n, dtype):
    outs, lses = states(n, (1, 2, 64, 64), dtype, empty=0.1)
    lses.clamp_(-torch.inf, torch.inf)
    lses[-1, ..., 0], lses[0, ..., 1], lses[-1, ..., 2] = torch.nan, -200, 3e38
    outs[0, ..., 3:6, 0], outs[-1, ..., 3:6, 1] = torch.inf, -torch.inf
    outs[-1, ..., 4:7, 2] = torch.nan
    outs, lses = apart(outs), apart(lses)
    out, lse = merge(outs, lses)
    want, want_lse = fastattn.merge_states([x.cpu() for x in outs], [x.cpu() for x in lses])
    for got, on_cpu in ((out.cpu().float(), want.float()), (lse.cpu(), want_lse)):
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(got), kind(on_cpu))
        finite = on_cpu.isfinite()
        assert torch.allclose(got[finite], on_cpu[finite], rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("n", [2, 9, 100])
def test_a_mean_of_the_largest_values_is_finite(n):
    for dtype in DTYPES.values():
        outs = [torch.full((1, 2, 3, 64), 0.99 * torch.finfo(dtype).max, device="cuda").to(dtype)]
        out, _ = merge(outs * n, [torch.ones(1, 2, 3, device="cuda")] * n)
        assert torch.allclose(out.double(), outs[0].double(), rtol=1e-2)


# -------------------------------------------------------------------------------------------- bits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [2, 3, 8, 9, 64, 300])
def test_bits_do_not_depend_on_the_run_or_on_other_rows(n, dtype):
    outs, lses = states(n, (16, 4, 200, 64) if n < 64 else (16, 4, 20, 64), dtype)
    out, lse = merge(list(outs), list(lses))
    for _ in range(5):
        again, again_lse = merge(list(outs), list(lses))
        assert torch.equal(out, again) and torch.equal(lse, again_lse)
    few, few_lse = merge(apart(outs[:, 3:4, 1:2, 5:8]), apart(lses[:, 3:4, 1:2, 5:8]))
    assert torch.equal(few, out[3:4, 1:2, 5:8]) and torch.equal(few_lse, lse[3:4, 1:2, 5:8])


def test_more_than_2_to_the_31_elements():
    """The last rows lie past 2^32 bytes and 2^31 elements."""
    rows, dv = 2**24 + 5, 136
    outs = [torch.zeros(1, 1, rows, dv, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    lses = [torch.zeros(1, 1, rows, device="cuda") for _ in range(2)]
    tail = [x[:, :, -3000:] for x in outs]
    for x, y in zip(tail, lses, strict=True):
        x.normal_()
        y.normal_()
    out, lse = merge(outs, lses)
    ends = [y[:, :, -3000:] for y in lses]
    assert complaints(out[:, :, -3000:], lse[:, :, -3000:], tail, ends) == []
    assert (out[:, :, :-3000] == 0).all()


def test_more_than_2_to_the_32_rows():
    rows = 2**32 + 77
    lses = torch.zeros(1, device="cuda").expand(1, 1, rows)
    outs = [torch.full((1, 1, 1, 1), x, device="cuda").half().expand(1, 1, rows, 1) for x in (1, 3)]
    out, lse = fastattn.merge_states(outs, [lses, lses])
    assert (out.view(-1) == 2).all() and (lse.view(-1)[-1000:] - 0.6931472).abs().max() < 1e-6


# -------------------------------------------------------------------- streams, graphs and devices


@pytest.mark.parametrize("n", [2, 8, 20, 200])
def test_runs_on_the_current_stream(n):
    """On a side stream whose inputs are late; it neither waits nor makes the host wait."""
    outs, lses = states(n, (2, 4, 30, 64))
    expected, expected_lse = fastattn.merge_states(apart(outs), apart(lses))
    room, room_lse = apart(torch.zeros_like(outs)), apart(torch.zeros_like(lses))
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(2 * CYCLES)
        torch._foreach_copy_([*room, *room_lse], [*outs, *lses])
        out, lse = fastattn.merge_states(room, room_lse)
        assert not stream.query()
    stream.synchronize()
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)


def test_streams_share_no_list():
    """Two streams at once, each with a list of parts in a workspace of its own."""
    streams = [torch.cuda.Stream() for _ in range(4)]
    given = [tuple(map(apart, states(60, (2, 4, 30, 64), seed=i))) for i in range(4)]
    expected = [fastattn.merge_states(*x) for x in given]
    torch.cuda.synchronize()
    got = []
    for _ in range(10):
        for stream, x in zip(streams, given, strict=True):
            with torch.cuda.stream(stream):
                got.append(fastattn.merge_states(*x))
    torch.cuda.synchronize()
    for x, y in zip(got, expected * 10, strict=True):
        assert torch.equal(x[0], y[0]) and torch.equal(x[1], y[1])


@pytest.mark.parametrize("n", [2, 8, 20, 200])
def test_is_captured_in_a_graph(n):
    outs, lses = map(apart, states(n, (2, 4, 30, 64)))
    fastattn.merge_states(outs, lses)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = fastattn.merge_states(outs, lses)
    for seed in (1, 2):
        new, new_lses = states(n, (2, 4, 30, 64), seed=seed)
        torch._foreach_copy_([*outs, *lses], [*new, *new_lses])
        out.fill_(torch.nan)
        lse.fill_(torch.nan)
        graph.replay()
        expected = fastattn.merge_states(list(new), list(new_lses))
        assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


@pytest.mark.parametrize("n", [2, 20])
def test_parts_of_attention_in_one_stream(n):
    """Each part's kernel may still run when merging is launched: it waits for them."""
    q, k, v = gpu.inputs(2, 4, 4, 256, 64 * n, 64)
    parts = [
        fastattn.attention(q, *(x[:, :, i : i + 64] for x in (k, v)), return_lse=True)
        for i in range(0, 64 * n, 64)
    ]
    out, lse = fastattn.merge_states(*zip(*parts, strict=True))
    whole, whole_lse = fastattn.attention(q, k, v, return_lse=True)
    assert (out.float() - whole.float()).abs().max() <= 2**-6 * whole.float().abs().max()
    assert (lse - whole_lse).abs().max() <= 1e-4


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("n", [2, 20])
def test_another_device_than_the_current_one(n):
    outs, lses = states(n, (2, 4, 30, 64))
    expected = fastattn.merge_states(apart(outs), apart(lses))
    there = [x.to("cuda:1") for x in outs], [x.to("cuda:1") for x in lses]
    got = fastattn.merge_states(*there)
    assert torch.cuda.current_device() == 0
    assert all(x.device.index == 1 for x in got)
    assert all(torch.equal(x.cpu(), y.cpu()) for x, y in zip(got, expected, strict=True))
    with pytest.raises(ValueError, match=r"`outs\[1\]` must be on cuda:0"):
        fastattn.merge_states([outs[0], there[0][1]], list(lses[:2]))


# ------------------------------------------------------------------------------------------ errors


def test_sentences():
    outs, lses = map(apart, states(2, (1, 2, 3, 8)))
    with pytest.raises(NotImplementedError, match=r"sm90: it takes .*float32.*not float64"):
        fastattn.merge_states([x.double() for x in outs], [x.double() for x in lses])
    with pytest.raises(TypeError, match=r"`lses\[0\]` must be float32, got bfloat16"):
        fastattn.merge_states(outs, [x.bfloat16() for x in lses])
    with pytest.raises(TypeError, match=r"`outs\[1\]` must be bfloat16 like"):
        fastattn.merge_states([outs[0], outs[1].float()], lses)
    with pytest.raises(ValueError, match=r"`lses\[1\]` must be on cuda:0"):
        fastattn.merge_states(outs, [lses[0], lses[1].cpu()])
