"""benchmarks/report.py on results of the backward pass: grids, cells not served, errors."""

import dataclasses
import json

import test_report
from conftest import needs
from fastattn.bench import llama
from fastattn.bench.cells import Cell
from test_report import rows_of, write

report, filled = test_report.report, test_report.filled  # fixtures

GRID = [
    Cell("gpu-backward", "cuda", 1, 8, s, d, computes="backward")
    for d in (128, 256)
    for s in (1, 2)
]


def rows(ours=1.0):
    """At d 256 none of ours; errors are those of dq, dk, dv: largest, mean."""
    found = []
    for cell in GRID:
        mine = rows_of(cell, ours if cell.d == 128 else None, cudnn=1.5, fa4=1.2)
        if cell.d == 256:
            mine[0]["unserved"] = f"sm90 takes d up to 128, got 256: {mine[0].pop('refused')}"
        for row, factor in zip(mine, (1.0, 2.0, cell.s * 1.0), strict=True):
            row["errors"] = {x: [4e-3 / factor, 1e-3 / factor] for x in ("dq", "dk", "dv")}
        if cell.d == 256:
            del mine[0]["errors"]
        found += mine
    return found


def table_of(report, suite):
    (result,) = [result for _, result in report.load()[0]]
    return report.table(result, suite)


def test_the_grid_shows_what_is_not_served_and_by_whom_it_is(report):
    write(report, "grid", "cuda", rows())
    lines = table_of(report, "gpu-backward")
    speed = {cell.d: cell.flops / 1.2e-3 * 1e-12 for cell in GRID}
    assert lines[2].startswith("| bf16 d128 full |") and lines[2].count("(1.20 x fa4)") == 2
    assert lines[3].count(f"not served, fa4 {speed[256]:.0f} TFLOP/s") == 2
    assert lines[5] == "| our error over theirs | cudnn, max | cudnn, mean | fa4, max | fa4, mean |"
    both = "2.00, worst 2.00 | 2.00, worst 2.00 | 1.41, worst 2.00 | 1.41, worst 2.00"
    assert lines[7:] == [f"| bf16 d128 full | {both} |"]


def test_a_list_shows_it_too(report):
    cell = dataclasses.replace(GRID[2], suite="gpu-backward-gqa")
    mine = rows_of(cell, None, fa4=1.0)
    mine[0]["unserved"] = mine[0].pop("refused")
    write(report, "gqa", "cuda", mine)
    assert "| not served, fa4 0 TFLOP/s | - | - | not here |" in table_of(report, cell.suite)[2]


def test_deterministic_gradients_are_set_against_ours_that_are_not(report):
    cell = dataclasses.replace(GRID[1], suite="gpu-backward-deterministic", deterministic=True)
    write(report, "same", "cuda", rows_of(cell, 1.0, free=0.95))
    assert "(0.95 x free)" in table_of(report, cell.suite)[2]


@needs("matplotlib")
def test_readme_says_how_much_is_served_and_how_fast(filled):
    filled.main()
    before = filled.README.read_text()
    assert "Gradients" not in before
    write(filled, "grid", "cuda", rows(1.25))
    filled.main()
    said = " ".join(filled.README.read_text().split())
    assert "2 of 4 cells are served. Over 2 cells the fastest other takes **0.96 times**" in said
    assert "Slower are d 128 full at s 1 0.96 (fa4); d 128 full at s 2 0.96 (fa4)." in said
    results = filled.RESULTS.read_text()
    assert "### Gradients: bfloat16, 16,384 tokens" in results


@needs("matplotlib")
def test_a_training_step_has_its_table(filled):
    values = {"fastattn": 1.0, "sdpa": 2.0}
    row = {"label": "a model", "suite": "llama", "ratio": 2.0, "right": True}
    row |= dict.fromkeys(("ms", "p10", "p90", "peak", "errors"), values)
    write(filled, "llama", "cuda", [row])
    filled.main()
    assert "| a model | 1.00 | 1.00 | 1.00 | 2.000 |" in filled.RESULTS.read_text()
    assert json.dumps(row) and llama.WAYS.keys() == values.keys()
