"""fastattn.bench.jax: what it makes of one small case, and its command."""

import dataclasses
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


def test_a_wrong_gradient_is_seen():
    arrays = bench.make_arrays(TINY)
    calls = bench.programs(jax, TINY, [jax.numpy.asarray(x) for x in arrays], 1)
    wanted = bench.exact(TINY, arrays, 1, gradients=True)
    out, dq, dk, dv = calls["fastattn"]()
    assert bench.error((out, dq, dk, dv), wanted) < 1e-5
    for wrong in ((out * 1.01, dq, dk, dv), (out, dk, dq, dv), (out, dq, dk, dv + 0.1)):
        assert bench.error(wrong, wanted) > 1e-3


def test_a_program_of_several_calls():
    """As on a GPU: each call takes the last one's output."""
    case = dataclasses.replace(TINY, device="cuda")
    q, k, v, dout = (jax.numpy.asarray(x) for x in bench.make_arrays(case))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "torch_program", lambda *_: None)
        call = bench.programs(jax, case, (q, k, v, dout), 3)["fastattn"]
    wanted = bench.exact(case, (q, k, v, dout), 3, gradients=False)
    assert bench.error(call(), wanted) < 1e-5
    assert bench.error(call(), bench.exact(case, (q, k, v, dout), 2, gradients=False)) > 1e-3


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
