"""The largest outputs: the size in bytes is what has to fit 63 bits. Nothing is computed."""

import fastattn
import numpy as np
import pytest

ROWS = 2**30 - 1  # the most of a sequence


def large(dtype, rows, columns):
    """2^30 * rows * columns elements, all of them one."""
    one = np.zeros(1, dtype)
    return np.lib.stride_tricks.as_strided(one, (2**15, 2**15, rows, columns), (0, 0, 0, 0))


@pytest.mark.parametrize(("dtype", "dv"), [("float64", 1), ("float32", 2), ("float16", 4)])
def test_the_largest_output(dtype, dv):
    q, k = large(dtype, ROWS, 1), large(dtype, 1, 1)
    explained = fastattn.explain(fastattn.attention, q, k, large(dtype, 1, dv))
    assert explained.backend == "cpu"
    with pytest.raises(ValueError, match="is too large for an output"):
        fastattn.explain(fastattn.attention, q, k, large(dtype, 1, dv + 1))
