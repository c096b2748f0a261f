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


SHAPES = {  # of masks: b, hq, sq, sk
    "all heads": (2, 1, 200, 300),
    "all batches": (1, 4, 200, 300),
    "each score": (2, 4, 200, 300),
    "all rows": (2, 1, 1, 300),
    "all keys": (1, 4, 200, 1),
    "everything": (1, 1, 1, 1),
}


@pytest.mark.parametrize("d", [64, 128, 33])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
def test_gradients_of_float_masks(kind, shape, d):
    """In the mask's shape and dtype, the same bits every time, whatever else changes scores."""
    q, k, v = gpu.inputs(2, 4, 2, 200, 300, d, d)
    dout, mask = normal(2, 4, 200, d, seed=9), random_mask(kind, *SHAPES[shape])
    lengths = {"k_lengths": torch.tensor([300, 130], dtype=torch.int32, device="cuda")}
    for more in ({}, {"causal": True, **lengths}, {"softcap": 2.0, "dropout_p": 0.3, "seed": 5}):
        asked = {"mask": mask, **more}
        out, lse = fastattn.attention(q, k, v, return_lse=True, **asked)
        arrays = (dout, q, k, v, out, lse)
        found = fastattn.attention_backward(*arrays, need_dmask=True, **asked)
        assert found[3].shape == mask.shape and found[3].dtype == mask.dtype
        given = [on_host(x) for x in (dout, q, k, v)]
        got = {"dmask": on_host(found[3])}
        host = {name: on_host(x) for name, x in asked.items()}
        assert not reference_backward.check(got, *given, lse=on_host(lse), **host), more
        again = fastattn.attention_backward(*arrays, need_dmask=True, **asked)
        assert torch.equal(found[3], again[3])
        assert torch.equal(found[1], again[1]) and torch.equal(found[2], again[2])


def test_the_gradient_of_a_mask_takes_no_array_of_scores():
    q, k, v = (x.requires_grad_() for x in gpu.inputs(1, 16, 16, 2048, 2048, 64))
    mask = normal(1, 1, 2048, 2048, dtype=torch.float32, seed=12).requires_grad_()
    out = fastattn.attention(q, k, v, mask=mask)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out.backward(torch.ones_like(out))
    scores = 16 * 2048 * 2048
    assert torch.cuda.max_memory_allocated() - before < 2 * scores


@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_no_score_gives_a_mask_zeros(kind):
    q, k, v = gpu.inputs(1, 2, 2, 5, 9, 64)
    lengths = {"k_lengths": torch.zeros(1, dtype=torch.int32, device="cuda")}
    for keys, more in ((0, {}), (9, lengths)):
        of = q, k[:, :, :keys], v[:, :, :keys]
        for shape in ((1, 1, 5, keys), (2, 5, 1), (5, keys)):
            mask = normal(*shape, dtype=getattr(torch, kind), seed=12)
            out, lse = fastattn.attention(*of, mask=mask, return_lse=True, **more)
            arguments = {"mask": mask, "need_dmask": True, **more}
            found = fastattn.attention_backward(torch.ones_like(out), *of, out, lse, **arguments)
            assert found[3].shape == mask.shape and not found[3].any()


def on_host(x):
    return NUMPY(x.cpu()) if isinstance(x, torch.Tensor) else x


SIZES = [*((d, d) for d in (64, 96, 128, 192, 256, 33, 225)), (192, 128)]


@pytest.mark.parametrize(("d", "dv"), SIZES)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_changed_scores(dtype, change, d, dv):
    q, k, v = gpu.inputs(2, 4, 2, 200, 300, d, dv, DTYPES[dtype])
    dout = normal(2, 4, 200, dv, dtype=DTYPES[dtype], seed=9)
    asked = arguments(2, 4, 200, 300, **CHANGES[change])
    out, lse = fastattn.attention(q, k, v, return_lse=True, **asked)
    found = fastattn.attention_backward(dout, q, k, v, out, lse, **asked)
    given = [on_host(x) for x in (dout, q, k, v)]
    asked = {name: on_host(x) for name, x in asked.items()}
    got = {name: on_host(x) for name, x in zip(NAMES, found, strict=False)}
    assert not reference_backward.check(got, *given, lse=on_host(lse), **asked)


LENGTHS = [1, 130, 0, 64, 300, 7]


KEYWORDS = ({"causal": True}, {"window": (60, 5)}, {"softcap": 4.0})


@pytest.mark.parametrize("keywords", KEYWORDS)
@pytest.mark.parametrize("d", [64, 96, 128, 192, 256])
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


def test_a_mask_of_packed_sequences():
    """Its gradient is the sum of those that the sequences have alone."""
    ends = np.cumsum([0, *LENGTHS])
    total, cu = ends[-1], torch.tensor(ends, dtype=torch.int32, device="cuda")
    q, dout = (normal(total, 4, 64, seed=seed) for seed in (1, 4))
    k, v = (normal(total, 2, 64, seed=seed) for seed in (2, 3))
    longest = max(LENGTHS)
    mask = normal(1, 4, longest, longest, dtype=torch.float32, seed=12)
    packs = (cu, cu, longest, longest)
    out, lse = fastattn.attention_varlen(q, k, v, *packs, mask=mask, return_lse=True)
    arrays = (dout, q, k, v, out, lse)
    found = fastattn.attention_varlen_backward(*arrays, *packs, mask=mask, need_dmask=True)[3]
    want = torch.zeros_like(mask)
    for first, end in itertools.pairwise(ends):
        n, rows = end - first, slice(first, end)
        alone = [x[rows].transpose(0, 1)[None] for x in arrays[:5]] + [lse[None, :, rows]]
        own = mask[..., :n, :n]
        if n:
            part = fastattn.attention_backward(*alone, mask=own, need_dmask=True)[3]
            want[..., :n, :n] += part
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
