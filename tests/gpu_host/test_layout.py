"""Each variant's shared memory and registers fit the chip: the kernel's own layout, compiled here.

kernels/sm90/fwd_variant.h and fwd_smem.h are C++ without CUDA. One program includes them once for
each line of the table, each in a namespace of its own, and prints what came out.
"""

import shutil
import subprocess

import pytest

from gpu_host import INCLUDES, VARIANTS

pytestmark = pytest.mark.skipif(
    not VARIANTS or not shutil.which("g++"), reason="needs the sources and g++"
)

BLOCK_LIMIT, SM_LIMIT = 227 << 10, 228 << 10  # shared memory, compute capability 9.0
SYSTEM = 1 << 10  # of it, for each block
REGISTERS = 65536  # of an SM
FIELDS = ("SMEM_BYTES", "THREADS", "SHARES", "MMA_REGISTERS", "PRODUCER_REGISTERS", "POOL")

# Headers that both include, and that no namespace may hold.
HEAD = """#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include "mask.h"
#include "sm90/fwd_columns.h"
"""


def program(variants):
    """C++ that prints the fields of each variant, a line each."""
    text, prints = [HEAD], []
    for i, defines in enumerate(variants):
        text += [f"#define {name} {value}" for name, value in defines.items()]
        text += [f"namespace n{i} {{", '#include "sm90/fwd_smem.h"', "}"]
        text += [f"#undef {name}" for name in defines]
        text += [
            f"#undef FASTATTN_SM90_{name}_H" for name in ("VARIANT", "FWD_VARIANT", "FWD_SMEM")
        ]
        values = ", ".join(f"(int)n{i}::{field}" for field in FIELDS)
        prints.append(f'printf("{" ".join(["%d"] * len(FIELDS))}\\n", {values});')
    return "\n".join([*text, "int main() {", *prints, "}", ""])


def defines(variant):
    """{VARIANT_D: 64}, as the build passes them."""
    return dict(define.removeprefix("-D").split("=") for define in variant.defines())


def layouts(variants, folder):
    """The fields of each by name; CalledProcessError where a static_assert fails."""
    (folder / "layout.cpp").write_text(program(variants))
    flags = ("-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unused", "-Wno-parentheses")
    command = ["g++", *flags, *INCLUDES, "layout.cpp", "-o", "layout"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    said = subprocess.run(folder / "layout", check=True, capture_output=True, text=True).stdout
    lines = [map(int, line.split()) for line in said.splitlines()]
    return [dict(zip(FIELDS, line, strict=True)) for line in lines]


@pytest.fixture(scope="module")
def chip(tmp_path_factory):
    """(variant, its layout) of each."""
    found = layouts(map(defines, VARIANTS), tmp_path_factory.mktemp("layout"))
    return list(zip(VARIANTS, found, strict=True))


def test_shared_memory_fits(chip):
    """A block's, and that of as many blocks as the variant wants on an SM."""
    for v, n in chip:
        assert 0 < n["SMEM_BYTES"] <= BLOCK_LIMIT, v.name
        assert (n["SMEM_BYTES"] + SYSTEM) * v["blocks_per_sm"] <= SM_LIMIT, v.name


def test_registers_fit(chip):
    """The launch's share, and what the warpgroups exchange afterwards: setmaxnreg takes 24 to 240,
    by eight, and nobody gets more than the others gave."""
    for v, n in chip:
        launch = n["POOL"] * 128 // n["THREADS"]
        assert launch % 8 == 0 and n["THREADS"] <= 1024, v.name
        assert launch * n["THREADS"] * n["SHARES"] <= REGISTERS, v.name
        assert n["SHARES"] >= v["blocks_per_sm"], v.name
        for registers in (n["MMA_REGISTERS"], n["PRODUCER_REGISTERS"]):
            assert 24 <= registers <= 240 and registers % 8 == 0, v.name
        exchanged = v["warpgroups"] * n["MMA_REGISTERS"] + n["PRODUCER_REGISTERS"]
        assert exchanged <= n["POOL"], v.name


def test_the_layout_is_the_variants_own(chip):
    """What it must hold at the least: Q, the stages of K and V, and what O leaves through."""
    for v, n in chip:
        of_d, of_dv = -(-v["d"] // 64), -(-v["dv"] // 64)
        least = 64 * 128 * of_d * v["q_slots"] + 128 * v["block_n"] * (of_d + of_dv) * v["stages"]
        least += v["staged"] * v["warpgroups"] * 64 * 128 * of_dv
        assert n["SMEM_BYTES"] >= least, v.name


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"VARIANT_STAGES": 9}, "a block has no more"),
        ({"VARIANT_MMA_REGISTERS": 248}, "the pool is too small"),
        ({"VARIANT_BLOCK_N": 144}, "32 bits of a row mask"),
        ({"VARIANT_D": 72}, "wgmma takes k by 16"),
    ],
)
def test_a_variant_that_does_not_fit_is_not_compiled(tmp_path, change, sentence):
    variant = next(v for v in VARIANTS if v.name.endswith("d128_2x128"))
    with pytest.raises(subprocess.CalledProcessError) as error:
        layouts([defines(variant) | change], tmp_path)
    assert sentence in error.value.stderr
