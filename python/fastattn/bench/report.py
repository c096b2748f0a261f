"""What follows from the times of a run, and its tables as text. Losing cells are printed like the
others. Rows are plain dictionaries, as result files keep them."""

import csv
import json
import math

from .cells import UNITS

# Of ours, in results that do not say so themselves
OURS = (
    "fastattn",
    "unmasked",
    "1 thread",
    "ordinary",
    "32 kv heads",
    "plain",
    "causal",
    "dense",
    "free",
)


def own(row):
    """Whether a row is ours: the call that is judged, or another cell or build beside it."""
    return row.get("own", row["implementation"] in OURS)


def limits_of(result):
    """The limits of a result: what machine() measured, or what was reached where that is more. On a
    GPU that its power holds back, attention may be faster than products of random numbers."""
    limits = dict(result["header"]["limits"])
    for row in result["rows"]:
        if "ms" in row and row["clock"] != "host" and row["mask"] != "blocks":  # those may skip
            for name, work in ((row["dtype"], row["work"]), ("copy", row["traffic"])):
                if name in limits:
                    limits[name] = max(limits[name], work / row["ms"] * 1e3)
    return limits


def known_peers(path):
    """peers.csv -> {(b, h, s, d, mask): cuDNN's time / the best known peer's}, forward."""
    with open(path) as lines:
        rows = csv.DictReader(line for line in lines if not line.startswith("#"))
        keys = ("batch", "heads", "seq", "head_dim")
        return {
            (*(int(row[key]) for key in keys), row["mask"]): float(row["x_cudnn"])
            for row in rows
            if row["pass"] == "fwd" and row["x_cudnn"]
        }


def derive(rows, known):
    """What follows from the times of one cell: speed, ratios to ours."""
    by_name = {row["implementation"]: row for row in rows}
    ours = by_name["fastattn"].get("ms")
    for row in rows:
        if "ms" not in row:
            continue
        if row["clock"] != "host":
            row["flops"] = row["work"] / row["ms"] * 1e3
        if ours:
            row["ratio"] = row["ms"] / ours
    peers_ms = [row["ms"] for row in rows if "ms" in row and not own(row)]
    if ours and peers_ms:
        by_name["fastattn"]["best_live"] = min(peers_ms) / ours
    key = tuple(by_name["fastattn"][x] for x in ("b", "hq", "s", "d", "mask"))
    if by_name["fastattn"].get("computes"):
        key = None
    if ours and key in known and "ms" in by_name.get("cudnn", ()):
        by_name["fastattn"]["best_known"] = by_name["cudnn"]["ms"] / known[key] / ours
    return rows


def aligned(lines):
    """Columns of text, the first left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (x.rjust(w) for x, w in zip(line[1:], widths[1:], strict=True))
        yield "  ".join([line[0].ljust(widths[0]), *cells]).rstrip()


def markdown(lines):
    """The same as a table in Markdown."""
    head, *rest = ("| " + " | ".join(line) + " |" for line in lines)
    return [head, "|---" * len(lines[0]) + "|", *rest]


def _number(row, key, text="{:.3g}", times=1):
    return text.format(row[key] * times) if row.get(key) is not None else "-"


def geometric_mean(values):
    values = [x for x in values if x]
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def shares(row, limits):
    """(share of the limit of its dtype, time over the higher floor); None where unknown."""
    if "flops" not in row or row["dtype"] not in limits:
        return None, None
    floor = max(row["work"] / limits[row["dtype"]], row["traffic"] / limits["copy"]) * 1e3
    return row["flops"] / limits[row["dtype"]], row["ms"] / floor


def table(rows, device, limits):
    """The text table of one suite: a line per cell, ours, then each peer's time over ours."""
    names = list(dict.fromkeys(row["implementation"] for row in rows if "ms" in row))
    names = [name for name in names if name != "fastattn"]
    unit, scale = UNITS[device]
    head = [rows[0]["suite"], "ms", "p10", "p90", "us/head", unit, "% limit", "x floor", "error"]
    cells = {}
    for row in rows:
        cells.setdefault(row["label"], {})[row["implementation"]] = row
    lines = [[*head, *(f"x {name}" for name in names), "x best", "x known"]]
    lines += (_line(label, cell, names, scale, limits) for label, cell in cells.items())
    if len(cells) > 1:
        lines.append(_means(cells.values(), names))
    # A column that says nothing anywhere is left out.
    kept = [c for c in zip(*lines, strict=True) if set(c[1:]) - {"-", ""}]
    yield from aligned([list(line) for line in zip(*kept, strict=True)])
    yield from complaints(rows)
    yield from unserved(cells.values(), unit, scale)


def _line(label, cell, names, scale, limits):
    ours = cell["fastattn"]
    times = [_number(ours, key, "{:.4g}") for key in ("ms", "p10", "p90")]
    per_head = _number(ours, "ms", "{:.4g}", 1e3 / ours["hq"])
    share, over = shares(ours, limits)
    line = [label, *times, per_head, _number(ours, "flops", times=scale)]
    line += [f"{share:.0%}".strip("%"), f"{over:.2f}"] if share else ["-", "-"]
    line += [_number(ours, "error", "{:.1e}")]
    for name in names:
        peer = cell.get(name, {})
        bad = "!" if peer.get("error", 0) > peer.get("bound", 0) else ""
        line.append(_number(peer, "ratio", "{:.2f}") + bad)
    return line + [_number(ours, key, "{:.2f}") for key in ("best_live", "best_known")]


def _means(cells, names):
    line = ["geometric mean"] + [""] * 8
    line += (_mean(cell.get(name, {}).get("ratio") for cell in cells) for name in names)
    keys = ("best_live", "best_known")
    return line + [_mean(cell["fastattn"].get(key) for cell in cells) for key in keys]


def complaints(rows):
    """A line of each row that is wrong, and of ours where they are refused."""
    for row in rows:
        name = f"{row['label']}: {row['implementation']}"
        if row.get("error", 0) > row.get("bound", 0):
            yield f"! {name} is off by {row['error']:.2e}, the bound is {row['bound']:.2e}"
        elif row["implementation"] == "fastattn" and "refused" in row:
            yield f"! {name} refused: {row['refused']}"
        elif row["implementation"] == "fastattn" and not row.get("repeats", True):
            yield f"! {name} gave other bits in its last call"


def unserved(cells, unit, scale):
    """A line of each cell whose gradient is not declared, with the speed of those that have it."""
    for cell in cells:
        ours = cell["fastattn"]
        if "unserved" in ours:
            others = [x for x in cell.values() if "flops" in x]
            speeds = [f"{x['implementation']} at {x['flops'] * scale:.0f} {unit}" for x in others]
            has = f" ({', '.join(speeds)})" if speeds else ""
            yield f"- {ours['label']}: fastattn does not serve it: {ours['unserved']}{has}"


def _mean(values):
    mean = geometric_mean(values)
    return f"{mean:.3f}" if mean else "-"


def wrong(rows):
    """Our rows that are not right: they make the command fail."""
    ours = [row for row in rows if own(row) and "unserved" not in row]
    return [r for r in ours if "ms" not in r or r["error"] > r["bound"] or not r["repeats"]]


def dump(result):
    """JSON with one row a line, so that a result file can be read and compared."""
    rows = ",\n".join("  " + json.dumps(row, default=float) for row in result["rows"])
    return f'{{"header": {json.dumps(result["header"], indent=1)},\n"rows": [\n{rows}\n]}}\n'


def show(result):
    """Prints the header and a table of each suite."""
    for key, value in result["header"].items():
        print(f"{key:12} {value}")
    for suite in dict.fromkeys(row["suite"] for row in result["rows"]):
        print()
        rows = [row for row in result["rows"] if row["suite"] == suite]
        print("\n".join(table(rows, result["header"]["device"], limits_of(result))))
