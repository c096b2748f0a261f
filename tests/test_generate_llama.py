"""benchmarks/generate_llama.py: a short run of it."""

import pytest
from conftest import ROOT, python

pytest.importorskip("torch")
pytest.importorskip("matplotlib")


def test_tokens_are_torchs(tmp_path):
    few = ("--steps", 20, "--layers", 2, "--prompts", "40,7", "--plot", tmp_path / "steps.svg")
    said = python(ROOT / "benchmarks" / "generate_llama.py", *few)
    assert said.startswith("40 of 40 tokens are the same")
    assert said.count("steps/s, attention is") == 2 and "its attention predicts" in said
    assert (tmp_path / "steps.svg").read_text().startswith("<?xml")
