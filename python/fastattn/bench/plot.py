"""The pictures of `python -m fastattn bench --plot`: figures of a result, made with matplotlib."""

import itertools
import pathlib

from .cells import GRIDS, H100_PEAK, UNITS
from .report import limits_of

# Colours that differ for every eye (Okabe and Ito), and markers
LOOKS = {
    "fastattn": ("#d55e00", "o"),
    "cudnn": ("#009e73", "s"),
    "fa3": ("#0072b2", "^"),
    "fa4": ("#cc79a7", "D"),
    "fa3-lib": ("#0072b2", "^"),
    "torch": ("#0072b2", "s"),
    "jax": ("#009e73", "^"),
}
OTHER_LOOKS = (("#e69f00", "v"), ("#56b4e9", "P"), ("#999999", "X"), ("#000000", "*"))
DASHES = ("-", (0, (4, 1.5)), ":")


def figures(result):
    """(name, figure) of each suite that a picture is made of."""
    timed = [row for row in result["rows"] if "ms" in row]
    for suite in dict.fromkeys(row["suite"] for row in timed):
        rows = [row for row in timed if row["suite"] == suite]
        if suite in GRIDS:
            yield suite, _grid(rows, result)
        elif suite == "gpu-origin":
            yield suite, _origin(rows, result)


def save(result, folder, kind="png", **keywords):
    """Writes FOLDER/SUITE.KIND of each picture; gives the paths."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams |= {"font.size": 9, "svg.hashsalt": "fastattn"}
    for name, figure in figures(result):
        path = pathlib.Path(folder) / f"{name}.{kind}"
        figure.savefig(path, dpi=130, facecolor="white", **keywords)
        yield path


def _looks(names):
    """Implementation -> (colour, marker)."""
    others = itertools.cycle(OTHER_LOOKS)
    return {name: LOOKS[name] if name in LOOKS else next(others) for name in names}


def _different(rows, key):
    return list(dict.fromkeys(row[key] for row in rows))


def _title(rows, header):
    cpu = "{cpu} ({cpu_level}, {cpu_threads} threads)"
    machine = header.get("gpu") or cpu.format(**header)
    dtypes, way = _different(rows, "dtype"), rows[0].get("computes")
    passes = {"backward": "attention, backward"}.get(way, "attention, forward")
    kind = f"{dtypes[0]} {passes}" if len(dtypes) == 1 else passes
    return f"{machine}: {kind}; higher is faster"


def _grid(rows, result):
    """Speed over length: a line of panels for each mask; a column for each head size, or for each
    dtype where there are several."""
    column, style = ("dtype", "d") if len(_different(rows, "dtype")) > 1 else ("d", "dtype")
    columns, masks = _different(rows, column), _different(rows, "mask")
    figure, axes = _panels(len(masks), len(columns))
    for (line, mask), (place, value) in itertools.product(enumerate(masks), enumerate(columns)):
        axis = axes[line][place]
        mine = [row for row in rows if row["mask"] == mask and row[column] == value]
        axis.set_title(f"d {value}, {mask}" if column == "d" else f"{value}, {mask}")
        if not mine:
            axis.set_visible(False)
        elif len(_different(rows, "s")) > 1:
            _curves(axis, mine, style, result)
        else:
            _bars(axis, mine, style, result)
    limits, (unit, scale) = limits_of(result), UNITS[rows[0]["device"]]
    most = max([row["flops"] for row in rows] + [limits.get(row["dtype"], 0) for row in rows])
    axes[0][0].set_ylim(0, 1.05 * most * scale)  # shared by all
    for line in axes:
        line[0].set_ylabel(unit)
    lengths = sorted(_different(rows, "s"))
    for axis in axes[-1]:
        axis.set_xlabel("sequence length" if len(lengths) > 1 else f"sequence length {lengths[0]}")
    _legend(figure, axes, _title(rows, result["header"]))
    return figure


def _panels(lines, columns):
    from matplotlib import pyplot

    size = (0.6 + 3.1 * columns, 0.9 + 2.4 * lines)
    # y is shared: panels can be compared
    return pyplot.subplots(
        lines, columns, figsize=size, sharey=True, squeeze=False, layout="constrained"
    )


def _legend(figure, axes, title):
    """One legend for all panels, above them and off the data."""
    found = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    names = sorted(found, key=lambda name: name.startswith(("limit", "floor")))  # these last
    figure.legend(
        [found[name] for name in names],
        names,
        title=title,
        title_fontsize=11,
        loc="outside upper center",
        ncols=min(len(found), 5),
        frameon=False,
        handlelength=3,
    )


def _limit(axis, rows, result):
    """The limit of the panel's rows as a dotted line."""
    limit = limits_of(result).get(rows[0]["dtype"])
    if limit:
        name = "limit: matrix products, or what was faster"
        scale = UNITS[rows[0]["device"]][1]
        axis.axhline(limit * scale, color="#777777", ls=":", lw=1.2, zorder=0, label=name)


def _curves(axis, rows, style, result):
    scale = UNITS[rows[0]["device"]][1]
    kinds, names = _different(rows, style), _different(rows, "implementation")
    for (name, (colour, marker)), (i, kind) in itertools.product(
        _looks(names).items(), enumerate(kinds)
    ):
        mine = [r for r in rows if r["implementation"] == name and r[style] == kind]
        points = sorted((row["s"], row["flops"] * scale) for row in mine)
        if points:
            ours = name == "fastattn"
            axis.plot(
                *zip(*points, strict=True),
                color=colour,
                marker=marker,
                ms=5 if ours else 4,
                lw=2.2 if ours else 1.2,
                zorder=3 if ours else 2,
                ls=DASHES[i % len(DASHES)],
                label=name if len(kinds) == 1 else f"{name}, {style} {kind}",
            )
    _limit(axis, rows, result)
    lengths = sorted(_different(rows, "s"))
    axis.set_xscale("log")
    axis.set_xticks(lengths, [f"{s // 1024}k" if s % 1024 == 0 else str(s) for s in lengths])
    axis.minorticks_off()
    axis.grid(alpha=0.25)


def _bars(axis, rows, style, result):
    """One length only: bars, a group for each head size or dtype."""
    scale = UNITS[rows[0]["device"]][1]
    kinds, names = _different(rows, style), _different(rows, "implementation")
    width = 0.8 / len(names)
    for i, (name, (colour, _)) in enumerate(_looks(names).items()):
        speeds = {r[style]: r["flops"] * scale for r in rows if r["implementation"] == name}
        places = [n + (i - (len(names) - 1) / 2) * width for n in range(len(kinds))]
        bars = axis.bar(
            places, [speeds.get(kind, 0) for kind in kinds], 0.9 * width, color=colour, label=name
        )
        axis.bar_label(bars, fmt="%.0f", fontsize=8)
    _limit(axis, rows, result)
    axis.set_xticks(range(len(kinds)), [f"d {k}" if style == "d" else k for k in kinds])


def _origin(rows, result):
    """Microseconds per head, the two floors as lines."""
    from matplotlib import pyplot

    labels, names = _different(rows, "label"), _different(rows, "implementation")
    looks = _looks(names)
    figure, axes = pyplot.subplots(
        1, len(labels), figsize=(0.6 + 1.9 * len(labels), 3.6), squeeze=False, layout="constrained"
    )
    for axis, label in zip(axes[0], labels, strict=True):
        mine = [row for row in rows if row["label"] == label]
        per_head = 1e6 / mine[0]["hq"]
        for row in mine:
            name = row["implementation"]
            bar = axis.bar(name, row["ms"] * 1e-3 * per_head, color=looks[name][0], label=name)
            axis.bar_label(bar, fmt="%.3g", fontsize=8)
        arithmetic = mine[0]["work"] / H100_PEAK * per_head
        memory = mine[0]["traffic"] / limits_of(result)["copy"] * per_head
        axis.axhline(arithmetic, ls="--", color="black", lw=1, label="floor: arithmetic")
        axis.axhline(memory, ls=":", color="black", lw=1, label="floor: memory")
        axis.set_title("\n".join([label[: label.index(" d")], label[label.index(" d") + 1 :]]))
        axis.set_xticks([])
    axes[0][0].set_ylabel("us per head")
    _legend(figure, axes, f"{result['header'].get('gpu', '')}: one forward call; lower is faster")
    return figure
