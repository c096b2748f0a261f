"""The CPU backend beside torch, as a program meets them: `python -m fastattn.bench.cpu`.

Each cell is timed twice. *alone*: one call after 20 ms of rest, ours and torch's in turn.
*alternating*: ours, torch's, ours, torch's without a pause, as the operators of a model follow each
other; idle threads of the one may then be in the way of the other. The limit is the machine's
matrix rate in the same run, the faster of torch and NumPy in float32. Every output is compared with
float64 first. Cells of few keys, called short, run on one thread.

`--level avx2` holds this package, torch and the libraries of both to AVX2. `--json` keeps the rows
that the file has of other cells, so that a suite can be measured in several short runs.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import os
import pathlib
import platform
import sys
import time

import numpy as np

import fastattn

from . import formula
from .machine import cpu_name
from .report import geometric_mean

AVX2 = {  # each library's own way of asking
    "FASTATTN_CPU_LEVEL": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
}
MODES = {"alone": 0.02, "alternating": 0}  # seconds of rest before a call
TOLERANCE = {"fp64": 1e-12, "fp32": 2e-6, "fp16": 2e-3, "bf16": 2e-2}  # of the largest |v|


def cells():
    """(label, dtype, b, h, sq, sk, d, causal, threads); 0 threads: all."""
    product = itertools.product
    for dtype, d, causal, s in product(
        ("fp32", "bf16", "fp16"), (64, 128), (False, True), (512, 2048, 4096)
    ):
        mask = "causal" if causal else "full"
        yield f"{dtype} b1 h8 s{s} d{d} {mask}", dtype, 1, 8, s, s, d, causal, 0
    short = [
        (dtype, 1, h, sq, sk, 64)
        for dtype in ("fp32", "bf16")
        for h, sq, sk in ((10_000, 1, 1), (8, 4096, 1), (8, 4096, 16))
    ]
    short += [("fp64", 1, 10_000, 16, 16, 64), ("fp32", 1000, 1000, 1, 0, 64)]
    for dtype, b, h, sq, sk, d in short:
        yield f"{dtype} b{b} h{h} sq{sq} sk{sk} d{d} short", dtype, b, h, sq, sk, d, False, 1


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def turns(calls, budget, rest, rounds=5):
    """Times of the calls, in turn for `budget` seconds and at least so many rounds."""
    for call in calls:
        call()
    times = [[] for _ in calls]
    end = time.perf_counter() + budget
    while len(times[0]) < rounds or time.perf_counter() < end:
        for call, taken in zip(calls, times, strict=True):
            if rest:
                time.sleep(rest)
            taken.append(seconds(call))
    return [float(np.median(taken)) for taken in times]


def matrix_rate(torch, n=1536):
    """GFLOP/s of a float32 product: the faster of torch's and NumPy's."""
    a, b = torch.randn(n, n), torch.randn(n, n)
    x, y, out, z = a.numpy(), b.numpy(), torch.empty(n, n), np.empty((n, n), np.float32)
    best = math.inf
    for call in (lambda: torch.mm(a, b, out=out), lambda: np.matmul(x, y, out=z)):
        call()
        best = min(best, *(seconds(call) for _ in range(8)))
        time.sleep(0.05)  # idle threads of the one are not to slow the other down
    return 2 * n**3 / best / 1e9


def error(out, q, k, v, causal):
    """The largest distance from float64, over the first and last head, rows 0, 1, 31 ..."""
    worst = 0.0
    for b, h in {(0, 0), (q.shape[0] - 1, q.shape[1] - 1)}:
        rows = np.unique(np.r_[0, np.arange(1, q.shape[2], 31), q.shape[2] - 1])
        x, y, z = (t[b, h].double().numpy() for t in (q, k, v))
        seen = (np.arange(y.shape[0]) <= rows[:, None]) | (not causal)
        want = formula.attention(np, x[None, rows], y[None], z[None], seen[None]).out[0]
        worst = max(worst, float(np.abs(out[b, h].double().numpy()[rows] - want).max()))
    return worst


def measure(torch, cell, budget):
    label, dtype, b, h, sq, sk, d, causal, threads = cell
    kind = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}[dtype]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(b, h, s, d, generator=generator).to(getattr(torch, kind)) for s in (sq, sk, sk)
    )
    sdpa = torch.nn.functional.scaled_dot_product_attention
    calls = (
        lambda: fastattn.attention(q, k, v, causal=causal),
        lambda: sdpa(q, k, v, is_causal=causal),
    )
    row = {"cell": label, "error": error(calls[0](), q, k, v, causal)}
    largest = max(1.0, float(v.abs().max())) if v.numel() else 1.0
    row["right"] = row["error"] <= TOLERANCE[dtype] * largest
    flops = 4 * b * h * sq * sk * d / (2 if causal else 1) / 1e9
    for mode, rest in MODES.items():
        ours, torchs = turns(calls, budget, rest)
        row[mode] = {"ms": ours * 1e3, "torch_ms": torchs * 1e3, "x": torchs / ours}
        if flops and not threads:
            row[mode]["gflops"] = flops / ours
    return row


def report(rows):
    print(f"{'cell':32} {'alone ms':>9} {'x torch':>8} {'of mm':>6} {'alternating x':>14} error")
    for row in rows:
        limit = row["alone"].get("gflops", math.nan) / row["matrix_rate"]
        print(
            f"{row['cell']:32} {row['alone']['ms']:9.3f} {row['alone']['x']:8.2f} {limit:6.2f} "
            f"{row['alternating']['x']:14.2f} {row['error']:.1e}{'' if row['right'] else ' WRONG'}"
        )
    for mode in MODES:
        for dtype, x in ratios(rows, mode).items():
            mean = geometric_mean(x)
            print(f"{dtype} {mode}: geometric mean {mean:.2f}, worst {min(x):.2f}, {len(x)} cells")


def ratios(rows, mode):
    """{dtype: torch's time over ours, of each cell of the grid}: of all but the short ones."""
    found = {}
    for row in rows:
        if not row["cell"].endswith("short"):
            found.setdefault(row["cell"].split()[0], []).append(row[mode]["x"])
    return found


def hold(torch, threads):
    """Both sides on so many threads; 0: on all."""
    fastattn.set_num_threads(threads or None)
    torch.set_num_threads(fastattn.get_num_threads())


def arguments(program, argv, cells):
    """(what the command line says, the cells that it chose)."""
    parser = argparse.ArgumentParser(prog=f"python -m {program}")
    parser.add_argument("--level", choices=("avx2", "all"), default="all")
    parser.add_argument("--filter", default="", help="words that a cell's name must have")
    parser.add_argument("--budget", type=float, default=0.6, help="seconds for a cell and mode")
    parser.add_argument("--json", type=pathlib.Path, help="file for the results")
    args = parser.parse_args(argv)
    words = set(args.filter.split())
    chosen = [cell for cell in cells if words <= set(cell[0].split())]
    if not chosen:
        parser.error(f"no cell has the words of --filter {args.filter!r}")
    if args.level == "avx2" and not AVX2.items() <= os.environ.items():
        # once more from the start: libraries read these variables when they are loaded
        os.execve(sys.executable, [sys.executable, "-m", program, *argv], {**os.environ, **AVX2})
    return args, chosen


def run(torch, program, args, chosen, every, measured):
    """The rows of the chosen cells; in args.json they join those that it has, in the order of
    every cell."""
    known = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    header = {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_name(),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "level": fastattn.info()["cpu"]["level"],
        "torch": f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}",
        "fastattn": fastattn.__version__,
        "command": f"python -m {program} --level {args.level}",
    }
    names, rows, order = {cell[0] for cell in chosen}, [], [cell[0] for cell in every]
    hold(torch, 0)
    for cell in chosen:
        rate, load = matrix_rate(torch), os.getloadavg()[0]
        row = measured(cell)
        rows.append({**row, "matrix_rate": max(rate, matrix_rate(torch)), "load": load})
        if args.json:
            kept = [row for row in known.get("rows", []) if row["cell"] not in names]
            kept = sorted(kept + rows, key=lambda row: order.index(row["cell"]))
            text = ",\n".join("  " + json.dumps(row) for row in kept)
            args.json.write_text(f'{{"header": {json.dumps(header)},\n"rows": [\n{text}\n]}}\n')
    print(header, f"load {os.getloadavg()}")
    return rows


def main(argv):
    program, every = "fastattn.bench.cpu", list(cells())
    args, chosen = arguments(program, argv, every)
    import torch

    def measured(cell):
        hold(torch, cell[-1])
        row = measure(torch, cell, args.budget)
        hold(torch, 0)
        return row

    rows = run(torch, program, args, chosen, every, measured)
    report(rows)
    return 0 if all(row["right"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
