"""`out` between the elements of q, k and v, on a GPU: nothing else is written, nothing misread."""

import fastattn
import pytest
from conftest import gpu_present, needs

pytestmark = [pytest.mark.gpu, needs("torch")]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d", [40, 64, 72, 128, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_out_beside_q_k_and_v_in_one_buffer(dtype, d, causal):
    if not gpu_present():
        pytest.skip("no GPU that the sm90 backend serves")
    import torch

    b, s, h = 2, 777, 3
    buffer = torch.randn(b, s, 4, h, d, device="cuda").to(getattr(torch, dtype))
    before = buffer.clone()
    want = torch.empty_like(buffer)[:, :, 3]  # of the same strides, so by the same kernel
    fastattn.attention(*before.unbind(2)[:3], out=want, layout="bshd", causal=causal)
    q, k, v, out = buffer.unbind(2)
    assert fastattn.attention(q, k, v, out=out, layout="bshd", causal=causal) is out
    assert torch.equal(out, want)
    assert torch.equal(buffer[:, :, :3], before[:, :, :3])
    with pytest.raises(ValueError, match="`out` must not overlap `k`"):
        fastattn.attention(q, k, v, out=k, layout="bshd")


@pytest.mark.parametrize("dv", [24, 64, 128])
def test_out_in_the_columns_beside_v(dv):
    """Rows that v and out share: what is read past v's columns is being written."""
    if not gpu_present():
        pytest.skip("no GPU that the sm90 backend serves")
    import torch

    q, k = (torch.randn(1, 4, 513, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    rows = torch.randn(1, 4, 513, 2 * dv, device="cuda").to(torch.bfloat16)
    v, out = rows[..., :dv], rows[..., dv:]
    kept, want = rows.clone()[..., :dv], torch.empty_like(rows)[..., dv:]
    fastattn.attention(q, k, kept, out=want)
    for _ in range(5):
        out.fill_(float("nan"))
        fastattn.attention(q, k, v, out=out)
        assert torch.equal(out, want) and torch.equal(v, kept)
