"""Gradients on a GPU where scores are changed or sequences packed, by the rule of semantics."""

import itertools

import fastattn
import numpy as np
import pytest
import reference_backward
from cases import Torch

import gpu
from gpu import DTYPES, normal, torch

pytestmark = gpu.marks

NAMES = ("dq", "dk", "dv")
NUMPY = Torch("cpu").numpy
CHANGES = {
    "softcap": {"softcap": 3.0},
    "a large softcap": {"softcap": 400.0, "causal": True},
    "alibi": {"alibi": True, "causal": True},
    "bool mask": {"mask": "bool"},
    "hidden blocks": {"mask": "blocks"},
    "hidden blocks, causal": {"mask": "blocks", "causal": True, "sink": True},
    "bool mask, windows": {"mask": "bool", "window": (100, 40), "sink": True},
    "float mask": {"mask": "float32"},
    "16 bits": {"mask": "bfloat16", "causal": True},
    "dropout": {"dropout_p": 0.25, "seed": 5},
    "all": {
        "softcap": 9.0,
        "mask": "float16",
        "alibi": True,
        "dropout_p": 0.5,
        "seed": 3,
        "window": (90, 30),
        "sink": True,
    },
}


def random_mask(kind, *shape):
    x = normal(*shape, dtype=torch.float32, seed=12)
    if kind == "blocks":  # of 64 rows and 128 keys: hidden, whole, or some of it
        few = normal(*shape[:2], shape[2] // 64 + 1, shape[3] // 128 + 1, seed=15)
        wide = few.repeat_interleave(64, 2).repeat_interleave(128, 3)[..., : shape[2], : shape[3]]
        return (wide > 0.7) | (wide.abs() < 0.3) & (x < 0.3)
    if kind != "bool":
        return x.to(getattr(torch, kind))
    seen = x < 0.3
    seen[..., 3, :] = seen[..., 7] = seen[..., :64, :128] = False
    return seen


def arguments(b, hq, sq, sk, mask=None, alibi=False, sink=False, **rest):
    if mask:
        rest["mask"] = random_mask(mask, 1, hq, sq, sk)
    if alibi:
        rest["alibi_slopes"] = normal(b, hq, dtype=torch.float32, seed=13).abs()
    if sink:
        rest["sink"] = normal(hq, dtype=torch.float32, seed=14)
    return rest


def on_host(x):
    return NUMPY(x.cpu()) if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize("d", [64, 128, 33])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_changed_scores(dtype, change, d):
    q, k, v = gpu.inputs(2, 4, 2, 200, 300, d, d, DTYPES[dtype])
    dout = normal(2, 4, 200, d, dtype=DTYPES[dtype], seed=9)
    asked = arguments(2, 4, 200, 300, **CHANGES[change])
    out, lse = fastattn.attention(q, k, v, return_lse=True, **asked)
    found = fastattn.attention_backward(dout, q, k, v, out, lse, **asked)
    given = [on_host(x) for x in (dout, q, k, v)]
    asked = {name: on_host(x) for name, x in asked.items()}
    got = {name: on_host(x) for name, x in zip(NAMES, found, strict=False)}
    assert not reference_backward.check(got, *given, lse=on_host(lse), **asked)


LENGTHS = [1, 130, 0, 64, 300, 7]


@pytest.mark.parametrize("keywords", [{"causal": True}, {"window": (60, 5)}, {"softcap": 4.0}])
@pytest.mark.parametrize("d", [64, 128])
def test_packed_sequences(d, keywords):
    """Each has the gradients that it has alone; rows of no sequence have 0."""
    ends = np.cumsum([0, *LENGTHS])
    total, cu = ends[-1] + 9, torch.tensor(ends, dtype=torch.int32, device="cuda")
    q, dout = (normal(total, 4, d, seed=seed) for seed in (1, 4))
    k, v = (normal(total, 2, d, seed=seed) for seed in (2, 3))
    packs = (cu, cu, max(LENGTHS), max(LENGTHS))
    out, lse = fastattn.attention_varlen(q, k, v, *packs, return_lse=True, **keywords)
    found = fastattn.attention_varlen_backward(dout, q, k, v, out, lse, *packs, **keywords)[:3]
    assert not any(x[ends[-1] :].any() for x in found)
    for first, end in itertools.pairwise(ends):
        rows = slice(first, end)
        given = [on_host(x[rows].transpose(0, 1)[None]) for x in (dout, q, k, v)]
        got = {n: on_host(x[rows].transpose(0, 1)[None]) for n, x in zip(NAMES, found, strict=True)}
        if first < end:
            said = on_host(lse[None, :, rows])
            assert not reference_backward.check(got, *given, lse=said, **keywords)
