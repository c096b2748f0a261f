"""fastattn.bench.serving: its cases, its inputs, and what it calls right; no time is taken."""

import functools

import pytest
from fastattn.bench import serving

torch = pytest.importorskip("torch")
SMALL = [
    serving.Case(2, 4, 2, 100, d=16),
    serving.Case(2, 4, 2, 100, sq=3, d=16),
    serving.Case(2, 4, 2, 100, d=16, page=8),
    serving.Case(3, 4, 1, 300, d=16, page=1, ragged=True),
    serving.Case(2, 4, 2, 90, d=16, invariant=True),
    serving.Case(2, 4, 2, 90, d=16, page=8, append=True),
    serving.Case(2, 4, 2, 90, d=16, mass=True),
]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    for name in ("empty", "zeros", "randperm"):
        there = getattr(torch, name)
        here = functools.partial(lambda f, *a, device=None, **k: f(*a, **k), there)
        monkeypatch.setattr(torch, name, here)
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device: generator())
    monkeypatch.setattr(torch.Tensor, "cuda", lambda x: x)


def test_labels_differ():
    labels = [case.label for cases in serving.CASES.values() for case in cases]
    assert len(labels) == len(set(labels))


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.label)
def test_what_is_right_and_what_is_not(case):
    inputs = serving.make(torch, case, 0)
    out = serving.ours(torch, case)(*inputs)
    assert serving.error(torch, case, inputs, out) < 1e-2
    assert serving.error(torch, case, inputs, out + 0.1) > 2e-2
    out[0, 0, 0, 0] = torch.nan
    assert serving.error(torch, case, inputs, out) == float("inf")
    assert case.bytes == 2 * 2 * case.lengths.sum() * case.hk * case.d
    if case.ragged:
        assert len({*case.lengths.tolist()}) > 1


def test_the_table():
    done = {"label": "b1", "us": {"fastattn": 2.0, "cudnn": 3.0}, "eager": {"fastattn": 2.5}}
    done |= {"share": 0.5, "errors": {"fastattn": 1e-3}, "host": 6.54}
    refused = {"label": "b2", "us": {}}
    assert [*serving.lines([done, refused])][1:] == [
        ["b1", "2.0", "2.5", "6.5", "0.500", "1.50", "-", "1.0e-03"],
        ["b2", *["-"] * 7],
    ]


def test_what_loses():
    rows = [
        {"label": "even", "us": {"fastattn": 2.0, "cudnn": 2.001}},
        {"label": "lost", "us": {"fastattn": 2.0, "cudnn": 3.0, "fa3": 1.5}},
        {"label": "alone", "us": {"fastattn": 2.0}},
        {"label": "refused", "us": {"cudnn": 2.0}},
        {"label": "worse", "us": {"fastattn": 4.0, "cudnn": 1.0}},
    ]
    assert serving.losing(rows) == [(0.25, "worse"), (0.75, "lost")]
