"""Merging on a GPU without one: the plan, and the kernels with threads as fibers."""

import ctypes
import itertools

import ml_dtypes
import numpy as np
import pytest
import reference

import gpu_host

pytestmark = gpu_host.marks

DTYPES = {"bf16": (ml_dtypes.bfloat16, 4), "fp16": (np.float16, 3), "fp32": (np.float32, 2)}
FIELDS = (
    *("batch", "many", "width", "stacked", "lanes", "share"),
    *("axis0", "axis1", "axis2", "tiles", "rows", "items", "bytes"),
)


class Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("shape", ctypes.c_int64 * 4),
        ("stride", ctypes.c_int64 * 4),
    )


class Stack(ctypes.Structure):
    _fields_ = (("dtype", ctypes.c_int), ("out", ctypes.c_int64), ("lse", ctypes.c_int64))


def described(x):
    """fa_tensor of a NumPy array of 3 or 4 axes (b, h, s[, dv]), as views.c describes it."""
    x = x if x.ndim == 4 else x[..., None]
    strides = [0 if n == 1 else s // x.itemsize for n, s in zip(x.shape, x.strides, strict=True)]
    if x.shape[3] == 1:
        strides[3] = 0
    return Tensor(x.ctypes.data, (ctypes.c_int64 * 4)(*x.shape), (ctypes.c_int64 * 4)(*strides))


def arguments(outs, lses, out, lse, n=None):
    return (
        n or len(outs),
        (Tensor * len(outs))(*map(described, outs)),
        (Tensor * len(lses))(*map(described, lses)),
        ctypes.byref(described(out)),
        ctypes.byref(described(lse)),
    )


def number(x):
    return next(number for dtype, number in DTYPES.values() if x.dtype == dtype)


def plan(merging, outs, lses, out, lse, stack=None, n=None):
    fields = (ctypes.c_int64 * len(FIELDS))()
    stack = None if stack is None else ctypes.byref(stack)
    merging.plan(*arguments(outs, lses, out, lse, n), number(out), stack, fields)
    return dict(zip(FIELDS, fields, strict=True))


def aligned(shape, dtype, shift=0):
    """An array whose first element lies `shift` bytes past a multiple of 256, among NaN."""
    dtype = np.dtype(dtype)
    raw = np.full(int(np.prod(shape)) * dtype.itemsize + 1024, 0xFF, np.uint8)
    at = -raw.ctypes.data % 256 + shift
    return raw[at : at + int(np.prod(shape)) * dtype.itemsize].view(dtype).reshape(shape)


def states(n, shape, dtype, rng, shift=0, empty=0.2):
    """outs and lses, some of them empty, whose outs then are NaN."""
    outs, lses = [], []
    for _ in range(n):
        out, lse = aligned(shape, dtype, shift), aligned(shape[:3], np.float32)
        out[:] = rng.standard_normal(shape)
        lse[:] = rng.normal(0, 10, shape[:3])
        gone = rng.random(shape[:3]) < empty
        out[gone] = np.nan
        lse[gone] = rng.choice([-np.inf, np.inf], int(gone.sum()))
        outs.append(out)
        lses.append(lse)
    return outs, lses


def run(merging, outs, lses, out, lse, stack=None, n=None):
    """Runs the kernels, into outputs of NaN: a block an item, and few that go round, the same."""
    found = plan(merging, outs, lses, out, lse, stack, n)
    workspace = np.zeros(found["bytes"] // 8, np.int64)
    stack = None if stack is None else ctypes.byref(stack)
    results = []
    for count in (max(1, found["items"]), 2):
        out[:], lse[:] = np.nan, np.nan
        given = arguments(outs, lses, out, lse, n)
        data = ctypes.c_void_p(workspace.ctypes.data)
        assert merging.merge(*given, number(out), stack, data, count) == 0
        results.append((out.tobytes(), lse.tobytes()))
    assert results[0] == results[1]
    return found


def check(outs, lses, out, lse):
    """Against float64: what two roundings and float32's sums may cost."""
    outs = [
        np.where(np.isinf(y)[..., None], 0, x).astype(np.float64)
        for x, y in zip(outs, lses, strict=True)
    ]
    want, want_lse = reference.merge_states(outs, lses)
    assert np.array_equal(lse == -np.inf, want_lse == -np.inf)
    assert (out[want_lse == -np.inf] == 0).all()
    finite = np.isfinite(want_lse)
    assert finite.any() or not finite.size
    assert np.abs(lse[finite] - want_lse[finite]).max(initial=0) <= 1e-5
    eps = float(reference.finfo(out.dtype).eps)
    bound = (0.51 * eps + 2e-6) * np.abs(want).max(initial=0)
    assert np.abs(out.astype(np.float64) - want).max(initial=0) <= bound


# ---------------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "dv", "shift", "batch", "many", "width", "lanes", "tiles", "share"),
    [
        (1, 128, 0, 2, 0, 16, 128, 1, 1),
        (2, 128, 0, 2, 0, 16, 128, 1, 1),
        (3, 128, 0, 4, 0, 16, 128, 1, 1),
        (5, 64, 0, 8, 0, 16, 64, 1, 1),
        (8, 8, 0, 8, 0, 16, 8, 1, 1),
        (9, 128, 0, 8, 1, 16, 128, 1, 1),
        (17, 128, 0, 8, 1, 16, 128, 1, 2),
        (64, 128, 0, 8, 1, 16, 128, 1, 4),
        (5000, 128, 0, 8, 1, 16, 128, 1, 512),
        (2, 512, 0, 2, 0, 16, 512, 2, 1),
        (2, 124, 8, 2, 0, 8, 124, 1, 1),
    ],
)
def test_which_kernel(merging, dtype, n, dv, shift, batch, many, width, lanes, tiles, share):
    """`lanes` is given as dv, and `share` and `tiles` of 16 bits: float32 takes twice as many."""
    kind = DTYPES[dtype][0]
    out, lse = aligned((2, 3, 7, dv), kind, shift), aligned((2, 3, 7), np.float32)
    outs, lses = zip(*[(aligned(out.shape, kind, shift), lse)] * n, strict=True)
    found = plan(merging, outs, lses, out, lse)
    fragments = -(-lanes * out.itemsize // width)
    lanes = 8 if fragments <= 8 else 16 if fragments <= 16 else 32
    tiles = max(1, -(-fragments // lanes))
    share = min(share, 256 // lanes)
    assert [found[x] for x in ("batch", "many", "width", "lanes", "tiles", "share")] == [
        batch,
        many,
        width,
        lanes,
        tiles,
        share,
    ]
    assert found["rows"] == 42
    at_once = 256 // lanes // share * 8 // batch
    assert found["items"] == -(-42 // at_once) * tiles


def test_a_list_takes_workspace_and_a_stack_none(merging):
    rng = np.random.default_rng(0)
    outs, lses = states(40, (1, 2, 3, 8), np.float32, rng)
    out, lse = aligned((1, 2, 3, 8), np.float32), aligned((1, 2, 3), np.float32)
    assert plan(merging, outs, lses, out, lse)["bytes"] == -(-40 * 72 // 256) * 256
    stacked, stacked_lse = np.stack(outs), np.stack(lses)
    found = plan(merging, list(stacked), list(stacked_lse), out, lse)
    assert found["bytes"] == 0 and found["stacked"]
    found = plan(merging, list(stacked), list(stacked_lse[::-1]), out, lse)
    assert found["bytes"] == 0 and found["stacked"]
    for wrong in ([0, 1, 3, 2], [0, 1, 2, 4], [0, 1, 2, 2]):
        some = [stacked[i] for i in [*wrong, *range(5, 12)]]
        found = plan(merging, some, list(stacked_lse[: len(some)]), out, lse)
        assert found["bytes"] and not found["stacked"]
    # Parts of one array, but with other strides.
    wide = np.stack([np.repeat(x, 2, axis=3) for x in outs[:2]])
    some = [wide[0][..., :8], wide[1][..., ::2]]
    assert not plan(merging, some, list(stacked_lse[:2]), out, lse)["stacked"]


def test_the_axes_come_in_the_order_of_the_result_in_memory(merging):
    for order in itertools.permutations(range(3)):
        shape = (5, 3, 7)
        memory = aligned((*(shape[i] for i in order), 8), np.float32)
        out = memory.transpose(*np.argsort(order), 3)
        lse = aligned(shape, np.float32)
        found = plan(merging, [out], [lse], out, lse)
        assert [found[f"axis{i}"] for i in range(3)] == list(order)


@pytest.mark.parametrize("row", [0, 5, 2**31, 2**32 - 2, 2**32 - 1, 2**35 + 12345, 2**40 - 1])
@pytest.mark.parametrize("sizes", [(1, 1), (3, 7), (1, 2**33), (2**20, 2**11), (12345, 1)])
def test_rows_beyond_32_bits_are_found(merging, row, sizes):
    """As the last of its rows, which may do in 32 bits, and as one of many."""
    rest, at2 = divmod(row, sizes[1])
    for rows in (max(row + 1, sizes[0] * sizes[1]), 2**41):
        at = (ctypes.c_int64 * 3)()
        merging.place(*map(ctypes.c_int64, (row, rows, *sizes)), at)
        assert list(at) == [rest // sizes[0], rest % sizes[0], at2]


# ------------------------------------------------------------------------------------- the kernels


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 9, 16, 17, 40, 130, 300])
@pytest.mark.parametrize("dv", [8, 64, 128, 264])
def test_wide(merging, dtype, n, dv):
    rng = np.random.default_rng(n)
    shape = (2, 3, 5, dv) if n < 100 else (1, 1, 2, dv)
    outs, lses = states(n, shape, DTYPES[dtype][0], rng)
    out, lse = aligned(shape, DTYPES[dtype][0]), aligned(shape[:3], np.float32)
    assert run(merging, outs, lses, out, lse)["width"] == 16
    check(outs, lses, out, lse)


@pytest.mark.parametrize("n", [1, 2, 4, 5, 9, 20, 60])
@pytest.mark.parametrize(
    ("dtype", "dv", "shift", "width"),
    [
        ("bf16", 100, 0, 8), ("bf16", 4, 0, 8), ("bf16", 128, 8, 8), ("bf16", 260, 0, 8),
        ("bf16", 102, 0, 4), ("bf16", 128, 4, 4), ("bf16", 130, 12, 4),
        ("bf16", 101, 0, 0), ("bf16", 128, 2, 0),
        ("fp32", 98, 0, 8), ("fp32", 2, 0, 8), ("fp32", 128, 8, 8),
        ("fp32", 97, 0, 4), ("fp32", 128, 4, 4),
    ],
)  # fmt: skip
def test_width(merging, dtype, dv, shift, width, n):
    """The widest that dv and the addresses of all parts allow; one part lies `shift` beside."""
    rng = np.random.default_rng(n)
    shape = (1, 2, 5, dv)
    outs, lses = states(n, shape, DTYPES[dtype][0], rng)
    outs[-1:], lses[-1:] = states(1, shape, DTYPES[dtype][0], rng, shift)
    out, lse = aligned(shape, DTYPES[dtype][0]), aligned(shape[:3], np.float32)
    found = run(merging, outs, lses, out, lse)
    assert found["width"] == width and found["many"] == (n > 8 or not width)
    check(outs, lses, out, lse)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(("n", "dv"), [(2, 1), (3, 5), (20, 131), (60, 33), (2, 0), (20, 0)])
def test_strided(merging, dtype, n, dv):
    """Columns apart, rows backwards, one array broadcast."""
    rng = np.random.default_rng(n)
    outs, lses = states(n, (2, 3, 5, dv), DTYPES[dtype][0], rng)
    for i in range(n):
        padded = np.full((2, 3, 5, 2 * dv), np.nan, outs[i].dtype)
        view = padded[..., ::-2] if i % 2 else padded[:, ::-1, ::-1, ::2]
        view[:] = outs[i]
        outs[i] = view
        spread = np.full((2, 3, 10), np.nan, np.float32)
        spread[..., ::-2] = lses[i]
        lses[i] = spread[..., ::-2]
    outs[1] = np.broadcast_to(outs[1][:, :1, :1], outs[1].shape)
    lses[1] = np.broadcast_to(lses[1][:, :1, :1], lses[1].shape)
    out = aligned((2, 5, 3, dv), DTYPES[dtype][0]).transpose(0, 2, 1, 3)
    lse = aligned((2, 3, 5), np.float32)
    found = run(merging, outs, lses, out, lse)
    assert not found["width"] or dv == 0
    check(outs, lses, out, lse)


@pytest.mark.parametrize("kind", ["bf16", "fp32"])
@pytest.mark.parametrize(("n", "dv"), [(1, 64), (2, 128), (7, 128), (64, 128), (200, 64), (30, 9)])
def test_stacked_float32(merging, kind, n, dv):
    """Partial results of a split over the keys: one array of float32, an output of 16 bits."""
    rng = np.random.default_rng(n)
    stacked, lses = aligned((n, 2, 3, 2, dv), np.float32), aligned((n, 2, 3, 2), np.float32)
    stacked[:], lses[:] = (np.stack(x) for x in states(n, stacked.shape[1:], np.float32, rng))
    out, lse = aligned((2, 3, 2, dv), DTYPES[kind][0]), aligned((2, 3, 2), np.float32)
    stack = Stack(DTYPES["fp32"][1], stacked[0].size, lses[0].size)
    found = run(merging, stacked[:1], lses[:1], out, lse, stack, n=n)
    assert found["bytes"] == 0 and found["stacked"]
    check(list(stacked), list(lses), out, lse)


@pytest.mark.parametrize("n", [2, 5, 20, 200])
def test_what_is_not_finite(merging, n):
    """NaN and inf of what counts come through, however little it weighs; of what is empty, none."""
    shape = (1, 1, 8, 8)
    outs, lses = states(n, shape, np.float32, np.random.default_rng(0), empty=0)
    for x, y in zip(outs, lses, strict=True):
        y[:] = np.clip(y, -30, 30)
        x[0, 0, 7], y[0, 0, 7] = np.nan, -np.inf
    last = lses[-1][0, 0]
    last[0], last[1], last[2], last[3], last[4] = np.nan, -200, -3e38, 3e38, np.inf
    outs[-1][0, 0, 1:3, 0] = np.inf
    outs[-1][0, 0, 1:3, 1] = np.nan
    outs[0][0, 0, 3, :2] = np.inf, np.nan
    outs[-1][0, 0, 4] = np.nan
    outs[0][0, 0, 5, :2] = np.inf, np.nan
    out, lse = aligned(shape, np.float32), aligned(shape[:3], np.float32)
    run(merging, outs, lses, out, lse)
    out, lse = out[0, 0], lse[0, 0]
    assert np.isnan(out[0]).all() and np.isnan(lse[0])
    for row in (1, 2, 3, 5):
        assert out[row, 0] == np.inf and np.isnan(out[row, 1]) and np.isfinite(out[row, 2:]).all()
    assert np.isfinite(lse[1:7]).all() and lse[3] == np.float32(3e38)
    assert np.isfinite(out[[4, 6]]).all()
    assert (out[7] == 0).all() and lse[7] == -np.inf


@pytest.mark.parametrize("n", [2, 8, 9, 100])
def test_a_mean_of_large_values_does_not_overflow(merging, n):
    outs, lses = states(n, (1, 2, 3, 8), np.float32, np.random.default_rng(0), empty=0)
    for x, y in zip(outs, lses, strict=True):
        x[:], y[:] = 3.4e38, 1
    out, lse = aligned((1, 2, 3, 8), np.float32), aligned((1, 2, 3), np.float32)
    run(merging, outs, lses, out, lse)
    assert np.allclose(out, 3.4e38, rtol=1e-6) and np.allclose(lse, 1 + np.log(n), atol=1e-6)
