"""What of caches a GPU does not serve yet: refused with the reason, and nothing is written;
test_decode.py has what it serves."""

import fastattn
import pytest

import gpu
from gpu import torch

pytestmark = gpu.marks


def test_the_operator_writes_no_new_keys():
    q = torch.ones(2, 1, 4, 64, dtype=torch.bfloat16, device="cuda")
    cache, new = torch.zeros(2, 2, 16, 2, 64, dtype=q.dtype, device="cuda"), q[:, :, :2]
    lengths = torch.tensor([3, 5], dtype=torch.int32, device="cuda")

    def step(q, k_cache, v_cache):
        return fastattn.attention_kvcache(q, k_cache, v_cache, lengths, k=new, v=new)

    with pytest.raises(NotImplementedError, match="sm90: it takes no new keys"):
        torch.compile(step, backend="aot_eager", fullgraph=True)(q, *cache)
    assert not cache.any()


def test_kernels_read_no_pages_of_packed_sequences():
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
