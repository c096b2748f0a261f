"""fastattn.bench.jax: what it makes of one small case, and its command."""

import json

import fastattn.bench.jax as bench
import pytest

jax = pytest.importorskip("jax")

TINY = bench.Case("cpu", 1, 2, 24, 8, "float32", True)


def test_a_case_is_checked_and_timed_beside_jax_nn(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "CASES", [TINY])
    file = tmp_path / "result.json"
    bench.main(["--budget", "0", "--json", str(file)])
    (row,) = json.loads(file.read_text())["rows"]
    assert row["right"] and row["suite"] == "jax-cpu"
    assert row["seconds"].keys() == row["alone"].keys() == {"fastattn", "jax.nn"}
    said = capsys.readouterr().out
    assert TINY.label in said and "jax.nn's time over fastattn's: geometric mean" in said


def test_a_wrong_gradient_is_seen(monkeypatch):
    calls = bench.programs(jax, TINY, [jax.numpy.asarray(x) for x in bench.make_arrays(TINY)])
    out, dq, dk, dv = calls["fastattn"]()
    arrays = bench.make_arrays(TINY)
    assert bench.error(TINY, arrays, (out, dq, dk, dv)) < 1e-5
    for wrong in ((out * 1.01, dq, dk, dv), (out, dk, dq, dv), (out, dq, dk, dv + 0.1)):
        assert bench.error(TINY, arrays, wrong) > 1e-3


def test_a_burst_waits_once_or_for_each_call(monkeypatch):
    """Two of 1 s in a burst of 2 s, by a clock that only starting (0.25 s) and waiting move."""
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(bench.time, "sleep", lambda _: None)

    def move(seconds):
        now[0] += seconds

    call = bench.Program(lambda: move(0.25), lambda _: move(0.75))
    for burst, waits, want in ((2, True, 1), (2, False, 0.625), (0, False, 1)):
        now = [0.0]
        assert bench.seconds({"one": call}, 0, burst, waits) == {"one": want}
