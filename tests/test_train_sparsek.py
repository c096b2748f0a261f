"""benchmarks/train_sparsek.py: a short run of it."""

import re

import pytest
from conftest import ROOT, python

pytest.importorskip("torch")
pytest.importorskip("matplotlib")


def test_both_learn(tmp_path):
    few = ("--steps", 8, "--length", 96, "--keep", 8, "--window", 8)
    said = python(ROOT / "benchmarks" / "train_sparsek.py", *few, "--plot", tmp_path / "x.svg")
    losses = re.findall(r"dense ([\d.]+), SparseK ([\d.]+)", said)
    assert len(losses) == 8
    for first, last in zip(losses[0], losses[-1], strict=True):
        assert float(last) < float(first) - 0.3
    assert said.count("kept for the backward pass") == 2 and "6 times fewer" in said
    assert (tmp_path / "x.svg").read_text().startswith("<?xml")
