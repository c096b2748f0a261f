"""Whether each variant of the table fits a chip."""

import itertools

import pytest

import gpu_host
from gpu_host import VARIANTS

pytestmark = gpu_host.marks


# ------------------------------------------------------------------------------------------ budgets

BLOCK_LIMIT, SM_LIMIT = 227 << 10, 228 << 10  # shared memory, compute capability 9.0


@pytest.mark.parametrize("row", VARIANTS, ids=lambda row: row["name"])
def test_shared_memory_fits(row):
    """Tiles in panels of 64 columns, 128 bytes a row: Q (then O) and the stages of K and V. (That
    the registers fit is a static_assert of the kernel: it does not build otherwise.)"""
    d, dv, block_n, stages = (row[column] for column in ("d", "dv", "block_n", "stages"))
    q_slots, ones, blocks = (row[column] for column in ("q_slots", "ones", "blocks_per_sm"))
    of_d, of_dv = -(-d // 64), -(-dv // 64)
    q = 64 * 128 * max(of_d, of_dv) * q_slots
    kv = 128 * block_n * ((of_d + of_dv) * stages + ones)
    room = 1024 + 1024  # to align the base; barriers and what the warps tell each other
    assert q + kv + room <= BLOCK_LIMIT
    assert (q + kv + room + 1024) * blocks <= SM_LIMIT  # 1024: what the system takes of each


def test_general_rows_watch(host):
    """They keep no offset, which a float mask could move by more than its range, and their key
    blocks are 64 or 128, the units of a packed mask."""
    general = [row for row in VARIANTS if row["general"]]
    assert {(row["dtype"], row["d"], row["loads"]) for row in general} == set(
        itertools.product(("FA_BF16", "FA_F16"), (64, 128, 256), ("FA_BOXES", "FA_STRIDED"))
    )
    for row in general:
        assert (row["offset"], row["ones"]) == ("WATCH", 0) and row["block_n"] in (64, 128)
