"""What is added to a score may be far larger than it: lse is as exact as float32 can say it."""

import cases
import numpy as np
import pytest
import reference
from random_cases import random_case


@pytest.mark.parametrize("seed", [20070762])
def test_alibi_beside_small_scores(seed):
    case = random_case(seed)
    assert case.alibi and case.softcap == 0.5 and case.window == (None, -198)
    assert not cases.run(case, cases.NumPy(), "cpu")


@pytest.mark.parametrize("times, wrong", [(1.9, False), (2.5, True)])
def test_lse_may_be_off_by_twice_what_float32_costs(times, wrong):
    exact = reference.Result(None, np.full((1, 1, 1), -136.78), 0.5, *np.zeros((2, 1, 1, 1), bool))
    low = reference.Result(None, exact.lse + 1.8e-5, 0.5, exact.empty, exact.seen)
    lse = (exact.lse + times * 1.8e-5).astype(np.float64)
    floats = np.float32(lse)
    assert abs(floats - lse).max() < 8e-6
    said = reference.judge_lse(floats, exact, low, np.float32)
    assert bool(said) == wrong
