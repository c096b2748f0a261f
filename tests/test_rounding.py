"""Outputs in 16 bits are the nearest ones, and of two as near the even one."""

import fastattn
import numpy as np
import pytest
from conftest import needs, python

ULPS = {"bfloat16": 2.0**-7, "float16": 2.0**-10}  # of 1
# In ulps above 1: the mean of the two is a tie, or next to one.
PAIRS = [(0, 1), (1, 2), (2, 3), (3, 4), (0, 3), (0, 2)]

ASK = """
import test_rounding
for name in test_rounding.ULPS:
    test_rounding.check(name)
"""


def check(name):
    """Two keys of equal weight, for more rows than a vector has lanes."""
    torch = pytest.importorskip("torch")
    dtype, ulp = getattr(torch, name), ULPS[name]
    q, k = torch.zeros(1, 1, 40, 8, dtype=dtype), torch.ones(1, 1, 2, 8, dtype=dtype)
    both = torch.tensor(PAIRS, dtype=torch.float64).T
    for sign in (1, -1):
        v = (sign * (1 + ulp * both)).to(dtype)[None, None]
        got = fastattn.attention(q, k, v.contiguous())[0, 0].double().numpy()
        # NumPy's rint rounds ties to even, too; 1 is an even number of ulps.
        want = sign * (1 + ulp * np.rint(both.numpy().mean(0)))
        assert (got == want).all(), (name, got[0], want)


@needs("torch")
@pytest.mark.parametrize("name", ULPS)
def test_ties_go_to_even(name):
    check(name)


@needs("torch")
def test_ties_go_to_even_at_every_level(cpu_levels):
    for level in cpu_levels:
        python("-c", ASK, FASTATTN_CPU_LEVEL=level)
