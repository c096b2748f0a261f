"""Whether each variant of the table fits a chip."""

import importlib.util
import itertools
import re

import pytest
from conftest import ROOT

import gpu_host
from gpu_host import VARIANTS

pytestmark = gpu_host.marks


# ------------------------------------------------------------------------------------------ budgets

BLOCK_LIMIT, SM_LIMIT = 227 << 10, 228 << 10  # shared memory, compute capability 9.0


@pytest.mark.parametrize("v", VARIANTS, ids=lambda v: v.name)
def test_shared_memory_fits(v):
    """Tiles in panels of 64 columns, 128 bytes a row: Q (then O) and the stages of K and V. (That
    the registers fit is a static_assert of the kernel: it does not build otherwise.)"""
    d, dv, block_n, stages = (v[column] for column in ("d", "dv", "block_n", "stages"))
    q_slots, ones, blocks = (v[column] for column in ("q_slots", "ones", "blocks_per_sm"))
    of_d, of_dv = -(-d // 64), -(-dv // 64)
    q = 64 * 128 * max(of_d, of_dv) * q_slots
    kv = 128 * block_n * ((of_d + of_dv) * stages + ones)
    room = 1024 + 1024  # to align the base; barriers and what the warps tell each other
    assert q + kv + room <= BLOCK_LIMIT
    assert (q + kv + room + 1024) * blocks <= SM_LIMIT  # 1024: what the system takes of each


def test_general_variants_watch(host):
    """They keep no offset, which a float mask could move by more than its range, and their key
    blocks are 64 or 128, the units of a packed mask."""
    general = [v for v in VARIANTS if v["general"]]
    assert {(v["dtype"], v["d"], v["loads"]) for v in general} == set(
        itertools.product(("FA_BF16", "FA_F16"), (64, 128, 256), ("FA_BOXES", "FA_STRIDED"))
    )
    for v in general:
        assert (v["offset"], v["ones"]) == ("WATCH", 0) and v["block_n"] in (64, 128)


def test_the_sanitizers_look_at_every_kernel():
    """What a kernel writes that is not named is uninitialised to initcheck, when another reads."""
    path = ROOT / "benchmarks" / "gpu_run.py"
    spec = importlib.util.spec_from_file_location("gpu_run", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = "".join(x.read_text() for x in (ROOT / "kernels").rglob("*.cu*"))
    names = set(re.findall(r"__global__ void(?: __launch_bounds__\([^()]*\))?\s+(\w+)\(", text))
    assert names > {
        "VARIANT_NAME",
        "list_tiles",
        "pack_mask",
        "write_zeros",
        "merge_list",
        "bwd_dq",
    }
    macros = {"VARIANT_NAME", "MASK_KERNEL", "Q_KERNEL"}  # that make names of a variant's
    names = (names - macros) | {v.name for v in gpu_host.EVERY_VARIANT}
    assert not {x for x in names if not any(part in x for part in module.KERNELS)}
