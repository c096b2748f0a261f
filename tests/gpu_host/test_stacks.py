"""Merging of parts in one array, some elements apart: how wide their rows are read."""

import numpy as np
import pytest

import gpu_host
from gpu_host.test_merging import DTYPES, Stack, aligned, check, plan, run, states

pytestmark = gpu_host.marks


def stacked(kind, n, apart):
    """Parts of float32 that lie `apart` elements more than their size from each other."""
    shape, rng = (1, 2, 3, 32), np.random.default_rng(n)
    size = int(np.prod(shape))
    raw = aligned((n * (size + apart),), np.float32)
    outs = [raw[i * (size + apart) :][:size].reshape(shape) for i in range(n)]
    lses = aligned((n, *shape[:3]), np.float32)
    for out, lse, x, y in zip(outs, lses, *states(n, shape, np.float32, rng), strict=True):
        out[:], lse[:] = x, y
    out, lse = aligned(shape, DTYPES[kind][0]), aligned(shape[:3], np.float32)
    return outs, lses, out, lse, Stack(DTYPES["fp32"][1], size + apart, lses[0].size)


@pytest.mark.parametrize("kind", ["bf16", "fp32"])
@pytest.mark.parametrize("n", [2, 5, 20])
@pytest.mark.parametrize(("apart", "width"), [(0, 16), (4, 16), (2, 8), (1, 4), (3, 4)])
def test_every_part_lies_aligned(merging, apart, width, n, kind):
    outs, lses, out, lse, stack = stacked(kind, n, apart)
    assert plan(merging, outs[:1], lses[:1], out, lse, stack, n)["width"] == width
    run(merging, outs[:1], lses[:1], out, lse, stack, n=n)
    check(outs, list(lses), out, lse)
