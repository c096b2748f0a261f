"""Gradients where a dimension is 0: zeros, whatever the memory held that they are made in."""

import fastattn
import numpy as np
import pytest

SIZES = {"b": 2, "h": 2, "sq": 5, "sk": 6, "d": 8, "dv": 7}


def gradients(sizes, broadcast):
    """All five, and none but those of a size of 0 is 0."""
    b, h, sq, sk, d, dv = sizes.values()
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    q, k, v = normal(b, h, sq, d), normal(b, h, sk, d), normal(b, h, sk, dv)
    shape = [1 if once else n for n, once in zip((b, h, sq, sk), broadcast, strict=True)]
    arrays = {"mask": normal(*shape), "sink": normal(h)}
    out, lse = fastattn.attention(q, k, v, **arrays, return_lse=True)
    more = {"need_dmask": True, "need_dsink": True}
    return fastattn.attention_backward(normal(*out.shape), q, k, v, out, lse, **arrays, **more)


@pytest.mark.parametrize("broadcast", [(1, 1, 1, 1), (1, 1, 1, 0), (0, 1, 0, 1), (0, 0, 0, 0)])
@pytest.mark.parametrize("none", ["b", "h", "sq", "sk", "dv"])
def test_all_are_0(none, broadcast):
    for _ in range(3):
        assert all(x.any() for x in gradients(SIZES, broadcast))
        found = gradients(SIZES | {none: 0}, broadcast)
        assert not any(x.any() for x in found)
