"""`python -m fastattn.bench.llama`: a training step of a Llama on a GPU, with fastattn's attention
and with torch's.

The model calls torch's scaled_dot_product_attention, which `use_fastattn()` makes ours. A step is
the forward and the backward pass and AdamW's update. The gradients of both are compared first with
those of the same weights in float32. Then steps of the two are timed in turn, and the memory that
each has at its peak is read.
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import sys

import numpy as np

from .arrays import arrays_for, gpu_usable
from .machine import environment
from .report import aligned

ROUNDS = 12


@dataclasses.dataclass(frozen=True)
class Config:
    layers: int = 8
    width: int = 2048
    heads: int = 16
    kv_heads: int = 8
    inner: int = 5632
    words: int = 32_000
    b: int = 1
    s: int = 8192

    @property
    def label(self):
        heads = f"h{self.heads}:{self.kv_heads} d{self.width // self.heads}"
        return f"{self.layers} layers of {self.width}, {heads}, b{self.b} s{self.s}"


def ours():
    from fastattn.torch import use_fastattn

    return use_fastattn("raise")


WAYS = {"fastattn": ours, "sdpa": contextlib.nullcontext}


def gradients(model, words, way):
    """Of all weights."""
    import torch

    with way():
        return torch.autograd.grad(model(words), list(model.parameters()))


def distance(found, wanted):
    """Of all gradients at once, relative."""
    pairs = list(zip(found, wanted, strict=True))
    off = sum(float((x.float() - y).double().square().sum()) for x, y in pairs)
    return (off / sum(float(y.double().square().sum()) for _, y in pairs)) ** 0.5


def measure(arrays, config):
    """The row of the result."""
    import torch

    from .llama_model import Llama

    torch.manual_seed(0)
    model = Llama(config).to(arrays.device, torch.bfloat16)
    words = torch.randint(config.words, (config.b, config.s), device=arrays.device)
    exact = Llama(config).to(arrays.device)
    exact.load_state_dict({name: x.float() for name, x in model.state_dict().items()})
    wanted = gradients(exact, words, WAYS["sdpa"])
    del exact
    errors = {name: distance(gradients(model, words, way), wanted) for name, way in WAYS.items()}
    del wanted
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=arrays.device == "cuda")

    def step_of(way):
        def step():
            with way():
                model(words).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    steps = {name: [step_of(way)] for name, way in WAYS.items()}
    peaks = {name: peak(step) for name, (step,) in steps.items()}
    times = {name: [] for name in steps}
    for turn in range(ROUNDS):
        for name in list(steps)[:: 1 if turn % 2 else -1]:
            times[name] += arrays.seconds(steps[name], 1, 1)
    ms = {name: np.percentile(x, (10, 50, 90)) * 1e3 for name, x in times.items()}
    return {
        **dataclasses.asdict(config),
        "suite": "llama",
        "label": config.label,
        "ms": {name: x[1] for name, x in ms.items()},
        "p10": {name: x[0] for name, x in ms.items()},
        "p90": {name: x[2] for name, x in ms.items()},
        "ratio": ms["sdpa"][1] / ms["fastattn"][1],
        "peak": peaks,
        "errors": errors,
        "right": errors["fastattn"] <= 1.1 * errors["sdpa"],
    }


def peak(step):
    """Bytes that torch's allocator has given out at the most, in a second step: the first makes the
    optimizer's state. 0 without a GPU."""
    import torch

    step()
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def lines(rows):
    """A table of text."""
    yield ["", "ms", "p10", "p90", "x SDPA", "peak GiB", "SDPA's", "error", "SDPA's"]
    for row in rows:
        times = [f"{row[key]['fastattn']:.2f}" for key in ("ms", "p10", "p90")]
        peaks = [f"{row['peak'][name] / 2**30:.2f}" for name in WAYS]
        errors = [f"{row['errors'][name]:.2e}" for name in WAYS]
        yield [row["label"], *times, f"{row['ratio']:.3f}", *peaks, *errors]


def main(argv):
    parser = argparse.ArgumentParser(prog="python -m fastattn.bench.llama", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", metavar="FILE", help="write header and rows")
    parser.add_argument("--commit", help="to be recorded")
    args = parser.parse_args(argv)
    if not gpu_usable():
        sys.exit("needs a GPU that fastattn has kernels for")
    arrays = arrays_for("cuda")
    rows = [measure(arrays, Config())]
    print("\n".join(aligned(list(lines(rows)))))
    if args.json:
        header = environment(arrays, "python -m fastattn.bench.llama", args.commit)
        pathlib.Path(args.json).write_text(json.dumps({"header": header, "rows": rows}, indent=1))
    if not all(row["right"] for row in rows):
        sys.exit("the gradients are further from float32's than SDPA's are")


if __name__ == "__main__":
    main(sys.argv[1:])
