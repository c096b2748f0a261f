"""The drop-in: scaled_dot_product_attention is torch.nn.functional's, value for value.

torch computes in float64 and our definition must agree with it, to the last digits; the result
under test is then judged by our definition like any other.
"""

import cases
import fastattn
import numpy as np
import pytest
import reference
from cases import DTYPES

torch = pytest.importorskip("torch")
sdpa = torch.nn.functional.scaled_dot_product_attention


def tensor(shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(getattr(torch, dtype))


def numpy(x):
    return cases.Torch().numpy(x.contiguous())


def judged(out, q, k, v, mask=None, is_causal=False, scale=None, enable_gqa=False):
    """Complaints about `out`, after torch in float64 and the definition have been held together."""
    wide = mask.double() if mask is not None and mask.is_floating_point() else mask
    if wide is not None and wide.ndim < 2:
        wide = wide.expand(q.shape[-2], k.shape[-2])  # torch wants both
    keywords = {"attn_mask": wide, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    theirs = sdpa(q.double(), k.double(), v.double(), **keywords)
    if out.shape != theirs.shape or out.dtype != q.dtype:
        return [f"{tuple(out.shape)} {out.dtype}, torch says {tuple(theirs.shape)} {q.dtype}"]

    # Any rank, with any broadcasting, as (b, h, s, d).
    rank = max(q.ndim, k.ndim, v.ndim, 3)
    full = [x.reshape((1,) * (rank - x.ndim) + tuple(x.shape)) for x in (q, k, v)]
    lead = torch.broadcast_shapes(*(x.shape[:-3] for x in full))
    heads = [x.shape[-3] for x in full]
    if not enable_gqa:
        heads = [max(heads)] * 3 if min(heads) else [0] * 3
    elif heads[1] != heads[2]:
        heads[1] = heads[2] = max(heads[1:])
    full = [x.expand(*lead, h, *x.shape[-2:]) for x, h in zip(full, heads, strict=True)]
    flat = [numpy(x).reshape(lead.numel(), *x.shape[-3:]) for x in full]
    if mask is not None:
        mask = mask.expand(*lead, heads[0], q.shape[-2], k.shape[-2])
        mask = numpy(mask).reshape(lead.numel(), *mask.shape[-3:])
    arguments = {"mask": mask, "causal": "top-left" if is_causal else False, "scale": scale}
    exact = reference.attention(*flat, **arguments)
    shape = exact.out.shape
    close = np.abs(exact.out - numpy(theirs).reshape(shape))
    assert close.max(initial=0) < 1e-12 * max(np.abs(flat[2].astype(float)).max(initial=0), 1)
    return reference.check(numpy(out).reshape(shape), None, *flat, **arguments)


def both(q, k, v, **keywords):
    out = fastattn.scaled_dot_product_attention(q, k, v, **keywords)
    keywords["mask"] = keywords.pop("attn_mask", None)
    complaints = judged(out, q, k, v, **keywords)
    assert not complaints


SHAPES = {
    "rank 2": ((17, 16), (23, 16), (23, 16)),
    "rank 3": ((3, 17, 16), (3, 23, 16), (3, 23, 24)),
    "rank 4": ((2, 3, 17, 16), (2, 3, 23, 16), (2, 3, 23, 16)),
    "rank 5": ((2, 2, 3, 17, 16), (2, 2, 3, 23, 16), (2, 2, 3, 23, 16)),
    "rank 7": ((2, 1, 2, 2, 3, 5, 8), (2, 1, 2, 2, 3, 7, 8), (2, 1, 2, 2, 3, 7, 8)),
    "k and v without batch": ((4, 3, 17, 16), (1, 3, 23, 16), (3, 23, 16)),
    "q without batch": ((3, 17, 16), (4, 3, 23, 16), (4, 3, 23, 16)),
    "one key head": ((2, 3, 17, 16), (2, 1, 23, 16), (2, 1, 23, 16)),
    "one query head": ((2, 1, 17, 16), (2, 3, 23, 16), (2, 3, 23, 16)),
    "one value head": ((2, 3, 17, 16), (2, 3, 23, 16), (2, 1, 23, 16)),
    "ranks differ": ((17, 16), (2, 3, 23, 16), (3, 23, 16)),
    "leading broadcast both ways": ((5, 1, 2, 9, 8), (1, 3, 2, 11, 8), (5, 3, 2, 11, 8)),
    "more queries": ((2, 2, 40, 8), (2, 2, 7, 8), (2, 2, 7, 8)),
    "one row": ((2, 2, 1, 8), (2, 2, 70, 8), (2, 2, 70, 8)),
    "one key": ((2, 2, 7, 8), (2, 2, 1, 8), (2, 2, 1, 8)),
    "no rows": ((2, 2, 0, 8), (2, 2, 5, 8), (2, 2, 5, 8)),
    "no keys": ((2, 2, 5, 8), (2, 2, 0, 8), (2, 2, 0, 8)),
    "no batch": ((0, 2, 5, 8), (0, 2, 5, 8), (0, 2, 5, 8)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, dtype):
    q, k, v = (tensor(s, dtype, n) for n, s in enumerate(SHAPES[shape]))
    both(q, k, v)
    both(q, k, v, is_causal=True)
    both(q, k, v, scale=-0.7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "mask_shape",
    [
        (23,),
        (1,),
        (17, 23),
        (1, 23),
        (17, 1),
        (3, 1, 1),
        (3, 17, 23),
        (2, 1, 1, 23),
        (1, 3, 17, 1),
        (1, 1, 1, 1),
        (2, 3, 17, 23),
    ],
)
@pytest.mark.parametrize("kind", ["bool", "same", "float32"])
def test_promise_4_any_mask_that_broadcasts(kind, mask_shape, dtype):
    q, k, v = (tensor((2, 3, s, 16), dtype, n) for n, s in enumerate((17, 23, 23)))
    mask = tensor(mask_shape, dtype if kind == "same" else "float32", 4)
    if kind == "bool":
        mask = mask > -0.5
    both(q, k, v, attn_mask=mask)
    stretched = mask.expand(torch.broadcast_shapes(mask_shape, (17, 23)))  # stride 0
    both(q, k, v, attn_mask=stretched)
    both(q, k, v, attn_mask=mask.t().contiguous().t() if mask.ndim == 2 else mask)


@pytest.mark.parametrize("dtype", DTYPES)
def test_promise_4_masks_of_other_ranks(dtype):
    q, k, v = (tensor((4, 2, 3, s, 8), dtype, n) for n, s in enumerate((5, 7, 7)))
    for shape in (
        (5, 7),
        (3, 5, 7),
        (2, 1, 5, 7),
        (4, 1, 1, 5, 7),
        (4, 2, 3, 5, 7),
        (4, 1, 3, 1, 7),
    ):
        both(q, k, v, attn_mask=tensor(shape, "float32", 9) > 0)
        both(q, k, v, attn_mask=tensor(shape, dtype, 9))
    q, k, v = (tensor((s, 8), dtype, n) for n, s in enumerate((5, 7, 7)))
    both(q, k, v, attn_mask=tensor((5, 7), dtype, 9))


@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_heads(dtype):
    for hq, hk in ((8, 2), (6, 3), (4, 1), (3, 3)):
        q = tensor((2, hq, 9, 16), dtype, 0)
        k, v = (tensor((2, hk, 11, 16), dtype, n) for n in (1, 2))
        both(q, k, v, enable_gqa=True)
        both(q, k, v, enable_gqa=True, is_causal=True)
        both(q[0], k[0], v[0], enable_gqa=True)


def test_promise_10_is_causal_is_top_left_for_every_pair_of_lengths():
    for sq in range(1, 12):
        for sk in range(1, 12):
            q, k, v = (tensor((1, 2, s, 8), "float32", n) for n, s in enumerate((sq, sk, sk)))
            both(q, k, v, is_causal=True)


def test_promise_6_a_fully_masked_row_is_zero():
    q, k, v = (tensor((1, 2, 6, 8), "float32", n) for n in range(3))
    mask = torch.ones(6, 6, dtype=torch.bool)
    mask[2] = False
    out = fastattn.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert (out[:, :, 2] == 0).all()
    out = fastattn.scaled_dot_product_attention(q, k, v, torch.where(mask, 0.0, -torch.inf))
    assert (out[:, :, 2] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype):
    """A transposed (b, s, h, d), slices, stride 0, a transposed last dimension."""
    x = tensor((2, 23, 3, 48), dtype, 0).transpose(1, 2)
    q, k, v = x[..., :16], x[..., 16:32], x[..., 32:]
    both(q, k, v, is_causal=True)
    both(q[:, :, ::3], k[:, :, 1::2], v[:, :, 1::2])
    both(q[:, :1].expand(-1, 3, -1, -1), k, v)
    both(q.transpose(2, 3).contiguous().transpose(2, 3), k, v.mT.contiguous().mT)


def test_positional_arguments_in_torchs_order():
    q, k, v = (tensor((1, 2, 6, 8), "float32", n) for n in range(3))
    mask = torch.rand(6, 6) > 0.3
    ours = fastattn.scaled_dot_product_attention(q, k, v, mask, 0.0, False, scale=0.3)
    assert not judged(ours, q, k, v, mask=mask, scale=0.3)
    ours = fastattn.scaled_dot_product_attention(query=q, key=k, value=v, is_causal=True)
    assert not judged(ours, q, k, v, is_causal=True)


@pytest.mark.parametrize("framework", ["numpy", "jax"])
def test_the_same_for_other_frameworks(framework):
    q, k, v = (tensor((2, 3, s, 16), "float32", n) for n, s in enumerate((9, 7, 7)))
    mask = tensor((9, 7), "float32", 3) > 0
    if framework == "numpy":
        given = [x.numpy() for x in (q, k, v, mask)]
    else:
        jax = pytest.importorskip("jax")
        given = [jax.numpy.asarray(x.numpy()) for x in (q, k, v, mask)]
    out = fastattn.scaled_dot_product_attention(*given)
    assert type(out) is type(given[0])
    assert not judged(torch.from_numpy(np.array(out)), q, k, v, mask=mask)
