"""The benchmark's backward suites: what is measured, how it is judged, who is refused, and the
process that FlashAttention-3 runs in. On a CPU, with cells of a few rows."""

import dataclasses
import sys

import fastattn
import numpy as np
import pytest
import reference_backward
from conftest import needs
from fastattn.bench import fa3, gradients
from fastattn.bench.cells import Cell, suites
from fastattn.bench.measure import Options, measure
from fastattn.bench.peers import GRADIENTS, Peer, _ours, _sdpa, peers
from fastattn.bench.report import complaints, derive, table, wrong

torch = pytest.importorskip("torch")

from fastattn.bench.arrays import TorchArrays  # noqa: E402

SUITE = "gpu-backward"
OPTIONS = Options(timings=20, warmup=0.0)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Calls are timed, and not repeated until a clock is good for them."""

    def seconds(self, calls, n, inner):
        for _ in range(n):
            calls[0]()
        return [1e-3] * n

    monkeypatch.setattr(TorchArrays, "seconds", seconds)


def cell_of(suite=SUITE, dtype="bf16", **changes):
    values = {"b": 2, "hq": 4, "s": 40, "d": 16, "computes": "backward"} | changes
    return Cell(suite, "cpu", dtype=dtype, **values)


def ours(build=None, **keywords):
    return Peer("fastattn", "cpu", build or _ours(), gradients=GRADIENTS, **keywords)


def torchs(name="torch", build=_sdpa, **keywords):
    return Peer(name, "cpu", build, "torch", gradients=GRADIENTS, packed=True, **keywords)


CELLS = [
    {},
    {"mask": "causal"},
    {"mask": "causal", "hk": 2, "dtype": "fp16"},
    {"computes": "both"},
    {"mask": "blocks", "s": 300},
    {"mask": "bf16"},
    {"mask": "bf16-b"},
    {"mask": "bf16-h", "hk": 2},
    {"mask": "window", "s": 1100, "hq": 1, "b": 1},
    {"change": "softcap"},
    {"change": "alibi", "mask": "causal"},
    {"change": "sink"},
    {"change": "dropout", "hk": 1},
    {"lengths": "uniform", "b": 5, "mask": "causal", "hk": 2},
    {"deterministic": True},
]


@pytest.mark.parametrize("changes", CELLS, ids=str)
def test_every_kind_of_cell_is_checked_and_timed(changes, monkeypatch):
    monkeypatch.setattr(gradients, "REPEATS", 3)
    monkeypatch.setattr(gradients, "ROWS", 32)  # more than one step
    cell = cell_of(**changes)
    (row,) = measure(TorchArrays(), cell, [ours()], OPTIONS)
    assert row.get("refused") is None and not wrong([row])
    names = {"dq", "dk", "dv"} | ({"dmask"} if "bf16" in cell.mask else set())
    assert row["errors"].keys() == names
    assert 0 < row["error"] <= row["bound"] and row["timings"] >= 20
    assert row["repetitions"] == (3 if cell.deterministic else 1)
    assert all(0 < mean < most for most, mean in row["errors"].values())


@pytest.mark.parametrize("changes", [x for x in CELLS if "lengths" not in x], ids=str)
def test_the_formula_is_the_reference(changes):
    """Judged are the last sequence's last key head and its query heads."""
    cell = cell_of(**changes)
    arrays = TorchArrays()
    inputs = gradients.make_inputs(arrays, cell)
    q, k, v, mask, dout = (None if x is None else x.double().numpy() for x in inputs)
    keywords = {"causal": cell.mask == "causal"} | dict(gradients.changes(cell))
    if cell.mask == "window":
        keywords["window"] = (1023, 0)
    if mask is not None:
        keywords["mask"] = mask if inputs[3].is_floating_point() else mask > 0
    want = reference_backward.attention_backward(dout, q, k, v, real=np.float64, **keywords)
    found = gradients.sampled(arrays, cell, inputs)
    for name, (exact, low) in found.items():
        ref = gradients.part_of(cell, name, torch.from_numpy(getattr(want, name)))
        torch.testing.assert_close(exact, ref, rtol=1e-9, atol=1e-11)
        assert 0 < (low - exact).abs().max() < 0.1 * exact.abs().max()


def broken(name, how):
    """Ours, with one gradient spoilt by a hook."""

    def build(cell, q, k, v, mask):
        {"q": q, "k": k, "v": v}[name].register_hook(how)
        return _ours()(cell, q, k, v, mask)

    return build


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize(
    "how",
    [lambda x: 1.05 * x, lambda x: x + torch.nan, lambda x: x.index_fill(2, torch.tensor(7), 0)],
)
def test_a_wrong_gradient_is_seen(name, how):
    (row,) = measure(TorchArrays(), cell_of(), [ours(broken(name, how))], OPTIONS)
    assert row["error"] > row["bound"] and wrong([row])
    assert any("off by" in line for line in complaints([row]))


def test_what_does_not_repeat_is_seen():
    factor = iter(range(1, 10**6))
    build = broken("k", lambda x: x + 1e-7 * next(factor))
    (row,) = measure(TorchArrays(), cell_of(dtype="fp32"), [ours(build)], OPTIONS)
    assert row["repeats"] is False
    build = broken("q", lambda x: x + 1e-7 * next(factor))  # the order of its sums
    (row,) = measure(TorchArrays(), cell_of(dtype="fp32"), [ours(build)], OPTIONS)
    assert row["repeats"] is True
    cell = cell_of(dtype="fp32", deterministic=True)
    (row,) = measure(TorchArrays(), cell, [ours(build)], OPTIONS)
    assert row["repeats"] is False


def test_a_gradient_that_is_not_declared_is_shown_and_no_fault():
    """The peers are timed all the same."""

    def refuse(*_):
        raise NotImplementedError("sm90: it takes d up to 128, got 256")

    cell = cell_of()
    rows = derive(measure(TorchArrays(), cell, [ours(refuse), torchs()], OPTIONS), {})
    mine, peer = rows
    assert "d up to 128" in mine["unserved"] and "refused" not in mine and not wrong(rows)
    assert peer["ms"] > 0 and peer["error"] <= peer["bound"] and "ratio" not in peer
    text = "\n".join(table(rows, "cuda", {}))
    assert "does not serve it: sm90: it takes d up to 128" in text and "torch at" in text

    def fail(*_):
        raise RuntimeError("an error of CUDA")

    (row,) = measure(TorchArrays(), cell, [ours(fail)], OPTIONS)
    assert "refused" in row and wrong([row])


def test_one_that_fails_in_its_turn_is_left_out():
    calls = []

    def build(cell, q, k, v, mask):
        def hook(x):
            calls.append(1)
            if len(calls) == 4:
                raise RuntimeError("out of memory")
            return x

        q.register_hook(hook)
        return _sdpa(cell, q, k, v, mask)

    rows = measure(TorchArrays(), cell_of(), [ours(), torchs(build=build), torchs("b")], OPTIONS)
    assert [("ms" in row, row.get("refused")) for row in rows] == [
        (True, None),
        (False, "out of memory"),
        (True, None),
    ]


def test_dout_has_the_strides_of_the_output():
    seen = []

    def build(cell, q, k, v, mask):
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))

        def run():
            out = fastattn.attention(q, k, v, layout="bshd")
            out.register_hook(lambda x: seen.append(x.is_contiguous()))
            return out.transpose(1, 2)

        return run

    (row,) = measure(TorchArrays(), cell_of(), [ours(build)], OPTIONS)
    assert not wrong([row]) and seen and all(seen)


def test_what_is_measured():
    known = suites()
    grid = known[SUITE]
    assert len(grid) == 36 and {c.b * c.s for c in grid} == {16384}
    assert {c.hq * c.d for c in grid} == {2048} and {c.dtype for c in grid} == {"bf16"}
    assert {name for name in known if name.startswith(SUITE)} == {SUITE + x for x in GRADIENTS}
    full = grid[0]
    forward = dataclasses.replace(full, computes="")
    assert full.flops == 2.5 * forward.flops and full.bytes == 2 * forward.bytes
    everyone = [peer for peer in peers() if peer.device == "cuda"]
    asked = {
        suite: {p.name for p in everyone if p.measures(cells[0])} - {"fastattn"}
        for suite, cells in known.items()
        if suite.startswith(SUITE)
    }
    assert asked[SUITE] == {"cudnn", "fa4", "fa3-lib"}
    assert asked[f"{SUITE}-fp16"] == {"cudnn"} and asked[f"{SUITE}-deterministic"] == {"free"}
    assert asked[f"{SUITE}-scores"] == {"cudnn", "fa4", "flex", "plain"}
    assert not {"free", "fa3-lib", "jax.nn"} & {p.name for p in everyone if p.measures(forward)}


# ------------------------------------------------------------------------------ the other process

STUB = """
import json, sys
for line in sys.stdin:
    asked = json.loads(line)
    if asked.get("n") == 13:
        sys.exit(1)
    answer = {"seconds": [0.25] * asked["n"]} if "n" in asked else {"refused": "no such cell"}
    print(json.dumps(answer), flush=True)
"""


def test_a_question_and_its_answer(monkeypatch):
    child = fa3.Child((sys.executable, "-c", STUB))
    assert child.ask(n=2)["seconds"] == [0.25, 0.25]
    with pytest.raises(RuntimeError, match="no such cell"):
        child.ask(cell={})
    for _ in range(fa3.ATTEMPTS):
        with pytest.raises(RuntimeError, match="gave no answer"):
            child.ask(n=13)
    with pytest.raises(RuntimeError, match="was lost 3 times"):
        child.ask(n=1)


def test_silence_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(fa3, "PATIENCE", 0.3)
    child = fa3.Child((sys.executable, "-c", "import time; time.sleep(60)"))
    with pytest.raises(RuntimeError, match="gave no answer"):
        child.ask(n=1)
    assert child.process.poll() is not None


def programs(jax, cell):
    """In the place of the library's: jax.nn's own on the CPU."""

    def forward(q, k, v, mask):
        def call(q, k, v):
            causal = cell.mask == "causal"
            if not cell.lengths:
                return jax.nn.dot_product_attention(q, k, v, is_causal=causal)
            of = np.repeat(np.arange(cell.b), cell.packed)  # the sequence of each row
            seen = (of[:, None] == of) & np.tri(len(of), dtype=bool)
            assert causal
            return jax.nn.dot_product_attention(q, k, v, mask=seen[None])

        return jax.vjp(jax.jit(call), q, k, v)

    return forward, lambda dout, pull: pull(dout)


class Here:
    """A child in this process."""

    def __init__(self):
        self.state = {}

    def ask(self, **question):
        return fa3.answer_to(question, self.state)


@needs("jax")
@pytest.mark.parametrize(
    "changes",
    [
        {"mask": "causal", "hk": 2},
        {"computes": "both"},
        {"lengths": "uniform", "b": 3, "mask": "causal", "hk": 2},
    ],
    ids=str,
)
def test_a_peer_apart_is_judged_and_timed_like_the_others(changes, monkeypatch):
    monkeypatch.setitem(fa3.PROGRAMS, "fa3", programs)
    monkeypatch.setattr(fa3, "BURST", 1e-3)
    here = Here()
    monkeypatch.setattr(fa3, "child", lambda: here)
    lib = torchs("fa3-lib", None, apart=fa3.apart)
    rows = measure(TorchArrays(), cell_of(**changes), [ours(), lib], OPTIONS)
    assert "refused" not in rows[1], rows[1]
    assert rows[1]["ms"] > 0 and 0 < rows[1]["error"] <= rows[1]["bound"]
    assert rows[1]["errors"].keys() == {"dq", "dk", "dv"} and "repeats" not in rows[1]


@needs("jax")
def test_jax_nn_has_the_gradient_of_a_mask(monkeypatch):
    import jax

    attention = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *x, implementation, **y: attention(*x, **y)
    )
    monkeypatch.setattr(fa3, "BURST", 1e-3)
    here = Here()
    monkeypatch.setattr(fa3, "child", lambda: here)
    cell = cell_of(f"{SUITE}-mask", mask="bf16-b")
    rows = measure(
        TorchArrays(), cell, [ours(), torchs("jax.nn", None, apart=fa3.apart_in_jax)], OPTIONS
    )
    assert rows[1]["error"] <= rows[1]["bound"]
    assert len(here.state["measured"].gradients) == 4


@needs("jax")
def test_what_the_library_has_not_is_refused():
    """Before it is loaded."""
    import jax

    for changes in ({"change": "softcap"}, {"mask": "bf16-b"}, {"change": "sink"}):
        with pytest.raises(NotImplementedError, match="in the library"):
            fa3.programs_of_fa3(jax, cell_of(**changes))
    cell = cell_of(mask="window", s=4096)
    assert fa3.attributes(cell)["window_size_left"] == 1023
    assert fa3.attributes(cell_of(lengths="uniform", b=5))["max_seqlen"] <= 40
