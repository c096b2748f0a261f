"""`python -m fastattn.bench.jax`: JAX's programs with fastattn's attention and with jax.nn's.

On the CPU a jitted forward and backward pass, beside jax.nn.dot_product_attention's. On a GPU a
jitted forward pass, beside its implementation="cudnn" and fastattn's own call of torch tensors. All
are timed in turn, round by round; the first results of each are compared with float64.

On a GPU a program is four calls, each of the last one's output as a model's layers are, and its
time that of a burst with one wait at the end: it is the kernels'. A program of one call, started,
run and waited for alone, has a time of its own.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import fastattn

from .arrays import arrays_for
from .machine import environment
from .report import aligned, geometric_mean

ROUNDS = 6
LAYERS = {"cpu": 1, "cuda": 4}
SUITES = [f"jax-{device}" for device in LAYERS]


@dataclasses.dataclass(frozen=True)
class Case:
    device: str
    b: int
    h: int
    s: int
    d: int
    dtype: str
    causal: bool

    @property
    def label(self):
        mask = "causal" if self.causal else "full"
        return f"{self.dtype} b{self.b} h{self.h} s{self.s} d{self.d} {mask}"


CASES = [
    *(Case("cpu", 1, 8, s, 64, "float32", c) for s in (512, 1024, 2048, 4096) for c in (0, 1)),
    *(Case("cuda", 4, 16, 4096, 128, "bfloat16", c) for c in (0, 1)),
]


def make_arrays(case):
    """q, k, v and the gradient of the output, (b, s, h, d) of float32."""
    rng = np.random.default_rng(0)
    shape = (case.b, case.s, case.h, case.d)
    return [rng.standard_normal(shape, np.float32) for _ in range(4)]


@dataclasses.dataclass(frozen=True)
class Program:
    start: Callable[[], tuple[Any, ...]]  # (out,) or (out, dq, dk, dv), which may be unfinished
    wait: Callable[[Any], Any]  # for what was started

    def __call__(self):
        results = self.start()
        self.wait(results)
        return results


def programs(jax, case, arrays, layers):
    """{name: a Program}"""
    from fastattn.jax import dot_product_attention

    def forward(function, **more):
        def call(q, k, v, dout):
            del dout
            for _ in range(layers):
                q = function(q, k, v, is_causal=bool(case.causal), **more)
            return (q,)

        return call

    def both(function):
        def call(q, k, v, dout):
            def out(q, k, v):
                return function(q, k, v, is_causal=bool(case.causal))

            found, pull = jax.vjp(out, q, k, v)
            return (found, *pull(dout))

        return call

    def jitted(call):
        call = jax.jit(call)
        return Program(lambda: call(*arrays), jax.block_until_ready)

    peer = jax.nn.dot_product_attention
    if case.device == "cpu":
        return {"fastattn": jitted(both(dot_product_attention)), "jax.nn": jitted(both(peer))}
    return {
        "fastattn": jitted(forward(dot_product_attention)),
        "cudnn": jitted(forward(peer, implementation="cudnn")),
        "torch": torch_program(case, arrays, layers),
    }


def torch_program(case, arrays, layers):
    """fastattn's call of the same numbers as torch tensors."""
    import torch

    q, k, v = (torch.from_dlpack(x) for x in arrays[:3])

    def start():
        out = q
        for _ in range(layers):
            out = fastattn.attention(out, k, v, causal=bool(case.causal), layout="bshd")
        return (out,)

    return Program(start, lambda _: torch.cuda.synchronize())


def head(x, n):
    """(s, d) of one head of the first sequence, float64."""
    x = x[0, :, n]
    return np.asarray(x.float().cpu() if hasattr(x, "cpu") else x, np.float64)


def exact(case, inputs, layers, gradients):
    """{head: results}, float64, of the first and the last head."""
    found = {}
    visible = np.tri(case.s, dtype=bool) if case.causal else np.ones((case.s, case.s), bool)
    scale = case.d**-0.5
    for n in {0, case.h - 1}:
        q, k, v, dout = (head(x, n) for x in inputs)
        out = q
        for _ in range(layers):
            scores = np.where(visible, out @ k.T * scale, -np.inf)
            p = np.exp(scores - scores.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            out = p @ v
        found[n] = [out]
        if gradients:
            ds = p * (dout @ v.T - (dout * out).sum(1, keepdims=True)) * scale
            found[n] += [ds @ k, ds.T @ q, p.T @ dout]
    return found


def error(results, wanted):
    """The largest distance from what exact() gave, of the largest number there."""
    return max(
        float(np.abs(head(got, n) - want).max() / np.abs(want).max())
        for n, of_head in wanted.items()
        for got, want in zip(results, of_head, strict=True)
    )


def seconds(calls, budget, burst, waits):
    """{name: the median time of a call}, in turn: a burst of each, of `burst` seconds or one call,
    until the budget is spent. `waits`: for every call; else for the last one."""
    sizes, times = {}, {name: [] for name in calls}
    for name, call in calls.items():
        start = time.perf_counter()
        call()
        sizes[name] = max(1, round(burst / (time.perf_counter() - start)))
    end = time.perf_counter() + budget
    order = list(calls)
    while len(times[order[0]]) < ROUNDS or time.perf_counter() < end:
        order = [*order[1:], order[0]]  # a GPU's clock depends on what ran before
        for name in order:
            call = calls[name]
            time.sleep(0.01)  # idle threads of the one are not to slow the other down
            start = time.perf_counter()
            for left in reversed(range(sizes[name])):
                results = call.start()
                if waits or not left:
                    call.wait(results)
            times[name].append((time.perf_counter() - start) / sizes[name])
    return {name: statistics.median(found) for name, found in times.items()}


def measure(jax, case, budget):
    """A row of the result."""
    inputs = make_arrays(case)
    arrays = [jax.numpy.asarray(x, case.dtype) for x in inputs]
    given = [np.asarray(x.astype(jax.numpy.float32)) for x in arrays]
    on_cpu, layers = case.device == "cpu", LAYERS[case.device]
    of_layers = {n: programs(jax, case, arrays, n) for n in {1, layers}}
    wanted = {n: exact(case, given, n, gradients=on_cpu) for n in of_layers}
    errors = {
        name: max(error(calls[name](), wanted[n]) for n, calls in of_layers.items())
        for name in of_layers[1]
    }
    # A burst is long beside the one wait of a GPU, which takes longer for JAX than for torch.
    times = seconds(of_layers[layers], budget, 0.02 if on_cpu else 0.1, waits=on_cpu)
    return {
        **dataclasses.asdict(case),
        "suite": f"jax-{case.device}",
        "label": case.label,
        "seconds": {name: x / layers for name, x in times.items()},
        "alone": seconds(of_layers[1], budget / 4, 0, waits=True),
        "errors": errors,
        "right": errors["fastattn"] <= {"float32": 1e-5, "bfloat16": 2e-2}[case.dtype],
    }


def lines(rows):
    """A table of text: each peer's time over ours, and all times of one call alone."""
    peers = [name for name in rows[0]["seconds"] if name != "fastattn"]
    heads = [*(f"x {name}" for name in peers), "ms alone", *(f"{x}'s" for x in peers)]
    yield ["", "ms", *heads, "error", *(f"{x}'s" for x in peers)]
    for row in rows:
        times = row["seconds"]
        ratios = [f"{times[name] / times['fastattn']:.3f}" for name in peers]
        alone = [f"{row['alone'][name] * 1e3:.3f}" for name in ("fastattn", *peers)]
        errors = [f"{row['errors'][name]:.1e}" for name in ("fastattn", *peers)]
        yield [row["label"], f"{times['fastattn'] * 1e3:.3f}", *ratios, *alone, *errors]


def main(argv):
    parser = argparse.ArgumentParser(prog="python -m fastattn.bench.jax", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--filter", default="", help="words that a case's name must have")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds for a case")
    parser.add_argument("--json", metavar="FILE", help="write header and rows")
    parser.add_argument("--commit", help="to be recorded")
    args = parser.parse_args(argv)
    import jax

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    words = set(args.filter.split())
    chosen = [x for x in CASES if x.device == device and words <= set(x.label.split())]
    if not chosen:
        parser.error(f"no case of this device has the words of --filter {args.filter!r}")
    rows = [measure(jax, case, args.budget) for case in chosen]
    print("\n".join(aligned(list(lines(rows)))))
    for name in list(rows[0]["seconds"])[1:]:
        ratios = [row["seconds"][name] / row["seconds"]["fastattn"] for row in rows]
        print(f"{name}'s time over fastattn's: geometric mean {geometric_mean(ratios):.3f}")
    if args.json:
        header = environment(arrays_for(device), "python -m fastattn.bench.jax", args.commit)
        pathlib.Path(args.json).write_text(json.dumps({"header": header, "rows": rows}, indent=1))
    bad = [row["label"] for row in rows if not row["right"]]
    if bad:
        sys.exit(f"wrong: {', '.join(bad)}")


if __name__ == "__main__":
    main(sys.argv[1:])
