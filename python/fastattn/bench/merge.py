"""`python -m fastattn.bench.merge`: merging partial results on a GPU, beside a plain copy.

Each case is first checked against float64, on heads from both ends and between; then it and a copy
of 1 GiB are timed in turn, round by round. Its rate is what it has to read and to write, by the
time that it takes; the share is of the copy's rate.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import statistics
import sys

import fastattn

from .arrays import arrays_for, gpu_usable
from .machine import environment
from .report import aligned

ROUNDS, GIB = 15, 1 << 30


@dataclasses.dataclass(frozen=True)
class Case:
    n: int
    b: int
    h: int
    s: int
    d: int
    dtype: str = "bf16"
    layout: str = "bhsd"
    stacked: bool = False  # the parts are slices of one array

    @property
    def label(self):
        how = " stacked" if self.stacked else ""
        shape = f"b{self.b} h{self.h} s{self.s} d{self.d}"
        return f"{self.n} parts {shape} {self.dtype} {self.layout}{how}"

    @property
    def bytes(self):
        """Read and written once."""
        rows, size = self.b * self.h * self.s, 4 if self.dtype == "fp32" else 2
        return (self.n + 1) * rows * (self.d * size + 4)


CASES = [
    Case(2, 16, 32, 8192, 128),
    Case(8, 16, 32, 8192, 128),
    Case(1, 16, 32, 8192, 128),
    Case(4, 16, 32, 8192, 128),
    Case(5, 16, 32, 8192, 128),
    Case(16, 8, 32, 8192, 128),
    Case(64, 2, 32, 8192, 128),
    Case(2, 16, 32, 8192, 128, "fp16"),
    Case(2, 16, 32, 8192, 128, "fp32"),
    Case(8, 8, 32, 8192, 128, "fp32"),
    Case(2, 16, 32, 8192, 128, layout="bshd"),
    Case(2, 16, 32, 8192, 64),
    Case(2, 8, 32, 8192, 256),
    Case(2, 8, 32, 8192, 100),  # 8 bytes at once
    Case(2, 8, 32, 8192, 102),  # 4
    Case(2, 8, 32, 8192, 101),  # element by element
    Case(16, 1, 32, 1, 128, "fp32", stacked=True),  # as after a split over the keys
    Case(64, 1, 32, 1, 128, "fp32", stacked=True),
    Case(16, 64, 32, 1, 128, "fp32", stacked=True),
    Case(2, 1, 32, 1, 128),
]


def make_parts(torch, case):
    """outs and lses, a part in eight empty."""
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[case.dtype]
    generator = torch.Generator("cuda").manual_seed(0)
    b, h, s, d = case.b, case.h, case.s, case.d
    shape = (b, h, s, d) if case.layout == "bhsd" else (b, s, h, d)
    outs = torch.empty(case.n, *shape, dtype=kind, device="cuda")
    outs.normal_(generator=generator)
    lses = torch.empty(case.n, b, h, s, device="cuda").normal_(0, 3, generator=generator)
    lses[torch.rand(lses.shape, generator=generator, device="cuda") < 0.125] = -torch.inf
    if case.stacked:
        return list(outs), list(lses)
    return [x.clone() for x in outs], [x.clone() for x in lses]


def wrong(torch, case, outs, lses, out, lse):
    """(error, bound) of some heads; inf where an element was not written or lse is off."""
    worst = [0.0, 0.0]
    if not (out.isfinite().all() and not lse.isnan().any()):
        return math.inf, 0.0
    for b, h in {(0, 0), (case.b - 1, case.h - 1), (case.b // 2, case.h // 3)}:
        at = (b, h) if case.layout == "bhsd" else (b, slice(None), h)
        mine, logs = torch.stack([x[at] for x in outs]), torch.stack([x[b, h] for x in lses])
        exact, low = (
            (logs.to(real).softmax(0).nan_to_num()[..., None] * mine.to(real)).sum(0)
            for real in (torch.float64, torch.float32)
        )
        rounding = ((exact.to(out.dtype) + 0.3).double() - 0.3 - exact).abs().max().item()
        if case.dtype == "fp32":
            rounding += exact.abs().max().item() * 2**-21  # 4 ulp
        allowed = 2 * (low.to(out.dtype).double() - exact).abs().max().item() + 2 * rounding
        worst = [
            max(worst[0], (out[at].double() - exact).abs().max().item()),
            max(worst[1], allowed),
        ]
        want = logs.double().logsumexp(0)
        if not torch.allclose(lse[b, h].double(), want, rtol=0, atol=1e-5):
            return math.inf, 0.0
    return tuple(worst)


def measure(arrays, case, copy):
    """A row of the result."""
    torch = arrays.torch
    outs, lses = make_parts(torch, case)
    poison = torch.full_like(outs[0], torch.nan)
    del poison  # the block that the allocator hands out next
    out, lse = fastattn.merge_states(outs, lses, layout=case.layout)
    error, bound = wrong(torch, case, outs, lses, out, lse)

    def merge():
        return fastattn.merge_states(outs, lses, layout=case.layout)

    inner = max(1, math.ceil(2e-4 / min(arrays.seconds([merge], 3, 1))))
    times = {"merge": [], "copy": []}
    for _ in range(ROUNDS):
        times["copy"] += arrays.seconds([copy], 1, 1)
        times["merge"] += arrays.seconds([merge], 1, inner)
    seconds = {name: statistics.median(found) for name, found in times.items()}
    again, again_lse = merge()
    return {
        **dataclasses.asdict(case),
        "suite": "merge",
        "label": case.label,
        "us": seconds["merge"] * 1e6,
        "rate": case.bytes / seconds["merge"],
        "copy": 2 * GIB / seconds["copy"],
        "error": error,
        "bound": bound,
        "repeats": torch.equal(again, out) and torch.equal(again_lse, lse),
    }


def lines(rows):
    """A table of text."""
    yield ["", "us", "TB/s", "copy TB/s", "share", "error", "allowed"]
    for row in rows:
        rates = (f"{row[name] / 1e12:.3f}" for name in ("rate", "copy"))
        errors = (f"{row[name]:.1e}" for name in ("error", "bound"))
        share = f"{row['rate'] / row['copy']:.3f}"
        yield [row["label"], f"{row['us']:.1f}", *rates, share, *errors]


def main(argv):
    parser = argparse.ArgumentParser(prog="python -m fastattn.bench.merge", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", metavar="FILE", help="write header and rows")
    parser.add_argument("--commit", help="to be recorded")
    args = parser.parse_args(argv)
    if not gpu_usable():
        sys.exit("needs torch, and a GPU that fastattn has kernels for")
    arrays = arrays_for("cuda")
    torch = arrays.torch
    source = torch.empty(GIB, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    rows = []
    for case in CASES:
        rows.append(measure(arrays, case, lambda: target.copy_(source)))
        torch.cuda.empty_cache()
    print("\n".join(aligned(list(lines(rows)))))
    if args.json:
        header = environment(arrays, "python -m fastattn.bench.merge", args.commit)
        pathlib.Path(args.json).write_text(json.dumps({"header": header, "rows": rows}, indent=1))
    bad = [row["label"] for row in rows if not row["error"] <= row["bound"] or not row["repeats"]]
    if bad:
        sys.exit(f"wrong, or not the same twice: {', '.join(bad)}")


if __name__ == "__main__":
    main(sys.argv[1:])
