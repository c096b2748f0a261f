"""Inside an autocast region of a device the functions cast as torch's own attention does."""

import fastattn
import pytest

torch = pytest.importorskip("torch")
sdpa = torch.nn.functional.scaled_dot_product_attention

LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}
KINDS = {**LOW, "fp32": torch.float32, "fp64": torch.float64}


def qkv(*kinds, device="cpu"):
    generator = torch.Generator().manual_seed(7)
    wide = [torch.randn(2, 4, s, 16, generator=generator) for s in (9, 12, 12)]
    return [x.to(device, KINDS[kind]) for x, kind in zip(wide, kinds, strict=True)]


def attempt(function, *arguments, **keywords):
    """The result, or None where torch's attention and ours refuse alike: a RuntimeError."""
    try:
        return function(*arguments, **keywords)
    except RuntimeError:
        return None


def check_as_torch(device, region, low, kinds, mask_kind):
    """The dtype that comes out, and the values, are those of tensors cast by hand."""
    q, k, v = qkv(*kinds, device=device)
    mask = None
    if mask_kind == "bool":
        mask = torch.ones(9, 12, dtype=torch.bool, device=device).tril()
    elif mask_kind is not None:
        mask = torch.linspace(-2, 2, 9 * 12, device=device).view(9, 12).to(KINDS[mask_kind])
    with torch.no_grad(), torch.autocast(region, dtype=low):
        want = attempt(sdpa, q, k, v, mask)
        got = attempt(fastattn.scaled_dot_product_attention, q, k, v, mask)
    assert (got is None) == (want is None)
    if got is None:
        return
    assert got.dtype == want.dtype

    def cast(x):
        cast_here = region == device and x is not None and x.is_floating_point()
        return x.to(low) if cast_here and x.dtype != torch.float64 else x

    by_hand = fastattn.scaled_dot_product_attention(*(cast(x) for x in (q, k, v, mask)))
    assert torch.equal(got, by_hand)


MIXED = [
    ("fp32", "fp32", "fp32"),
    ("fp32", "fp32", "bf16"),  # what rotary embeddings in float32 give
    ("fp32", "bf16", "fp16"),
    ("fp16", "fp16", "fp16"),
    ("bf16", "bf16", "bf16"),
    ("fp64", "fp64", "fp64"),
    ("fp64", "fp32", "fp32"),
]


@pytest.mark.parametrize("mask", [None, "bool", "fp32", "fp16", "fp64"])
@pytest.mark.parametrize("kinds", MIXED, ids="-".join)
@pytest.mark.parametrize("low", LOW)
def test_as_torch(low, kinds, mask):
    check_as_torch("cpu", "cpu", LOW[low], kinds, mask)


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
@pytest.mark.parametrize(
    "kinds", [("fp32", "fp32", "fp32"), ("fp32", "fp32", "bf16")], ids="-".join
)
def test_a_region_of_another_device(kinds):
    if torch.cuda.is_available():
        check_as_torch("cpu", "cuda", torch.bfloat16, kinds, None)
    else:  # torch then enables no region at all
        with torch.autocast("cuda", dtype=torch.bfloat16):
            check_as_torch("cpu", "cuda", torch.bfloat16, kinds, None)


def test_nested_regions():
    q, k, v = qkv("fp32", "fp32", "fp32")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            assert fastattn.attention(q, k, v).dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.float16):
            assert fastattn.attention(q, k, v).dtype == torch.float16
        assert fastattn.attention(q, k, v).dtype == torch.bfloat16
    assert fastattn.attention(q, k, v).dtype == torch.float32


def test_a_region_of_one_thread():
    from concurrent.futures import ThreadPoolExecutor

    q, k, v = qkv("fp32", "fp32", "fp32")
    with torch.autocast("cpu", dtype=torch.bfloat16), ThreadPoolExecutor(1) as other:
        assert other.submit(fastattn.attention, q, k, v).result().dtype == torch.float32


def check_attention(device, low):
    """attention, attention_varlen: sink, slopes and lse stay float32, `out` has the cast dtype."""
    q, k, v = qkv("fp32", "fp32", "bf16", device=device)
    cast = [x.to(low) for x in (q, k, v)]
    more = {
        "mask": torch.linspace(-2, 2, 12, device=device),
        "sink": torch.linspace(0, 1, 4, device=device) + 1e-5,
        "alibi_slopes": torch.linspace(0.1, 0.2, 4, device=device),
        "return_lse": True,
    }
    low_mask = {**more, "mask": more["mask"].to(low)}
    cu_q, cu_k = (torch.tensor([0, n], dtype=torch.int32, device=device) for n in (9, 12))
    packed = [x[0].transpose(0, 1) for x in (q, k, v)]
    low_packed = [x[0].transpose(0, 1) for x in cast]
    want = fastattn.attention(*cast, **low_mask)
    want_packed = fastattn.attention_varlen(*low_packed, cu_q, cu_k, 9, 12, **low_mask)
    out, wrong = torch.empty_like(cast[0]), torch.full_like(q, 7.0)
    with torch.autocast(device, dtype=low):
        got = fastattn.attention(q, k, v, **more)
        got_packed = fastattn.attention_varlen(*packed, cu_q, cu_k, 9, 12, **more)
        written, _ = fastattn.attention(q, k, v, out=out, **more)
        name = str(low).removeprefix("torch.")
        with pytest.raises(TypeError, match=f"`out` must be {name} like `q`, got float32"):
            fastattn.attention(q, k, v, out=wrong)
        assert fastattn.explain(fastattn.attention, q, k, v) == fastattn.explain(
            fastattn.attention, *cast
        )
    assert written is out and (wrong == 7).all()
    for (a, lse), (b, lse_b) in ((got, want), (got_packed, want_packed), ((out, got[1]), want)):
        assert a.dtype == low and lse.dtype == torch.float32
        assert torch.equal(a, b) and torch.equal(lse, lse_b)


@pytest.mark.parametrize("low", LOW)
def test_attention_and_varlen(low):
    check_attention("cpu", LOW[low])


def test_other_arrays_are_left_alone():
    import numpy as np

    x = np.ones((1, 1, 4, 8), np.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fastattn.attention(x, x, x).dtype == np.float32


def test_no_gradient_where_none_is_wanted():
    q, k, v = qkv("fp32", "fp32", "fp32")
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        out = fastattn.attention(torch.nn.Parameter(q), k, v)
    assert out.dtype == torch.bfloat16 and not out.requires_grad


def test_casts_are_let_go():
    """What the cast made is freed with the call, also where the call is refused."""
    import gc
    import weakref

    q, k, v = qkv("fp32", "fp32", "fp32")
    made = []
    from fastattn import _frameworks

    class Seen(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), keywords=None):
            result = function(*args, **(keywords or {}))
            if function is torch.Tensor.to:
                made.append(weakref.ref(result))
            return result

    assert _frameworks.autocast(q) is q
    with torch.autocast("cpu", dtype=torch.bfloat16), Seen():
        fastattn.attention(q, k, v)
        with pytest.raises(ValueError, match="`k` must have d"):
            fastattn.attention(q, k[..., :8], v)
    gc.collect()
    assert len(made) == 6 and not any(x() is not None for x in made)
