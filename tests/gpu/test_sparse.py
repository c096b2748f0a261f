"""attention_sparse on a GPU, against its definition."""

import fastattn
import numpy as np
import pytest
import reference_sparse
from cases import Torch
from sparse_cases import check_packed, random_call, run

import gpu
from gpu import torch

pytestmark = gpu.marks
SIZES = (3, 8, 40, 64, 100, 128, 256)


def there(x):
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16).cuda()
    return torch.from_numpy(np.ascontiguousarray(x)).cuda()


back = Torch("cuda").numpy


def size(call):
    """Numbers that the reference gathers for each of its arrays."""
    q, k, v, lists = call.arrays.values()
    columns = lists.shape[3] * call.keywords["k_block"] + k.shape[2]
    return q.shape[0] * k.shape[1] * q.shape[2] * columns * max(q.shape[3], v.shape[3])


def said(seed, dtype, sizes=SIZES):
    call = random_call(seed, dtype, sizes)
    if size(call) > 5e6:
        call = random_call(seed, dtype)
    q, k, v, lists = call.arrays.values()
    results = run(call, seed % 2 == 1, "sm90", there, back, deterministic=seed % 3 == 0)
    return reference_sparse.complaints(
        results, q, k, v, lists, dout=call.dout, dlse=call.dlse, **call.keywords
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("first", range(0, 120, 10))
def test_random_calls(first, dtype):
    wrong = {seed: x for seed in range(first, first + 10) if (x := said(seed, dtype))}
    assert not wrong


@pytest.mark.parametrize("seed", range(12))
def test_packed_sequences(seed):
    check_packed(seed, "bfloat16", "sm90", there, back)


@pytest.mark.parametrize(
    ("q_block", "k_block", "group", "d"),
    [(128, 128, 1, 128), (64, 64, 4, 64), (1, 64, 16, 128), (64, 1, 2, 128), (1, 1, 8, 256)],
)
def test_deterministic_gradients(q_block, k_block, group, d):
    """The same bits in every run, and nearly those of sums in any order."""
    sq, sk = (512, 4096) if q_block > 1 else (128, 4096)
    q, k, v = gpu.inputs(2, 2 * group, 2, sq, sk, d)
    shape = (2, 2, sq // q_block, sk // k_block)
    lists = torch.rand(shape, device="cuda").argsort(-1)[..., : max(8, 1024 // k_block)].int()
    gate = torch.rand(1, 2, *lists.shape[2:], device="cuda")
    options = {"q_block": q_block, "k_block": k_block, "gate": gate, "backend": "sm90"}
    out, lse = fastattn.attention_sparse(q, k, v, lists, return_lse=True, **options)
    given = (out, q, k, v, out, lse, lists)

    def gradients(deterministic):
        return fastattn.attention_sparse_backward(
            *given, need_dgate=True, deterministic=deterministic, **options
        )[:4]

    first, free = gradients(True), gradients(False)
    for _ in range(20):
        for x, y in zip(gradients(True), first, strict=True):
            assert torch.equal(x, y)
    for x, y in zip(free, first, strict=True):
        torch.testing.assert_close(x.float(), y.float(), rtol=0.02, atol=1e-3)


def test_runs_in_a_graph():
    q, k, v = gpu.inputs(2, 8, 2, 128, 512, 128)
    lists = torch.arange(8, dtype=torch.int32, device="cuda").expand(2, 2, 2, 8)
    options = {"q_block": 64, "k_block": 64, "return_mass": True}
    want = fastattn.attention_sparse(q, k, v, lists, **options)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
        got = fastattn.attention_sparse(q, k, v, lists, **options)
    graph.replay()
    torch.cuda.synchronize()
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)
