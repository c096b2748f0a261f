"""fastattn.bench.llama: a model of a few rows on the CPU."""

import json

import pytest

torch = pytest.importorskip("torch")

from fastattn.bench import llama, llama_model  # noqa: E402
from fastattn.bench.arrays import TorchArrays  # noqa: E402

SMALL = llama.Config(2, 64, 4, 2, 96, 50, 2, 24)


def test_a_step_is_right_and_timed(monkeypatch):
    monkeypatch.setattr(llama, "ROUNDS", 2)
    monkeypatch.setattr(TorchArrays, "seconds", lambda *_: [_[1][0]() or 0.5])
    row = llama.measure(TorchArrays(), SMALL)
    assert row["right"] and 0 < row["errors"]["fastattn"] < 0.1
    assert row["ms"] == {"fastattn": 500.0, "sdpa": 500.0} and row["ratio"] == 1.0
    assert row["label"] == "2 layers of 64, h4:2 d16, b2 s24"
    assert [line[4] for line in llama.lines([row])] == ["x SDPA", "1.000"]


def test_the_model_is_a_language_model():
    """It learns a sequence, by ours."""
    torch.manual_seed(0)
    model = llama_model.Llama(SMALL)
    words = torch.arange(24)[None] % 7
    optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-2), []
    for _ in range(12):
        with llama.WAYS["fastattn"]():
            loss = model(words)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]


def test_a_wrong_gradient_is_seen(monkeypatch):
    monkeypatch.setattr(llama, "ROUNDS", 1)
    monkeypatch.setattr(TorchArrays, "seconds", lambda *_: [0.5])
    gradients = llama.gradients

    def spoilt(model, words, way):
        found = gradients(model, words, way)
        return [1.2 * x for x in found] if way is llama.WAYS["fastattn"] else found

    monkeypatch.setattr(llama, "gradients", spoilt)
    assert not llama.measure(TorchArrays(), SMALL)["right"]


@pytest.mark.parametrize("right", [True, False])
def test_the_command(monkeypatch, tmp_path, capsys, right):
    values = {"fastattn": 1.0, "sdpa": 2.0}
    row = {"label": "a model", "suite": "llama", "ratio": 2.0, "right": right}
    row |= dict.fromkeys(("ms", "p10", "p90", "peak", "errors"), values)
    monkeypatch.setattr(llama, "gpu_usable", lambda: True)
    monkeypatch.setattr(llama, "arrays_for", lambda _: TorchArrays())
    monkeypatch.setattr(llama, "measure", lambda *_: row)
    monkeypatch.setattr(llama, "environment", lambda *_: {"commit": "abc"})
    file = tmp_path / "result.json"
    if right:
        llama.main(["--json", str(file)])
    else:
        with pytest.raises(SystemExit, match="further from float32"):
            llama.main(["--json", str(file)])
    assert json.loads(file.read_text())["rows"] == [row]
    assert "2.000" in capsys.readouterr().out
