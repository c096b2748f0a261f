"""Packed sequences: any lengths, offsets that make no sense, graphs."""

import itertools

import fastattn
import numpy as np
import pytest

import gpu
from gpu import DTYPES, torch
from gpu.calls import CAUSAL, MIXED, SIZES, check_packed

pytestmark = gpu.marks


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", SIZES)
def test_packed(d, dtype, causal):
    q, k, v = gpu.packed(MIXED, 4, 2, d, dtype=DTYPES[dtype], tail=(3, 70))
    check_packed(q, k, v, MIXED, causal=causal)
    check_packed(q, k, v, MIXED, causal=causal, longest=(1 << 20, 1 << 20))


@pytest.mark.parametrize("s", [1, 15, 16, 17, 64, 65, 127, 128, 129, 256])
def test_packed_sequences_of_one_length(s):
    lengths = [(s, s)] * 7
    for d in SIZES:
        check_packed(*gpu.packed(lengths, 2, 2, d), lengths, causal=True)


@pytest.mark.parametrize(
    ("d", "dv"), [(96, 96), (160, 160), (192, 192), (192, 128), (40, 72), (136, 152), (65, 127)]
)
def test_packed_with_other_head_sizes(d, dv):
    check_packed(*gpu.packed(MIXED, 2, 1, d, dv, tail=(1, 1)), MIXED, causal=True)


@pytest.mark.parametrize("odd", ["q", "k", "v", "qkv"])
@pytest.mark.parametrize("d", SIZES)
def test_packed_with_odd_strides(d, odd):
    arrays = dict(zip("qkv", gpu.packed(MIXED, 2, 2, d, tail=(5, 5)), strict=True))
    for name in odd:
        x = arrays[name]
        room = x.new_full((x.shape[0], x.shape[1] * d + 1), torch.nan)
        arrays[name] = room[:, :-1].unflatten(1, x.shape[1:])
        arrays[name].copy_(x)
    check_packed(**arrays, lengths=MIXED, causal=True)


@pytest.mark.parametrize("window", [(0, 0), (100, 0), (None, 50), (127, 128)])
def test_packed_with_windows(window):
    check_packed(*gpu.packed(MIXED, 2, 2, 128), MIXED, window=window)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d", SIZES)
def test_packed_lengths_hide_what_lies_behind_them(d, causal):
    q, k, v = gpu.packed(MIXED, 2, 2, d, tail=(9, 300))
    ends = np.cumsum(MIXED, axis=0)
    used = np.array(
        [(299, 1), (1, 129), (0, 0), (0, 0), (10, 64), (17, 128), (0, 0), (0, 5), (65, 39)]
    )
    for n, (sq, sk) in enumerate(MIXED):
        q[ends[n, 0] - sq + used[n, 0] : ends[n, 0]] = torch.nan
        for x in (k, v):
            x[ends[n, 1] - sk + used[n, 1] : ends[n, 1]] = torch.nan
    check_packed(q, k, v, MIXED, causal=causal, q_lengths=used[:, 0], k_lengths=used[:, 1])


def test_packed_with_an_expanded_head():
    q, k, v = gpu.packed(MIXED, 4, 1, 128)
    check_packed(q, *(x.expand(-1, 4, -1) for x in (k, v)), MIXED, causal=True)


@pytest.mark.parametrize("causal", [False, True])
def test_packed_peaked_rows(causal):
    """Tiles that are done again."""
    q, k, v = gpu.packed(MIXED, 4, 4, 128)
    check_packed(q * 100, k, v, MIXED, causal=causal)


@pytest.mark.parametrize("d", [64, 128])
def test_packed_100000_short_sequences(d):
    """All of them against the padded call, some against the formula."""
    n = np.random.default_rng(0).integers(0, 65, 100_000)
    lengths = np.stack([n, n], 1)
    q, k, v = gpu.packed(lengths, 2, 2, d, tail=(100, 100))
    some = [0, 1, 33_333, 50_001, 99_999]
    out, _ = check_packed(q, k, v, lengths, some, causal=True)
    at = torch.from_numpy(n).cuda()
    inside = torch.arange(64, device="cuda") < at[:, None]
    padded = [x.new_zeros(len(n), 64, 2, d) for x in (q, k, v)]
    for room, x in zip(padded, (q, k, v), strict=True):
        room[inside] = x[: n.sum()]
    at = at.to(torch.int32)
    want = fastattn.attention(*padded, layout="bshd", causal=True, q_lengths=at, k_lengths=at)
    torch.testing.assert_close(out[: n.sum()], want[inside], atol=2e-2, rtol=2e-2)


def test_packed_one_long_sequence_among_short_ones():
    rng = np.random.default_rng(1)
    lengths = rng.integers(0, 100, (5000, 2))
    lengths[2500] = 12_000
    some = [0, 2499, 2500, 2501, 4999]
    check_packed(*gpu.packed(lengths, 2, 1, 128), lengths, some, most=1, causal=True)


def test_packed_a_million_rows():
    lengths = [(3, 3), (1_000_000, 1_000_000), (100, 100)]
    q, k, v = gpu.packed(lengths, 1, 1, 64)
    out, lse = check_packed(q, k, v, lengths, [0, 2], window=(200, 0))
    assert torch.isfinite(out).all() and torch.isfinite(lse).all()


@pytest.mark.parametrize("lengths", [[], [(0, 0)], [(0, 5)], [(5, 0)], [(0, 0)] * 70_000])
def test_packed_nothing(lengths):
    q, k, v = gpu.packed(lengths or [(0, 0)], 2, 2, 64, tail=(4, 4))
    check_packed(q, k, v, lengths)
    check_packed(q, k, v, lengths, longest=(10, 10))
    if not lengths:
        check_packed(q[:0], k[:0], v[:0], [])


@pytest.mark.parametrize("d", SIZES)
def test_packed_bad_offsets_stay_inside(d):
    """Nothing around the output is written. (What the rows hold then, nobody promises.)"""
    total, guard, big = 1000, 4096, 2**31 - 1
    offsets = [
        [0, 500, 300, 1000],
        [0, 1000, 0, 1000, 0, 1000] * 500,
        [7, -5, 2000, big],
        [0, big, -big - 1, big, 1000],
        [-big - 1] * 100,
        [big] * 100,
        np.random.default_rng(0).integers(-2000, 3000, 3000),
    ]
    for cu, other in itertools.product(offsets, repeat=2):
        b = min(len(cu), len(other)) - 1
        cu_q, cu_k = (
            torch.tensor(np.asarray(x)[: b + 1], dtype=torch.int32, device="cuda")
            for x in (cu, other)
        )
        q, k, v = (gpu.normal(total, 2, d, seed=i) for i in range(3))
        room = torch.full((total + 2 * guard, 2, d), 7.0, dtype=q.dtype, device="cuda")
        out = room[guard:-guard]
        for longest in (total, 100):
            _, lse = fastattn.attention_varlen(
                q, k, v, cu_q, cu_k, longest, longest, out=out, return_lse=True, causal=True
            )
            torch.cuda.synchronize()
            assert lse.shape == (2, total)
            assert (room[:guard] == 7).all() and (room[-guard:] == 7).all()


def test_packed_bits():
    """The same every time; with batch_invariant whoever else is in the call."""
    for d, dtype in itertools.product(SIZES, DTYPES.values()):
        q, k, v = gpu.packed(MIXED, 4, 2, d, dtype=dtype)
        *cu, most_q, most_k = gpu.offsets(MIXED)
        first = fastattn.attention_varlen(q, k, v, *cu, most_q, most_k, causal=True)
        for _ in range(50):
            again = fastattn.attention_varlen(q, k, v, *cu, most_q, most_k, causal=True)
            assert torch.equal(again, first)
        options = {"causal": True, "batch_invariant": True, "return_lse": True}
        together = check_packed(q, k, v, MIXED, causal=True, batch_invariant=True)
        ends = np.cumsum(MIXED, axis=0)
        for n, (sq, sk) in enumerate(MIXED):
            rows, keys = slice(ends[n, 0] - sq, ends[n, 0]), slice(ends[n, 1] - sk, ends[n, 1])
            own = gpu.offsets([(sq, sk)])
            out, lse = fastattn.attention_varlen(q[rows], k[keys], v[keys], *own, **options)
            assert torch.equal(out, together[0][rows])
            assert torch.equal(lse, together[1][:, rows])


def test_packed_in_a_graph():
    """A replay goes by what cu_seqlens holds then."""
    lengths = [(300, 300), (100, 100), (1, 5)]
    other = [(30, 0), (200, 280), (171, 125)]
    q, k, v = gpu.packed(lengths, 2, 2, 128)
    cu_q, cu_k, *_ = gpu.offsets(lengths)
    out = torch.full_like(q, torch.nan)

    def call():
        fastattn.attention_varlen(q, k, v, cu_q, cu_k, 300, 300, out=out, causal=True)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for now in (lengths, other, lengths):
        for cu, new in zip((cu_q, cu_k), gpu.offsets(now)[:2], strict=True):
            cu.copy_(new)
        out.fill_(torch.nan)
        graph.replay()
        assert gpu.packed_complaints(out, None, q, k, v, now, causal=True) == []
