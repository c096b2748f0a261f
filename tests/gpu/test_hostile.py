"""Scores that outgrow their offset, huge values, inf and NaN."""

import math

import pytest

import gpu
from gpu import DTYPES, inputs, torch
from gpu.calls import SIZES, check

pytestmark = gpu.marks

# (b, h, sq, sk, d, dv): between them every variant of boxes is the best for some (gpu_host/)
SHAPES = (
    (1, 1, 257, 257, 64, 64),
    (1, 32, 257, 257, 64, 64),
    (4, 16, 257, 257, 64, 64),
    (1, 1, 1500, 1500, 64, 64),
    (1, 1, 257, 257, 80, 80),
    (4, 16, 257, 257, 80, 80),
    (4, 16, 300, 300, 80, 80),
    (1, 1, 257, 257, 96, 96),
    (4, 16, 257, 257, 96, 96),
    (1, 1, 257, 257, 128, 128),
    (1, 32, 257, 257, 128, 128),
    (4, 16, 257, 257, 128, 128),
    (1, 1, 3000, 3000, 128, 128),
    (10, 8, 257, 1240, 128, 128),
    (1, 1, 257, 257, 160, 160),
    (1, 1, 257, 257, 192, 128),
    (1, 1, 257, 257, 192, 192),
    (1, 1, 257, 257, 256, 256),
)


@pytest.mark.parametrize("how", ["peaked", "late"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_offsets_that_do_not_hold(shape, dtype, causal, how):
    """In every variant: raised at nearly every block, or once, in the midst of a tile."""
    b, h, sq, sk, d, dv = shape
    q, k, v = inputs(b, h, h, sq, sk, d, dv, dtype=DTYPES[dtype])
    if how == "peaked":
        q = q * 40
    else:
        k[:, :, sk // 3] *= 100
    check(q, k, v, causal=causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("factor", [4, 8, 16, 25, 40, 100])
def test_peaked_rows(factor, d, dtype, causal):
    q, k, v = inputs(1, 4, 4, 1024, 1024, d, dtype=DTYPES[dtype])
    check(q * factor, k, v, causal=causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("place", [0, 127, 128, 500, 1000, 1023])
def test_one_huge_key(place, d, dtype, causal):
    q, k, v = inputs(1, 2, 2, 1024, 1024, d, dtype=DTYPES[dtype])
    k[:, :, place] *= 100
    check(q, k, v, causal=causal)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "how", ["rising", "falling", "equal", "negative", "zero scale", "negative scale", "tiny"]
)
def test_ordered_scores(how, dtype):
    q, k, v = inputs(1, 2, 2, 600, 1500, 128, dtype=DTYPES[dtype])
    slope = torch.linspace(0, 60, 1500, device="cuda")[:, None]
    scale = {"zero scale": 0.0, "negative scale": -0.3}.get(how)
    if how in ("rising", "falling"):  # each block's maximum above, or below, all before it
        q[..., 0], k[..., :1] = 11.3, (slope if how == "rising" else 60 - slope).to(k.dtype)
    elif how == "negative":
        q[..., 0], k[..., 0] = 30, -300
    elif how == "equal":
        k[:] = k[:, :, :1]
    elif how == "tiny":
        v = v * 1e-4
    check(q, k, v, scale=scale)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads, s", [(32, 1024), (128, 2048)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_that_outgrow_their_offset(dtype, heads, s, causal):
    """Far behind a tile's first blocks comes a key whose score is so many powers of two greater, in
    each head another: what fp16's P holds, what a float holds, and what neither does."""
    jumps = [0, 0.5, 3, 10, 13.9, 14.1, 15, 16, 30, 90, 100, 113, 118, 119, 119.5, 119.9, 120]
    jumps += [120.1, 120.5, 121, 123, 125, 126, 126.5, 127, 127.5, 128, 129, 140, 200, 500, 3000]
    q, k, v = inputs(1, heads, heads, s, s, 128, dtype=DTYPES[dtype])
    q[..., 0], k[..., 0] = 16, 0
    jump = torch.tensor([jumps[i * 32 // heads] for i in range(heads)], device="cuda")
    k[:, :, s // 3, 0] = (jump * (math.log(2) * math.sqrt(128) / 16)).to(k.dtype)
    check(q, k, v, most=32, causal=causal)


@pytest.mark.parametrize("d", SIZES)
def test_huge_values(d):
    q, k, v = inputs(1, 2, 2, 300, 700, d)
    check(q, k, v * 1e30)
    check(q, k, v * 1e-30)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_inf_and_nan(name, dtype, value, causal):
    """They come out as the formula gives them. (A value that only some rows see may spread.)"""
    arrays = dict(zip("qkv", inputs(1, 2, 2, 300, 300, 128, dtype=DTYPES[dtype]), strict=True))
    where = 0 if name == "v" else 200
    arrays[name][0, 0, where, 5] = value
    check(**arrays, causal=causal)
