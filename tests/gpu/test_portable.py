"""The portable backend, where Hopper's variants refuse, and forced. What every backend computes,
the cases of tests/ ask of it as well: their place "sm80-torch"."""

import itertools

import fastattn
import pytest
import reference

import gpu
from gpu import normal, torch

pytestmark = gpu.marks

DTYPES = {**gpu.DTYPES, "fp32": torch.float32, "fp64": torch.float64}


def check(q, k, v, backend="sm80", most=4, **keywords):
    """Of float32 one path's error is luck (reference.careful), and others are not asked here."""
    out, lse = fastattn.attention(q, k, v, return_lse=True, backend=backend, **keywords)
    said = gpu.complaints(out, lse, q, k, v, most=most, **keywords)
    lucky = q.dtype == torch.float32 and all(getattr(x, "may_be_luck", False) for x in said)
    assert not said or lucky, said


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "d, dv", [(64, 64), (65, 128), (200, 256), (257, 64), (96, 300), (512, 512)]
)
def test_head_sizes(d, dv, dtype):
    """Chosen where Hopper refuses, and then the same bits as forced."""
    for sq, sk, causal in ((130, 200, True), (1, 333, False), (300, 70, True)):
        q, k, v = gpu.inputs(2, 4, 2, sq, sk, d, dv, dtype=DTYPES[dtype])
        check(q, k, v, causal=causal)
        said = fastattn.explain(fastattn.attention, q, k, v, causal=causal)
        hopper = dtype in gpu.DTYPES and max(d, dv) <= 256
        assert said.backend == ("sm90" if hopper else "sm80")


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_changes_at_once(dtype):
    q, k, v = gpu.inputs(2, 4, 2, 200, 333, 80, dtype=DTYPES[dtype])
    slopes, sink = normal(4, dtype=torch.float32).abs(), normal(4, dtype=torch.float32)
    masks = normal(200, 333, dtype=torch.float32), normal(2, 1, 200, 333) > 0
    for mask, softcap in itertools.product(masks, (0.0, 5.0)):
        changes = {"mask": mask, "softcap": softcap, "alibi_slopes": slopes, "sink": sink}
        check(q, k, v, **changes, window=(90, 20))
        check(q, k, v, **changes, dropout_p=0.3, seed=5)


@pytest.mark.parametrize("d", [64, 128, 256, 512])
def test_equal_logits_of_float32(d):
    """Tensor cores truncate as they add: 16k products of one sign would show it."""
    q, k = torch.zeros(1, 1, 3, d, device="cuda"), torch.zeros(1, 1, 16384, d, device="cuda")
    v = normal(1, 1, 16384, d, dtype=torch.float32).abs()
    out, lse = fastattn.attention(q, k, v, return_lse=True, backend="sm80")
    assert not reference.check(*(gpu.numpy(x) for x in (out, lse, q, k, v)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_comes_through_where_it_is_seen(dtype):
    q, k, v = gpu.inputs(1, 2, 2, 70, 200, 64, dtype=DTYPES[dtype])
    v[..., 40, 3], v[..., 50, 4], v[..., 60, 5] = torch.inf, -torch.inf, torch.nan
    k[..., 199, :] = v[..., 199, :] = torch.nan
    out = fastattn.attention(
        q, k, v, k_lengths=torch.tensor([199], device="cuda", dtype=torch.int32), backend="sm80"
    )
    rest = [i for i in range(64) if i not in (3, 4, 5)]
    assert (out[..., 3] == torch.inf).all() and (out[..., 4] == -torch.inf).all()
    assert out[..., 5].isnan().all() and out[..., rest].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype):
    """Rows that begin anywhere, columns apart, heads repeated, into an output of each kind."""
    q, k, v = gpu.inputs(2, 4, 4, 130, 150, 71, dtype=DTYPES[dtype])
    want = fastattn.attention(q, k, v, backend="sm80")

    def apart(x, by):
        wide = torch.full((*x.shape[:3], x.shape[3] * by + 1), torch.nan, dtype=x.dtype)
        return wide.cuda()[..., 1::by][..., : x.shape[3]].copy_(x)

    for by in (1, 2):
        moved = [apart(x, by) for x in (q, k, v)]
        got = fastattn.attention(*moved, out=apart(want * 0, by), backend="sm80")
        assert torch.equal(got, want)
    one = [x[:, :1].expand_as(x) for x in (k, v)]
    same = [x[:, :1].repeat(1, 4, 1, 1) for x in (k, v)]
    got, want = (fastattn.attention(q, *x, backend="sm80") for x in (one, same))
    assert torch.equal(got, want)


def test_a_graph_replays_it():
    q, k, v = gpu.inputs(1, 2, 2, 100, 100, 64, dtype=torch.float32)
    mask = normal(100, 100) > 0
    out = torch.empty_like(q)
    fastattn.attention(q, k, v, mask=mask, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fastattn.attention(q, k, v, mask=mask, out=out)
    q.mul_(2)
    graph.replay()
    assert torch.equal(out, fastattn.attention(q, k, v, mask=mask))
