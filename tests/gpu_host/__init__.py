"""What the kernels' host code decides, tested without a GPU.

It is plain C, so gcc makes a library of it (shim.c) that the tests ask.
"""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

TESTS = Path(__file__).resolve().parent.parent
KERNELS = TESTS.parent / "kernels"
INCLUDES = (f"-I{KERNELS}", f"-I{KERNELS.parent}/csrc")
SMS = 132
LOADS = ("FA_BOXES", "FA_STRIDED", "FA_SLICES", "FA_RAW")
F16, BF16 = 3, 4
HAS_LEFT, HAS_RIGHT, TOP_LEFT = 1, 2, 4


def variants():
    """Those of all tables, as the build reads them; none without sources."""
    if not KERNELS.exists():
        return []
    sys.path.insert(0, str(KERNELS))
    import table

    return [variant for path in table.tables() for variant in table.read(path)]


EVERY_VARIANT = variants()
VARIANTS = [v for v in EVERY_VARIANT if v.name.startswith("sm90_fwd_")]

marks = pytest.mark.skipif(
    not VARIANTS or not shutil.which("gcc"), reason="needs the sources and gcc"
)


def library(source, folder, *flags):
    """A C or C++ file as a library, by the compiler of its language."""
    compiler = ["gcc", "-std=c11"] if source.suffix == ".c" else ["g++", "-std=c++17"]
    warnings = ("-Wall", "-Wextra", "-Werror", "-Wno-unused-function", "-Wno-unknown-pragmas")
    target = folder / f"{source.stem}.so"
    command = [*compiler, "-O1", *warnings, "-shared", "-fPIC", *INCLUDES, *flags]
    subprocess.run([*command, source, "-o", target], check=True)
    return ctypes.CDLL(str(target))


def shapes(n):
    rng = np.random.default_rng(3)
    for _ in range(n):
        hk = int(2 ** rng.uniform(0, 5))
        hq = hk * int(rng.choice([1, 1, 4, 8]))
        sq, sk = (int(2 ** rng.uniform(0, 15)) for _ in range(2))
        yield int(2 ** rng.uniform(0, 8)), hq, hk, sq, sk
