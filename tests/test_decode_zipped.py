"""Values of bfloat16 are zipped in pairs as they lie, or packed first: the same bits either way."""

import fastattn
import pytest

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("dv", [16, 48, 96])
@pytest.mark.parametrize("keys", [64, 201, 1500])
@pytest.mark.parametrize("start", [0, 3, 46])
def test_zipped_as_packed(keys, start, dv):
    """Values before the first key are NaN, so that its pair is half hidden where it is odd."""
    torch.manual_seed(keys)
    k, v = (torch.randn(2, 2, keys, n).bfloat16() for n in (32, dv))
    v[:, :, :start] = torch.nan
    starts = torch.tensor([start, 0]).int()
    v[1] = torch.randn(2, keys, dv)
    apart = torch.full((2, 2, keys, 2 * dv), torch.nan).bfloat16()
    apart[..., ::2] = v
    for rows in (1, 2, 5):
        q = torch.randn(2, 4, rows, 32).bfloat16()
        for more in ({}, {"window": (40, None)}):
            rest = {"k_start": starts, "causal": True, **more}
            out = fastattn.attention(q, k, v, **rest)
            assert out.isfinite().all()
            assert torch.equal(out, fastattn.attention(q, k, apart[..., ::2], **rest))
            wide = (x.float() for x in (q, k, v))
            want = fastattn.attention(*wide, **rest)
            assert (out.float() - want).abs().max() <= 2e-2 * v[1].float().abs().max()
