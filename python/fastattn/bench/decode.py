"""Few rows against many keys on the CPU, beside torch: `python -m fastattn.bench.decode`.

A cell is timed after 20 ms of rest, in turn with torch's SDPA and with what a program without it
writes, matmul, softmax, matmul over a group's heads; one with a softcap has the latter alone. What
limits it is memory: the bytes of K and V over our time, beside the rate at which torch sums numbers
that no cache holds on as many threads, in turn with the rest. Outputs are compared with float64
first.

`--level` and `--json` are those of fastattn.bench.cpu.
"""

from __future__ import annotations

import sys

import fastattn

from . import cpu

KINDS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
READ = 1 << 26  # numbers that are summed
TOLERANCE = {"fp32": 2e-6, "fp16": 2e-3, "bf16": 2e-2}  # of the largest |v|
SUITE = "decode"
SHAPES = (  # b, hq, hk, sq, sk, d, change: of one thread
    (1, 8, 8, 1, 1_000, 64, ""),
    (1, 8, 8, 1, 20_000, 64, ""),
    (1, 8, 8, 1, 20_000, 64, "mask"),
    (1, 8, 8, 1, 20_000, 64, "softcap"),
    (1, 8, 8, 2, 20_000, 64, ""),
    (1, 8, 8, 4, 20_000, 64, ""),
    (1, 8, 8, 9, 20_000, 64, ""),
    (1, 32, 32, 1, 20_000, 64, ""),
    (1, 32, 8, 1, 50_000, 64, ""),
    (1, 1, 1, 1, 100_000, 128, ""),
    (8, 32, 8, 1, 4_096, 128, ""),
)


def cells():
    """(label, dtype, b, hq, hk, sq, sk, d, change, threads); 0 threads: all."""
    every = [
        (dtype, b, 32, 8, 1, sk, 128, "", 0)
        for b, sk in ((4, 4096), (1, 32_768), (1, 131_072))
        for dtype in KINDS
        if dtype != "fp16" or sk < 131_072
    ]
    every += [("fp32", *shape, 1) for shape in SHAPES]
    for dtype, b, hq, hk, sq, sk, d, change, threads in every:
        words = f"{dtype} b{b} h{hq}:{hk} sq{sq} sk{sk} d{d} {change}".split()
        label = " ".join([*words, *["one thread"] * threads])
        yield label, dtype, b, hq, hk, sq, sk, d, change, threads


def inputs(torch, cell):
    """q, k, v, and a float mask or None."""
    _, dtype, b, hq, hk, sq, sk, d, change, _ = cell
    generator = torch.Generator().manual_seed(0)
    shapes = (b, hq, sq, d), (b, hk, sk, d), (b, hk, sk, d), (1, 1, sq, sk)
    *qkv, mask = (
        torch.randn(shape, generator=generator).to(getattr(torch, KINDS[dtype])) for shape in shapes
    )
    return *qkv, mask if change == "mask" else None


def products(torch, q, k, v, mask, softcap):
    """By torch's matrix products, of a group's heads at once."""
    b, hq, sq, d = q.shape
    hk = k.shape[1]
    s = torch.matmul(q.reshape(b, hk, hq // hk * sq, d), k.mT) * d**-0.5
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    if mask is not None:
        s = (s.view(b, hq, sq, -1) + mask).view(s.shape)
    return torch.matmul(s.softmax(-1), v).view(b, hq, sq, d)


def measure(torch, cell, budget):
    label, dtype, _, _, hk, *_, change, _ = cell
    q, k, v, mask = inputs(torch, cell)
    cap = 30.0 if change == "softcap" else 0.0
    sdpa = torch.nn.functional.scaled_dot_product_attention
    grouped = q.shape[1] != hk
    calls = {
        "fastattn": lambda: fastattn.attention(q, k, v, mask=mask, softcap=cap),
        "sdpa": lambda: sdpa(q, k, v, attn_mask=mask, enable_gqa=grouped),
        "products": lambda: products(torch, q, k, v, mask, cap),
    }
    calls["read"] = torch.ones(READ).sum
    if cap:
        del calls["sdpa"]
    wide = (None if x is None else x[-1:].double() for x in (q, k, v, mask))
    error = (calls["fastattn"]()[-1:].double() - products(torch, *wide, cap)).abs().max()
    taken = dict(
        zip(calls, cpu.turns(list(calls.values()), budget, cpu.MODES["alone"]), strict=True)
    )
    ours, read = taken.pop("fastattn"), taken.pop("read")
    return {
        "suite": SUITE,
        "cell": label,
        "error": float(error),
        "right": float(error) <= TOLERANCE[dtype] * float(v.abs().max()),
        "ms": ours * 1e3,
        "gb_s": 2 * k.numel() * k.element_size() / ours / 1e9,
        "read_rate": 4 * READ / read / 1e9,
        "x": {name: time / ours for name, time in taken.items()},
    }


def columns(row):
    """{title: what a table says of a row, None where it was not measured}: torch's times over
    ours, and the rate at which K and V were read, in GB/s and in parts of the machine's."""
    return {
        "ms": row["ms"],
        "x SDPA": row["x"].get("sdpa"),
        "x products": row["x"]["products"],
        "GB/s": row["gb_s"],
        "of the read rate": row["gb_s"] / row["read_rate"],
    }


def losing(rows):
    """[(the least of torch's times over ours, cell)] of those below 1, the least first."""
    found = ((min(row["x"].values()), row["cell"]) for row in rows)
    return sorted((x, cell) for x, cell in found if round(x, 2) < 1)


def least(rows):
    """{dtype: the least part of the read rate, of the cells on all threads}."""
    found = {}
    for row in rows:
        if not row["cell"].endswith("one thread"):
            part = columns(row)["of the read rate"]
            dtype = row["cell"].split()[0]
            found[dtype] = min(part, found.get(dtype, part))
    return found


def report(rows):
    print(f"{'cell':44}", *(f"{title:>16}" for title in columns(rows[0])), "error")
    for row in rows:
        texts = ("" if x is None else f"{x:.2f}" for x in columns(row).values())
        wrong = "" if row["right"] else " WRONG"
        print(f"{row['cell']:44}", *(f"{text:>16}" for text in texts), f"{row['error']:.1e}{wrong}")
    print("slower:", "; ".join(f"{cell} {x:.2f}" for x, cell in losing(rows)) or "none")


def main(argv):
    program, every = "fastattn.bench.decode", list(cells())
    args, chosen = cpu.arguments(program, argv, every)
    import torch

    def measured(cell):
        cpu.hold(torch, cell[-1])
        row = measure(torch, cell, args.budget)
        cpu.hold(torch, 0)
        return row

    rows = cpu.run(torch, program, args, chosen, every, measured)
    report(rows)
    return 0 if all(row["right"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
