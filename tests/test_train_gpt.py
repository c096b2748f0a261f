"""benchmarks/train_gpt.py: a short run of it."""

import re

import pytest
from conftest import ROOT, python

pytest.importorskip("torch")
pytest.importorskip("matplotlib")


def test_losses_follow_torchs(tmp_path):
    few = ("--steps", 6, "--layers", 1, "--length", 96, "--plot", tmp_path / "losses.svg")
    said = python(ROOT / "benchmarks" / "train_gpt.py", *few)
    losses = re.findall(r"torch ([\d.]+), fastattn ([\d.]+)", said)
    assert len(losses) == 6 and float(losses[-1][0]) < float(losses[0][0]) - 0.5  # it learns
    assert all(abs(float(a) - float(b)) <= 1e-3 for a, b in losses)
    assert said.count("tokens/s, attention is") == 2 and "its attention predicts" in said
    assert (tmp_path / "losses.svg").read_text().startswith("<?xml")
