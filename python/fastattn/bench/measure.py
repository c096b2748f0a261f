"""One cell: every implementation is first checked against float64, then all are timed in turn,
round by round, because clocks and power move more between two runs than most changes gain."""

import dataclasses
import functools
import math
import time

import numpy as np

from . import gradients, judge
from .arrays import make_inputs


@dataclasses.dataclass
class Options:
    timings: int = 25
    warmup: float = 0.3
    peers: tuple = ()  # names; (): all

    def asks(self, peer, cell):
        return (
            peer.device == cell.device
            and peer.measures(cell)
            and (not self.peers or peer.own or peer.name in self.peers)
            and (not cell.lengths or peer.own or peer.packed)
            and peer.installed()
        )


@dataclasses.dataclass
class Running:
    """An implementation that gave a result."""

    peer: object
    row: dict
    clock: object  # (n, inner) -> n times
    again: object  # -> (whether it gives the same bits, how many calls said so); None: not asked


def measure(arrays, cell, everyone, options):
    """The rows of all implementations, ours first, as plain dictionaries."""
    made = functools.cache(lambda cell, seed: task(cell).make_inputs(arrays, cell, seed))
    copies = [made(cell, seed) for seed in range(arrays.copies(cell))]
    samples = task(cell).sampled(arrays, cell, copies[0])
    running, rows = [], []
    for peer in everyone:
        if not options.asks(peer, cell):
            continue
        other = peer.of(cell) if peer.of else cell
        row = {"implementation": peer.name, "own": peer.own, "label": cell.label}
        row |= dataclasses.asdict(cell) | {"work": other.flops, "traffic": other.bytes}
        rows.append(row)
        try:
            if peer.apart:
                running.append(_apart(arrays, peer, other, row))
                continue
            mine, expected = copies, samples
            if other != cell:
                mine = [made(other, 0)]
                expected = task(other).sampled(arrays, other, mine[0])
            calls, out = first_call(arrays, peer, other, mine)
            if peer.own or other.change != "dropout":  # another's pattern is its own
                row |= checked(arrays, other, expected, out)
        except Exception as error:  # a peer's refusal is a result; ours is one too, and is shown
            _refuse(row, error)
            continue
        clock = arrays.host_seconds if cell.clock == "host" else arrays.seconds
        again = functools.partial(repeats, arrays, other, calls[0], out) if peer.own else None
        running.append(Running(peer, row, functools.partial(clock, calls), again))
    _time(arrays, cell, running, options)
    for one in running:
        if one.again:  # what was timed is what was checked
            one.row["repeats"], one.row["repetitions"] = one.again()
    return rows


def task(cell):
    """The module that makes the inputs of a cell and says how right an output is."""
    return gradients if cell.computes else _Forward


class _Forward:
    make_inputs, sampled = staticmethod(make_inputs), staticmethod(judge.sampled)


def checked(arrays, cell, samples, out):
    """What a row says of an output's distance from float64."""
    if cell.computes:
        return gradients.check(cell, samples, out)
    return dict(zip(("error", "bound"), judge.check(arrays, cell.dtype, samples, out), strict=True))


def repeats(arrays, cell, call, out):
    """(whether a call gives the bits of the first, how many calls said so)"""
    if cell.computes:
        return gradients.repeats(arrays, cell, call, out)
    return arrays.equal(arrays.take(call()), out), 1


def _refuse(row, error):
    """Ours says that a gradient is not declared by NotImplementedError, before anything runs."""
    words = (" ".join(str(error).split()) or type(error).__name__)[:200]
    unserved = row["own"] and row["computes"] and isinstance(error, NotImplementedError)
    row["unserved" if unserved else "refused"] = words


def _apart(arrays, peer, cell, row):
    """Of a peer in a process of its own, which has inputs of its own and times itself."""
    clock, one, inputs, out = peer.apart(arrays, cell)
    row |= checked(arrays, one, task(one).sampled(arrays, one, inputs), out)
    return Running(peer, row, clock, None)


def first_call(arrays, peer, cell, copies):
    """(a call of each of the inputs, the first one's output). The blocks that the allocator hands
    out next hold NaN, as `out` does for ours."""
    with peer.context():
        if cell.computes:
            poison = [arrays.nan(x.shape, cell.dtype) for x in copies[0][:3]]
            del poison
            calls = [peer.gradients_of(cell, *inputs) for inputs in copies]
            poison = [arrays.nan(x.shape, cell.dtype) for x in copies[0][:3]]
            del poison
            return calls, calls[0]()
        calls = [peer.build(cell, *inputs) for inputs in copies]
        poison = arrays.nan((*copies[0][0].shape[:-1], cell.kv[1]), cell.dtype)
        if peer.name == "fastattn" and cell.clock == "call":
            return calls, calls[0](out=poison)
        del poison
        return calls, arrays.take(calls[0]())


def _time(arrays, cell, running, options):
    """Adds to each row the percentiles of its times. A peer that fails is out of `running`."""
    burst = 5 if arrays.device == "cuda" and cell.clock == "call" else 1
    times, inner = {one.peer.name: [] for one in running}, {}

    def turn_of(one, n):
        name = one.peer.name
        try:
            with one.peer.context():
                if name not in inner:
                    inner[name] = _inner(cell, min(one.clock(2, 1)))
                return one.clock(n, inner[name])
        except Exception as error:
            _refuse(one.row, error)
            running.remove(one)
            return []

    for one in list(running):
        turn_of(one, 1)
    start = time.perf_counter()
    sustained = cell.clock == "sustained"
    rounds = 3 if sustained else math.ceil(max(options.timings, 20) / burst)
    turn = 0
    while turn < rounds and running:
        warm = sustained or time.perf_counter() - start >= options.warmup
        first = turn % len(running)
        for one in running[first:] + running[:first]:
            got = turn_of(one, burst)
            if warm:
                times[one.peer.name] += got
        turn += warm
    for one in running:
        found = times[one.peer.name]
        p10, median, p90 = np.percentile(found, (10, 50, 90)) * 1e3
        one.row |= {"ms": median, "p10": p10, "p90": p90, "timings": len(found)}


def _inner(cell, estimate):
    """Calls to a timing, so that one lasts long enough for the clock."""
    target = {"host": 1e-3, "sustained": 1.0}.get(cell.clock, 5e-5)
    most = 200 if cell.clock == "host" else 1 << 30  # the launch queue holds about a thousand
    return max(1, min(most, math.ceil(target / estimate)))
