"""Random cases, whole: shapes, strides, dtypes, masks and every feature at once.

hypothesis draws and shrinks them here (2,000 in CI, the same ones each time); `python
tests/campaign.py --cases 100000` runs as many as wanted.
"""

import cases
import pytest
import random_cases
from conftest import LEVELS, ROOT, python

hypothesis = pytest.importorskip("hypothesis")
strategies = hypothesis.strategies


@strategies.composite
def any_case(draw):
    return random_cases.choose_case(
        lambda options: draw(strategies.sampled_from(options)), draw(strategies.integers(0, 2**31))
    )


@hypothesis.given(case=any_case())
def test_any_case_is_right(case):
    try:
        complaints = cases.run(case, cases.NumPy())
    except cases.Refused:
        hypothesis.assume(False)
    assert not complaints, f"python tests/campaign.py --case '{case!r}': {complaints}"


@pytest.mark.parametrize("level", LEVELS)
def test_every_vector_level(level, cpu_levels):
    """The campaign with the CPU backend held to one level of instructions."""
    if level not in cpu_levels:
        pytest.skip(f"this CPU has no {level}")
    command = (ROOT / "tests" / "campaign.py", "--cases", 600, "--seed", 10**6)
    said = python(*command, FASTATTN_CPU_LEVEL=level)
    assert "600 cases, 0 wrong, 0 refused" in said


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(threads):
    """Not the campaign's one thread a process: the split of a call over threads is part of it."""
    command = (ROOT / "tests" / "campaign.py", "--cases", 300, "--seed", 2 * 10**6)
    said = python(*command, "--jobs", 1, FASTATTN_NUM_THREADS=str(threads))
    assert "300 cases, 0 wrong, 0 refused" in said


def test_a_wrong_result_is_reported(monkeypatch, capsys):
    """The campaign itself: a backend that is off by one rounding in one element is caught."""
    case = cases.Case(sq=20, sk=30, d=64, dv=64, seed=3)

    def broken(*args, **keywords):
        import fastattn

        out, lse = fastattn.attention(*args, **keywords)
        out[0, 0, 7, 5] += 1e-4
        return out, lse

    assert cases.run(case, attention=broken)
    assert not cases.run(case)
    assert eval(repr(case), {"Case": cases.Case}) == case
