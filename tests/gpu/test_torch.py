"""torch's habits on a GPU: autocast, the memory order of the drop-in's output, what is refused."""

import fastattn
import pytest
import test_autocast
import test_memory_order

import gpu
from gpu import DTYPES, torch

pytestmark = gpu.marks

sdpa = torch.nn.functional.scaled_dot_product_attention


@pytest.mark.parametrize("mask", [None, "bool", "fp32", "fp16"])
@pytest.mark.parametrize(
    "kinds",
    [
        ("fp32", "fp32", "fp32"),
        ("fp32", "fp32", "bf16"),
        ("fp32", "bf16", "fp16"),
        ("fp16", "fp16", "fp16"),
        ("bf16", "bf16", "bf16"),
    ],
    ids="-".join,
)
@pytest.mark.parametrize("low", DTYPES)
def test_autocast_as_torch(low, kinds, mask):
    test_autocast.check_as_torch("cuda", "cuda", DTYPES[low], kinds, mask)


@pytest.mark.parametrize("low", DTYPES)
def test_autocast_of_attention_and_varlen(low):
    test_autocast.check_attention("cuda", DTYPES[low])


@pytest.mark.parametrize(("device", "region"), [("cuda", "cpu"), ("cpu", "cuda")])
@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_autocast_of_another_device(device, region, kind):
    other = torch.float16 if kind == "bf16" else torch.bfloat16
    test_autocast.check_as_torch(device, region, other, (kind,) * 3, None)


def test_autocast_leaves_float64_alone():
    q, k, v = test_autocast.qkv("fp64", "fp64", "fp64", device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = fastattn.attention(q, k, v)
    assert out.dtype == torch.float64 and torch.equal(out, fastattn.attention(q, k, v))


def test_float32_is_served_and_cast_under_autocast():
    q, k, v = gpu.inputs(1, 2, 2, 9, 9, 64, dtype=torch.float32)
    out, lse = fastattn.attention(q, k, v, return_lse=True)
    assert gpu.complaints(out, lse, q, k, v) == []
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = fastattn.scaled_dot_product_attention(q, k, v)
    assert torch.equal(out, fastattn.attention(*(x.bfloat16() for x in (q, k, v))))


def test_autocast_is_captured_in_a_graph():
    """The casts are torch's own operators on the caller's stream: a replay casts anew."""
    q, k, v = gpu.inputs(1, 2, 2, 33, 33, 64, dtype=torch.float32)

    def attend():
        with torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False):
            return fastattn.scaled_dot_product_attention(q, k, v)

    attend()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    q.mul_(-2)
    graph.replay()
    assert torch.equal(out, fastattn.attention(*(x.bfloat16() for x in (q, k, v))))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [64, 72, 128])
def test_memory_order_as_torch(d, dtype):
    test_memory_order.check_as_torch("cuda", DTYPES[dtype], 64, d)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [64, 128])
def test_packed_qkv(d, dtype):
    test_memory_order.check_packed("cuda", DTYPES[dtype], d)


@pytest.mark.parametrize("d", [40, 64])
def test_memory_order_of_every_rank(d):
    test_memory_order.check_ranks("cuda", torch.bfloat16, d)


def test_memory_order_of_a_large_call():
    """Rows of the row kernels and of the copy engine: the bits of a contiguous call."""
    qkv = gpu.normal(2, 1000, 3, 8, 128)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    out = fastattn.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert out.transpose(1, 2).view(2, 1000, 1024).is_contiguous()
    plain = fastattn.attention(q, k, v, causal="top-left")
    assert gpu.complaints(out.contiguous(), None, q, k, v, most=4, causal="top-left") == []
    assert (out.float() - plain.float()).abs().max() < 0.02


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_traced_is_called_again():
    q, k, v = gpu.inputs(1, 2, 2, 9, 9, 64)
    traced = torch.jit.trace(
        lambda q, k, v: fastattn.scaled_dot_product_attention(q, k, v), (q, k, v)
    )
    assert torch.equal(traced(k, v, q), fastattn.scaled_dot_product_attention(k, v, q))
    with torch.device("cuda"):  # a default device is a mode, which may only look on
        assert fastattn.scaled_dot_product_attention(q, k, v).shape == q.shape
