"""`python -m fastattn bench`: measures attention here, beside the libraries that are installed.

One *cell* is a shape, a dtype and a mask. Every implementation computes it: first it is checked
against float64, then all are timed side by side, interleaved round by round. What is printed is the
median, with the 10th and 90th percentile, beside the two limits of the machine as measured in the
same run: its matrix product rate and its copy bandwidth, or what was faster. Losing cells are
printed like the others.
"""

import argparse
import contextlib
import importlib
import importlib.util
import json
import pathlib
import re
import shlex
import sys

import fastattn

from . import decode, serving
from .arrays import arrays_for, gpu_usable
from .cells import suites
from .machine import environment, git, machine
from .measure import Options, measure
from .peers import peers
from .report import derive, dump, known_peers, show, wrong


def _progress(items):
    """A progress bar on stderr: tqdm's, or a plain count where it is not installed."""
    with contextlib.suppress(ImportError):
        bar = importlib.import_module("tqdm").tqdm
        yield from bar(items, unit="cell", leave=False, file=sys.stderr, dynamic_ncols=True)
        return
    for i, item in enumerate(items):
        print(f"\r{i + 1}/{len(items)} ", end="", file=sys.stderr, flush=True)
        yield item
    print("\r", end="", file=sys.stderr)


APART = (
    "{}: in a process with JAX, in turn with the others in each round; inputs of its own, the "
    "host's clock over a burst of calls with one wait at its end"
)


class Refusal(Exception):  # noqa: N818 - a sentence for the user, not a fault
    """What the command line asks for cannot be measured here."""


def parser_of(program, tree):
    parser = argparse.ArgumentParser(prog=program, description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    others = [peer for peer in peers() if not peer.own]
    parser.epilog = "\n".join(
        [
            f"suites: {', '.join(suites())}; 'cpu*' and 'gpu*' take all of a kind; alone, "
            f"{decode.SUITE}: few rows against many keys, on a GPU where there is one.",
            f"peers of the CPU: {', '.join(x.name for x in others if x.device == 'cpu')}; "
            f"of a GPU: {', '.join(x.name for x in others if x.device == 'cuda')}",
        ]
    )
    add = parser.add_argument
    add("--suite", action="append", help="name, or a prefix with *; default: by the device")
    add("--filter", action="append", default=[], help="words of a cell's label; repeats")
    add("--peers", help="names, comma-separated; default: all that are installed")
    backends = fastattn.info()["backends"]
    add("--backend", choices=backends, help="hold fastattn to this backend")
    add(
        "--module",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="another build, measured as NAME beside this one: its compiled module, or where the "
        "two do not fit together its package's folder; repeats",
    )
    add("--timings", type=int, default=25, help="of each implementation, at least 20")
    add("--warmup", type=float, default=0.3, help="seconds, each cell")
    known, commit = (tree / "benchmarks" / "peers.csv", git(tree)) if tree else (None, None)
    add("--known", default=known, help="benchmarks/peers.csv, for the column 'x known'")
    add("--commit", default=commit, help="to be recorded; benchmarks/ knows that of its tree")
    add("--json", metavar="FILE", help="write header and rows")
    add("--plot", metavar="DIR", help="write PNGs (needs matplotlib)")
    add("--from", dest="source", metavar="FILE", help="print and plot a result file again")
    return parser


def recorded(program, argv):
    """The command line as results keep it: files by their names, without folders of a machine."""
    return shlex.join([*program.split(), *(re.sub(r"(^|=)/.*/", r"\1", x) for x in argv)])


def main(argv, program="python -m fastattn bench", tree=None):
    """The command line, called from the sources in `tree` (None: installed). Returns the status."""
    args = parser_of(program, tree).parse_args(argv)
    if args.suite == [decode.SUITE]:
        gpu = gpu_usable()
        more = ["--json", args.json] if args.json else []
        more += ["--commit", args.commit] if gpu and args.commit else []
        return (serving if gpu else decode).main(more) or 0
    try:
        if args.plot:  # before minutes of measuring
            if not importlib.util.find_spec("matplotlib"):
                raise Refusal("--plot needs matplotlib: pip install matplotlib")
            pathlib.Path(args.plot).mkdir(parents=True, exist_ok=True)
        if args.source:
            result = json.loads(pathlib.Path(args.source).read_text())
        else:
            result = run(args, recorded(program, argv))
    except (Refusal, OSError, json.JSONDecodeError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before there was anything to print
        return 130
    show(result)
    if args.plot:
        for path in importlib.import_module("fastattn.bench.plot").save(result, args.plot):
            print(f"wrote {path}")
    bad = wrong(result["rows"])
    if bad:
        print(f"{len(bad)} of our rows are wrong or refused", file=sys.stderr)
    return 130 if "interrupted" in result["header"] else 1 if bad else 0


def choose(args):
    """The cells that the arguments name, all of one device, which is here; else a Refusal."""
    known, gpu = suites(), gpu_usable()
    wanted = args.suite or ["gpu*" if gpu else "cpu*"]

    def matches(name, pattern):
        return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern

    for pattern in wanted:
        if not any(matches(name, pattern) for name in known):
            raise Refusal(f"there is no suite {pattern!r}, only {', '.join(known)}")
    cells = [
        cell
        for name, cells in known.items()
        if any(matches(name, pattern) for pattern in wanted)
        for cell in cells
    ]
    devices = {cell.device for cell in cells}
    if len(devices) > 1:
        raise Refusal(f"the suites {', '.join(wanted)} are of the CPU and of a GPU: one at a time")
    if devices == {"cuda"} and not gpu:
        raise Refusal(
            f"the suite {wanted[0]} needs torch, and a GPU that fastattn has kernels for: "
            "`python -m fastattn` says what was found"
        )
    words = [set(text.split()) for text in args.filter]
    cells = [c for c in cells if not words or any(w <= set(c.label.split()) for w in words)]
    if not cells:
        raise Refusal(f"no cell of {', '.join(wanted)} has the words of --filter {args.filter}")
    return cells


def choose_peers(args, device):
    """(everyone who may be asked, the names that --peers gives); else a Refusal."""
    modules = [text.partition("=")[::2] for text in args.module]
    for name, file in modules:
        if not (name.isidentifier() and file and pathlib.Path(file).exists()):
            raise Refusal(f"--module must be NAME=PATH of what is there, got {name}={file}")
    everyone = [peer for peer in peers(args.backend, modules) if peer.device == device]
    named = tuple(args.peers.split(",")) if args.peers else ()
    known = {peer.name: peer for peer in everyone}
    for name in named:
        if name not in known:
            others = ", ".join(peer.name for peer in everyone if not peer.own)
            raise Refusal(f"there is no peer {name!r} on this device, only {others}")
        if not known[name].installed():
            raise Refusal(f"the peer {name} is not installed: no module {known[name].module}")
    return everyone, named


def run(args, command):
    """Measures the cells that the arguments choose. Ctrl-C ends it with what is finished."""
    cells = choose(args)
    everyone, named = choose_peers(args, cells[0].device)
    known = known_peers(args.known) if args.known else {}
    arrays = arrays_for(cells[0].device)
    for dtype in sorted({cell.dtype for cell in cells} - arrays.dtypes.keys()):
        print(f"without torch and ml_dtypes there is no {dtype}: left out", file=sys.stderr)
    cells = [cell for cell in cells if cell.dtype in arrays.dtypes]
    options = Options(args.timings, args.warmup, named)
    result = {"header": environment(arrays, command, args.commit), "rows": []}
    apart = [p.name for p in everyone if p.apart and any(options.asks(p, x) for x in cells)]
    if apart:
        result["header"]["apart"] = APART.format(" and ".join(apart))

    def save():  # after each cell: what was measured survives whatever comes
        if args.json:
            pathlib.Path(args.json).write_text(dump(result))

    if args.json:
        pathlib.Path(args.json).parent.mkdir(parents=True, exist_ok=True)
    save()
    result["header"]["limits"] = machine(arrays)
    try:
        for done, cell in enumerate(_progress(cells), 1):
            result["header"].setdefault("interrupted", "before the first cell")
            result["rows"] += derive(measure(arrays, cell, everyone, options), known)
            result["header"]["interrupted"] = f"after {done} of {len(cells)} cells"
            save()
        del result["header"]["interrupted"]
    except KeyboardInterrupt:
        print(f"\ninterrupted {result['header']['interrupted']}", file=sys.stderr)
    save()
    return result
