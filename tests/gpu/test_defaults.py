"""Where the default of torch 2.11 on a Hopper GPU (cuDNN 9.19) is wrong, the drop-in is right.

What torch gives for such inputs, and for which version: `python benchmarks/correctness.py`.
"""

import fastattn
import pytest

import gpu
from gpu import DTYPES, inputs, normal, torch

pytestmark = gpu.marks

dtypes = pytest.mark.parametrize("dtype", DTYPES)
head_sizes = pytest.mark.parametrize("d", [64, 128, 256])


def check(q, k, v, attn_mask=None, is_causal=False, scale=None, **keywords):
    """The drop-in's output is right."""
    out = fastattn.scaled_dot_product_attention(
        q, k, v, attn_mask, is_causal=is_causal, scale=scale, **keywords
    )
    meant = {"mask": attn_mask, "causal": "top-left" if is_causal else False, "scale": scale}
    assert gpu.complaints(out, None, q, k, v, **meant) == []
    return out


@head_sizes
@dtypes
@pytest.mark.parametrize("scale", [-0.3, -8.0, -1e-30, 0.0, -0.0])
@pytest.mark.parametrize("s", [1, 64, 100, 129, 1000])
def test_causal_with_a_scale_that_is_not_positive(s, scale, dtype, d):
    q, k, v = inputs(2, 4, 4, s, s, d, dtype=DTYPES[dtype])
    check(q, k, v, is_causal=True, scale=scale)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_every_kind_of_interval_with_a_scale_that_is_not_positive(scale):
    q, k, v = inputs(2, 4, 2, 200, 300, 128)
    lengths = torch.tensor([300, 170], dtype=torch.int32, device="cuda")
    for limits in (
        {"causal": True},
        {"window": (30, 5)},
        {"window": (100, None), "causal": True},
        {"k_lengths": lengths},
        {"k_start": 300 - lengths},
    ):
        out, lse = fastattn.attention(q, k, v, scale=scale, return_lse=True, **limits)
        limits = {n: x.cpu().numpy() if torch.is_tensor(x) else x for n, x in limits.items()}
        assert gpu.complaints(out, lse, q, k, v, scale=scale, **limits) == [], limits


@head_sizes
@dtypes
@pytest.mark.parametrize("shape", [(100, 300), (4, 1, 300), (2, 1, 100, 300), (2, 4, 100, 1)])
def test_float32_mask_beside_16_bits(shape, dtype, d):
    q, k, v = inputs(2, 4, 4, 100, 300, d, dtype=DTYPES[dtype])
    check(q, k, v, 5 * normal(*shape, dtype=torch.float32, seed=9))


@head_sizes
@dtypes
@pytest.mark.parametrize("rows", [[0], [7], [99], [0, 1, 63, 64], range(64), range(100)])
def test_a_bool_mask_with_rows_that_see_nothing(rows, dtype, d):
    q, k, v = inputs(2, 4, 4, 100, 100, d, dtype=DTYPES[dtype])
    mask = normal(100, 100, seed=9) > 0
    mask[list(rows)] = False
    assert (check(q, k, v, mask)[:, :, list(rows)] == 0).all()


@dtypes
def test_a_bool_mask_with_another_empty_row_for_each_head(dtype):
    q, k, v = inputs(2, 4, 4, 100, 100, 64, dtype=DTYPES[dtype])
    mask = normal(2, 4, 100, 100, seed=9) > 0
    for b, h in torch.cartesian_prod(torch.arange(2), torch.arange(4)).tolist():
        mask[b, h, 11 * h + b] = False
    check(q, k, v, mask)


def stored(mask, how):
    """The same mask (b, h, sq, sk) with other strides."""
    if how == "transposed":
        return mask.mT.contiguous().mT
    if how == "heads last":
        return mask.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    if how == "every second":
        return mask.repeat_interleave(2, dim=3)[..., ::2]
    return mask[:1, :1].expand(mask.shape)


@dtypes
@pytest.mark.parametrize("kind", ["bool", "own", "float32"])
@pytest.mark.parametrize("how", ["transposed", "heads last", "every second", "expanded"])
def test_masks_of_any_strides(how, kind, dtype):
    q, k, v = inputs(2, 4, 4, 100, 300, 64, dtype=DTYPES[dtype])
    mask = normal(2, 4, 100, 300, dtype=torch.float32, seed=9)
    mask = mask > 0 if kind == "bool" else mask.to(q.dtype if kind == "own" else mask.dtype)
    check(q, k, v, stored(mask, how))


@head_sizes
@pytest.mark.parametrize(("sq", "sk"), [(100, 80), (80, 100), (1, 300), (300, 1), (512, 513)])
def test_causal_with_other_lengths_of_keys(sq, sk, d):
    check(*inputs(2, 4, 4, sq, sk, d), is_causal=True)


@head_sizes
@dtypes
def test_dropout_of_everything(dtype, d):
    q, k, v = inputs(2, 4, 4, 100, 100, d, dtype=DTYPES[dtype])
    for causal in (False, True):
        out = fastattn.scaled_dot_product_attention(q, k, v, None, 1.0, causal)
        assert out.shape == q.shape and (out == 0).all()


@dtypes
@pytest.mark.parametrize("kind", ["bool", "own"])
@pytest.mark.parametrize("s", [1, 64, 192, 320, 1088])
def test_masks_at_lengths_that_leave_half_a_block(s, kind, dtype):
    """The forward pass at the lengths where gradients of torch's default were once NaN."""
    q, k, v = inputs(2, 4, 4, s, s, 64, dtype=DTYPES[dtype])
    mask = normal(s, s, dtype=torch.float32, seed=9)
    mask = (mask > 0) | torch.eye(s, dtype=torch.bool, device="cuda") if kind == "bool" else mask
    check(q, k, v, mask if kind == "bool" else mask.to(q.dtype))
