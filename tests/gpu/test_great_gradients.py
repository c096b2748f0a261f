"""Gradients on a GPU where scores are changed, and an ulp of lse is more than their differences."""

import fastattn
import pytest

import gpu
from gpu import DTYPES, normal, torch

pytestmark = gpu.marks

KEYS = 200
SIZES = (64, 96, 128, 192, 256)


def float_mask():
    return torch.linspace(-5, 5, KEYS, device="cuda")[None, :]


def bool_mask(rows):
    return (torch.arange(rows * KEYS, device="cuda") % 3 > 0).view(rows, KEYS)


SLOPES = (0.5, 3.0)


def alibi():
    return {"alibi_slopes": torch.tensor(SLOPES, device="cuda")}


WAYS = {
    "bool mask": lambda rows: {"mask": bool_mask(rows)},
    "bool mask, sink": lambda rows: {"mask": bool_mask(rows), "sink": alibi()["alibi_slopes"]},
    "float mask": lambda rows: {"mask": float_mask()},
    "float mask, causal": lambda rows: {"mask": float_mask(), "causal": True},
    "float mask, deterministic": lambda rows: {"mask": float_mask(), "deterministic": True},
    "alibi": lambda rows: alibi(),
    "alibi, window": lambda rows: alibi() | {"window": (60, 60)},
    "alibi, negative scale": lambda rows: alibi() | {"scale": -0.1},
}


def weights(q, k, way, scale):
    """P in float64, a sink left out, for it counts for nothing."""
    rows = q.shape[2]
    s = q.double() @ k.double().mT * scale
    ahead = torch.arange(rows, device="cuda")[:, None] + KEYS - rows
    ahead = ahead - torch.arange(KEYS, device="cuda")
    if "causal" in way:
        s = s.masked_fill(ahead < 0, -torch.inf)
    if "window" in way:
        s = s.masked_fill(ahead.abs() > 60, -torch.inf)
    if "bool mask" in way:
        s = s.masked_fill(~bool_mask(rows), -torch.inf)
    if "float mask" in way:
        s = s + float_mask()
    if "alibi" in way:
        s = s - torch.tensor(SLOPES, device="cuda")[:, None, None] * ahead.abs()
    return s.softmax(-1)


def complaints(dtype, d, way, size, rows):
    """A row's one great score keeps its weight of 1, in dv and, by dlse, in dq."""
    q, k = (normal(1, 2, n, d, seed=i) * size**0.5 for i, n in enumerate((rows, KEYS)))
    q, k = q.to(dtype), k.to(dtype)
    v, dout = normal(1, 2, KEYS, d, dtype=dtype, seed=2), torch.zeros_like(q)
    dout[..., range(rows), range(rows)] = 1  # by which dv[j, i] is P[i, j]
    keywords = WAYS[way](rows)
    forward = {name: x for name, x in keywords.items() if name != "deterministic"}
    scale = keywords.get("scale", d**-0.5)
    p = weights(q, k, way, scale)
    clear = p.amax(-1) > 0.999
    assert clear.double().mean() > 0.9  # but for a few near ties
    out, lse = fastattn.attention(q, k, v, return_lse=True, **forward)
    said = []
    for given in (lse, lse.nextafter(lse.new_full((), -torch.inf))):
        dq, dk, dv = fastattn.attention_backward(dout, q, k, v, out, given, **keywords)[:3]
        if not all(x.isfinite().all() for x in (dq, dk, dv)):
            said.append("not finite")
        got = dv[..., :rows].mT.double()
        if not ((got >= 0) & (got <= 1)).all():
            said.append(f"P from {got.min()} to {got.max()}")
        if not (got - p).abs()[clear].max() < 4e-3:
            said.append(f"P is off by {(got - p).abs()[clear].max()}")
    nothing, one = torch.zeros_like(dout), torch.ones_like(lse)
    dq = fastattn.attention_backward(nothing, q, k, v, out, lse, dlse=one, **keywords)[0]
    want = scale * p @ k.double()
    if not (dq - want).abs()[clear].max() < 1e-2 * want.abs().max():
        said.append(f"dq is off by {(dq - want).abs()[clear].max() / want.abs().max()}")
    return said


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_great_score_keeps_its_weight(dtype, d, way):
    for size in (1e5, 1e6) if dtype == "fp16" else (1e5, 1e10, 1e15):
        for rows in (1, 60):
            assert complaints(DTYPES[dtype], d, way, size, rows) == [], (size, rows)
