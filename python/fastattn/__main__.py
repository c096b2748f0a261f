"""`python -m fastattn`: what was found, and a first attention. With `bench`: the measurements.

Needs nothing but the package and NumPy; PyTorch is compared with where it is installed.
"""

import argparse
import contextlib
import importlib.metadata
import platform
import sys

import fastattn

from .bench import cli
from .bench.arrays import arrays_for, gpu_usable, make_inputs
from .bench.cells import UNITS, Cell
from .bench.machine import cpu_name
from .bench.measure import Options, measure
from .bench.peers import peers
from .bench.report import aligned, wrong

FRAMEWORKS = ("numpy", "torch", "jax", "cupy")


def version(name):
    """The installed version, without importing the package."""
    for package in (name, *importlib.metadata.packages_distributions().get(name, ())):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{name} {importlib.metadata.version(package)}"
    return f"{name} -"


def found(info):
    """(what, text) lines of what this build and this machine have."""
    cpu, cuda = info["cpu"], info["cuda"]
    yield "fastattn", f"{info['version']}, python {platform.python_version()}"
    yield "frameworks", ", ".join(version(name) for name in FRAMEWORKS)
    yield "cpu", f"{cpu_name()}: {cpu['level']} kernels, {cpu['threads']} threads"
    if not cuda:
        yield "gpu", f"no kernels in this build: {info['no_kernels']}"
        return
    yield "kernels", f"{len(cuda['kernels'])} GPU kernels, built with CUDA {cuda['toolkit']}"
    needs = f"needs one for CUDA {cuda['driver_needed']} or newer"
    driver = f"for CUDA {cuda['driver']}" if cuda["driver"] else "none found"
    yield "gpu driver", f"{driver} ({needs})"
    for device in cuda["devices"]:
        memory = f"{device['memory'] / 2**30:.0f} GiB"
        size = f"compute capability {device['capability']}, {device['sms']} SMs, {memory}"
        yield "gpu", f"{device['name']}: {size}"
    if not cuda["devices"]:
        yield "gpu", f"none ({cuda['error'] or 'no device'})"


def first_cell():
    """A shape that the best backend finishes in milliseconds."""
    if gpu_usable():
        return Cell("first", "cuda", 2, 16, 4096, 128, "bf16", "causal")
    return Cell("first", "cpu", 1, 8, 1024, 64, "fp32", "causal")


def main():
    info = fastattn.info()
    for what, text in found(info):
        print(f"{what:12}{text}")

    cell = first_cell()
    arrays = arrays_for(cell.device)
    explained = fastattn.explain(fastattn.attention, *make_inputs(arrays, cell)[:3], causal=True)
    print(f"\nA first attention: {cell.label}, {arrays.name} arrays")
    print(f"backend {explained.backend}, kernel {explained.kernel}\n")
    rows = measure(arrays, cell, peers(), Options(peers=("torch", "cudnn")))
    unit, scale = UNITS[cell.device]
    lines = [["", "ms", unit, "error", "allowed"]]
    for row in rows:
        if "ms" not in row:
            print(f"{row['implementation']}: {row['refused']}")
            continue
        speed = cell.flops / row["ms"] * 1e3 * scale
        errors = (f"{row[key]:.1e}" for key in ("error", "bound"))
        lines.append([row["implementation"], f"{row['ms']:.3f}", f"{speed:.0f}", *errors])
    print("\n".join(aligned(lines)))
    print("\nerror: largest difference from float64 on the same inputs.")
    if wrong(rows):
        return "fastattn's result is wrong on this machine: please report this output"
    return 0


def parse(argv):
    """--help, --version and wrong words end here."""
    parser = argparse.ArgumentParser(prog="python -m fastattn", description=__doc__)
    parser.add_argument("--version", action="version", version=f"fastattn {fastattn.__version__}")
    parser.add_argument(
        "command", nargs="?", choices=["bench"], help="measure: `python -m fastattn bench --help`"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    if sys.argv[1:2] == ["bench"]:
        sys.exit(cli.main(sys.argv[2:]))
    parse(sys.argv[1:])
    sys.exit(main())
