"""fastattn.bench.decode: its cells, what it makes of their times, and its command."""

import json

import fastattn
import pytest
from fastattn.bench import cpu, decode

torch = pytest.importorskip("torch")
PLAIN = ("bf16 b2 h4:2 sq1 sk70 d16", "bf16", 2, 4, 2, 1, 70, 16, "", 0)
MASK = ("fp32 b1 h2:2 sq3 sk50 d8 mask one thread", "fp32", 1, 2, 2, 3, 50, 8, "mask", 1)
CAP = ("fp32 b1 h2:1 sq2 sk50 d8 softcap one thread", "fp32", 1, 2, 1, 2, 50, 8, "softcap", 1)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """And both sides' threads as they were, afterwards."""
    monkeypatch.setattr(decode, "READ", 1000)
    monkeypatch.setattr(cpu, "matrix_rate", lambda _: 100.0)
    monkeypatch.setattr(cpu, "MODES", {"alone": 0})
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    fastattn.set_num_threads(None)


def test_cells():
    cells = list(decode.cells())
    assert len({cell[0] for cell in cells}) == len(cells) == 8 + len(decode.SHAPES)
    for label, dtype, b, hq, hk, sq, sk, d, change, threads in cells:
        words = [dtype, f"b{b}", f"h{hq}:{hk}", f"sq{sq}", f"sk{sk}", f"d{d}"]
        assert label.split()[:6] == words and change in label
        assert label.endswith("one thread") == bool(threads)


@pytest.mark.parametrize("cell", [PLAIN, MASK, CAP], ids=lambda cell: cell[0])
def test_a_cell_is_checked_and_timed(cell, monkeypatch):
    row = decode.measure(torch, cell, 0)
    assert row["cell"] == cell[0] and row["right"] and row["read_rate"] > 0
    assert ("sdpa" in row["x"]) == (cell is not CAP)
    size = 2 * 2 * cell[2] * cell[4] * cell[6] * cell[7] * (1 if cell is PLAIN else 2)
    assert row["gb_s"] == pytest.approx(size / row["ms"] / 1e6)
    attention = fastattn.attention
    monkeypatch.setattr(fastattn, "attention", lambda *q, **options: attention(*q, **options) + 0.1)
    assert not decode.measure(torch, cell, 0)["right"]


def test_the_command_names_the_losers(monkeypatch, tmp_path, capsys):
    rows = {
        PLAIN[0]: {"x": {"sdpa": 3.0, "products": 0.9}, "right": True},
        CAP[0]: {"x": {"products": 1.5}, "right": True},
    }
    common = {"suite": "decode", "error": 1e-7, "ms": 2.0, "gb_s": 10.0, "read_rate": 40.0}
    monkeypatch.setattr(decode, "cells", lambda: [PLAIN, CAP])
    measured = lambda _, cell, budget: common | {"cell": cell[0]} | rows[cell[0]]  # noqa: E731
    monkeypatch.setattr(decode, "measure", measured)
    file = tmp_path / "result.json"
    assert decode.main(["--json", str(file)]) == 0
    said = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()[2:]]
    assert said == [
        f"{PLAIN[0]} 2.00 3.00 0.90 10.00 0.25 1.0e-07",
        f"{CAP[0]} 2.00 1.50 10.00 0.25 1.0e-07",
        f"slower: {PLAIN[0]} 0.90",
    ]
    assert [x["cell"] for x in json.loads(file.read_text())["rows"]] == [PLAIN[0], CAP[0]]
    rows[CAP[0]]["right"] = False
    assert decode.main([]) == 1
