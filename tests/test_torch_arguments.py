"""Arguments as torch's users give them: what is taken, what is refused, and by which exception."""

import pickle

import fastattn
import numpy as np
import pytest

torch = pytest.importorskip("torch")
sdpa = torch.nn.functional.scaled_dot_product_attention
ours = fastattn.scaled_dot_product_attention


def qkv(**keywords):
    return [torch.randn(2, 4, 6, 8, **keywords) for _ in range(3)]


# ------------------------------------------------------------------------------- which exception


REFUSED = {
    "rank 1": (ValueError, lambda q, k, v: (q[0, 0, 0], k, v)),
    "mixed dtypes": (TypeError, lambda q, k, v: (q, k.double(), v)),
    "all dtypes integers": (TypeError, lambda q, k, v: (q.int(), k.int(), v.int())),
    "head sizes": (ValueError, lambda q, k, v: (q, k[..., :4], v)),
    "keys": (ValueError, lambda q, k, v: (q, k, v[:, :, :3])),
    "batches": (ValueError, lambda q, k, v: (q, torch.cat([k, k[:1]]), torch.cat([v, v[:1]]))),
    "heads": (ValueError, lambda q, k, v: (q, k[:, :2], v[:, :2])),
    "mask shape": (ValueError, lambda q, k, v: (q, k, v, torch.zeros(5, 5))),
    "mask rank": (ValueError, lambda q, k, v: (q, k, v, torch.zeros(1, 2, 4, 6, 6))),
    "mask dtype": (TypeError, lambda q, k, v: (q, k, v, torch.zeros(6, 6).double())),
    "integer mask": (TypeError, lambda q, k, v: (q, k, v, torch.zeros(6, 6).int())),
    "dropout": (ValueError, lambda q, k, v: (q, k, v, None, 1.5)),
    "mask and causal": (ValueError, lambda q, k, v: (q, k, v, torch.zeros(6, 6), 0.0, True)),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_the_drop_in_raises_runtime_errors_too(kind):
    """`except RuntimeError` around torch's attention goes on catching what it caught."""
    error, change = REFUSED[kind]
    arguments = change(*qkv())
    with pytest.raises(error, match="`") as raised:
        ours(*arguments)
    assert isinstance(raised.value, RuntimeError)
    copy = pickle.loads(pickle.dumps(raised.value))
    assert type(copy) is type(raised.value) and str(copy) == str(raised.value)
    if kind not in ("all dtypes integers", "keys", "mask and causal"):  # not in every torch
        with pytest.raises(RuntimeError):
            sdpa(*arguments)


def test_attention_keeps_its_own():
    q, k, v = qkv()
    with pytest.raises(ValueError) as raised:
        fastattn.attention(q, k[..., :4], v)
    assert type(raised.value) is ValueError
    with pytest.raises(TypeError) as raised:
        fastattn.attention(q, k.double(), v)
    assert type(raised.value) is TypeError


# ---------------------------------------------------------------------------- tensors as numbers


@pytest.mark.parametrize(
    "number",
    [
        torch.nn.Parameter(torch.tensor(0.3)),
        torch.tensor([0.3]),
        2 * torch.ones((), requires_grad=True),
    ],
    ids=["parameter", "vector", "result"],
)
def test_a_tensor_with_a_gradient_is_no_number(number):
    q, k, v = qkv()
    for name in ("scale", "softcap", "dropout_p"):
        with pytest.raises(TypeError, match=f"`{name}` must be a float, got a torch tensor that"):
            fastattn.attention(q, k, v, **{name: number})
    with pytest.raises(TypeError, match="`scale` must be a float, got a torch tensor"):
        ours(q, k, v, scale=number)
    with pytest.raises(TypeError):
        sdpa(q, k, v, scale=number)
    arrays = [x.numpy() for x in (q, k, v)]
    with pytest.raises(TypeError, match="`scale` must be a float, got a torch tensor"):
        fastattn.attention(*arrays, scale=number)


def test_other_numbers_are_numbers():
    q, k, v = qkv()
    want = fastattn.attention(q, k, v, scale=0.5)
    for number in (np.float32(0.5), np.float64(0.5), np.array(0.5), torch.tensor(0.5)):
        assert torch.equal(fastattn.attention(q, k, v, scale=number), want)
    torch.testing.assert_close(sdpa(q, k, v, scale=torch.tensor(0.5)), want)
    want = fastattn.attention(q, k, v, scale=1.0)
    for number in (1, np.int64(1), torch.tensor(1)):
        assert torch.equal(fastattn.attention(q, k, v, scale=number), want)


# ------------------------------------------------------------------------------------ CausalBias


@pytest.mark.parametrize(("sq", "sk"), [(6, 6), (6, 11), (11, 6), (1, 7)])
def test_causal_bias(sq, sk):
    from torch.nn.attention.bias import causal_lower_right, causal_upper_left

    q, k, v = (torch.randn(2, 4, s, 8) for s in (sq, sk, sk))
    for bias, causal in ((causal_upper_left, "top-left"), (causal_lower_right, True)):
        out = ours(q, k, v, bias(sq, sk))
        assert torch.equal(out, fastattn.attention(q, k, v, causal=causal))
        if sq <= sk:  # torch gives NaN to rows that see nothing
            torch.testing.assert_close(out, sdpa(q, k, v, bias(sq, sk)))
        said = fastattn.explain(ours, q, k, v, bias(sq, sk))
        assert said.backend == "cpu"


def test_causal_bias_that_does_not_fit():
    from torch.nn.attention.bias import causal_lower_right, causal_upper_left

    q, k, v = qkv()
    sentence = r"`attn_mask` must be the CausalBias of 6 queries and 6 keys, got one of 5 and 6"
    with pytest.raises(ValueError, match=sentence):
        ours(q, k, v, causal_lower_right(5, 6))
    with pytest.raises(ValueError, match="`attn_mask` must be None with is_causal=True"):
        ours(q, k, v, causal_upper_left(6, 6), is_causal=True)
    # Top-left does not depend on the sizes, and torch does not look at them.
    assert torch.equal(ours(q, k, v, causal_upper_left(9, 9)), ours(q, k, v, is_causal=True))
    for bias, instead in ((causal_lower_right, "True"), (causal_upper_left, '"top-left"')):
        with pytest.raises(TypeError, match=f"got a CausalBias: pass causal={instead}"):
            fastattn.attention(q, k, v, mask=bias(6, 6))


# --------------------------------------------------------------------- tensors that are not plain


class Mine(torch.Tensor):
    pass


def jagged(x):
    return torch.nested.nested_tensor([x[0, 0], x[0, 1]], layout=torch.jagged)


STRANGE = {
    "meta": (lambda x: x.to("meta"), "must have memory, got a meta tensor"),
    "sparse": (lambda x: x.to_sparse(), r"must be a strided tensor, .*sparse_coo: pass its to_de"),
    "sparse rows": (lambda x: x[0, 0].to_sparse_csr(), "must be a strided tensor, .*sparse_csr"),
    "mkldnn": (lambda x: x.to_mkldnn(), "must be a strided tensor, got torch._mkldnn"),
    "quantized": (
        lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        r"must not be quantized, got torch\.qint8: pass its dequantize\(\)",
    ),
    "nested": (lambda x: torch.nested.nested_tensor([x[0], x[1]]), "must not be nested: pass its"),
    "jagged": (jagged, r"must not be nested: pass its values\(\) and offsets\(\) to attention_v"),
    "subclass": (lambda x: x.as_subclass(Mine), r"must be a plain torch\.Tensor .* subclass Mine"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", STRANGE)
def test_what_is_not_plain_says_what_to_do(kind):
    make, sentence = STRANGE[kind]
    q, k, v = qkv()
    with pytest.raises(TypeError, match=f"^`query` {sentence}"):
        ours(make(q), k, v)
    with pytest.raises(TypeError, match=f"^`value` {sentence}"):
        ours(q, k, make(v))
    with pytest.raises(TypeError, match=f"^`mask` {sentence}"):
        fastattn.attention(q, k, v, mask=make(q))
    with pytest.raises(TypeError, match=f"^`out` {sentence}"):
        fastattn.attention(q, k, v, out=make(q))


def test_distributed_tensors():
    distributed = pytest.importorskip("torch.distributed")
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    try:
        whole = torch.randn(2, 4, 6, 8)
        x = distribute_tensor(whole, init_device_mesh("cpu", (1,)))
        with pytest.raises(TypeError, match=r"^`q` must be .*, got a DTensor: pass its to_local"):
            fastattn.attention(x, x, x)
        assert torch.equal(ours(*[x.to_local()] * 3), ours(whole, whole, whole))
    finally:
        distributed.destroy_process_group()


# ------------------------------------------------------------------------------------------- out=


def test_an_inference_tensor_is_written_in_inference_mode_only():
    q, k, v = qkv()
    with torch.inference_mode():
        out = torch.zeros(2, 4, 6, 8)
        assert fastattn.attention(q, k, v, out=out) is out
        written = out.clone()
        out.zero_()
    with pytest.raises(ValueError, match="`out` must not be an inference tensor outside of"):
        fastattn.attention(q, k, v, out=out)
    assert (out == 0).all()
    assert torch.equal(fastattn.attention(q, k, v, out=torch.zeros(2, 4, 6, 8)), written)
