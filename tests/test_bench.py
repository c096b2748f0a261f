"""The benchmark's command line: refusals before measuring, interruption, limits, pictures."""

import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import fastattn
import pytest
from conftest import needs
from fastattn.bench import cli, plot
from fastattn.bench.arrays import NumpyArrays, TorchArrays, make_inputs
from fastattn.bench.cells import Cell
from fastattn.bench.machine import machine
from fastattn.bench.measure import Options, measure
from fastattn.bench.peers import Peer, peers
from fastattn.bench.report import derive, limits_of, shares, table, wrong


@pytest.fixture
def nothing_is_measured(monkeypatch):
    def measured(*_, **__):
        raise AssertionError("measured before the arguments were checked")

    for name in ("measure", "machine", "environment"):
        monkeypatch.setattr(cli, name, measured)


def without(monkeypatch, *modules):
    """importlib finds these modules no more."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *_: None if name in modules else find(name)
    )


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--suite cpux", ("no suite 'cpux'", "cpu-mask")),
        ("--suite cpu-host --suite gpu-bf6", ("no suite 'gpu-bf6'",)),
        ("--suite tpu*", ("no suite 'tpu*'",)),
        ("--suite gpu-bf16", ("gpu-bf16 needs torch, and a GPU",)),
        ("--suite cpu* --suite gpu*", ("one at a time",)),
        ("--suite cpu --peers torch,torhc", ("no peer 'torhc'", "torch")),
        ("--suite cpu --peers fa3", ("no peer 'fa3' on this device",)),
        ("--suite cpu --filter s513", ("no cell", "s513")),
        ("--suite cpu --module other", ("NAME=PATH",)),
        ("--suite cpu --module other=nowhere.so", ("NAME=PATH", "nowhere.so")),
        ("--suite cpu --known nowhere.csv", ("nowhere.csv",)),
        ("--from nowhere.json", ("nowhere.json",)),
    ],
)
def test_a_refusal_is_one_sentence_before_anything_is_measured(
    line, words, nothing_is_measured, monkeypatch, capsys
):
    monkeypatch.setattr(cli, "gpu_usable", lambda: False)
    assert cli.main(line.split()) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert all(word in said.err for word in words), said.err


def test_plot_needs_matplotlib(nothing_is_measured, monkeypatch, capsys, tmp_path):
    without(monkeypatch, "matplotlib")
    assert cli.main(["--suite", "cpu", "--plot", str(tmp_path)]) == 2
    assert "matplotlib" in capsys.readouterr().err


def test_the_folder_for_results_is_there_first(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cli, "measure", None)
    monkeypatch.setattr(cli, "machine", None)
    assert cli.main(["--suite", "cpu-host", "--json", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_a_named_peer_must_be_installed(nothing_is_measured, monkeypatch, capsys):
    without(monkeypatch, "jax", "fa3_fwd_interface")
    assert cli.main(["--suite", "cpu", "--peers", "jax"]) == 2
    assert "peer jax is not installed" in capsys.readouterr().err
    args = cli.parser_of("bench", None).parse_args(["--peers", "cudnn,fa3"])
    with pytest.raises(cli.Refusal, match="no module fa3_fwd_interface"):
        cli.choose_peers(args, "cuda")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_another_build_is_measured_beside_this_one(device):
    """By its module, or by its package's folder."""
    package = pathlib.Path(fastattn.__file__).parent
    module = next(package.glob("_C*.so"))
    args = cli.parser_of("bench", None).parse_args(
        ["--module", f"one={module}", "--module", f"other={package}"]
    )
    everyone, _ = cli.choose_peers(args, device)
    assert [peer.name for peer in everyone[:3]] == ["one", "other", "fastattn"]
    assert all(peer.own for peer in everyone[:3])


def test_every_suite_and_peer_can_be_named(monkeypatch):
    monkeypatch.setattr(cli, "gpu_usable", lambda: True)
    monkeypatch.setattr(Peer, "installed", lambda _: True)
    for device, pattern in (("cpu", "cpu*"), ("cuda", "gpu*")):
        names = [peer.name for peer in peers() if peer.device == device]
        args = cli.parser_of("bench", None).parse_args(
            ["--suite", pattern, "--peers", ",".join(names)]
        )
        assert {cell.device for cell in cli.choose(args)} == {device}
        assert cli.choose_peers(args, device)[1] == tuple(names)


# ------------------------------------------------------------------------------------ interruption


def row_of(cell, name="fastattn", ms=1.0):
    row = {"implementation": name, "label": cell.label, **vars(cell)}
    row |= {"work": cell.flops, "traffic": cell.bytes, "ms": ms, "p10": ms, "p90": ms}
    return row | {"error": 0.0, "bound": 1.0, "repeats": True}


def test_what_is_finished_is_printed_and_saved(monkeypatch, capsys, tmp_path):
    done = []

    def two_cells(arrays, cell, everyone, options):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(cell.label)
        return [row_of(cell)]

    monkeypatch.setattr(cli, "measure", two_cells)
    monkeypatch.setattr(cli, "machine", lambda arrays: {"fp32": 1e12, "copy": 1e10})
    file = tmp_path / "new" / "result.json"
    assert cli.main(["--suite", "cpu", "--filter", "fp32", "--json", str(file)]) == 130
    said = capsys.readouterr()
    assert all(label in said.out for label in done)
    assert "interrupted after 2 of 12 cells" in said.err
    kept = json.loads(file.read_text())
    assert [row["label"] for row in kept["rows"]] == done
    assert kept["header"]["interrupted"] == "after 2 of 12 cells"


def test_results_keep_the_command_without_folders_of_a_machine():
    line = ["--filter", "s512 d64", "--json", "/data/a b/r.json", "--module=old=/data/old/_C.so"]
    line += ["--plot=/data/plots", "--known", "benchmarks/peers.csv"]
    assert cli.recorded("python benchmarks", line) == (
        "python benchmarks --filter 's512 d64' --json r.json --module=old=_C.so --plot=plots "
        "--known benchmarks/peers.csv"
    )


def test_ctrl_c(tmp_path):
    file = tmp_path / "result.json"
    line = ["--suite", "cpu-host", "--suite", "cpu", "--json", file, "--warmup", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastattn", "bench", *map(str, line)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not (file.exists() and '"ms"' in file.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "interrupted" in err and "Traceback" not in err
    assert json.loads(file.read_text())["rows"][0]["label"] in out


def test_one_thread_is_held_for_its_turns_alone(monkeypatch):
    cell, before = (
        Cell("cpu-threads", "cpu", 1, 1, 64, 16, "fp32"),
        fastattn.get_num_threads(),
    )
    attention, seen = fastattn.attention, set()

    def spy(*args, **keywords):
        seen.add((name, fastattn.get_num_threads()))
        return attention(*args, **keywords)

    monkeypatch.setattr(fastattn, "attention", spy)
    found = {peer.name: peer for peer in peers() if peer.device == "cpu"}
    arrays = NumpyArrays()
    for name in ("fastattn", "1 thread", "fastattn"):
        with found[name].context():
            found[name].build(cell, *make_inputs(arrays, cell))()
    assert seen == {("fastattn", before), ("1 thread", 1)}
    rows = measure(arrays, cell, list(found.values()), Options(20, 0.0, ("none",)))
    assert [row["implementation"] for row in rows] == ["fastattn", "1 thread"]
    assert not wrong(rows) and fastattn.get_num_threads() == before


# ------------------------------------------------------------------------------------------ limits


@pytest.mark.parametrize("level", ["portable", "avx2", "avx512", "avx512_bf16"])
@pytest.mark.parametrize("kind", ["numpy", pytest.param("torch", marks=needs("torch"))])
def test_the_limit_is_the_rate_of_real_matrix_products(kind, level, monkeypatch):
    arrays = NumpyArrays() if kind == "numpy" else TorchArrays()
    info = fastattn.info() | {"cpu": {"level": level, "threads": 1}}
    monkeypatch.setattr(fastattn, "info", lambda: info)
    limits = machine(arrays, sizes=(32, 64), copied=1 << 16)
    assert limits["fp16"] == limits["fp32"] > 0 and limits["copy"] > 0
    if level != "avx512_bf16":
        assert limits["bf16"] == limits["fp32"]
    elif kind == "torch":
        assert limits["bf16"] >= limits["fp32"]
    else:  # NumPy has no such product: no limit rather than a wrong one
        assert "bf16" not in limits


def result_of(*rows, limits):
    for label in {row["label"] for row in rows}:
        derive([row for row in rows if row["label"] == label], {})
    header = {"device": "cpu", "cpu": "some CPU", "cpu_level": "avx2", "cpu_threads": 2}
    header["limits"] = limits
    return {"header": header, "rows": list(rows)}


CELLS = [Cell("cpu", "cpu", 1, 8, s, 64, "fp32") for s in (512, 2048)]


@pytest.mark.parametrize("rate", [1e9, 1e11, 1e13])
def test_no_row_is_above_its_limit_or_below_its_floor(rate):
    slow, fast = (row_of(cell, ms=ms) for cell, ms in zip(CELLS, (30.0, 40.0), strict=True))
    limits = {"fp32": rate, "copy": 1e7}
    result = result_of(slow, fast, limits=limits)
    found = limits_of(result)
    assert found["fp32"] == max(rate, *(row["flops"] for row in result["rows"]))
    for row in result["rows"]:
        share, over = shares(row, found)
        assert 0 < share <= 1 <= over
    assert result["header"]["limits"] == limits  # as measured


def test_what_a_mask_hides_by_blocks_is_no_work():
    full, blocks = (Cell("gpu-mask", "cuda", 1, 1, 1024, 64, mask=m) for m in ("full", "blocks"))
    assert blocks.flops == full.flops / 2
    limits = {"bf16": full.flops / 1e-3, "copy": 1e30}
    result = result_of(row_of(full), row_of(blocks, ms=0.1), limits=limits)
    assert limits_of(result)["bf16"] == limits["bf16"]


def test_without_a_limit_there_is_no_share():
    result = result_of(row_of(CELLS[0]), limits={"copy": 1e10})
    assert shares(result["rows"][0], limits_of(result)) == (None, None)
    assert "% limit" not in "\n".join(table(result["rows"], "cpu", {"copy": 1e10}))


# ---------------------------------------------------------------------------------------- pictures


def picture(cells):
    rows = [row_of(c, name, ms) for c in cells for name, ms in (("fastattn", 2.0), ("torch", 3.0))]
    (found,) = plot.figures(result_of(*rows, limits={"fp32": 1e11, "copy": 1e10}))
    assert found[0] == "cpu"
    return found[1]


@needs("matplotlib")
def test_curves_have_labelled_axes_and_their_legend_off_the_data():
    figure = picture(CELLS)
    (axis,) = figure.axes
    assert axis.get_xlabel() == "sequence length" and axis.get_ylabel() == "GFLOP/s"
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["512", "2k"]
    assert axis.get_legend() is None
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names[:2] == ["fastattn", "torch"] and names[2].startswith("limit")
    figure.draw_without_rendering()
    assert legend.get_window_extent().y0 >= axis.get_window_extent().y1
    highest = max(line.get_ydata()[0] for line in axis.lines if len(line.get_ydata()) == 2)
    assert axis.get_ylim()[0] == 0 and axis.get_ylim()[1] > highest


@needs("matplotlib")
def test_one_length_gives_bars():
    figure = picture(CELLS[:1])
    (axis,) = figure.axes
    assert len(axis.patches) == 2 and all(line.get_marker() == "None" for line in axis.lines)
    assert axis.get_xlabel() == "sequence length 512"


# ------------------------------------------------------------------------------- the package itself


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--version"], 0, f"fastattn {fastattn.__version__}"),
        (["--help"], 0, "bench"),
        (["-h"], 0, "bench"),
        (["bench", "--help"], 0, "--suite"),
        (["nonsense"], 2, "nonsense"),
        (["--nonsense"], 2, "--nonsense"),
    ],
)
def test_help_and_version(words, status, said):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-m", "fastattn", *words], env=environment, capture_output=True, text=True
    )
    assert done.returncode == status and said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
