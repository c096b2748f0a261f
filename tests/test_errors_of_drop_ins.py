"""Bad input under other libraries' names: errors name the arguments as those libraries do."""

import pytest

torch = pytest.importorskip("torch")

import fastattn.xformers as xops  # noqa: E402
from fastattn import flash_attn, flash_attn_interface  # noqa: E402
from fastattn.flash_attn import bert_padding  # noqa: E402

Q, K = torch.randn(2, 5, 4, 8), torch.randn(2, 7, 2, 8)
ENDS = torch.tensor([0, 3, 8], dtype=torch.int32)
PACKED = torch.randn(8, 3, 4, 8)

OPTIONS = {  # of FlashAttention 2 and 3
    "softmax_scale": ["x", float("nan"), [1.0]],
    "window_size": [None, 3, (3,), (1, 2, 3), "ab", (2.5, 0), (None, 1)],
    "softcap": [None, "x", float("inf")],
    "s_aux": [[0.0] * 4, torch.zeros(3), Q.numpy()],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [(n, x) for n, values in OPTIONS.items() for x in values],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_options_of_flash_attention(name, value):
    for module in (flash_attn, flash_attn_interface):
        with pytest.raises((TypeError, ValueError), match=f"^`{name}` must "):
            module.flash_attn_func(Q, K, K, **{name: value})
        rows = (Q.flatten(0, 1)[:8],) * 3
        with pytest.raises((TypeError, ValueError), match=f"^`{name}` must "):
            module.flash_attn_varlen_func(*rows, ENDS, ENDS, 5, 5, **{name: value})


def test_packed_arrays_of_flash_attention():
    for name, call in {
        "kv": lambda x: flash_attn.flash_attn_kvpacked_func(Q, x),
        "qkv": lambda x: flash_attn.flash_attn_varlen_qkvpacked_func(x, ENDS, 5),
    }.items():
        for wrong in (PACKED.numpy(), [Q, Q]):
            with pytest.raises(TypeError, match=f"^`{name}` must be a tensor, got "):
                call(wrong)


def test_padding():
    states, mask = torch.randn(2, 3, 4), torch.ones(2, 3, dtype=torch.int64)
    unpad, concatenated = (
        bert_padding.unpad_input,
        bert_padding.unpad_input_for_concatenated_sequences,
    )
    for wrong in (mask[:1], mask[:, :2], torch.ones(2, 4), mask[0]):
        with pytest.raises(ValueError, match=r"^`attention_mask` must be \(2, 3\) like"):
            unpad(states, wrong)
        with pytest.raises(ValueError, match=r"^`unused_mask` must be \(2, 3\) like"):
            unpad(states, mask, wrong)
        with pytest.raises(ValueError, match=r"^`attention_mask_in_length` must be \(2, 3\) like"):
            concatenated(states, wrong)
    with pytest.raises(
        ValueError, match=r"^`indices` must be \(2,\) like `hidden_states`, got \(6"
    ):
        bert_padding.pad_input(states[0, :2], torch.arange(6), 2, 3)


def blocks(*lengths):
    return xops.BlockDiagonalMask.from_seqlens(*lengths)


def padded(*arguments):
    return xops.attn_bias.BlockDiagonalPaddedKeysMask.from_seqlens(*arguments)


BIASES = {  # how an error starts: what raises it
    "`q_seqlen` must be of ints": [
        lambda: blocks(None),
        lambda: blocks([2.5]),
        lambda: blocks("a"),
    ],
    "`q_seqlen` must be at least 0, got -1": [
        lambda: blocks([-1, 6]),
        lambda: padded([-1], 3, [1]),
    ],
    "`kv_seqlen` must be of ints": [
        lambda: blocks([2, 3], [2, 3.5]),
        lambda: padded([2, 3], 3, None),
        lambda: xops.attn_bias.BlockDiagonalGappyKeysMask.from_seqlens([2], [0, 3], ["a"]),
    ],
    "`kv_padding` must be of ints": [lambda: padded([2], "a", [1])],
    "`kv_seqstarts` must be of ints": [
        lambda: xops.attn_bias.BlockDiagonalGappyKeysMask.from_seqlens([2], [0, None], [1])
    ],
    "`window_size` must be of ints": [
        lambda: xops.attn_bias.LowerTriangularFromBottomRightLocalAttentionMask("a"),
        lambda: blocks([2]).make_local_attention(2.5),
    ],
    "`window_left` must be of ints": [
        lambda: xops.attn_bias.LocalAttentionFromBottomRightMask(None, 1)
    ],
    "`bias` must be a tensor": [lambda: xops.LowerTriangularMaskWithTensorBias(None)],
}


@pytest.mark.parametrize("said", BIASES)
def test_biases_of_xformers(said):
    for make in BIASES[said]:
        with pytest.raises((TypeError, ValueError), match=f"^{said}"):
            make()


CALLS = {
    "query": {"query": [Q]},
    "key": {"key": K[..., :7]},
    "value": {"value": K[:, :6]},
    "attn_bias": {"attn_bias": torch.zeros(2, 4, 5, 6)},
    "p": {"p": 2.0},
    "scale": {"scale": "x"},
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_of_xformers(name):
    given = {"query": Q, "key": K, "value": K} | CALLS[name]
    with pytest.raises((TypeError, ValueError), match=f"^`{name}` must ") as caught:
        xops.memory_efficient_attention(**given)
    assert not {"`q`", "`k`", "`v`", "`k`'s"} & set(str(caught.value).replace(",", "").split())


def test_gradients_of_xformers_have_the_outputs_shape():
    """One that has as many numbers in another order is not taken for it."""
    q = torch.randn(2, 5, 4, 8)
    out, lse = xops.memory_efficient_attention_forward_requires_grad(q, q, q)
    dout = torch.ones_like(out)
    for name, wrong in {
        "grad": (dout.transpose(1, 2), out),
        "output": (dout, out.transpose(0, 1)),
    }.items():
        with pytest.raises(ValueError, match=rf"^`{name}` must be \(2, 5, 4, 8\), got \("):
            xops.memory_efficient_attention_backward(*wrong, lse, q, q, q)


def test_transformers():
    pytest.importorskip("transformers")
    from fastattn.transformers import attend

    q = torch.randn(2, 4, 5, 8)
    for name, options in {
        "attention_mask": {"attention_mask": torch.ones(2, 1, 5, 6, dtype=torch.bool)},
        "scaling": {"scaling": "x"},
        "dropout": {"dropout": 3.0},
        "key": {"key": q[..., :7]},
        "s_aux": {"s_aux": torch.zeros(3)},
    }.items():
        given = {"query": q, "key": q, "value": q, "attention_mask": None} | options
        with pytest.raises((TypeError, ValueError), match=f"^`{name}` must "):
            attend(None, **given)
