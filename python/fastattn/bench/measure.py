"""One cell: every implementation is first checked against float64, then all are timed in turn,
round by round, because clocks and power move more between two runs than most changes gain."""

import dataclasses
import math
import time

import numpy as np

from .arrays import make_inputs
from .judge import check, sampled


@dataclasses.dataclass
class Options:
    timings: int = 25
    warmup: float = 0.3
    peers: tuple = ()  # names; (): all

    def asks(self, peer, cell):
        return (
            peer.device == cell.device
            and (not peer.suites or cell.suite in peer.suites)
            and (not self.peers or peer.own or peer.name in self.peers)
            and (not cell.lengths or peer.own or peer.packed)
            and peer.installed()
        )


def measure(arrays, cell, everyone, options):
    """The rows of all implementations, ours first, as plain dictionaries."""
    copies = [make_inputs(arrays, cell, seed) for seed in range(arrays.copies(cell))]
    samples = sampled(arrays, cell, copies[0])
    running, rows = [], []
    for peer in everyone:
        if not options.asks(peer, cell):
            continue
        other = peer.of(cell) if peer.of else cell
        row = {"implementation": peer.name, "own": peer.own, "label": cell.label}
        row |= dataclasses.asdict(cell) | {"work": other.flops, "traffic": other.bytes}
        rows.append(row)
        try:
            mine, expected = copies, samples
            if other != cell:
                mine = [make_inputs(arrays, other)]
                expected = sampled(arrays, other, mine[0])
            calls, out = first_call(arrays, peer, other, mine)
            row["error"], row["bound"] = check(arrays, other.dtype, expected, out)
        except Exception as error:  # a peer's refusal is a result; ours is one too, and is shown
            row["refused"] = (" ".join(str(error).split()) or type(error).__name__)[:200]
            continue
        running.append((peer, calls, row, out))
    _time(arrays, cell, running, options)
    for peer, calls, row, out in running:
        if peer.own:  # what was timed is what was checked
            row["repeats"] = arrays.equal(arrays.take(calls[0]()), out)
    return rows


def first_call(arrays, peer, cell, copies):
    """(a call of each of the inputs, the first one's output). The block that the allocator hands
    out next holds NaN, as `out` does for ours."""
    with peer.context():
        calls = [peer.build(cell, *inputs) for inputs in copies]
        poison = arrays.nan((*copies[0][0].shape[:-1], cell.kv[1]), cell.dtype)
        if peer.name == "fastattn" and cell.clock == "call":
            return calls, calls[0](out=poison)
        del poison
        return calls, arrays.take(calls[0]())


def _time(arrays, cell, running, options):
    """Adds to each row the percentiles of its times."""
    clock = arrays.host_seconds if cell.clock == "host" else arrays.seconds
    burst = 5 if arrays.device == "cuda" and cell.clock == "call" else 1
    inner = _inner(clock, cell, running)
    start = time.perf_counter()
    times = {peer.name: [] for peer, *_ in running}
    sustained = cell.clock == "sustained"
    rounds = 3 if sustained else math.ceil(max(options.timings, 20) / burst)
    turn = 0
    while turn < rounds:
        warm = sustained or time.perf_counter() - start >= options.warmup
        for i in range(len(running)):
            peer, calls, _, _ = running[(i + turn) % len(running)]
            with peer.context():
                got = clock(calls, burst, inner[peer.name])
            if warm:
                times[peer.name] += got
        turn += warm
    for peer, _, row, _ in running:
        p10, median, p90 = np.percentile(times[peer.name], (10, 50, 90)) * 1e3
        row |= {"ms": median, "p10": p10, "p90": p90, "timings": len(times[peer.name])}


def _inner(clock, cell, running):
    """{name: calls to a timing}, so that one lasts long enough for the clock."""
    target = {"host": 1e-3, "sustained": 1.0}.get(cell.clock, 5e-5)
    most = 200 if cell.clock == "host" else 1 << 30  # the launch queue holds about a thousand
    inner = {}
    for peer, calls, _, _ in running:
        with peer.context():
            estimate = min(clock(calls, 2, 1))
        inner[peer.name] = max(1, min(most, math.ceil(target / estimate)))
    return inner
