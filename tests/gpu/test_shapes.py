"""Every length, head size, window and limit, and random requests."""

from dataclasses import replace

import cases
import fastattn
import pytest
import random_cases

import gpu
from gpu import DTYPES, inputs, torch
from gpu.calls import CAUSAL, SIZES, check, poisoned

pytestmark = gpu.marks

LENGTHS = (1, 7, 64, 127, 128, 129, 1000, 4096)


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("s", LENGTHS)
def test_lengths(s, d, dtype, causal):
    check(*inputs(2, 3, 3, s, s, d, dtype=DTYPES[dtype]), most=4, causal=causal)


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize(
    ("sq", "sk"),
    [
        (1, 4096),
        (4096, 1),
        (127, 129),
        (129, 127),
        (64, 1000),
        (1000, 64),
        (7, 300),
        (300, 7),
        (1, 2),
        (257, 511),
    ],
)
def test_other_lengths_of_keys(sq, sk, d, causal):
    check(*inputs(1, 2, 2, sq, sk, d), causal=causal)


@pytest.mark.parametrize(("dtype", "causal"), [("fp16", False), ("bf16", True)])
@pytest.mark.parametrize("d", [128, 256])
def test_a_million_keys(d, dtype, causal):
    """Of 128 rows the last 8 are judged, which see what they would see alone. d 64 is in
    test_values.py, which tries it on every backend."""
    q, k, v = inputs(1, 2, 1, 128, 1_000_000, d, dtype=DTYPES[dtype])
    out, lse = fastattn.attention(q, k, v, causal=causal, out=poisoned(q, v), return_lse=True)
    assert torch.isfinite(out).all() and torch.isfinite(lse).all()
    out, lse, q = (x[:, :, -8:] for x in (out, lse, q))
    assert gpu.complaints(out, lse, q, k, v, causal=causal) == []


@pytest.mark.parametrize("s", range(1, 258, 8))
def test_every_length_around(s):
    for sq in range(s, s + 8):
        check(*inputs(1, 2, 1, sq, sq + s % 3, 64), causal=bool(s % 16 < 8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hq", "hk"), [(8, 1), (16, 2), (6, 2)])
def test_grouped_heads(hq, hk, dtype):
    check(*inputs(2, hq, hk, 333, 517, 128, dtype=DTYPES[dtype]), most=hq, causal=True)


@pytest.mark.parametrize(
    ("d", "dv"),
    [
        *((80, 80), (96, 96), (160, 160), (192, 192), (192, 128)),
        *((40, 72), (136, 152), (8, 8), (1, 1), (65, 127)),
    ],
)
def test_other_head_sizes(d, dv):
    check(*inputs(1, 2, 2, 200, 300, d, dv), causal=True)


@pytest.mark.parametrize(
    ("b", "h", "s"), [(70_000, 1, 16), (35, 2000, 16), (1, 70_000, 5), (4096, 8, 64)]
)
def test_many_heads(b, h, s):
    check(*inputs(b, h, h, s, s, 64), most=4096)


@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (2, 2, 0, 5), (2, 2, 5, 0), (0, 2, 0, 0)])
def test_empty_dimensions(shape):
    b, h, sq, sk = shape
    out, lse = (
        check(*inputs(b, h, h, sq, sk, 64))
        if b * sq
        else fastattn.attention(*inputs(b, h, h, sq, sk, 64), return_lse=True)
    )
    assert out.shape == (b, h, sq, 64) and lse.shape == (b, h, sq)
    assert (out == 0).all() and (lse == -torch.inf).all()
    torch.cuda.synchronize()


def served(case):
    """The case as the Hopper kernels take it: a 16-bit dtype."""
    d = SIZES[case.seed % 3]
    return replace(
        case,
        dtype=("bfloat16", "float16")[case.seed % 2],
        d=d,
        dv=d,
        mask="float32" if case.mask == "float64" else case.mask,
    )


@pytest.mark.parametrize("first", range(0, 300, 50))
def test_random_cases(first):
    """Poisoned padding, random strides, windows, lengths, families of inputs: see cases.py."""
    framework = cases.Torch("cuda")
    for seed in range(first, first + 50):
        case = served(random_cases.random_case(seed))
        assert cases.run(case, framework) == [], case


@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("window", [(0, 0), (100, 0), (None, 50), (127, 128), (1000, None)])
def test_windows(window, d):
    check(*inputs(1, 2, 2, 700, 900, d), window=window)


@pytest.mark.parametrize("d", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("window", [(50, 20), (20, 0), (200, None)])
@pytest.mark.parametrize("shape", [(33, 8, 129, 70), (4, 8, 300, 1000), (4, 8, 1000, 70)])
def test_windows_of_true_lengths(shape, window, d):
    """A warpgroup may have a block to pass by between two that it computes."""
    b, h, sq, sk = shape
    limits = {
        "q_lengths": [max(0, sq - 70 * (n + 1)) for n in range(b)],
        "k_lengths": [max(0, sk - 70 * n) for n in range(b)],
        "k_start": [1] * b,
    }
    on_gpu = {n: torch.tensor(x, dtype=torch.int32, device="cuda") for n, x in limits.items()}
    q, k, v = inputs(b, h, h, sq, sk, d)
    out, lse = fastattn.attention(
        q, k, v, out=poisoned(q, v), return_lse=True, window=window, **on_gpu
    )
    assert gpu.complaints(out, lse, q, k, v, window=window, **limits) == []


def test_lengths_hide_what_lies_behind_them():
    q, k, v = inputs(4, 2, 2, 200, 300, 128)
    q_lengths, k_lengths, k_start = [200, 1, 0, 130], [300, 129, 77, 0], [0, 128, 5, 9]
    for b in range(4):
        q[b, :, q_lengths[b] :] = torch.nan
        for x in (k, v):
            x[b, :, k_lengths[b] :] = torch.nan
            x[b, :, : k_start[b]] = torch.inf
    lengths = {"q_lengths": q_lengths, "k_lengths": k_lengths, "k_start": k_start}
    out = poisoned(q, v)
    on_gpu = {
        name: torch.tensor(x, dtype=torch.int32, device="cuda") for name, x in lengths.items()
    }
    _, lse = fastattn.attention(q, k, v, out=out, return_lse=True, causal=True, **on_gpu)
    assert gpu.complaints(out, lse, q, k, v, causal=True, **lengths) == []


def test_lengths_out_of_range_count_as_the_nearest():
    q, k, v = inputs(2, 2, 2, 70, 90, 64)

    def numbers(*x):
        return torch.tensor(x, dtype=torch.int32, device="cuda")

    for name, wild, near in (
        ("q_lengths", (-3, 99), (0, 70)),
        ("k_lengths", (2**31 - 1, -1), (90, 0)),
        ("k_start", (-(2**31), 91), (0, 90)),
        ("q_offset", (-(2**31), 2**31 - 1), (-(2**30), 2**30)),
    ):
        got, want = (
            fastattn.attention(q, k, v, causal=True, **{name: numbers(*x)}) for x in (wild, near)
        )
        assert torch.equal(got, want), name
