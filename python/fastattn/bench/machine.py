"""The limits of the machine, and what a result says of where it was measured."""

import contextlib
import datetime
import functools
import importlib.metadata
import operator
import platform
import subprocess

import numpy as np

import fastattn

from .arrays import NumpyArrays

PEERS = ("torch", "jax", "fa3-fwd", "flash-attn-4", "dew-flash-attn-cu13")  # their packages


def machine(arrays, sizes=(1024, 2048), copied=1 << 26):
    """The run's own limits, each the best of several tries: matrix product rate per dtype (FLOP/s),
    where a library has one, and copy bandwidth (B/s, bytes read plus bytes written)."""
    rng, cuda = np.random.default_rng(0), arrays.device == "cuda"

    def fastest(call):
        arrays.seconds([call], 1, 1)
        return min(arrays.seconds([call], 8, 1))

    def product(arrays, dtype, n):
        a, b = (arrays.normal(rng, (n, n), dtype) for _ in range(2))
        return 2 * n**3 / fastest(functools.partial(operator.matmul, a, b))

    if cuda:
        limits = {dtype: product(arrays, dtype, 8192) for dtype in ("bf16", "fp16")}
    else:  # the better library, on whichever CPU this is; the kernels widen 16 bits to fp32 ...
        libraries = (NumpyArrays(), arrays) if arrays.name == "torch" else (arrays,)
        fp32 = max(product(x, "fp32", n) for x in libraries for n in sizes)
        limits = {"fp32": fp32, "bf16": fp32, "fp16": fp32}
        if fastattn.info()["cpu"]["level"] == "avx512_bf16":  # ... but for this; NumPy has none
            del limits["bf16"]
            if arrays.name == "torch":
                limits["bf16"] = max(fp32, *(product(arrays, "bf16", n) for n in sizes))
    source = arrays.normal(rng, (16 * copied if cuda else copied,), "bf16" if cuda else "fp32")
    target = source + 0
    copy = functools.partial(operator.setitem, target, slice(None), source)
    limits["copy"] = 2 * source.nbytes / fastest(copy)
    return limits


def git(tree):
    """The commit of a source tree, or None."""
    return _shell("git", "-C", str(tree), "describe", "--always", "--dirty")


def _shell(*command):
    """One line of a command's output, or None where it cannot be asked."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return output.stdout.strip().partition("\n")[0]


def environment(arrays, command, commit):
    """Everything that a reader needs to repeat the run: the header of a result file, but for the
    limits."""
    info = fastattn.info()
    head = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
        "commit": commit,
        "device": arrays.device,
        "cpu": cpu_name(),
        "cpu_level": info["cpu"]["level"],
        "cpu_threads": info["cpu"]["threads"],
        "versions": versions(info),
    }
    if arrays.device == "cuda":
        torch = arrays.torch
        query = "clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
        head["gpu"] = torch.cuda.get_device_name()
        head["driver"] = _shell("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        values = _shell("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
        head["clocks"] = dict(zip(query.split(","), (values or "").split(", "), strict=False))
        head["versions"]["cuda"] = torch.version.cuda
        head["versions"]["cudnn"] = torch.backends.cudnn.version()
    return head


def versions(info):
    """Of everything that a time may depend on, where it is installed."""
    found = {"python": platform.python_version(), "fastattn": info["version"]}
    for name in (*PEERS, "numpy", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def caption(header):
    """Where something was measured, in one line."""
    machine = header.get("gpu") or f"{header['cpu']}, {header['cpu_threads']} threads"
    clocks = header.get("clocks")
    driver = f", driver {header['driver']}, {clocks['clocks.sm']}" if clocks else ""
    names = ("torch", "cuda", "cudnn", *PEERS[1:])
    versions = header["versions"]
    found = "".join(f", {name} {versions[name]}" for name in names if versions.get(name))
    return f"{machine}{driver}{found}; {header['date'][:10]}, commit {header['commit']}"


def cpu_name():
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
