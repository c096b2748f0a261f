"""fastattn.bench.training: its cells, how each part is measured, and what is said of the rows."""

import json

import fastattn
import pytest
from fastattn.bench import cpu, training

torch = pytest.importorskip("torch")
CELL = ("fp32 b1 h2 s40 d16 causal", "fp32", 2, 40, 16, True, "step")
HALF = ("bf16 b1 h2 s600 d8 full", "bf16", 2, 600, 8, False, "step")
THREADS = ("fp32 b1 h1 s70 d16 threads", "fp32", 1, 70, 16, False, "threads")
MEMORY = ("fp32 b1 h2 s900 d64 memory", "fp32", 2, 900, 64, False, "memory")


@pytest.fixture(autouse=True)
def threads():
    """Both sides' as they were, afterwards."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    fastattn.set_num_threads(None)


def test_cells():
    cells = list(training.cells())
    assert len({cell[0] for cell in cells}) == len(cells)
    for dtype, count in (("fp32", 12), ("bf16", 8), ("fp16", 8)):
        assert sum(cell[1] == dtype and cell[-1] == "step" for cell in cells) == count
    for label, dtype, h, s, d, causal, part in cells:
        last = part if part != "step" else "causal" if causal else "full"
        assert label == f"{dtype} b1 h{h} s{s} d{d} {last}"
        assert part in training.MEASURES


@pytest.mark.parametrize("causal", [False, True])
def test_what_is_exact_is_what_autograd_finds(causal):
    """Over more rows than are taken at a time."""
    tensors = training.inputs(torch, "fp32", 2, 1030, 8)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    found = training.exact(torch, tensors, causal)
    for x, y in zip(found, training.step_of(torch, "torch", wide, causal)(), strict=True):
        assert (x - y[0, -1]).abs().max() < 1e-12


@pytest.mark.parametrize("cell", [CELL, HALF], ids=lambda cell: cell[0])
def test_a_step_is_checked_and_timed(cell, monkeypatch):
    row = training.measure_step(torch, cell, 0) | {"matrix_rate": 100.0}
    assert row["cell"] == cell[0] and row["right"] and row["suite"] == training.SUITE
    assert row["alone"]["x"] == pytest.approx(row["alone"]["torch_ms"] / row["alone"]["ms"])
    assert ("alternating" in row) == ("x_fp32" not in row["alone"]) == (cell is CELL)
    found = training.columns(row)
    assert found["ms"] == row["alone"]["ms"] and found["x torch"] == row["alone"]["x"]
    assert found["of the matrix rate"] == row["backward"]["gflops"] / 100
    assert (found["x float32"] is None) == (cell is CELL) and found["x one thread"] is None

    attention = fastattn.attention
    monkeypatch.setattr(
        fastattn, "attention", lambda q, k, v, **options: attention(q, k, 1.1 * v, **options)
    )
    assert not training.measure_step(torch, cell, 0)["right"]


def test_threads_take_turns(monkeypatch):
    held, seconds = [], {1: 3.0, 2: 2.0}
    monkeypatch.setattr(fastattn, "get_num_threads", lambda: 2)
    monkeypatch.setattr(cpu, "hold", lambda _, n: held.append(n))
    monkeypatch.setattr(cpu, "seconds", lambda _: seconds[held[-1]])
    row = training.measure_threads(torch, THREADS, 0)
    assert held == [1, 2] * 3 + [0] and row["right"]
    assert row["threads"] == {"n": 2, "ms": 2000.0, "x": 1.5}
    assert training.columns(row | {"matrix_rate": 1})["x one thread"] == 1.5


def test_a_process_each_says_what_a_step_adds():
    row = training.measure_memory(torch, MEMORY, 0)
    assert row["right"] and row["memory"].keys() == {"mib", "torch_mib"}
    least = 4 * 2 * 900 * 64 * 4 / 2**20  # out, dq, dk, dv
    assert least * 0.9 < row["memory"]["mib"] < 40
    (said,) = training.memory([{"cell": "other"}, row])
    assert said.startswith(f"{MEMORY[0]}: a step adds {row['memory']['mib']:.0f} MiB")


def test_the_command_measures_each_part(monkeypatch, capsys, tmp_path):
    """And says each cell, the means, and the memory."""
    row = {"suite": "training", "error": 1e-7, "right": True}
    times = {"ms": 8.0, "torch_ms": 12.0, "x": 1.5}
    rows = {
        "step": {"alone": times, "alternating": times | {"x": 0.5}, "backward": {"gflops": 90}},
        "threads": {"threads": {"n": 2, "ms": 4.0, "x": 1.75}},
        "memory": {"memory": {"mib": 128, "torch_mib": 160.4}},
    }
    monkeypatch.setattr(training, "cells", lambda: [CELL, THREADS, MEMORY])
    monkeypatch.setattr(cpu, "matrix_rate", lambda _: 100.0)
    for part, found in rows.items():
        measured = lambda _, cell, budget, found=found: row | {"cell": cell[0]} | found  # noqa: E731
        monkeypatch.setitem(training.MEASURES, part, measured)
    file = tmp_path / "result.json"
    assert training.main(["--json", str(file), "--filter", "memory"]) == 0
    capsys.readouterr()
    assert training.main(["--json", str(file), "--filter", "fp32"]) == 0
    said = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()[2:]]
    assert said == [
        f"{CELL[0]} 8.00 1.50 0.50 0.90 1.0e-07",
        f"{THREADS[0]} 4.00 1.75 1.0e-07",
        "fp32 alone: geometric mean 1.50, worst 1.50, 1 cells",
        "fp32 alternating: geometric mean 0.50, worst 0.50, 1 cells",
        f"{MEMORY[0]}: a step adds 128 MiB at its peak, torch's 160.",
    ]
    result = json.loads(file.read_text())
    assert [x["cell"] for x in result["rows"]] == [CELL[0], THREADS[0], MEMORY[0]]
    assert result["header"]["command"] == "python -m fastattn.bench.training --level all"

    monkeypatch.setitem(
        training.MEASURES,
        "step",
        lambda *_: row | {"cell": CELL[0]} | rows["step"] | {"right": False},
    )
    assert training.main(["--filter", "causal"]) == 1
