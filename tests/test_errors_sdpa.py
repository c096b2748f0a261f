"""What the drop-in refuses is what torch refuses, each by its sentence."""

import fastattn
import numpy as np
import pytest
from conftest import needs
from test_errors import a

SDPA_WRONG = {
    "rank": (
        ValueError,
        "`query` must have at least 2 dimensions, got 1",
        ((8,), (7, 8), (7, 8)),
        {},
    ),
    "mask and causal": (
        ValueError,
        "`attn_mask` must be None with is_causal=True, got both",
        None,
        {"attn_mask": a(5, 7), "is_causal": True},
    ),
    "mask dtype": (
        TypeError,
        "`attn_mask` must be bool, float32 or of `query`'s dtype, got float16",
        None,
        {"attn_mask": a(5, 7, dtype=np.float16)},
    ),
    "mask shape": (
        ValueError,
        r"`attn_mask` must broadcast to \(2, 4, 5, 7\), got \(7, 5\)",
        None,
        {"attn_mask": a(7, 5)},
    ),
    "head size": (
        ValueError,
        "`key` must have d = 8 like `query`, got 9",
        ((5, 8), (7, 9), (7, 8)),
        {},
    ),
    "lengths": (
        ValueError,
        "`value` must have sk = 7 like `key`, got 6",
        ((5, 8), (7, 8), (6, 8)),
        {},
    ),
    "heads without enable_gqa": (
        ValueError,
        "`key` must have hk = 4 like `query` or 1 without enable_gqa, got 2",
        ((1, 4, 5, 8), (1, 2, 7, 8), (1, 2, 7, 8)),
        {},
    ),
    "head ratio": (
        ValueError,
        "`query` must have a number of heads that is a multiple of `key`'s 3, got 4",
        ((1, 4, 5, 8), (1, 3, 7, 8), (1, 3, 7, 8)),
        {"enable_gqa": True},
    ),
    "leading dimensions": (
        ValueError,
        "`query`, `key` and `value` must have leading dimensions that broadcast, got 2, 3 and 3",
        ((2, 4, 5, 8), (3, 4, 7, 8), (3, 4, 7, 8)),
        {},
    ),
    "dtype": (
        TypeError,
        "`key` must be float32 like `query`, got float16",
        (a(5, 8), a(7, 8, dtype=np.float16), a(7, 8)),
        {},
    ),
    "dropout of NumPy arrays": (ValueError, r"attention\(seed=\)", None, {"dropout_p": 0.1}),
    "dropout range": (
        ValueError,
        "`dropout_p` must be from 0 to 1, got -0.1",
        None,
        {"dropout_p": -0.1},
    ),
    "9 dimensions": (
        ValueError,
        "`query` must have at most 8 dimensions, got 9",
        ((1,) * 7 + (5, 8), (7, 8), (7, 8)),
        {},
    ),
}


@pytest.mark.parametrize("what", SDPA_WRONG)
def test_sdpa_sentence(what):
    exception, sentence, arrays, keywords = SDPA_WRONG[what]
    arrays = arrays or ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8))
    arrays = [a(*x) if isinstance(x, tuple) else x for x in arrays]
    with pytest.raises(exception, match=sentence):
        fastattn.scaled_dot_product_attention(*arrays, **keywords)


@needs("torch")
def test_sdpa_refuses_what_torch_refuses():
    """Wherever torch raises for a shape, so do we; where it computes, so do we."""
    import torch

    theirs = torch.nn.functional.scaled_dot_product_attention
    rng = np.random.default_rng(0)
    agreed = 0
    for _ in range(1500):
        rank = rng.integers(2, 6)
        shapes = []
        for tail in ((3, 4), (2, 4), (2, 4)):
            lead = rng.choice([1, 2, 3], max(rank - 2 - rng.integers(0, 2), 0), p=[0.4, 0.5, 0.1])
            tail = [n + (rng.random() < 0.03) for n in tail]
            shapes.append((*(int(n) for n in lead), *(int(n) for n in tail)))
        tensors = [torch.ones(shape, dtype=torch.float64) for shape in shapes]
        try:
            want = tuple(theirs(*tensors).shape)
        except RuntimeError:
            want = None
        if shapes[1][-2] != shapes[2][-2]:
            want = None  # more keys than values: from 2.14.1 on torch computes something for some
        try:
            got = tuple(fastattn.scaled_dot_product_attention(*tensors).shape)
        except ValueError:
            got = None
        assert got == want, shapes
        agreed += want is not None
    assert agreed > 200
