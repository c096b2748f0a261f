"""benchmarks/gpu_run.py: its parts, who is stopped, and what comes back."""

import importlib.util
import sys
import tarfile
import time
from types import SimpleNamespace

import pytest
from conftest import ROOT
from fastattn.bench import cli

pytestmark = pytest.mark.skipif(
    not (ROOT / "benchmarks" / "gpu_run.py").exists(), reason="no source tree"
)


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("gpu_run", ROOT / "benchmarks" / "gpu_run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def of(monkeypatch, script, programs):
    """The commands of every part are these programs of Python."""
    listed = [(label, [sys.executable, "-c", text]) for label, text in programs.items()]
    monkeypatch.setattr(script, "commands", lambda *_: iter(listed))
    monkeypatch.setattr(script.os, "cpu_count", lambda: len(listed))


@pytest.fixture
def report(script, tmp_path):
    (tmp_path / "out").mkdir()
    return script.Report(tmp_path / "out", tmp_path / "work")


def test_a_shard_that_fails_ends_its_tool_and_no_other(script, report, monkeypatch, capsys):
    wait = "import time; time.sleep(60)"
    fail = "print('========= Invalid read'); raise SystemExit(99)"
    of(monkeypatch, script, {"memcheck-0": fail, "memcheck-1": wait, "racecheck-0": "print('a')"})
    start = time.perf_counter()
    assert not script.run_all("sanitize", SimpleNamespace(tail=5), report, "x", 50, None)
    assert time.perf_counter() - start < 45
    report.end()
    said = capsys.readouterr().out
    assert "==== x-memcheck-0: 99" in said and "==== x-racecheck-0: ok" in said
    assert f"==== x-memcheck-1: {script.SPARED}" in said
    last = said.splitlines()[-3:]
    assert last == ["==== FAILED x-memcheck-0: 99", "========= Invalid read", "==== 1 failed"]


def test_what_takes_too_long_is_stopped(script, report, monkeypatch, capsys):
    of(monkeypatch, script, {"grid": "import time; print('begun', flush=True); time.sleep(60)"})
    assert not script.run_all("grid", SimpleNamespace(tail=5), report, "x", 1, None)
    report.end()
    assert "==== FAILED x-grid: stopped after 1 s" in capsys.readouterr().out


def test_what_comes_back(script, report, monkeypatch):
    """Few files, the most telling first: the tests' whole log is in the first."""
    of(monkeypatch, script, {"tests": "print(*range(100), sep='\\n')"})
    assert script.run_all("tests", SimpleNamespace(tail=2), report, "x", 50, None)
    (report.out / "x-grid.json").write_text("{}")
    report.pack()
    report.end()
    assert sorted(p.name for p in report.out.iterdir()) == [
        *("a-report.txt", "b-all.tar.gz", "x-grid.json")
    ]
    assert "\n7\n8\n9\n" in report.file.read_text()
    with tarfile.open(report.out / "b-all.tar.gz") as tar:
        assert tar.getnames() == ["x-tests.log", "x-grid.json"]


def test_lines_that_tell(script):
    log = "\n".join(["fine"] * 50 + ["E   assert 1 == 2", "FAILED tests/a.py", "RuntimeError: no"])
    assert script.telling(log) == ["E   assert 1 == 2", "FAILED tests/a.py", "RuntimeError: no"]
    assert script.telling("a\nb\nc", most=2) == ["b", "c"]


def test_sanitizers_are_told_to_say_little(script, monkeypatch):
    monkeypatch.setattr(script, "sanitizer", lambda: "compute-sanitizer")
    options = SimpleNamespace(tools=",".join(script.TOOLS), shards=2, commit=None, calls="")
    found = dict(script.commands("sanitize", options, ROOT, "x"))
    tools = dict.fromkeys(label.partition("-")[0] for label in found)
    assert list(tools) == ["memcheck", "racecheck", "synccheck", "initcheck"]
    assert all("--print-limit 5" in " ".join(map(str, x)) for x in found.values())


def test_every_part_of_the_benchmark_can_be_measured(script, monkeypatch):
    """Its suites and peers are there, and every suite of gradients is in a part."""
    monkeypatch.setattr(cli, "gpu_usable", lambda: True)
    monkeypatch.setattr("fastattn.bench.peers.Peer.installed", lambda _: True)
    chosen = set()
    for words in script.SUITES.values():
        args = cli.parser_of("bench", None).parse_args(words.split())
        chosen |= {cell.suite for cell in cli.choose(args)}
        cli.choose_peers(args, "cuda")
    for words in script.COMPILED:
        suite, _, label = words.partition(" ")
        args = cli.parser_of("bench", None).parse_args(["--suite", suite, "--filter", label])
        assert cli.choose(args)
    wanted = {name for name in cli.suites() if name.startswith("gpu-backward")}
    assert wanted <= chosen
    assert all(script.SECONDS[part] < 300 for part in script.SUITES if "backward" in part)
