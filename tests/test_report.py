"""benchmarks/report.py: which result files count, and what is made of them."""

import importlib.util
import json

import pytest
from conftest import ROOT, needs
from fastattn.bench.cells import Cell
from fastattn.bench.report import derive, dump

pytestmark = pytest.mark.skipif(
    not (ROOT / "benchmarks" / "report.py").exists(), reason="no source tree"
)

README = (
    "before\n<!-- report: gpu -->\nold\n<!-- end -->\n<!-- report: cpu -->\n<!-- end -->\nafter\n"
)
README += "<!-- report: correctness -->\n<!-- end -->\n"
GPU, CPU = "NVIDIA Test", "some CPU"


@pytest.fixture
def report(tmp_path, monkeypatch):
    """The script, on a folder of its own."""
    spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks" / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "results").mkdir()
    for name, path in (("HERE", ""), ("README", "README.md"), ("RESULTS", "RESULTS.md")):
        monkeypatch.setattr(module, name, tmp_path / path)
    module.README.write_text(README)
    monkeypatch.setattr("sys.argv", ["report.py"])
    return module


def write(report, name, device, rows, date="2030-01-01 10:00 UTC", level="avx2", commit="abc"):
    header = {"date": date, "command": f"measure {name}", "commit": commit, "device": device}
    header |= {"cpu": CPU, "cpu_level": level, "cpu_threads": 2, "versions": {"torch": "2.x"}}
    header["limits"] = {"bf16": 1e15, "fp32": 1e12, "copy": 1e13}
    if device == "cuda":
        header |= {"gpu": GPU, "driver": "1", "clocks": {"clocks.sm": "1 MHz"}}
    text = dump({"header": header, "rows": rows})
    (report.HERE / "results" / f"{name}.json").write_text(text)


def rows_of(cell, ours=1.0, **peers):
    rows = []
    for name, ms in {"fastattn": ours, **peers}.items():
        row = {"implementation": name, "label": cell.label, **vars(cell), "repeats": True}
        row |= {"work": cell.flops, "traffic": cell.bytes, "error": 0.0, "bound": 1.0}
        timed = {"ms": ms, "p10": ms, "p90": ms}
        rows.append(row | ({"refused": "not here"} if ms is None else timed))
    return derive(rows, {})


def grid(suite, device, ours, **peers):
    dtype = "bf16" if device == "cuda" else "fp32"
    cells = [Cell(suite, device, 1, 8, s, 64, dtype) for s in (512, 1024)]
    return [row for cell in cells for row in rows_of(cell, ours, **peers)]


def beside(report, cells, **header):
    """A result of fastattn.bench.cpu: torch's time over ours, alone and alternating."""
    header |= {"date": "2030-01-01", "level": "avx2", "machine": "a machine", "torch": "2.x"}
    rows = [
        {
            "cell": cell,
            "matrix_rate": 100,
            "load": 0.26,
            "alone": {"ms": 2.0, "x": alone, "gflops": 50},
            "alternating": {"ms": 2.0, "x": alternating},
        }
        for cell, (alone, alternating) in cells.items()
    ]
    text = json.dumps({"header": header | {"command": "measure"}, "rows": rows})
    (report.HERE / "results" / "beside.json").write_text(text)


def steps(report):
    """A result of fastattn.bench.training."""
    rows = [
        {
            "cell": "fp32 s512 d64 full",
            "alone": {"ms": 8.0, "x": 1.5},
            "alternating": {"ms": 8.0, "x": 0.96},
            "backward": {"ms": 5.0, "gflops": 90},
        },
        {"cell": "fp16 s512 d64 full", "alone": {"ms": 4.0, "x": 6.0, "x_fp32": 0.875}},
        {"cell": "fp32 s4096 d64 threads", "threads": {"n": 2, "ms": 3.0, "x": 0.91}},
        {"cell": "fp32 s16384 d64 memory", "memory": {"mib": 128, "torch_mib": 160}},
    ]
    rows = [{"suite": "training", "matrix_rate": 100, "load": 0.26} | row for row in rows]
    header = {"date": "2030-01-01", "level": "avx2", "machine": "a machine", "torch": "2.x"}
    text = json.dumps({"header": header | {"command": "measure"}, "rows": rows})
    (report.HERE / "results" / "steps.json").write_text(text)


def few(report, ratios):
    """A result of fastattn.bench.decode: the times of torch's SDPA over ours."""
    common = {"suite": "decode", "load": 0.26, "ms": 2.0, "gb_s": 30.0, "read_rate": 40.0}
    rows = [{"cell": x, "x": {"sdpa": y, "products": 2.0}} | common for x, y in ratios.items()]
    rows[-1]["gb_s"] = 20.0
    header = {"date": "2030-01-01", "level": "avx2", "machine": "a machine", "torch": "2.x"}
    text = json.dumps({"header": header | {"command": "measure"}, "rows": rows})
    (report.HERE / "results" / "few.json").write_text(text)


def verdict(implementation, words):
    row = {"suite": "correctness", "input": "an input", "implementation": implementation}
    return row | {"verdict": words, "right": words == "right"}


@pytest.fixture
def filled(report):
    write(report, "old", "cuda", grid("gpu-bf16", "cuda", 9.0, fa3=1.0), "2029-01-01 10:00 UTC")
    write(report, "new", "cuda", grid("gpu-bf16", "cuda", 1.0, fa3=1.2, cudnn=1.5))
    short = Cell("gpu-short", "cuda", 1, 8, 64, 64)
    write(report, "short", "cuda", rows_of(short, 1.0, cudnn=0.8))
    write(report, "cpu", "cpu", grid("cpu", "cpu", 1.0, torch=2.0))
    write(report, "cpu-other", "cpu", grid("cpu", "cpu", 1.0, torch=3.0), level="avx512")
    beside(report, {"fp32 b1 h8 s512 d64 full": (1.5, 0.9), "fp64 b1 sk1 d64 short": (4.0, 5.0)})
    steps(report)
    wrong = [verdict("default", "NaN in 9 %"), verdict("fastattn", "right")]
    right = [verdict("default", "refused"), verdict("flash", "NaN in 9 %")]
    write(report, "wrong", "cpu", wrong + [row | {"input": "another input"} for row in right])
    return report


@needs("matplotlib")
def test_one_command_writes_everything(filled, capsys, monkeypatch):
    filled.main()
    assert "results/old.json is superseded" in capsys.readouterr().err
    readme, results = filled.README.read_text(), filled.RESULTS.read_text()
    assert readme.startswith("before\n") and "\nafter\n" in readme and "old" not in readme
    said = " ".join(readme.split())
    assert "takes **1.20 times**" in said
    assert "The worst cells of other suites: short sequences 0.80 (cudnn)." in said
    assert "- forward (avx2, 2030-01-01): fp32 **2.00** - forward (avx2, 2030-01-01): fp32" in said
    assert "| an input | **NaN in 9 %** | right |" in readme
    assert "another input" in results and "another input" not in readme  # the default has it right
    assert f"## {GPU}" in results and f"## {CPU} (avx2)" in results
    assert f"## {CPU} (avx512)" in results and "old.json" not in results
    assert "| fp32 b1 h8 s512 d64 full | 2 | 0.50 | 1.50 | **0.90** | 0.3 |" in results
    assert "| fp32 s512 d64 full | 8.00 | 1.50 | **0.96** | - | - | 0.90 | 0.3 |" in results
    assert "| fp16 s512 d64 full | 4.00 | 6.00 | - | 0.88 | - | - | 0.3 |" in results
    assert "| fp32 s4096 d64 threads | 3.00 | - | - | - | 0.91 | - | 0.3 |" in results
    assert "\nfp32 s16384 d64 memory: a step adds 128 MiB at its peak, torch's 160.\n" in results
    assert "(1.20 x fa3)" in results and "**cudnn 0.80**" in results

    monkeypatch.setattr("sys.argv", ["report.py", "--check"])
    filled.main()  # all is as written
    filled.RESULTS.write_text(results.replace("1.20", "1.30"))
    with pytest.raises(SystemExit, match=r"RESULTS\.md: not what"):
        filled.main()


@needs("matplotlib")
def test_pictures_follow_their_data(filled, monkeypatch):
    filled.main()
    for suite in filled.PICTURES:
        text = (filled.HERE / f"{suite}.svg").read_text()
        assert text.startswith("<?xml") and len(text) < 150_000
    write(filled, "new", "cuda", grid("gpu-bf16", "cuda", 1.0, fa3=1.3))
    monkeypatch.setattr("sys.argv", ["report.py", "--check"])
    with pytest.raises(SystemExit, match=r"gpu-bf16\.svg"):
        filled.main()


def test_bold_is_another_implementation_that_is_faster(report):
    """Not fastattn on another cell."""
    cell = Cell("gpu-mask", "cuda", 1, 8, 512, 64, mask="bool")
    write(report, "mask", "cuda", rows_of(cell, 1.0, unmasked=0.5, cudnn=0.9, efficient=2.0))
    (result,) = [result for _, result in report.load()[0]]
    assert report.table(result, "gpu-mask")[2].endswith(
        "| unmasked 0.50, **cudnn 0.90**, efficient 2.00 |"
    )


def test_a_refusal_of_ours_and_a_cell_without_peers_are_shown(report):
    cells = [Cell("gpu-heads", "cuda", 1, 8, 64, d) for d in (96, 300)]
    rows = rows_of(cells[0], 1.0, cudnn=None) + rows_of(cells[1], None, cudnn=1.0)
    write(report, "heads", "cuda", rows)
    (result,) = [json.loads(p.read_text()) for p in (report.HERE / "results").iterdir()]
    lines = report.table(result, "gpu-heads")
    assert len(lines) == 4 and "refused" in lines[3] and "not here" in lines[3]
    assert lines[2].startswith("| bf16 b1 h8 s64 d96 full | 1 (1 to 1) |")


@pytest.mark.parametrize(
    ("ratios", "mean", "losing"),
    [
        (((1.0, 2.0), (4.0, 2.0), (0.8, 0.9)), 2.0, ["fp32 sk1 d64 on one thread 0.80"]),
        (((1.0, 0.5), (4.0, 2.0), (6.0, 5.0)), 1.0, ["fp32 s512 full 0.50"]),
        (((1.0, 2.0), (4.0, 8.0), (1.8, 0.996)), 2.0, []),
    ],
)
def test_means_are_of_the_grid_in_the_slower_mode(report, ratios, mean, losing):
    labels = "fp32 s512 full", "fp32 s2048 full", "fp32 sk1 d64 short"
    beside(report, dict(zip(labels, ratios, strict=True)))
    found, lost = report.in_both_modes("forward", report.load()[1], report.cpu.ratios)
    assert [(what, means, header["level"]) for what, header, means in found] == [
        ("forward", {"fp32": pytest.approx(mean)}, "avx2")
    ]
    assert lost == losing


def test_of_training_the_means_and_the_losers(report):
    """Those of a dtype that was measured in one mode are of that mode."""
    steps(report)
    found, lost = report.in_both_modes("a step", report.load()[2], report.training.ratios)
    assert found[0][2] == pytest.approx({"fp32": 0.96, "fp16": 6.0})
    assert lost == ["fp32 s512 d64 full 0.96"]


def test_each_measurement_on_the_cpu_has_a_line(filled):
    few(filled, {"fp32 sk4096": 3.0, "bf16 sk4096": 0.9})
    files, *others, _ = filled.load()
    said = "".join(filled.cpu_words(filled.newest(files), *others)).split("\n")
    assert said[0].startswith("a machine; some CPU: time of torch 2.x over ours, geometric means, ")
    slower = "fp32 b1 h8 s512 d64 full 0.90; fp32 s512 d64 full 0.96; bf16 sk4096 0.90"
    assert said[0].endswith(f"whichever is lower. Slower: {slower}. ")
    assert [line.partition(" (avx")[0] for line in said[1:]] == [
        "- forward",
        "- forward",
        "- forward and backward",
        "- one new token, 4,096 to 131,072 keys, at least this part of memory's read rate",
    ]
    assert said[-1].endswith(": fp32 **0.75**, bf16 **0.50**")


def test_programs_of_jax(filled):
    """They have a device, but no implementation of each row."""
    times = {"fastattn": 1e-3, "cudnn": 1.5e-3}
    errors = {"fastattn": 1e-3, "cudnn": 2e-3}
    row = {"suite": "jax-cuda", "label": "a case", "seconds": times, "alone": times}
    write(filled, "jax", "cuda", [row | {"errors": errors}])
    files, *_, jitted = filled.load()
    assert [name for name, _ in jitted] == ["jax.json"]
    assert "jax.json" not in [name for name, _ in files]
    text = "\n".join(filled.programs_of_jax(jitted))
    assert "| a case | 1.000 | 1.500 |" in text


@pytest.mark.parametrize("slow", [3.0, 0.9])
def test_few_rows_against_many_keys(report, slow):
    few(report, {"fp32 sk4096": 3.0, "fp32 sk100 one thread": slow, "bf16 sk4096": 4.0})
    found, lost = report.decoding(report.load()[3])
    assert found[0][2] == pytest.approx({"fp32": 0.75, "bf16": 0.5})
    assert lost == (["fp32 sk100 one thread 0.90"] if slow < 1 else [])
    text = "\n".join(report.few_rows(report.load()[3]))
    assert "| bf16 sk4096 | 2.00 | 4.00 | 2.00 | 20.00 | 0.50 | 0.3 |" in text
    assert (report.marked("0.90", 0.9) in text) == (slow < 1)
