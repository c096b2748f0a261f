"""The same bits every time: between launches, batches, and calls that follow each other."""

import functools
import itertools

import fastattn
import numpy as np
import pytest

import gpu
from gpu import DTYPES, inputs, torch
from gpu.calls import SIZES, check

pytestmark = gpu.marks


def random_shapes(n):
    rng = np.random.default_rng(7)
    for i in range(n):
        sq, sk = (int(2 ** rng.uniform(0, 11)) for _ in range(2))
        hk, group = int(rng.integers(1, 5)), int(rng.choice([1, 1, 2, 4]))
        yield (
            i,
            int(rng.integers(1, 4)),
            hk * group,
            hk,
            sq,
            sk,
            int(rng.choice(SIZES)),
            bool(rng.integers(2)),
        )


@pytest.mark.parametrize("part", range(10))
def test_the_same_bits_every_time(part):
    """100 launches of each of 100 shapes, half of them beside the work of another stream."""
    other, busy = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    for i, b, hq, hk, sq, sk, d, causal in itertools.islice(random_shapes(100), part, None, 10):
        q, k, v = inputs(b, hq, hk, sq, sk, d, dtype=list(DTYPES.values())[i % 2], seed=i)
        q = q * 40 if i % 3 == 0 else q
        first = fastattn.attention(q, k, v, causal=causal, return_lse=True)
        torch.cuda.synchronize()
        differ = torch.zeros((), dtype=torch.int64, device="cuda")
        for launch in range(100):
            if launch >= 50 and launch % 10 == 0:
                with torch.cuda.stream(other):
                    busy @ busy
            again = fastattn.attention(q, k, v, causal=causal, return_lse=True)
            for x, y in zip(first, again, strict=True):
                bits = torch.int16 if x.dtype != torch.float32 else torch.int32
                differ += (x.view(bits) != y.view(bits)).sum()
        assert differ.item() == 0, (b, hq, hk, sq, sk, d, causal)


@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("kind", ["plain", "sink", "mask", "packed"])
def test_calls_that_follow_each_other(kind, d):
    """A kernel starts before the one before it has ended, and waits: what that one writes, this one
    reads, and what that one reads, this one writes. Each call moves the rows of v on by one."""
    q, _, v = inputs(2, 4, 4, 300, 300, d)
    k = q.roll(1, 2)  # row i sees key i + 1, and no other: its score is the greatest by far
    keywords = {"scale": 4.0}
    if kind == "sink":
        keywords["sink"] = torch.zeros(4, device=q.device)
    if kind == "mask":
        keywords["mask"] = torch.ones(300, 300, dtype=torch.bool, device=q.device)
    call = fastattn.attention
    if kind == "packed":
        q, k, v = (x.transpose(1, 2).reshape(600, 4, d) for x in (q, k, v))
        cu = torch.tensor([0, 300, 600], dtype=torch.int32, device=q.device)
        call = functools.partial(call_packed, cu)

    def chain(wait):
        x, out = v.clone(), torch.empty_like(v)
        for _ in range(200):
            call(q, k, x, out=out, **keywords)
            x, out = out, x
            if wait:
                torch.cuda.synchronize()
        return x

    slowly = chain(wait=True)
    assert not torch.equal(slowly, v)
    for _ in range(5):
        assert torch.equal(chain(wait=False), slowly)


def call_packed(cu, q, k, v, **keywords):
    return fastattn.attention_varlen(q, k, v, cu, cu, 300, 300, **keywords)


@pytest.mark.parametrize("d", SIZES)
def test_batch_invariant(d):
    q, k, v = inputs(5, 8, 2, 700, 700, d)
    together = fastattn.attention(q, k, v, causal=True, batch_invariant=True)
    for b in range(5):
        alone = fastattn.attention(
            q[b : b + 1], k[b : b + 1], v[b : b + 1], causal=True, batch_invariant=True
        )
        assert torch.equal(alone[0], together[b])
    check(q, k, v, causal=True, batch_invariant=True)
