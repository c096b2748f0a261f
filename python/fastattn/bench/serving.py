"""`python -m fastattn.bench.serving`: few rows against long caches on a GPU, beside cuDNN and FA3.

Each case is called through attention, or attention_kvcache where its keys lie in pages or its
sequences differ; its inputs rotate, so that no cache lies in the L2. The first call of each
implementation is checked against float64, on heads from both ends; then all are timed in turn,
round by round, by replays of a CUDA graph that calls them once with each set of inputs, and once
more without a graph. `share` is the bytes of K and V that are read, by our time, over the rate of
a copy of 1 GiB (read and written) in the same run; `host` the host's time of an eager call. Then
chunked prefill (fastattn.bench.chunked).
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import sys

import numpy as np

import fastattn

from . import chunked
from .arrays import arrays_for, gpu_usable
from .machine import environment
from .report import aligned

ROUNDS, GIB, L2 = 11, 1 << 30, 60 << 20


@dataclasses.dataclass(frozen=True)
class Case:
    b: int
    hq: int
    hk: int
    sk: int
    sq: int = 1
    d: int = 128
    page: int = 0  # keys in a page; 0: no pages
    ragged: bool = False  # lengths from 128 to sk, log-uniform
    invariant: bool = False
    append: bool = False  # the last sq keys are new ones, written by the call
    mass: bool = False

    @property
    def label(self):
        words = [f"b{self.b} h{self.hq}:{self.hk} sq{self.sq} sk{self.sk} d{self.d}"]
        words += [f"pages of {self.page}"] * bool(self.page)
        words += ["ragged"] * self.ragged + ["invariant"] * self.invariant
        words += ["append"] * self.append + ["mass"] * self.mass
        return " ".join(words)

    @property
    def lengths(self):
        if not self.ragged:
            return np.full(self.b, self.sk, np.int32)
        spread = np.random.default_rng(0).uniform(np.log(128), np.log(self.sk), self.b)
        return np.exp(spread).astype(np.int32)

    @property
    def bytes(self):
        return int(self.lengths.sum(dtype=np.int64)) * self.hk * self.d * 4


TABLE = [
    *(Case(1, 32, 8, sk) for sk in (1024, 8192, 131072)),
    Case(16, 32, 8, 8192),
    Case(64, 32, 8, 4096),
    Case(128, 64, 8, 2048),
    Case(16, 32, 32, 4096),
    Case(16, 32, 8, 8192, sq=8),
]
PAGED = [
    *(Case(64, 32, 8, 4096, page=page) for page in (256, 64, 16, 1)),
    *(Case(1, 32, 8, sk, page=page) for sk in (1024, 8192) for page in (64, 1)),
    Case(64, 32, 8, 32768, page=64, ragged=True),
]
MORE = [
    *(Case(b, 32, 8, 4096) for b in (1, 2, 4, 8, 16, 32, 128)),
    *(Case(16, 32, 8, 8192, d=d) for d in (64, 256)),
    *(Case(b, 32, 8, 8192, invariant=True) for b in (1, 16)),
    *(Case(b, 32, 8, 8192, page=64, append=True) for b in (1, 16)),
    *(Case(b, 32, 8, 8192, mass=True) for b in (1, 16)),
]
CASES = {"table": TABLE, "paged": PAGED, "more": MORE}


def make(torch, case, seed):
    """q (b, sq, hq, d); k and v (b, sk, hk, d), or pages of them; lengths; the table or None."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape):
        x = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
        return x.normal_(generator=generator)

    lengths = torch.from_numpy(case.lengths - case.sq * case.append).cuda()
    q = normal(case.b, case.sq, case.hq, case.d)
    if not case.page:
        return q, *(normal(case.b, case.sk, case.hk, case.d) for _ in "kv"), lengths, None
    columns = -(-case.sk // case.page)
    need = int((-(-case.lengths // case.page)).sum())
    order = torch.randperm(need, generator=generator, device="cuda").int()
    table = torch.zeros(case.b, columns, dtype=torch.int32, device="cuda")
    first = 0
    for n, length in enumerate(case.lengths.tolist()):
        used = -(-length // case.page)
        table[n, :used] = order[first : first + used]
        first += used
    return q, *(normal(need, case.page, case.hk, case.d) for _ in "kv"), lengths, table


def ours(torch, case):
    more = {"causal": case.sq > 1, "batch_invariant": case.invariant}
    if case.append:
        return lambda q, k, v, n, t: fastattn.attention_kvcache(
            q, k, v, n, k=q[:, :, : case.hk], v=q[:, :, -case.hk :], page_table=t, **more
        )
    if case.mass:
        return lambda q, k, v, n, t: fastattn.attention_kvcache(
            q, k, v, n, page_table=t, return_mass=True, **more
        )[0]
    if case.page or case.ragged:
        return lambda q, k, v, n, t: fastattn.attention_kvcache(q, k, v, n, page_table=t, **more)
    return lambda q, k, v, n, t: fastattn.attention(q, k, v, layout="bshd", **more)


def cudnn(torch, case):
    """SDPA, which has neither pages nor a causal mask that ends at the last key."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    if case.page or case.ragged or case.sq > 1 or case.invariant or case.append or case.mass:
        return None

    def call(q, k, v, n, t):
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return sdpa(q, k, v, enable_gqa=case.hq != case.hk).transpose(1, 2)

    return call


def fa3(torch, case):
    """flash_attn_with_kvcache, which some builds have without pages, or without new keys."""
    if case.invariant or case.mass:
        return None
    try:
        from fa3_fwd_interface import flash_attn_func, flash_attn_with_kvcache
    except ImportError:
        return None

    def call(q, k, v, n, t):
        more = {"causal": case.sq > 1}
        if case.append:
            more |= {"k": q[:, :, : case.hk], "v": q[:, :, -case.hk :]}
        if case.page or case.ragged or case.append:
            out = flash_attn_with_kvcache(q, k, v, cache_seqlens=n, page_table=t, **more)
        else:
            out = flash_attn_func(q, k, v, **more)
        return out[0] if isinstance(out, tuple) else out

    return call


IMPLEMENTATIONS = {"fastattn": ours, "cudnn": cudnn, "fa3": fa3}


def error(torch, case, inputs, out):
    """The largest, of heads at both ends, relative to what bfloat16's own roundings may do."""
    q, k, v, lengths, table = inputs
    worst, group = 0.0, case.hq // case.hk
    for b, h in {(0, 0), (case.b - 1, case.hq - 1), (case.b // 2, case.hq // 3)}:
        n = int(lengths[b]) + case.sq * case.append
        if table is None:
            mine = [x[b, :n, h // group].double() for x in (k, v)]
        else:
            pages = table[b, : -(-n // case.page)].long()
            mine = [x[pages, :, h // group].flatten(0, 1)[:n].double() for x in (k, v)]
        s = q[b, :, h].double() @ mine[0].T * case.d**-0.5
        if case.sq > 1:
            s += torch.full_like(s, -torch.inf).triu(n - case.sq + 1)
        want = s.softmax(-1) @ mine[1]
        off = (out[b, :, h].double() - want).abs().max() / want.abs().max()
        worst = max(worst, float(off) if out[b, :, h].isfinite().all() else np.inf)
    return worst


def captured(torch, call, sets):
    """A replay calls it once with each set of inputs."""
    for inputs in sets[:2]:
        call(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call(*inputs) for inputs in sets]
    return graph, kept


def measure(arrays, case, copy):
    torch = arrays.torch
    count = max(3, min(40, -(-3 * L2 // case.bytes)))
    sets = [make(torch, case, seed) for seed in range(count)]
    row = {"suite": "serving", "label": case.label, "bytes": case.bytes, "us": {}, "eager": {}}
    row |= {"errors": {}, "kernel": ""}
    replays, calls = {"copy": copy}, {}
    kept = []
    for name, build in IMPLEMENTATIONS.items():
        if (call := build(torch, case)) is None:
            continue
        try:
            row["errors"][name] = error(torch, case, sets[0], call(*sets[0]))
            graph, outputs = captured(torch, call, sets)
        except (RuntimeError, NotImplementedError) as refusal:
            print(f"{case.label}: {name}: {str(refusal).splitlines()[0]}", file=sys.stderr)
            continue
        kept.append((graph, outputs))
        replays[name] = graph.replay
        calls[name] = lambda call=call: [call(*inputs) for inputs in sets]
    times = {name: [] for name in replays}
    eager = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, replay in replays.items():
            times[name] += arrays.seconds([replay], 1, 1)
        for name, call in calls.items():
            eager[name] += arrays.seconds([call], 1, 1)
    if "fastattn" in calls:
        one = IMPLEMENTATIONS["fastattn"](torch, case)
        host = arrays.host_seconds([lambda: one(*sets[0])], 5, 20)
        row["host"] = statistics.median(host) * 1e6
    row["copy"] = 2 * GIB / statistics.median(times.pop("copy"))
    row["us"] = {name: statistics.median(x) / count * 1e6 for name, x in times.items()}
    row["eager"] = {name: statistics.median(x) / count * 1e6 for name, x in eager.items()}
    if "fastattn" in row["us"]:
        row["share"] = case.bytes / row["us"]["fastattn"] * 1e6 / row["copy"]
    return row


def lines(rows):
    yield [
        "",
        "us",
        "eager",
        "host",
        "share",
        *(f"x {x}" for x in list(IMPLEMENTATIONS)[1:]),
        "error",
    ]
    for row in rows:
        us = row["us"]
        if "fastattn" not in us:
            yield [row["label"], *["-"] * 7]
            continue
        others = [
            f"{us[x] / us['fastattn']:.2f}" if x in us else "-" for x in list(IMPLEMENTATIONS)[1:]
        ]
        eager, host = row["eager"]["fastattn"], row.get("host", np.nan)
        first = f"{us['fastattn']:.1f}", f"{eager:.1f}", f"{host:.1f}", f"{row['share']:.3f}"
        yield [row["label"], *first, *others, f"{row['errors']['fastattn']:.1e}"]


def losing(rows):
    """[(the least of the others' times over ours, case)] of those below 1, the least first."""
    found = []
    for row in rows:
        others = [time for name, time in row["us"].items() if name != "fastattn"]
        if others and "fastattn" in row["us"]:
            found.append((min(others) / row["us"]["fastattn"], row["label"]))
    return sorted((x, label) for x, label in found if round(x, 2) < 1)


def main(argv):
    parser = argparse.ArgumentParser(prog="python -m fastattn.bench.serving", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--cases", default="table,paged,more", help="of: %(default)s")
    parser.add_argument("--no-chunked", dest="chunked", action="store_false", help="leave it out")
    parser.add_argument("--json", metavar="FILE", help="write header and rows")
    parser.add_argument("--commit", help="to be recorded")
    args = parser.parse_args(argv)
    if not gpu_usable():
        sys.exit("needs torch, and a GPU that fastattn has kernels for")
    arrays = arrays_for("cuda")
    torch = arrays.torch
    source = torch.empty(GIB, dtype=torch.uint8, device="cuda").random_()
    target, rows = torch.empty_like(source), []
    for case in (case for name in args.cases.split(",") for case in CASES[name]):
        rows.append(measure(arrays, case, lambda: target.copy_(source)))
        torch.cuda.empty_cache()
        print("  ".join(list(lines(rows[-1:]))[1]), flush=True)
    print("\n".join(aligned(list(lines(rows)))))
    print("slower:", "; ".join(f"{label} {x:.2f}" for x, label in losing(rows)) or "none")
    steps = [chunked.measure(arrays, step) for step in chunked.STEPS if args.chunked]
    if steps:
        print("\n".join(aligned(list(chunked.lines(steps)))))
    if args.json:
        header = environment(arrays, "python -m fastattn.bench.serving", args.commit)
        pathlib.Path(args.json).write_text(
            json.dumps({"header": header, "rows": rows + steps}, indent=1)
        )
    bad = [row["label"] for row in rows if not row["errors"].get("fastattn", np.inf) < 2e-2]
    if bad:
        sys.exit(f"wrong: {', '.join(bad)}")


if __name__ == "__main__":
    main(sys.argv[1:])
