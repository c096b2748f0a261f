"""A weight far below 1, all of a row's output beside a sink, is as right as any other."""

import pytest
from conftest import LEVELS, python

PROGRAM = """
import fastattn
import numpy as np

scores = -np.arange(1, 80, 0.37)
q = scores[None, None, :, None].astype(np.float32)
one = np.ones((1, 1, 1, 1), np.float32)
out = fastattn.attention(q, one, one, scale=1.0, sink=np.zeros(1, np.float32))[0, 0, :, 0]
s = q[0, 0, :, 0].astype(float)
want = np.exp(s) / (1 + np.exp(s))
print(np.abs(out / want - 1).max())
"""


@pytest.mark.parametrize("level", LEVELS)
def test_relative_error(level, cpu_levels):
    if level not in cpu_levels:
        pytest.skip(f"this CPU has no {level}")
    assert float(python("-c", PROGRAM, FASTATTN_CPU_LEVEL=level)) <= 4e-7
