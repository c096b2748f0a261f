"""attention_kvcache on a GPU: refused so far, with the reason, and nothing is written."""

import fastattn
import pytest

import gpu
from gpu import torch

pytestmark = gpu.marks


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_no_kernel_serves_it_yet(dtype):
    q = torch.ones(2, 1, 4, 64, dtype=getattr(torch, dtype), device="cuda")
    cache, new = torch.zeros(2, 2, 16, 2, 64, dtype=q.dtype, device="cuda"), q[:, :, :2]
    lengths = torch.tensor([3, 99], dtype=torch.int32, device="cuda")  # which the host cannot see
    with pytest.raises(NotImplementedError, match="sm90: it reads and writes no caches of keys"):
        fastattn.attention_kvcache(q, *cache, lengths, k=new, v=new)
    said = fastattn.explain(fastattn.attention_kvcache, q, *cache, lengths)
    assert said.backend is None and "no caches of keys" in said.reasons["sm90"]
    assert not cache.any()


def test_nor_does_its_operator():
    q = torch.ones(2, 1, 4, 64, dtype=torch.bfloat16, device="cuda")
    cache, new = torch.zeros(2, 2, 16, 2, 64, dtype=q.dtype, device="cuda"), q[:, :, :2]
    lengths = torch.tensor([3, 5], dtype=torch.int32, device="cuda")

    def step(q, k_cache, v_cache):
        return fastattn.attention_kvcache(q, k_cache, v_cache, lengths, k=new, v=new)

    with pytest.raises(NotImplementedError, match="sm90: it reads and writes no caches of keys"):
        torch.compile(step, backend="aot_eager", fullgraph=True)(q, *cache)
    assert not cache.any()


def test_nor_do_kernels_read_pages_of_packed_sequences():
    q = torch.ones(5, 4, 64, dtype=torch.bfloat16, device="cuda")
    cache = torch.zeros(2, 7, 16, 2, 64, dtype=q.dtype, device="cuda")
    ends, n = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([0, 2, 5], [9, 3]))
    table, out = torch.zeros(2, 1, dtype=torch.int32, device="cuda"), torch.zeros_like(q)
    for m in (n, n * 0):
        rest = {"page_table": table, "seqused_k": m, "out": out}
        for most in (9, 0):
            with pytest.raises(NotImplementedError, match="sm90: it takes no keys in pages"):
                fastattn.attention_varlen(q, *cache, ends, None, 3, most, **rest)
    assert not out.any()
