"""Deterministic gradients on a GPU: the same bits in 1,000 runs, whatever else is running."""

import fastattn
import pytest

import gpu
from gpu import DTYPES, normal, torch

pytestmark = gpu.marks

SIZES = (64, 96, 128, (192, 128), 192, 256, 57)
SHAPES = {  # b, hq, hk, sq, sk and keywords
    "few rows": ((1, 2, 2, 3, 1000), {}),
    "full": ((2, 6, 6, 700, 900), {}),
    "grouped heads": ((1, 8, 2, 600, 1100), {}),
    "more tiles than fit": ((4, 24, 24, 1000, 1000), {"causal": True}),
    "long": ((1, 1, 1, 300, 20000), {"causal": True}),
    "window": ((1, 4, 2, 900, 1500), {"window": (300, 40)}),
    "a window to the left": ((1, 4, 4, 1500, 900), {"window": (200, None)}),
    "lengths": ((2, 3, 3, 500, 900), {"q_lengths": (500, 70), "k_lengths": (411, 900)}),
    "start": ((2, 3, 3, 500, 900), {"k_start": (0, 333), "causal": True}),
}
CHANGES = {  # of scores, and sequences
    "bool mask": {"mask": "bool"},
    "hidden blocks": {"mask": "blocks", "causal": True},
    "float mask": {"mask": "float"},
    "softcap and a sink": {"softcap": 5.0, "sink": True},
    "alibi": {"alibi": True, "causal": True},
    "dropout": {"dropout_p": 0.3, "seed": 3},
    "packed": {"cu": (0, 130, 130, 700, 1500, 1601), "causal": True},
}
REPEATS = 1000


def ints(x):
    return torch.tensor(x, dtype=torch.int32, device="cuda")


def differing(call, repeats=REPEATS):
    """How many numbers of all further runs are not those of the first, half of these beside the
    work of another stream; and the first run's."""
    other, busy = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    first, found = call(), torch.zeros((), dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    for n in range(repeats):
        if n % 2 and n % 5 == 0:
            with torch.cuda.stream(other):
                busy @ busy
        for x, y in zip(first, call(), strict=True):
            found += (x.view(torch.int16) != y.view(torch.int16)).sum()
    return found.item(), first


def check(function, arguments, keywords, repeats=REPEATS):
    def call(deterministic=True):
        found = function(*arguments, **keywords, deterministic=deterministic)
        return found[:3]

    count, first = differing(call, repeats)
    assert count == 0
    again = call(False)
    for name, got, free, other in zip(("dq", "dk", "dv"), first, call(False), again, strict=True):
        # Sums of float32 in another order, rounded: of dq always, else where blocks of rows start
        far = (got.float() - free.float()).abs()
        assert (far <= free.float().abs() / 64 + 1e-5).all(), (name, far.max())
        assert name == "dq" or torch.equal(free, other), name


def inputs(d, b, hq, hk, sq, sk, dtype):
    d, dv = d if isinstance(d, tuple) else (d, d)
    q, k, v = gpu.inputs(b, hq, hk, sq, sk, d, dv, dtype=dtype)
    return q, k, v, normal(b, hq, sq, dv, dtype=dtype, seed=9)


@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("name", SHAPES)
def test_the_same_bits_every_time(name, d):
    shape, keywords = SHAPES[name]
    dtype = list(DTYPES.values())[len(name) % 2]
    keywords = {key: ints(x) if "k_" in key or "q_" in key else x for key, x in keywords.items()}
    q, k, v, dout = inputs(d, *shape, dtype)
    out, lse = fastattn.attention(q, k, v, return_lse=True, **keywords)
    check(fastattn.attention_backward, (dout, q, k, v, out, lse), keywords)


@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("name", CHANGES)
def test_where_scores_are_changed(name, d):
    keywords = dict(CHANGES[name])
    cu, hq = keywords.pop("cu", None), 4
    b, sq, sk = (1, 1700, 1700) if cu else (2, 500, 900)
    q, k, v, dout = inputs(d, b, hq, 2, sq, sk, torch.bfloat16)
    kind = keywords.pop("mask", None)
    if kind:
        noise = normal(1, hq, sq, sk, dtype=torch.float32, seed=7)
        keywords["mask"] = noise if kind == "float" else noise < 0.5
        if kind == "blocks":  # of 64 rows and 128 keys; a third is seen
            few = normal(1, hq, 8, 8, dtype=torch.float32, seed=8) < -0.5
            few = few.repeat_interleave(64, 2).repeat_interleave(128, 3)
            keywords["mask"] = few[..., :sq, :sk]
    if keywords.pop("sink", False):
        keywords["sink"] = normal(hq, dtype=torch.float32, seed=5)
    if keywords.pop("alibi", False):
        keywords["alibi_slopes"] = normal(hq, dtype=torch.float32, seed=6).abs()
    forward, backward, ends = fastattn.attention, fastattn.attention_backward, ()
    if cu:
        forward, backward = fastattn.attention_varlen, fastattn.attention_varlen_backward
        q, k, v, dout = (x[0].transpose(0, 1).contiguous() for x in (q, k, v, dout))
        ends = ints(cu), ints(cu), 800, 800
    out, lse = forward(q, k, v, *ends, return_lse=True, **keywords)
    check(backward, (dout, q, k, v, out, lse, *ends), keywords, REPEATS // 4)


def test_two_streams_do_not_wait_for_each_other_for_ever():
    """Blocks of threads wait for others of their launch, which two launches share the SMs for."""
    calls, streams = [], [torch.cuda.Stream() for _ in range(2)]
    for seed in range(2):
        q, k, v = gpu.inputs(2, 16, 16, 2000, 2000, 128, seed=seed)
        out, lse = fastattn.attention(q, k, v, return_lse=True)
        calls.append((out, q, k, v, out, lse))
    torch.cuda.synchronize()
    found = [[], []]
    for _ in range(50):
        for own, stream, arguments in zip(found, streams, calls, strict=True):
            with torch.cuda.stream(stream):
                own.append(fastattn.attention_backward(*arguments, deterministic=True)[0])
    torch.cuda.synchronize()
    for own in found:
        assert all(torch.equal(x, own[0]) for x in own)
