"""A training step's attention on the CPU beside torch's: `python -m fastattn.bench.training`.

A step is the forward and the backward pass of tensors that require grad: dq, dk and dv. Each cell
is timed as in fastattn.bench.cpu, *alone* after 20 ms of rest and *alternating* with torch's; in 16
bits, where a step of torch's may take seconds, alone, beside our own float32 too. The backward pass
by itself is set against the machine's matrix rate of the same run. Other cells: one head on one
thread and on all, and what one step of 16,384 tokens adds to a process's memory at its peak.
Gradients of the last head are compared with float64 first.

`--level` and `--json` are those of fastattn.bench.cpu.
"""

from __future__ import annotations

import itertools
import json
import pathlib
import re
import subprocess
import sys
import time

import numpy as np

import fastattn

from . import cpu
from .report import geometric_mean

TOLERANCE = {"fp32": 1e-5, "fp16": 4e-3, "bf16": 4e-2}  # of a gradient's largest element
KINDS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
SUITE = "training"


def cells():
    """(label, dtype, h, s, d, causal, part): a "step", its "threads", or its "memory"."""
    for dtype, d, causal, s in itertools.product(
        KINDS, (64, 128), (False, True), (512, 2048, 4096)
    ):
        if dtype == "fp32" or s < 4096:
            mask = "causal" if causal else "full"
            yield f"{dtype} b1 h8 s{s} d{d} {mask}", dtype, 8, s, d, causal, "step"
    for d in (64, 128):
        yield f"fp32 b1 h1 s4096 d{d} threads", "fp32", 1, 4096, d, False, "threads"
    yield "fp32 b1 h8 s16384 d64 memory", "fp32", 8, 16384, 64, False, "memory"


def inputs(torch, dtype, h, s, d):
    """q, k, v, which require grad, and dout."""
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randn(1, h, s, d, generator=generator) for _ in range(4))
    q, k, v, dout = (x.to(getattr(torch, KINDS[dtype])) for x in drawn)
    return *(x.requires_grad_() for x in (q, k, v)), dout


def forwards(torch):
    """Ours and torch's."""
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return {
        "fastattn": lambda q, k, v, causal: fastattn.attention(q, k, v, causal=causal),
        "torch": lambda q, k, v, causal: sdpa(q, k, v, is_causal=causal),
    }


def step_of(torch, name, tensors, causal):
    *qkv, dout = tensors
    forward = forwards(torch)[name]
    return lambda: torch.autograd.grad(forward(*qkv, causal), qkv, dout)


def exact(torch, tensors, causal):
    """dq, dk and dv of the last head in float64, some rows at a time."""
    q, k, v, dout = (x.detach()[0, -1].double() for x in tensors)
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    keys, scale = torch.arange(len(k)), q.shape[1] ** -0.5
    for rows in torch.arange(len(q)).split(512):
        s = scale * (q[rows] @ k.T)
        if causal:
            s = s.masked_fill(keys > rows[:, None], -torch.inf)
        p, dp = s.softmax(1), dout[rows] @ v.T
        ds = scale * p * (dp - (p * dp).sum(1, keepdim=True))
        dq[rows] = ds @ k
        dk += ds.T @ q[rows]
        dv += p.T @ dout[rows]
    return dq, dk, dv


def checked(torch, cell, tensors, gradients):
    """The row's first fields: the last head's greatest distance from float64, in parts of a
    gradient's largest element."""
    label, dtype, *_, causal, _ = cell
    pairs = zip(gradients, exact(torch, tensors, causal), strict=True)
    error = max(float((x[0, -1].double() - y).abs().max() / y.abs().max()) for x, y in pairs)
    return {"suite": SUITE, "cell": label, "error": error, "right": error <= TOLERANCE[dtype]}


def measure_step(torch, cell, budget):
    _, dtype, h, s, d, causal, _ = cell
    tensors = inputs(torch, dtype, h, s, d)
    calls = {name: step_of(torch, name, tensors, causal) for name in forwards(torch)}
    modes = dict(cpu.MODES)
    if dtype != "fp32":
        calls["fp32"] = step_of(torch, "fastattn", inputs(torch, "fp32", h, s, d), causal)
        del modes["alternating"]
    row = checked(torch, cell, tensors, calls["fastattn"]())
    for mode, rest in modes.items():
        taken = dict(zip(calls, cpu.turns(list(calls.values()), budget, rest, 3), strict=True))
        ours = taken["fastattn"]
        row[mode] = {"ms": ours * 1e3, "torch_ms": taken["torch"] * 1e3, "x": taken["torch"] / ours}
        if "fp32" in taken:
            row[mode]["x_fp32"] = taken["fp32"] / ours
    *qkv, dout = (x.detach() for x in tensors)
    out, lse = fastattn.attention(*qkv, causal=causal, return_lse=True)
    (taken,) = cpu.turns(
        [lambda: fastattn.attention_backward(dout, *qkv, out, lse, causal=causal)],
        budget / 2,
        cpu.MODES["alone"],
        3,
    )
    flops = 2.5 * 4 * h * s * s * d / (2 if causal else 1)
    return row | {"backward": {"ms": taken * 1e3, "gflops": flops / taken / 1e9}}


def measure_threads(torch, cell, budget):
    """One thread and all of them, in turn."""
    _, dtype, h, s, d, causal, _ = cell
    tensors = inputs(torch, dtype, h, s, d)
    step = step_of(torch, "fastattn", tensors, causal)
    row = checked(torch, cell, tensors, step())
    threads = (1, fastattn.get_num_threads())
    taken, end = ([], []), time.perf_counter() + 4 * budget
    while len(taken[1]) < 3 or time.perf_counter() < end:
        for n, times in zip(threads, taken, strict=True):
            cpu.hold(torch, n)
            time.sleep(cpu.MODES["alone"])
            times.append(cpu.seconds(step))
    cpu.hold(torch, 0)
    one, every = (float(np.median(times)) for times in taken)
    return row | {"threads": {"n": threads[1], "ms": every * 1e3, "x": one / every}}


def peak_mib():
    """The most memory that this process has held. Not getrusage's: that counts its parent's."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"^VmHWM:\s*(\d+) kB$", status, re.M)[1]) / 1024


def say_peak(name, words):
    """MiB that one step adds to what the process had before, after the row's first fields."""
    import torch

    cell = json.loads(words)
    _, dtype, h, s, d, causal, _ = cell
    step_of(torch, name, inputs(torch, dtype, h, 64, d), causal)()  # what is loaded by a first call
    tensors = inputs(torch, dtype, h, s, d)
    before = peak_mib()
    gradients = step_of(torch, name, tensors, causal)()
    mib = peak_mib() - before
    print(json.dumps(checked(torch, cell, tensors, gradients) | {"mib": mib}))


def measure_memory(torch, cell, budget):
    """Each side in a process of its own."""
    program = "import sys; from fastattn.bench import training; training.say_peak(*sys.argv[1:])"
    found = {}
    for name in forwards(torch):
        command = [sys.executable, "-c", program, name, json.dumps(cell)]
        found[name] = json.loads(subprocess.check_output(command))
    row = found["fastattn"]
    ours, other = row.pop("mib"), found["torch"]["mib"]
    return row | {"memory": {"mib": ours, "torch_mib": other}}


MEASURES = {"step": measure_step, "threads": measure_threads, "memory": measure_memory}


def columns(row):
    """{title: what a table says of a row of times, None where it was not measured}: the time of
    torch's step and of our own in float32 over ours, and the backward pass's part of the rate."""
    alone, threads, backward = (row.get(name, {}) for name in ("alone", "threads", "backward"))
    return {
        "ms": alone.get("ms", threads.get("ms")),
        "x torch": alone.get("x"),
        "x torch, alternating": row.get("alternating", {}).get("x"),
        "x float32": alone.get("x_fp32"),
        "x one thread": threads.get("x"),
        "of the matrix rate": backward["gflops"] / row["matrix_rate"] if backward else None,
    }


def timed(rows):
    return [row for row in rows if "memory" not in row]


def memory(rows):
    """A sentence for each row of memory."""
    for row in rows:
        if "memory" in row:
            ours, other = row["memory"]["mib"], row["memory"]["torch_mib"]
            yield f"{row['cell']}: a step adds {ours:.0f} MiB at its peak, torch's {other:.0f}."


def report(rows):
    for number, row in enumerate(timed(rows)):
        found = columns(row)
        if number == 0:
            print(f"{'cell':30}", *(f"{title:>20}" for title in found), "error")
        texts = ("" if x is None else f"{x:.2f}" for x in found.values())
        wrong = "" if row["right"] else " WRONG"
        print(f"{row['cell']:30}", *(f"{text:>20}" for text in texts), f"{row['error']:.1e}{wrong}")
    for mode in cpu.MODES:
        for dtype, x in ratios(rows, mode).items():
            mean = geometric_mean(x)
            print(f"{dtype} {mode}: geometric mean {mean:.2f}, worst {min(x):.2f}, {len(x)} cells")
    for sentence in memory(rows):
        print(sentence)


def ratios(rows, mode):
    """{dtype: torch's time over ours, of each step that was timed so}."""
    found = {}
    for row in rows:
        if mode in row:
            found.setdefault(row["cell"].split()[0], []).append(row[mode]["x"])
    return found


def main(argv):
    program, every = "fastattn.bench.training", list(cells())
    args, chosen = cpu.arguments(program, argv, every)
    import torch

    def measured(cell):
        return MEASURES[cell[-1]](torch, cell, args.budget)

    rows = cpu.run(torch, program, args, chosen, every, measured)
    report(rows)
    return 0 if all(row["right"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
