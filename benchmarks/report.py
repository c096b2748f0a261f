"""The one command behind every published number: `python benchmarks/report.py`.

From the result files in results/ it writes RESULTS.md (all tables), the blocks of README.md between
`<!-- report: NAME -->` and `<!-- end -->`, and the pictures gpu-bf16.svg and cpu.svg. Of each card
and suite the newest file counts; files that no longer count are named, to be deleted. --check
writes nothing and fails where something is not what would be written.

New results: `python benchmarks --suite ... --json benchmarks/results/DATE-CARD-PART.json`, on a GPU
all of them by gpu_run.py.
"""

import hashlib
import json
import pathlib
import re
import sys
import tempfile
import textwrap

from fastattn.bench import cpu, decode, jax, llama, merge, plot, training
from fastattn.bench.cells import GRIDS, UNITS
from fastattn.bench.machine import caption
from fastattn.bench.report import dump, geometric_mean, limits_of, markdown, own, shares

HERE = pathlib.Path(__file__).resolve().parent
README, RESULTS = HERE.parent / "README.md", HERE / "RESULTS.md"
APART = ("fa3-lib", "jax.nn")  # with inputs of their own
BLOCK = re.compile(r"(<!-- report: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
PICTURES = {"gpu-bf16": "cuda", "cpu": "cpu"}  # suite -> device
TITLES = {
    "correctness": "What PyTorch's and JAX's own attention gets wrong",
    "gpu-bf16": "bfloat16, 16,384 tokens, hq * d = 2,048",
    "gpu-fp16": "float16, the same shapes",
    "gpu-origin": "The two shapes that this project began with",
    "gpu-sustained": "One of them, one second without a pause",
    "gpu-gqa": "Grouped heads",
    "gpu-heads": "Other head sizes",
    "gpu-short": "Short sequences",
    "gpu-hostile": "Inputs that make the running maximum move",
    "gpu-mask": "Dense masks",
    "gpu-scores": "Soft caps, ALiBi, sinks, dropout",
    "gpu-window": "Windows of 1,024 and 4,096 keys",
    "gpu-flex": "Beside FlexAttention",
    "gpu-varlen": "Packed sequences",
    "gpu-host": "Host time, Python to launch",
    "gpu-backward": "Gradients: bfloat16, 16,384 tokens, hq * d = 2,048",
    "gpu-backward-fp16": "Gradients: float16, the same shapes",
    "gpu-backward-deterministic": "Deterministic gradients, beside ours that are not",
    "gpu-backward-origin": "Forward and backward: the two shapes that this project began with",
    "gpu-backward-gqa": "Gradients: grouped heads",
    "gpu-backward-mask": "Gradients: half of the blocks hidden; a float mask and its gradient",
    "gpu-backward-scores": "Gradients: soft caps, ALiBi, sinks, dropout",
    "gpu-backward-window": "Gradients: windows of 1,024 and 4,096 keys",
    "gpu-backward-varlen": "Gradients: packed sequences",
    "gpu-backward-host": "Host time of a backward call through autograd",
    "llama": "A training step of a Llama",
    "merge": "Merging partial results, beside a copy of the same run",
    "cpu": "The CPU: b 1, h 8",
    "cpu-mask": "A dense mask",
    "cpu-threads": "One head on all threads",
    "cpu-host": "Host time of a tiny call",
}
HOW_TO_READ = """\
# Results

Written by `python benchmarks/report.py` from the files in [results](results), where every row has
its error, bound, spread, versions and command. Medians of interleaved timings, all implementations
in one process, each output checked against float64 first; `python -m fastattn bench` measures the
machine at hand. Ratios are the other's time over ours: above 1 fastattn is faster, **bold** where
it is slower. "unmasked", "plain", "ordinary", "causal", "dense", "free", "32 kv heads" and "1
thread" are fastattn too, on the cell without what is special. "x floor" is our time over the higher
of two floors: arithmetic at the run's own matrix product rate (or at what was faster), memory at
its copy rate.
"""


LOAD = """\
Load is the system's one-minute average when a cell begins. Work that was stopped during the
measurement still decays in it.
"""


def load():
    """[(file name, result)] of the benchmark, the newest first; the same of bench.cpu, of
    bench.training, of bench.decode, of bench.jax."""
    found = [(p.name, json.loads(p.read_text())) for p in (HERE / "results").glob("*.json")]
    found.sort(key=lambda item: (item[1]["header"]["date"], item[0]), reverse=True)
    ours, beside, steps, few, jitted = [], [], [], [], []
    kinds = {training.SUITE: steps, decode.SUITE: few, **dict.fromkeys(jax.SUITES, jitted)}
    for item in found:
        other = ours if "device" in item[1]["header"] else beside
        kinds.get(item[1]["rows"][0].get("suite"), other).append(item)
    return ours, beside, steps, few, jitted


def card_of(header):
    return header.get("gpu") or f"{header['cpu']} ({header['cpu_level']})"


def newest(files):
    """{card: {suite: (file name, result)}}, GPUs first, then the newest first."""
    cards = {}
    for name, result in sorted(files, key=lambda item: item[1]["header"]["device"] != "cuda"):
        suites = cards.setdefault(card_of(result["header"]), {})
        for suite in dict.fromkeys(row["suite"] for row in result["rows"]):
            suites.setdefault(suite, (name, result))
    return cards


def find(cards, suite, device):
    """The newest result of a suite on a kind of device, or None."""
    found = [suites[suite][1] for suites in cards.values() if suite in suites]
    found = [result for result in found if result["header"]["device"] == device]
    return max(found, key=lambda result: result["header"]["date"], default=None)


def cells_of(result, suite):
    """Of each cell {implementation: row}."""
    cells = {}
    for row in result["rows"]:
        if row["suite"] == suite:
            cells.setdefault(row["label"], {})[row["implementation"]] = row
    return list(cells.values())


def best_peer(cell):
    """The fastest implementation that is not ours: (its time over ours, name); or None."""
    peers = [row for row in cell.values() if not own(row) and "ms" in row]
    best = min(peers, key=lambda row: row["ms"], default=None)
    return (best["ratio"], best["implementation"]) if best and "ratio" in best else None


def beside(cell):
    """What a grid compares with: the fastest peer; of deterministic gradients ours that are not."""
    free = cell.get("free", {})
    return (free["ratio"], "free") if "ratio" in free else best_peer(cell)


def not_served(cell, result):
    """Of a cell whose gradient is not declared, the fastest that has it; else None."""
    if "unserved" not in cell["fastattn"]:
        return None
    unit, scale = UNITS[result["header"]["device"]]
    speeds = [
        (row["flops"] * scale, row["implementation"]) for row in cell.values() if "flops" in row
    ]
    best = f", {max(speeds)[1]} {max(speeds)[0]:.0f} {unit}" if speeds else ""
    return f"not served{best}"


def marked(text, ratio):
    return f"**{text}**" if round(ratio, 2) < 1 else text


# ------------------------------------------------------------------------------------ RESULTS.md


def grid(cells, result):
    """Lines dtype, d, mask; columns s: speed, and the fastest peer's time over ours."""
    unit, scale = UNITS[result["header"]["device"]]
    lengths = sorted({cell["fastattn"]["s"] for cell in cells})
    yield [unit, *(f"s {s}" for s in lengths), "geometric mean"]
    lines = {}
    for cell in cells:
        ours = cell["fastattn"]
        lines.setdefault((ours["dtype"], ours["d"], ours["mask"]), {})[ours["s"]] = cell
    for (dtype, d, mask), row in lines.items():
        line, ratios = [f"{dtype} d{d} {mask}"], []
        for s in lengths:
            ours = row[s]["fastattn"] if s in row else {}
            best = beside(row[s]) if ours else None
            speed = f"{ours['flops'] * scale:.0f}" if "flops" in ours else "-"
            speed = (ours and not_served(row[s], result)) or speed
            ratios.append(best and best[0])
            line.append(marked(f"{speed} ({best[0]:.2f} x {best[1]})", best[0]) if best else speed)
        mean = geometric_mean(ratios)
        yield [*line, marked(f"{mean:.2f}", mean) if mean else "-"]


def listing(cells, result):
    """A line per cell, for suites that are no grid."""
    limits = limits_of(result)
    yield ["", "ms (p10 to p90)", "us per head", "x floor", "compared, time over ours"]
    for cell in cells:
        ours = cell["fastattn"]
        if "ms" not in ours:
            said = not_served(cell, result)
            words = (
                [said, "-", "-", ours["unserved"]]
                if said
                else ["refused", "-", "-", ours["refused"]]
            )
            yield [ours["label"], *words]
            continue
        compared = []
        for row in cell.values():
            if row is not ours and "ratio" in row:
                text = f"{row['implementation']} {row['ratio']:.2f}"
                compared.append(text if own(row) else marked(text, row["ratio"]))
        time = f"{ours['ms']:.4g} ({ours['p10']:.4g} to {ours['p90']:.4g})"
        over = shares(ours, limits)[1]
        per_head = f"{ours['ms'] * 1e3 / ours['hq']:,.2f}"
        yield [ours["label"], time, per_head, f"{over:.2f}" if over else "-", ", ".join(compared)]


def distances(cells):
    """Of gradients, our errors over a peer's on the same inputs: the largest and the mean ones,
    each as a geometric mean over dq, dk and dv of the cells, and the worst."""
    names = [
        x for x in cells[0] if any(not own(c[x]) and "errors" in c[x] for c in cells if x in c)
    ]
    shared = [name for name in names if name not in APART]
    yield ["our error over theirs", *(f"{x}, {kind}" for x in shared for kind in ("max", "mean"))]
    lines = {}
    for cell in cells:
        ours = cell["fastattn"]
        if "errors" in ours:
            lines.setdefault(f"{ours['dtype']} d{ours['d']} {ours['mask']}", []).append(cell)
    for label, mine in lines.items():
        line = [label]
        for name, kind in ((name, kind) for name in shared for kind in (0, 1)):
            ratios = [
                errors[kind] / cell[name]["errors"][x][kind]
                for cell in mine
                if "errors" in cell.get(name, {})
                for x, errors in cell["fastattn"]["errors"].items()
                if x in cell[name]["errors"] and cell[name]["errors"][x][kind]
            ]
            said = f"{geometric_mean(ratios):.2f}, worst {max(ratios):.2f}" if ratios else "-"
            line.append(said)
        yield line


def verdicts(rows):
    """Of correctness.py: an input a line, an implementation a column, ours the last."""
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    names = [name for name in names if name != "fastattn"] + ["fastattn"]
    said = {}
    for row in rows:
        plain = row["right"] or row["verdict"] == "refused"
        words = row["verdict"] if plain else f"**{row['verdict']}**"
        said[row["input"], row["implementation"]] = words
    inputs = dict.fromkeys(row["input"] for row in rows)
    lines = [[x, *(said.get((x, name), "") for name in names)] for x in inputs]
    return markdown([["bfloat16, b 2, h 4, s 100, d 64", *names], *lines])


def table(result, suite):
    if suite == "correctness":
        return verdicts(result["rows"])
    if suite == "merge":
        return markdown(list(merge.lines(result["rows"])))
    if suite == "llama":
        return markdown(list(llama.lines(result["rows"])))
    cells = cells_of(result, suite)
    lines = markdown(list((grid if suite in GRIDS else listing)(cells, result)))
    if suite in ("gpu-backward", "gpu-backward-fp16"):
        lines += ["", *markdown(list(distances(cells)))]
    return lines


def machine_of(header):
    """Of a result of fastattn.bench.cpu; its first ones had no name of the CPU."""
    return ", ".join(header[key] for key in ("cpu", "machine") if key in header)


def heading(title, name, header):
    about = f"{machine_of(header)}, torch {header['torch']}; {header['date']}"
    yield from ("", f"## {title}: {header['level']}", "", f"- [{name}](results/{name}): {about}")
    yield from (f"  `{header['command']}`", "", *LOAD.split("\n"))


def beside_torch(files):
    """What fastattn.bench.cpu measured: a call after a rest, and in turn with torch's."""
    for name, result in files:
        yield from heading("The CPU as a program meets it", name, result["header"])
        lines = [["", "ms", "of the matrix rate", "x torch", "x torch, alternating", "load"]]
        for row in result["rows"]:
            alone, other = row["alone"], row["alternating"]
            share = f"{alone['gflops'] / row['matrix_rate']:.2f}" if "gflops" in alone else "-"
            ratios = (marked(f"{mode['x']:.2f}", mode["x"]) for mode in (alone, other))
            lines.append([row["cell"], f"{alone['ms']:.4g}", share, *ratios, f"{row['load']:.1f}"])
        yield from markdown(lines)


def by_columns(rows, columns, peers):
    """A table of what columns() finds in each row; marked is what loses to one of the peers."""
    lines = []
    for row in rows:
        found = columns(row)
        lines = lines or [["", *found, "load"]]
        texts = (
            "-" if x is None else marked(f"{x:.2f}", x if title.startswith(peers) else 1)
            for title, x in found.items()
        )
        lines.append([row["cell"], *texts, f"{row['load']:.1f}"])
    yield from markdown(lines)


def training_steps(files):
    """What fastattn.bench.training measured: forward and backward."""
    for name, result in files:
        yield from heading("A training step on the CPU", name, result["header"])
        yield from by_columns(training.timed(result["rows"]), training.columns, "x torch")
        yield from ("", *training.memory(result["rows"]))


def few_rows(files):
    """What fastattn.bench.decode measured."""
    for name, result in files:
        yield from heading("Few rows against many keys on the CPU", name, result["header"])
        yield from by_columns(result["rows"], decode.columns, "x ")


def programs_of_jax(files):
    """What fastattn.bench.jax measured."""
    for name, result in files:
        header = result["header"]
        yield from ("", f"## JAX's programs: {card_of(header)}", "")
        yield from (f"- [{name}](results/{name}): {caption(header)}", f"  `{header['command']}`")
        yield ""
        yield from markdown(list(jax.lines(result["rows"])))


def results_text(cards, beside, steps, few, jitted):
    lines = [HOW_TO_READ]
    for card, suites in cards.items():
        lines += [f"## {card}", ""]
        for name, result in dict(suites.values()).items():
            header = result["header"]
            lines += [f"- [{name}](results/{name}): {caption(header)}"]
            lines += [f"  `{header['command']}`"]
            lines += [f"  {header['apart']}"] if "apart" in header else []
        for suite in sorted(suites, key=[*TITLES, *suites].index):
            lines += ["", f"### {TITLES.get(suite, suite)} (`{suite}`)", ""]
            lines += table(suites[suite][1], suite)
        lines.append("")
    lines = [*"\n".join(lines).rstrip().split("\n"), *beside_torch(beside)]
    lines += [*training_steps(steps), *few_rows(few), *programs_of_jax(jitted)]
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------- README.md


def shape(cell):
    ours = cell["fastattn"]
    return f"d {ours['d']} {ours['mask']} at s {ours['s']}"


def slower(cells, name):
    """'name ratio (peer)' of the cells where another is faster, the worst first."""
    ratios = [(best_peer(cell), name(cell)) for cell in cells if best_peer(cell)]
    losing = sorted((best, text) for best, text in ratios if round(best[0], 2) < 1)
    return [f"{text} {ratio:.2f} ({peer})" for (ratio, peer), text in losing]


def overall(cells):
    return geometric_mean([(best_peer(cell) or (None,))[0] for cell in cells])


def gpu_words(cards):
    """The grid in a paragraph, with the cells that lose, and the worst of each other suite."""
    result = find(cards, "gpu-bf16", "cuda")
    cells, header = cells_of(result, "gpu-bf16"), result["header"]
    losing = slower(cells, shape)
    yield (
        f"{header['gpu']}, {header['date'][:10]}, commit {header['commit']}: the fastest other "
        f"implementation, live in the same run, takes **{overall(cells):.2f} times** as long "
        f"(geometric mean of {len(cells)} cells). "
    )
    yield f"Slower are {'; '.join(losing)}. " if losing else "No cell is slower. "
    worst = []
    for suite, (_, result) in cards[card_of(header)].items():
        if suite not in ("gpu-bf16", "gpu-backward", "correctness", "merge", "llama"):
            title = TITLES.get(suite, suite).lower()
            worst += slower(cells_of(result, suite), lambda _, title=title: title)[:1]
    yield f"The worst cells of other suites: {'; '.join(worst) or 'none is slower'}. "
    yield from gradient_words(cards)


def gradient_words(cards):
    """The same of the backward pass, where it was measured."""
    result = find(cards, "gpu-backward", "cuda")
    if result is None:
        return
    cells, header = cells_of(result, "gpu-backward"), result["header"]
    served = [cell for cell in cells if "ms" in cell["fastattn"]]
    yield f"\nGradients, {header['gpu']}, {header['date'][:10]}, commit {header['commit']}: "
    if len(served) < len(cells):
        yield f"{len(served)} of {len(cells)} cells are served. "
    mean, losing = overall(served), slower(served, shape)
    if mean:
        yield f"Over {len(served)} cells the fastest other takes **{mean:.2f} times** as long. "
        many = f" {len(losing)} of them, the worst" if len(losing) > 6 else ""
        listed = "; ".join(losing[:3] if many else losing)
        yield f"Slower are{many} {listed}. " if losing else "No cell is slower. "


def forward(cards):
    """Of the suite "cpu": [(what, header, {dtype: mean})] and what loses."""
    result = find(cards, "cpu", "cpu")
    cells, header = cells_of(result, "cpu"), result["header"]
    dtypes = dict.fromkeys(cell["fastattn"]["dtype"] for cell in cells)
    means = {d: overall([c for c in cells if c["fastattn"]["dtype"] == d]) for d in dtypes}
    about = header | {"level": header["cpu_level"], "torch": header["versions"].get("torch")}
    losing = slower(cells, lambda cell: f"{cell['fastattn']['dtype']} {shape(cell)}")
    return [("forward", about, means)], losing


def in_both_modes(what, files, ratios):
    """Of fastattn.bench.cpu or .training likewise: the lower mean, and what loses in a mode."""
    found, losing = [], []
    for _, result in files:
        header, rows = result["header"], result["rows"]
        modes = [ratios(rows, mode) for mode in cpu.MODES]
        means = {d: min(geometric_mean(m[d]) for m in modes if d in m) for d in modes[0]}
        found.append((what, header, means))
        for row in rows:
            x = min((row[mode]["x"] for mode in cpu.MODES if mode in row), default=1)
            if round(x, 2) < 1:
                losing.append(f"{row['cell'].replace('short', 'on one thread')} {x:.2f}")
    return found, losing


def decoding(files):
    """Of fastattn.bench.decode the part of the rate at which memory is read, and what loses."""
    what = "one new token, 4,096 to 131,072 keys, at least this part of memory's read rate"
    found = [(what, r["header"], decode.least(r["rows"])) for _, r in files]
    return found, [f"{cell} {x:.2f}" for _, r in files for x, cell in decode.losing(r["rows"])]


def cpu_words(cards, beside, steps, few):
    """What loses, then each measurement in a line."""
    parts = (
        forward(cards),
        in_both_modes("forward", beside, cpu.ratios),
        in_both_modes("forward and backward", steps, training.ratios),
        decoding(few),
    )
    found, losing = ([x for part in parts for x in part[i]] for i in (0, 1))
    machines = dict.fromkeys(machine_of(header) for _, header, _ in reversed(found))
    machines = [x for x in machines if not any(y.startswith(f"{x},") for y in machines)]
    versions = dict.fromkeys(header["torch"].partition(",")[0] for _, header, _ in found)
    yield (
        f"{'; '.join(machines)}: time of torch {', '.join(versions)} over ours, geometric means, "
        "after a rest or in turn with torch, whichever is lower. "
    )
    yield f"Slower: {'; '.join(losing)}. " if losing else "No cell is slower. "
    for what, header, means in found:
        numbers = ", ".join(f"{dtype} **{mean:.2f}**" for dtype, mean in means.items() if mean)
        yield f"\n- {what} ({header['level']}, {header['date'][:10]}): {numbers}"


def correctness_words(cards):
    """Of the newest GPU, else of the CPU, what the default gets wrong."""
    result = find(cards, "correctness", "cuda") or find(cards, "correctness", "cpu")
    header, rows = result["header"], result["rows"]
    default = [row for row in rows if row["implementation"] == "default" and not row["right"]]
    wrong = {row["input"] for row in default if row["verdict"] != "refused"}
    names = ("torch", "cudnn", "jax")
    versions = ", ".join(f"{x} {header['versions'][x]}" for x in names if x in header["versions"])
    yield f"{card_of(header)}, {versions}; {header['date'][:10]}, commit {header['commit']}:\n\n"
    yield "\n".join(verdicts([row for row in rows if row["input"] in wrong]))


def wrapped(text, width=100):
    """Paragraphs and list items broken into lines; tables as they are."""

    def broken(line):
        indent = "  " if line.startswith("- ") else ""
        return (
            line if line.startswith("|") else textwrap.fill(line, width, subsequent_indent=indent)
        )

    return "\n".join(map(broken, text.split("\n")))


def readme_text(cards, beside, steps, few, _):
    blocks = {
        "gpu": gpu_words(cards),
        "cpu": cpu_words(cards, beside, steps, few),
        "correctness": correctness_words(cards),
    }

    def block(match):
        return match[1] + wrapped("".join(blocks[match[2]]).strip()) + "\n" + match[3]

    return BLOCK.sub(block, README.read_text())


# -------------------------------------------------------------------------------------- pictures


def picture_of(cards, suite, device):
    """(the part of the newest result that is drawn, a fingerprint of it and of the drawing)."""
    result = find(cards, suite, device)
    rows = [row for row in result["rows"] if row["suite"] == suite]
    drawn = {"header": result["header"], "rows": rows}
    code = pathlib.Path(plot.__file__).read_bytes()
    return drawn, hashlib.sha256(dump(drawn).encode() + code).hexdigest()


def draw(drawn, fingerprint):
    with tempfile.TemporaryDirectory() as folder:
        about = {"Date": None, "Description": fingerprint}
        (path,) = plot.save(drawn, folder, "svg", metadata=about)
        text = "\n".join(line.rstrip() for line in path.read_text().splitlines())
    return text + "\n"


def main():
    files, *others = load()
    cards = newest(files)
    check, stale = "--check" in sys.argv[1:], []
    for path, text in (
        (RESULTS, results_text(cards, *others)),
        (README, readme_text(cards, *others)),
    ):
        if not path.exists() or path.read_text() != text:
            stale.append(path.name)
            if not check:
                path.write_text(text)
    for suite, device in PICTURES.items():
        path, (drawn, fingerprint) = HERE / f"{suite}.svg", picture_of(cards, suite, device)
        if not path.exists() or fingerprint not in path.read_text():
            stale.append(path.name)
            if not check:
                path.write_text(draw(drawn, fingerprint))
    counted = {name for suites in cards.values() for name, _ in suites.values()}
    for name in sorted({name for name, _ in files} - counted):
        print(f"results/{name} is superseded: delete it", file=sys.stderr)
    if check and stale:
        sys.exit(f"{', '.join(stale)}: not what benchmarks/report.py writes; run it")
    print(f"written: {', '.join(stale)}" if stale else "nothing has changed")


if __name__ == "__main__":
    main()
