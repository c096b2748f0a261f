"""fastattn.xformers.attn_bias: the classes that divide rows into sequences, and what all can do."""

import numpy as np
import pytest
import reference

torch = pytest.importorskip("torch")
import shims  # noqa: E402
from fastattn.xformers import attn_bias as biases  # noqa: E402
from fastattn.xformers import memory_efficient_attention  # noqa: E402

Q, K = [3, 0, 6], [5, 2, 4]  # more queries than keys in the last; none in the second
STARTS = {"packed": [0, 5, 7, 11], "padded": [0, 6, 12, 18], "gappy": [1, 7, 9, 15]}


def plain(*, make=None, window=()):
    bias = biases.BlockDiagonalMask.from_seqlens(Q, K)
    return getattr(bias, make)(*window) if make else bias


def padded(kind, *window):
    if window:
        return getattr(biases, kind).from_seqlens_local(Q, 6, K, *window)
    return getattr(biases, kind).from_seqlens(Q, 6, K)


def gappy(kind, *window):
    if window:
        return getattr(biases, kind).from_seqlens_local_gappy(Q, STARTS["gappy"], K, *window)
    return getattr(biases, kind).from_seqlens(Q, STARTS["gappy"], K)


CAUSAL, TOP_LEFT, LOCAL = {"causal": True}, {"causal": "top-left"}, {"window": (2, 1)}
LAST = {"window": (2, None)}  # three keys
BLOCKS = {  # the class: an object, how its keys lie, and what rows of a block see
    "BlockDiagonalMask": (plain(), "packed", {}),
    "BlockDiagonalCausalMask": (plain(make="make_causal"), "packed", TOP_LEFT),
    "BlockDiagonalCausalFromBottomRightMask": (
        plain(make="make_causal_from_bottomright"),
        "packed",
        CAUSAL,
    ),
    "BlockDiagonalCausalLocalAttentionMask": (
        plain(make="make_local_attention", window=(3,)),
        "packed",
        TOP_LEFT | LAST,
    ),
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask": (
        plain(make="make_local_attention_from_bottomright", window=(3,)),
        "packed",
        CAUSAL | LAST,
    ),
    "BlockDiagonalPaddedKeysMask": (padded("BlockDiagonalPaddedKeysMask"), "padded", {}),
    "BlockDiagonalCausalWithOffsetPaddedKeysMask": (
        padded("BlockDiagonalCausalWithOffsetPaddedKeysMask"),
        "padded",
        CAUSAL,
    ),
    "BlockDiagonalLocalAttentionPaddedKeysMask": (
        padded("BlockDiagonalLocalAttentionPaddedKeysMask", 2, 1),
        "padded",
        LOCAL,
    ),
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask": (
        padded("BlockDiagonalCausalLocalAttentionPaddedKeysMask", 3),
        "padded",
        CAUSAL | LAST,
    ),
    "BlockDiagonalGappyKeysMask": (gappy("BlockDiagonalGappyKeysMask"), "gappy", {}),
    "BlockDiagonalCausalWithOffsetGappyKeysMask": (
        gappy("BlockDiagonalCausalWithOffsetGappyKeysMask"),
        "gappy",
        CAUSAL,
    ),
    "BlockDiagonalLocalAttentionFromBottomRightGappyKeysMask": (
        gappy("BlockDiagonalLocalAttentionFromBottomRightGappyKeysMask", 2, 1),
        "gappy",
        LOCAL,
    ),
}


def blocks(kind):
    """Each sequence's rows of q and of k."""
    q = np.append(0, np.cumsum(Q)).tolist()
    keys = zip(STARTS[kind], K, strict=False)
    return [(q[n : n + 2], (at, at + length)) for n, (at, length) in enumerate(keys)]


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name):
    bias, kind, keywords = BLOCKS[name]
    assert type(bias).__name__ == name
    total = STARTS[kind][-1]
    tensors = shims.leaves((1, 9, 4, 3), (1, total, 4, 3), (1, total, 4, 5))
    with torch.no_grad():  # what nobody sees reaches nothing
        for at in set(range(total)) - {n for _, k in blocks(kind) for n in range(*k)}:
            tensors[1][:, at] = tensors[2][:, at] = torch.nan
    out = memory_efficient_attention(*tensors, bias)
    dout = torch.randn_like(out)
    found = [x[0] for x in torch.autograd.grad(out, tensors, dout)]
    alone = [x[0] for x in tensors]
    shims.judge_blocks(out[0], None, alone, dout[0], found, blocks(kind), lambda n: keywords)


@pytest.mark.parametrize("name", BLOCKS)
def test_groups_in_blocks(name):
    bias, kind, _ = BLOCKS[name]
    total = STARTS[kind][-1]
    q, k = shims.leaves((1, 9, 2, 3, 4), (1, total, 2, 1, 4))
    wide = k.expand(1, total, 2, 3, 4).flatten(2, 3)
    want = memory_efficient_attention(q.flatten(2, 3), wide, wide, bias)
    for keys in (k, k.expand(1, total, 2, 3, 4)):
        out = memory_efficient_attention(q, keys, keys, bias)
        torch.testing.assert_close(out, want.view_as(out))
    found = torch.autograd.grad(out.square().sum(), (q, k))
    for x, y in zip(found, torch.autograd.grad(want.square().sum(), (q, k)), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("name", BLOCKS)
def test_materialize_of_blocks(name):
    bias, kind, keywords = BLOCKS[name]
    shape = 9, STARTS[kind][-1]
    want = np.full(shape, -np.inf)
    for (q0, q1), (k0, k1) in blocks(kind):
        seen, _ = reference.interval(1, q1 - q0, k1 - k0, **keywords)
        want[q0:q1, k0:k1] = np.where(seen[0], 0, -np.inf)
    found = bias.materialize((2, 3, *shape), dtype=torch.float64)
    assert found.shape == (2, 3, *shape) and (found == torch.from_numpy(want)).all()
    with pytest.raises(ValueError, match=rf"`shape` must end with \(9, {shape[1]}\), got"):
        bias.materialize((9, 3))


WHOLE = {
    "LowerTriangularMask": ((), TOP_LEFT),
    "LowerTriangularFromBottomRightMask": ((), CAUSAL),
    "LowerTriangularFromBottomRightLocalAttentionMask": ((3,), CAUSAL | LAST),
    "LocalAttentionFromBottomRightMask": ((2, 1), LOCAL),
}


@pytest.mark.parametrize("sq, sk", [(4, 4), (3, 6), (6, 3)])
@pytest.mark.parametrize("name", WHOLE)
def test_materialize_of_whole_matrices(name, sq, sk):
    arguments, keywords = WHOLE[name]
    bias = getattr(biases, name)(*arguments)
    seen, _ = reference.interval(1, sq, sk, **keywords)
    found = bias.materialize((2, sq, sk))
    assert torch.equal(found.exp(), torch.from_numpy(seen).float().expand(2, sq, sk))
    assert bias.to("cpu").materialize((sq, sk), torch.bfloat16).dtype == torch.bfloat16


def test_a_mask_with_a_tensor():
    bias = torch.randn(3, 4, dtype=torch.float64)
    mask = biases.LowerTriangularMask(device="cpu").add_bias(bias)
    assert isinstance(mask, biases.LowerTriangularMaskWithTensorBias)
    want = biases.LowerTriangularMask().materialize((3, 4)) + bias
    assert torch.equal(mask.to("cpu").materialize((3, 4), torch.float64), want)


def test_tensors_are_packed_and_split():
    parts = [torch.randn(b, s, 2, 3) for b, s in ((1, 3), (2, 4), (1, 2))]
    bias, packed = biases.BlockDiagonalMask.from_tensor_list(parts)
    assert packed.shape == (1, 13, 2, 3) and bias.q_seqinfo.seqstart_py == [0, 3, 7, 11, 13]
    for kept in (bias, bias.make_causal(), bias.to("cpu"), bias.make_local_attention(2)):
        for x, y in zip(kept.split(packed), parts, strict=True):
            assert torch.equal(x, y)
    keys = [torch.randn(b, s, 2, 3) for b, s in ((1, 2), (2, 5), (1, 1))]
    bias, q, k, v = biases.BlockDiagonalCausalMask.from_tensor_lists_qkv(parts, keys, keys)
    assert type(bias) is biases.BlockDiagonalCausalMask and torch.equal(q, packed)
    assert torch.equal(k, v) and k.shape == (1, 13, 2, 3)
    for split, whole, want in ((bias.split_queries, q, parts), (bias.split_kv, k, keys)):
        assert all(torch.equal(x, y) for x, y in zip(split(whole), want, strict=True))
    with pytest.raises(ValueError, match="needs queries and keys of one division"):
        bias.split(q)
    with pytest.raises(ValueError, match=r"`tensor` must be \(1, 13, ...\), got \(1, 12, 2, 3\)"):
        bias.split_kv(k[:, :12])
    assert biases.BlockDiagonalMask.from_tensor_lists_qkv(parts, keys)[3] is None


def test_what_an_object_holds():
    """The fields of xFormers' objects, which programs read."""
    bias = biases.BlockDiagonalPaddedKeysMask.from_seqlens([3, 1], 6, [5, 2], device="cpu")
    keys = bias.k_seqinfo
    assert (keys.max_seqlen, keys.min_seqlen, keys.padding) == (5, 2, 6)
    assert (keys.seqstart_py, keys.seqlen_py) == ([0, 6, 12], [5, 2])
    for tensor, numbers in ((keys.seqstart, [0, 6, 12]), (keys.seqlen, [5, 2])):
        assert tensor.tolist() == numbers and tensor.dtype == torch.int32
    assert bias.q_seqinfo.seqstart.tolist() == [0, 3, 4] and bias.q_seqinfo.max_seqlen == 3
    local = bias.make_local_attention(2, 1)
    assert (local.window_left, local.window_right) == (2, 1) and local.k_seqinfo is keys
    moved = local.to("meta")
    assert moved.k_seqinfo.seqlen.device.type == "meta" and moved.window_left == 2
    assert biases.BlockDiagonalMask.from_seqlens([], []).q_seqinfo.seqstart.tolist() == [0]


def test_no_sequences_at_all():
    q = torch.randn(1, 0, 2, 4)
    out = memory_efficient_attention(q, q, q, biases.BlockDiagonalMask.from_seqlens([]))
    assert out.shape == (1, 0, 2, 4)


WRONG = {
    "window_left": lambda: biases.LocalAttentionFromBottomRightMask(-1, 2),
    "window_right": lambda: plain_padded().make_local_attention(1, -2),
    "window_size": lambda: plain().make_local_attention(0),
    "kv_seqlen": lambda: biases.BlockDiagonalMask.from_seqlens([2, 3], [1]),
    "kv_seqlen` must be at most": lambda: biases.BlockDiagonalPaddedKeysMask.from_seqlens(
        [2], 3, [4]
    ),
    "kv_seqstarts": lambda: biases.BlockDiagonalGappyKeysMask.from_seqlens([2], [0], [1]),
}


def plain_padded():
    return biases.BlockDiagonalPaddedKeysMask.from_seqlens([2], 6, [4])


@pytest.mark.parametrize("name", WRONG)
def test_wrong_numbers(name):
    with pytest.raises(ValueError, match=f"`{name}"):
        WRONG[name]()


def test_keys_in_pages_are_refused():
    table = torch.zeros(1, 2, dtype=torch.int32)
    calls = [
        lambda: biases.PagedBlockDiagonalPaddedKeysMask.from_seqlens([2], [4], table, 3),
        lambda: biases.PagedBlockDiagonalCausalLocalPaddedKeysMask.from_seqlens_local(
            [2], [4], table, 3, 2
        ),
        lambda: plain_padded().make_paged(table, 3, biases.PagedBlockDiagonalPaddedKeysMask),
        lambda: gappy("BlockDiagonalGappyKeysMask").make_paged(table, 3, 6, None),
    ]
    for call in calls:
        with pytest.raises(NotImplementedError, match="`attn_bias` of keys in pages is not served"):
            call()


def test_classes_are_related_as_in_xformers():
    assert issubclass(biases.BlockDiagonalCausalLocalAttentionMask, biases.BlockDiagonalCausalMask)
    assert issubclass(biases.LowerTriangularMaskWithTensorBias, biases.LowerTriangularMask)
    assert all(issubclass(getattr(biases, name), biases.AttentionBias) for name in biases.__all__)
    assert set(BLOCKS) | set(WHOLE) < set(biases.__all__)
