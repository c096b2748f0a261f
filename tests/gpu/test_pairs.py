"""Blocks that work in pairs, as gradients of d 256 and many keys do: values, and the bits of dk and
dv that blocks by themselves give."""

import fastattn
import pytest

import gpu
from gpu import DTYPES, normal, torch
from gpu.test_gradients import complaints, nan_like, visible

pytestmark = gpu.marks

SHAPES = {  # b, hq, hk, sq, sk, d and keywords
    "full": ((2, 3, 3, 1000, 1024, 256), {}),
    "a half of the last pair": ((1, 2, 2, 300, 1217, 256), {}),
    "one key of the last pair": ((1, 2, 2, 300, 1153, 256), {}),
    "grouped heads": ((1, 8, 2, 500, 1100, 256), {}),
    "causal": ((2, 2, 1, 2100, 2200, 256), {"causal": True}),
    "fewer rows than keys": ((1, 2, 2, 70, 4000, 256), {"causal": True}),
    "keys that no row sees": ((1, 2, 2, 1000, 2500, 256), {"causal": "top-left"}),
    "padded heads": ((1, 2, 2, 300, 1300, 200), {}),
    "many heads": ((3, 70, 70, 65, 1200, 256), {}),
    "long": ((1, 1, 1, 300, 20000, 256), {}),
}
LENGTHS = {
    "lengths": {"q_lengths": (500, 70, 0), "k_lengths": (1411, 100, 1500)},
    "start": {"k_start": (0, 333, 1400)},
}


def gradients(arrays, **keywords):
    q, k, v, dout = arrays
    passed = {name: x for name, x in keywords.items() if name != "deterministic"}
    out, lse = fastattn.attention(q, k, v, return_lse=True, **passed)
    call = (dout, q, k, v, out, lse)
    said = fastattn.explain(fastattn.attention_backward, *call, **keywords)
    given = dict(zip(("dq", "dk", "dv"), [nan_like(x) for x in (q, k, v)], strict=True))
    return fastattn.attention_backward(*call, **given, **keywords)[:3], said.kernel


def inputs(b, hq, hk, sq, sk, d, dtype="bf16"):
    q, k, v = gpu.inputs(b, hq, hk, sq, sk, d, d, DTYPES[dtype])
    return q, k, v, normal(b, hq, sq, d, dtype=DTYPES[dtype], seed=9)


def alike(pairs, alone):
    (dq, dk, dv), kernel = pairs
    (dq_alone, dk_alone, dv_alone), other = alone
    assert kernel.endswith("_pair") and not other.endswith("_pair")
    assert torch.equal(dk, dk_alone) and torch.equal(dv, dv_alone)
    far = (dq.float() - dq_alone.float()).abs()  # sums of float32 in another order, rounded
    assert (far <= dq_alone.float().abs() / 64 + 1e-5).all(), far.max()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values(dtype, shape):
    sizes, keywords = SHAPES[shape]
    arrays = inputs(*sizes, dtype)
    pairs = gradients(arrays, **keywords)
    alike(pairs, gradients(arrays, **keywords, deterministic=True))
    q, k, v, dout = arrays
    if sizes[1] * sizes[3] * sizes[4] < 1 << 24:  # what float64 has memory for
        seen = visible(*sizes[3:5], **keywords)
        assert complaints(pairs[0], dout, q, k, v, seen) == []


@pytest.mark.parametrize("which", LENGTHS)
def test_lengths(which):
    arrays = inputs(3, 4, 2, 500, 1500, 256)
    limits = {
        name: torch.tensor(x, dtype=torch.int32, device="cuda")
        for name, x in LENGTHS[which].items()
    }
    alike(gradients(arrays, **limits), gradients(arrays, **limits, deterministic=True))


def test_again_and_again():
    """Blocks that wait for each other: 300 calls, beside the work of another stream."""
    arrays, other = inputs(1, 5, 5, 900, 1300, 256), torch.cuda.Stream()
    busy = torch.randn(2048, 2048, device="cuda")
    alone = gradients(arrays, deterministic=True)
    for n in range(300):
        if n % 3 == 0:
            with torch.cuda.stream(other):
                busy @ busy
        if n % 30 == 0:
            alike(gradients(arrays), alone)
        else:
            gradients(arrays)
