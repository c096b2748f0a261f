"""The benchmark's backward suites on a GPU, on small cells: ours right or not served, and whoever
is installed beside it right too."""

import dataclasses

import pytest
from fastattn.bench.arrays import CudaArrays
from fastattn.bench.cells import Cell, suites
from fastattn.bench.measure import Options, measure
from fastattn.bench.peers import peers
from fastattn.bench.report import wrong

import gpu

pytestmark = gpu.marks

GRADIENTS = [name for name in suites() if name.startswith("gpu-backward")]
OPTIONS = Options(timings=20, warmup=0.0)


def small(cell):
    """A cell of the same kind that takes no time."""
    longest = {"window": 1500, "window4k": 5000}.get(cell.mask, 256)
    return dataclasses.replace(cell, b=2, hq=8, hk=cell.hk and 2, s=min(cell.s, longest))


def rows_of(cell, names=None):
    everyone = [p for p in peers() if p.device == "cuda" and (not names or p.name in names)]
    return {row["implementation"]: row for row in measure(CudaArrays(), cell, everyone, OPTIONS)}


@pytest.mark.parametrize("suite", GRADIENTS)
def test_the_first_and_last_cell_of_every_suite(suite):
    for cell in (suites()[suite][0], suites()[suite][-1]):
        found = rows_of(small(cell), ("fastattn", "cudnn", "free", "plain", "unmasked", "causal"))
        assert not wrong(found.values())
        if "ms" in found["fastattn"]:
            assert found["fastattn"]["errors"].keys() >= {"dq", "dk", "dv"}
        cudnn = found.get("cudnn", {})
        if suite in ("gpu-backward", "gpu-backward-fp16", "gpu-backward-gqa"):
            assert cudnn["ms"] > 0 and cudnn["error"] <= cudnn["bound"]


@pytest.mark.parametrize("d", [64, 128])
def test_plain_gradients_are_served_and_timed(d):
    cell = Cell("gpu-backward", "cuda", 2, 8, 512, d, mask="causal", computes="backward")
    row = rows_of(cell, ("fastattn",))["fastattn"]
    assert row["repeats"] and 0 < row["p10"] <= row["ms"] <= row["p90"]
    cell = dataclasses.replace(cell, suite="gpu-backward-origin", computes="both")
    both = rows_of(cell, ("fastattn",))["fastattn"]
    assert both["repeats"] and both["error"] <= both["bound"]


@pytest.mark.parametrize("name", ["fa4", "fa3-lib", "jax.nn"])
def test_a_library_that_is_installed_gives_gradients(name):
    peer = next(peer for peer in peers() if peer.name == name)
    if not peer.installed():
        pytest.skip(f"{name} is not installed")
    suite = "gpu-backward-mask" if name == "jax.nn" else "gpu-backward"
    cell = Cell(suite, "cuda", 2, 8, 512, 128, computes="backward")
    row = rows_of(cell, ("fastattn", name))[name]
    assert "refused" not in row, row["refused"]
    assert row["ms"] > 0 and row["error"] <= row["bound"]
