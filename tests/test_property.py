"""Random cases, whole: shapes, strides, dtypes, masks and every feature at once.

hypothesis draws and shrinks them here (2,000 in CI, the same ones each time); `python
tests/campaign.py --cases 100000` runs as many as wanted.
"""

from types import SimpleNamespace

import campaign
import cases
import conftest
import declared
import pytest
import random_cases
from conftest import EXAMPLES, LEVELS, ROOT, python

hypothesis = pytest.importorskip("hypothesis")
strategies = hypothesis.strategies


@strategies.composite
def any_case(draw):
    return random_cases.choose_case(
        lambda options: draw(strategies.sampled_from(options)), draw(strategies.integers(0, 2**31))
    )


def test_any_case_is_right():
    """By conftest's settings: torch's test modules load their own, of 10 examples."""
    tried = 0

    @hypothesis.settings(hypothesis.settings.get_profile("fastattn"))
    @hypothesis.given(case=any_case())
    def one(case):
        nonlocal tried
        complaints = cases.run(case, cases.NumPy())
        assert not complaints, f"python tests/campaign.py --case '{case!r}': {complaints}"
        tried += 1

    one()
    assert tried >= EXAMPLES


@pytest.mark.parametrize("level", LEVELS)
def test_every_vector_level(level, cpu_levels):
    """The campaign with the CPU backend held to one level of instructions."""
    if level not in cpu_levels:
        pytest.skip(f"this CPU has no {level}")
    first = 10**6 + 300 * LEVELS.index(level)  # not the same ones at each level
    command = (ROOT / "tests" / "campaign.py", "--cases", 300, "--seed", first)
    said = python(*command, FASTATTN_CPU_LEVEL=level)
    assert "300 cases, 0 wrong, 0 refused" in said


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(threads):
    """Not the campaign's one thread a process: the split of a call over threads is part of it."""
    command = (ROOT / "tests" / "campaign.py", "--cases", 150, "--seed", threads * 10**7)
    said = python(*command, "--jobs", 1, FASTATTN_NUM_THREADS=str(threads))
    assert "150 cases, 0 wrong, 0 refused" in said


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


def refuses(*args, **keywords):
    raise NotImplementedError("no kernel")


def test_a_refusal_is_wrong_unless_it_is_declared(monkeypatch):
    """For a test, and for the campaign; and so is a call that is served undeclared."""
    case = cases.Case(sq=3, sk=4, dtype="float16")
    assert cases.run(case, attention=refuses) == ["refused, though declared: no kernel"]
    with monkeypatch.context() as patch:
        patch.setattr(cases, "function", lambda case: refuses)
        found, _ = campaign.check_range(0, 20, "numpy", None)
        assert [seed for seed, _ in found] == list(range(20))
        assert all(said and said.startswith("refused, though declared") for _, said in found)
    monkeypatch.setattr(declared, "reason", lambda *args, **keywords: "not declared")
    assert cases.run(case) == ["served, though not declared"]
    assert campaign.check(case, cases.NumPy(), None) == "served, though not declared"
    with pytest.raises(cases.Refused, match="not declared"):
        cases.run(case, attention=refuses)


def test_redraws_of_float32_are_counted():
    """Every second result a little wrong is no luck, however right its other draw is."""
    before, cases.luck = cases.luck, cases.Luck()
    calls = []

    def broken(*args, **keywords):
        import fastattn

        out, lse = fastattn.attention(*args, **keywords)
        calls.append(out)
        if len(calls) % 3 == 1:
            out[0, 0, 0, 0] += 2e-6
        return out, lse

    try:
        for seed in range(20):
            case = cases.Case(sq=20, sk=30, d=64, dv=64, seed=seed)
            assert not cases.run(case, attention=broken)
        assert cases.luck.judged == 20 and cases.luck.redrawn > 3 and cases.luck.strained
        worker = SimpleNamespace(config=SimpleNamespace(workeroutput={}), exitstatus=0)
        conftest.pytest_sessionfinish(worker)
        cases.luck = cases.Luck()
        session = SimpleNamespace(config=SimpleNamespace(), exitstatus=0)
        conftest.pytest_sessionfinish(session)
        assert not worker.exitstatus and not session.exitstatus
        conftest.pytest_testnodedown(worker.config)
        conftest.pytest_sessionfinish(session)
        assert session.exitstatus
    finally:
        cases.luck = before
    assert not cases.Luck(10_000, 25).strained and cases.Luck(10_000, 35).strained
