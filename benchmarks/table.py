"""Writes the tables of README.md from the result files; with --check only says whether they agree.

A table stands between two comments; the first names files under results/ and suites:

    <!-- table: FILE.json,FILE.json SUITE ... -->
    <!-- end -->
"""

import json
import pathlib
import re
import sys

from fastattn import _bench

HERE = pathlib.Path(__file__).resolve().parent
README = HERE.parent / "README.md"
MARKERS = re.compile(r"(<!-- table: (\S+) (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def caption(results):
    """What was measured on, and the commands that print it."""
    commands = [f"    {result['header']['command']}" for result in results]
    return [f"{_bench.caption(results[0]['header'])}:", "", *commands, ""]


def best_peer(cell):
    """The fastest implementation that is not ours: (name, its time over ours)."""
    peers = [r for r in cell.values() if r["implementation"] not in _bench.VARIANTS and "ms" in r]
    best = min(peers, key=lambda row: row["ms"], default=None)
    return (best["implementation"], best["ratio"]) if best and "ratio" in best else ("-", None)


def grid(cells, device):
    """Lines dtype, d, mask; columns s: speed, and the fastest peer's time over ours."""
    unit, scale = _bench.UNITS[device]
    lengths = sorted({cell["fastattn"]["s"] for cell in cells})
    yield [unit, *(f"s {s}" for s in lengths), "geometric mean"]
    lines = {}
    for cell in cells:
        ours = cell["fastattn"]
        lines.setdefault((ours["dtype"], ours["d"], ours["mask"]), {})[ours["s"]] = cell
    for (dtype, d, mask), row in lines.items():
        line, ratios = [f"{dtype} d{d} {mask}"], []
        for s in lengths:
            name, ratio = best_peer(row[s]) if s in row else ("-", None)
            ratios.append(ratio)
            if not ratio:
                line.append("-")
                continue
            speed = row[s]["fastattn"]["flops"] * scale
            line.append(f"{speed:.0f} ({ratio:.2f} x {name})")
        mean = _bench.geometric_mean(ratios)
        yield [*line, f"{mean:.2f}" if mean else "-"]


def listing(cells):
    """A line per cell, for suites that are no grid."""
    yield ["", "ms (p10 to p90)", "us per head", "compared, time over ours"]
    for cell in cells:
        ours = cell["fastattn"]
        others = (r for r in cell.values() if r is not ours and "ratio" in r)
        compared = ", ".join(f"{r['implementation']} {r['ratio']:.2f}" for r in others)
        if "ms" not in ours:
            yield [ours["label"], "refused", "-", ours["refused"]]
            continue
        time = f"{ours['ms']:.4g} ({ours['p10']:.4g} to {ours['p90']:.4g})"
        yield [ours["label"], time, f"{ours['ms'] * 1e3 / ours['hq']:,.2f}", compared]


def table(names, suites):
    results = [json.loads((HERE / "results" / name).read_text()) for name in names.split(",")]
    lines, device = caption(results), results[0]["header"]["device"]
    for suite in suites.split():
        cells = {}
        for row in (row for result in results for row in result["rows"]):
            if row["suite"] == suite:
                cells.setdefault(row["label"], {})[row["implementation"]] = row
        cells = list(cells.values())
        rows = grid(cells, device) if suite in _bench.GRIDS else listing(cells)
        lines += [*_bench.markdown(list(rows)), ""] if cells else []
    return "\n".join(lines)


def main():
    old = README.read_text()
    new = MARKERS.sub(lambda m: m[1] + table(m[2], m[3]) + m[4], old)
    if "--check" not in sys.argv[1:]:
        README.write_text(new)
    elif new != old:
        sys.exit("README.md's tables are not what benchmarks/table.py writes: run it")


if __name__ == "__main__":
    main()
