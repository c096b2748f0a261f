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
    assert (
        row["right"]
        and row["suite"] == "jax-cpu"
        and set(row["seconds"])
        == {
            "fastattn",
            "jax.nn",
        }
    )
    said = capsys.readouterr().out
    assert TINY.label in said and "jax.nn's time over fastattn's: geometric mean" in said


def test_a_wrong_gradient_is_seen(monkeypatch):
    calls = bench.programs(jax, TINY, [jax.numpy.asarray(x) for x in bench.make_arrays(TINY)])
    out, dq, dk, dv = calls["fastattn"]()
    arrays = bench.make_arrays(TINY)
    assert bench.error(TINY, arrays, (out, dq, dk, dv)) < 1e-5
    for wrong in ((out * 1.01, dq, dk, dv), (out, dk, dq, dv), (out, dq, dk, dv + 0.1)):
        assert bench.error(TINY, arrays, wrong) > 1e-3
