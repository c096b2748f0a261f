"""fastattn.bench.cpu: its cells, what it makes of their times, and its command."""

import json
import os

import fastattn
import pytest
from fastattn.bench import cpu
from fastattn.bench.machine import cpu_name

TINY = ("fp32 b1 h2 s40 d16 causal", "fp32", 1, 2, 40, 40, 16, True, 0)
SHORT = ("bf16 b2 h3 sq9 sk1 d8 short", "bf16", 2, 3, 9, 1, 8, False, 1)
EMPTY = ("fp64 b2 h3 sq2 sk0 d8 short", "fp64", 2, 3, 2, 0, 8, False, 1)


@pytest.fixture
def torch():
    """torch, with both sides' threads as they were afterwards."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    yield torch
    torch.set_num_threads(threads)
    fastattn.set_num_threads(None)


def test_cells():
    cells = list(cpu.cells())
    assert len({cell[0] for cell in cells}) == len(cells)
    grid = [cell for cell in cells if not cell[0].endswith("short")]
    for dtype in ("fp32", "bf16", "fp16"):
        assert sum(cell[1] == dtype for cell in grid) == 12
    assert len(grid) == 36 and {cell[-1] for cell in grid} == {0}
    assert {cell[-1] for cell in cells if cell not in grid} == {1}
    for label, dtype, b, h, *_ in cells:
        assert label.split()[:3] == [dtype, f"b{b}", f"h{h}"]


@pytest.mark.parametrize("cell", [TINY, SHORT, EMPTY], ids=lambda cell: cell[0])
def test_a_cell_is_checked_and_timed_both_ways(torch, cell, monkeypatch):
    row = cpu.measure(torch, cell, 0)
    assert row["cell"] == cell[0] and row["right"]
    for mode in cpu.MODES:
        assert row[mode]["x"] == pytest.approx(row[mode]["torch_ms"] / row[mode]["ms"])
        assert ("gflops" in row[mode]) == (cell is TINY)
    monkeypatch.setattr(cpu, "turns", lambda *_: [1.0, 2.0])
    attention = fastattn.attention
    monkeypatch.setattr(fastattn, "attention", lambda *q, **options: attention(*q, **options) + 0.1)
    assert not cpu.measure(torch, cell, 0)["right"]


def row_of(cell, alone, alternating=1.0, right=True):
    row = {"cell": cell, "matrix_rate": 100.0, "error": 1e-9, "right": right}
    return row | {
        "alone": {"ms": 1.0, "x": alone, "gflops": 50.0},
        "alternating": {"ms": 1.0, "x": alternating},
    }


def test_means_leave_the_short_cells_out(capsys):
    rows = [row_of("fp32 s512", 1.0), row_of("fp32 s2048", 4.0, 0.25, right=False)]
    rows += [row_of("fp64 sk1 short", 9.0)]
    cpu.report(rows)
    said = capsys.readouterr().out.splitlines()
    assert [line.endswith("WRONG") for line in said[1:4]] == [False, True, False]
    assert said[4:] == [
        "fp32 alone: geometric mean 2.00, worst 1.00, 2 cells",
        "fp32 alternating: geometric mean 0.50, worst 0.25, 2 cells",
    ]


def test_the_command_keeps_the_rows_of_other_cells(torch, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cpu, "cells", lambda: [TINY, SHORT])
    monkeypatch.setattr(cpu, "matrix_rate", lambda torch: float(torch.get_num_threads()))
    measure, threads = cpu.measure, {}

    def spy(torch, cell, budget):
        threads[cell[0]] = fastattn.get_num_threads(), torch.get_num_threads()
        return measure(torch, cell, budget)

    monkeypatch.setattr(cpu, "measure", spy)
    file = tmp_path / "result.json"
    line = ["--budget", "0", "--json", str(file), "--filter"]
    for words in ("short bf16", "causal", "short"):
        assert cpu.main([*line, words]) == 0
    result = json.loads(file.read_text())
    assert [row["cell"] for row in result["rows"]] == [TINY[0], SHORT[0]]
    assert result["header"]["cpu"] == cpu_name() in capsys.readouterr().out
    every = fastattn.get_num_threads()
    assert threads == {TINY[0]: (every, every), SHORT[0]: (1, 1)}
    assert {row["matrix_rate"] for row in result["rows"]} == {every}

    monkeypatch.setattr(cpu, "measure", lambda *_: row_of(TINY[0], 1.0, right=False))
    assert cpu.main([*line, "causal"]) == 1


def test_avx2_starts_the_program_once_more(torch, monkeypatch):
    for name in cpu.AVX2:
        monkeypatch.delenv(name, raising=False)

    class Started(Exception):  # noqa: N818 - no fault
        pass

    def start(path, command, environment):
        raise Started(command, environment)

    monkeypatch.setattr(os, "execve", start)
    with pytest.raises(Started) as caught:
        cpu.main(["--level", "avx2", "--filter", "causal"])
    command, environment = caught.value.args
    assert command[1:] == ["-m", "fastattn.bench.cpu", "--level", "avx2", "--filter", "causal"]
    assert environment == {**os.environ, **cpu.AVX2}

    for name, value in cpu.AVX2.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cpu, "cells", lambda: [SHORT])
    assert cpu.main(["--level", "avx2", "--budget", "0"]) == 0


def test_a_filter_that_leaves_no_cell_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        cpu.main(["--filter", "causall"])
    assert "no cell has the words of --filter 'causall'" in capsys.readouterr().err
