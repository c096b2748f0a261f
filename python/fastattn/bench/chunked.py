"""Prompts and single tokens in one call over a cache in pages, beside calls of their own:
`python -m fastattn.bench.chunked`. fastattn.bench.serving runs it too.

A step of a serving engine: `prompts` sequences have `new` tokens each, `singles` one token after
`keys` cached ones. `apart` is the time of the prompts alone, packed, their keys in one piece, plus
that of the single tokens alone, by attention_kvcache; `paged` has the prompts' keys in pages too.
Each is a replay of a CUDA graph, in turn.
"""

import dataclasses
import statistics

import numpy as np

import fastattn

ROUNDS = 15


@dataclasses.dataclass(frozen=True)
class Step:
    prompts: int = 8
    new: int = 2048
    singles: int = 120
    keys: int = 4096
    hq: int = 32
    hk: int = 8
    d: int = 128
    page: int = 64

    @property
    def label(self):
        heads = f"h{self.hq}:{self.hk} d{self.d}"
        return (
            f"{self.prompts} prompts of {self.new} + {self.singles} tokens at {self.keys} "
            f"{heads} pages of {self.page}"
        )

    @property
    def rows(self):
        return [self.new] * self.prompts + [1] * self.singles

    @property
    def lengths(self):
        return [self.new] * self.prompts + [self.keys] * self.singles


STEPS = [Step(page=page) for page in (256, 64, 16, 1)] + [Step(singles=0), Step(new=512)]


def calls_of(torch, step, device="cuda"):
    """{name: call}; each returns what the step's rows are, (rows, hq, d)."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        x = torch.empty(shape, dtype=torch.bfloat16, device=device)
        return x.normal_(generator=generator)

    def int32(numbers):
        return torch.tensor(numbers, dtype=torch.int32, device=device)

    rows, lengths = step.rows, step.lengths
    columns = -(-max(lengths) // step.page)
    order = torch.randperm(len(rows) * columns, generator=generator, device=device).int()
    table = order.view(len(rows), columns)
    k, v = (normal(len(rows) * columns, step.page, step.hk, step.d) for _ in "kv")
    q = normal(sum(rows), step.hq, step.d)
    ends, used = int32(np.cumsum([0, *rows])), int32(lengths)
    many, n = step.prompts * step.new, step.prompts

    def whole(x):
        pages = x[table[:n, : -(-step.new // step.page)].long()]
        return pages.flatten(1, 2)[:, : step.new].flatten(0, 1).contiguous()

    packed = [whole(x) for x in (k, v)]
    most = max(rows), max(lengths)

    def together():
        more = {"page_table": table, "seqused_k": used, "causal": True}
        return fastattn.attention_varlen(q, k, v, ends, None, *most, **more)

    def prompts():
        cu = ends[: n + 1]
        given = q[:many], *packed, cu, cu, step.new, step.new
        return fastattn.attention_varlen(*given, causal=True)

    def paged_prompts():
        more = {"page_table": table[:n], "seqused_k": used[:n], "causal": True}
        given = q[:many], k, v, ends[: n + 1], None, step.new, step.new
        return fastattn.attention_varlen(*given, **more)

    def singles():
        given = q[many:, None], k, v, used[n:]
        return fastattn.attention_kvcache(*given, page_table=table[n:])[:, 0]

    found = {"together": together, "prompts": prompts, "paged prompts": paged_prompts}
    return found | ({"singles": singles} if step.singles else {})


def check(torch, calls):
    """How far one call is from those apart, of the largest that is there."""
    out = calls["together"]()
    parts = [calls[name]() for name in ("prompts", "singles") if name in calls]
    want = torch.cat(parts)
    return float((out.float() - want.float()).abs().max() / want.float().abs().max())


def measure(arrays, step):
    torch = arrays.torch
    calls = calls_of(torch, step)
    error = check(torch, calls)
    graphs, times = {}, {name: [] for name in calls}
    for name, call in calls.items():
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            call()
    for _ in range(ROUNDS):
        for name, graph in graphs.items():
            times[name] += arrays.seconds([graph.replay], 1, 1)
    us = {name: statistics.median(x) * 1e6 for name, x in times.items()}
    singles = us.get("singles", 0.0)
    return {
        "suite": "chunked",
        "label": step.label,
        "us": us,
        "error": error,
        "x apart": us["together"] / (us["prompts"] + singles),
        "x paged": us["together"] / (us["paged prompts"] + singles),
    }


def lines(rows):
    names = "together", "prompts", "paged prompts", "singles"
    yield ["", *names, "x apart", "x paged", "difference"]
    for row in rows:
        times = (f"{row['us'][name]:.1f}" if name in row["us"] else "-" for name in names)
        yield [
            row["label"],
            *times,
            f"{row['x apart']:.3f}",
            f"{row['x paged']:.3f}",
            f"{row['error']:.1e}",
        ]


def main():
    from .arrays import arrays_for
    from .report import aligned

    arrays = arrays_for("cuda")
    print("\n".join(aligned(list(lines([measure(arrays, step) for step in STEPS])))))


if __name__ == "__main__":
    main()
