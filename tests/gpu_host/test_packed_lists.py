"""The list of tiles of packed sequences; the kernel itself, threads as fibers."""

import ctypes

import numpy as np
import pytest

import gpu_host
from gpu_host import HAS_LEFT, HAS_RIGHT

pytestmark = gpu_host.marks


def list_tiles(
    packed, cu_q, cu_k, total_q, total_k, heads=(4, 2), longest=None, flags=2, block=64, few=0
):
    """The list's entries, the visits of each row by each head, and the keys of each entry. cu_k
    None: keys are a cache's, and sequences of at most `few` rows are left out."""
    b, capacity = len(cu_q) - 1, total_q // block + len(cu_q)
    cu = [None if x is None else np.ascontiguousarray(x, np.int32) for x in (cu_q, cu_k)]
    longest = longest or (total_q, total_k)
    workspace = np.full(4 + 2 * capacity + 64 + 1000, -7, np.int32)
    visits, keys = np.zeros((heads[0], total_q), np.uint8), np.zeros(capacity, np.int32)
    arrays = (*cu, workspace, visits, keys)
    pointers = [None if x is None else ctypes.c_void_p(x.ctypes.data) for x in arrays]
    entries = packed.list(
        b, *heads, total_q, total_k, *longest, *pointers[:2], flags, block, pointers[2],
        ctypes.c_int64(4 * (len(workspace) - 1000)), *pointers[3:], few,
    )  # fmt: skip
    assert 0 <= entries <= capacity, entries
    assert (workspace[4 + 2 * capacity :] == -7).all()  # nothing behind the list
    return workspace[4 : 4 + 2 * entries].reshape(-1, 2), visits, keys[:entries]


def ends(lengths):
    return np.append(0, np.cumsum(lengths))


@pytest.mark.parametrize("flags", [0, HAS_RIGHT, HAS_LEFT | HAS_RIGHT])
def test_packed_rows_come_exactly_once(packed, flags):
    rng = np.random.default_rng(5)
    for case in range(25):
        b = int(2 ** rng.uniform(0, 12))
        most = (3, 64, 700, 5000)[case % 4] if b < 300 else 40
        nq, nk = (rng.integers(0, most + 1, b) for _ in range(2))
        if case % 5 == 0:
            nq[rng.integers(b)] = nk[rng.integers(b)] = 9000
        tail = int(rng.choice([0, 1, 300]))
        hk, group = int(rng.integers(1, 4)), int(rng.integers(1, 4))
        entries, visits, keys = list_tiles(
            packed, ends(nq), ends(nk), int(nq.sum()) + tail, int(nk.sum()), (hk * group, hk),
            (int(rng.integers(1, 2 * most)), max(1, int(nk.max()))), flags,
            (64, 128, 192)[case % 3],
        )  # fmt: skip
        assert (visits == 1).all()
        # By classes of the number of keys, then as they come; the list of a sequence is one piece.
        order = [packed.length_class(int(n)) for n in keys]
        assert order == sorted(order)
        for one in set(order):
            mine = entries[np.array(order) == one, 0]
            assert (np.diff(mine) >= 0).all()
        firsts = {}
        for i, (sequence, first) in enumerate(entries):
            assert first == firsts.setdefault(sequence, i)


@pytest.mark.parametrize("few", [0, 1, 16])
def test_a_cache_leaves_out_sequences_of_few_rows(packed, few):
    rows = np.random.default_rng(few).choice([0, 1, 1, 3, 16, 17, 64, 300], 200)
    total = int(rows.sum())
    entries, visits, keys = list_tiles(
        packed, ends(rows), None, total + 5, 0, longest=(300, 5000), few=few
    )
    assert (visits == np.append(np.repeat(rows > few, rows), [True] * 5)).all()
    assert len(entries) == sum(-(-rows[rows > few] // 64)) + 1
    assert (keys[:-1] == 5000).all() and entries[-1, 0] == 200


def test_packed_classes(packed):
    got = [packed.length_class(n) for n in range(5000)]
    assert got == sorted(got, reverse=True) and got[0] == got[63] == 31 and got[64] == 30
    assert [packed.length_class(n) for n in (2**16, 2**20, 2**30 - 1)] == [10, 2, 1]


def test_packed_offsets_that_make_no_sense(packed):
    big, total = 2**31 - 1, 100_000
    for cu in (
        [0, total, 0, total, 0, total] * 100,
        [0, 500, 300, total],
        [7, -5, 2 * total, big],
        [0, big, -big - 1, big, 1000],
        [-big - 1] * 100,
        [big] * 100,
        np.random.default_rng(0).integers(-2000, 3 * total, 3000),
    ):
        list_tiles(packed, cu, cu, total, total)


def test_the_sequence_of_a_row(packed):
    """The one that has it, where any has."""
    rng = np.random.default_rng(6)
    for case in range(200):
        lengths = rng.integers(0, (2, 5, 60)[case % 3], int(rng.integers(1, 40)))
        cu, total = ends(lengths).astype(np.int32), int(lengths.sum()) + 3
        got = [
            packed.sequence_at(ctypes.c_void_p(cu.ctypes.data), len(lengths), total, row)
            for row in range(total)
        ]
        assert got[:-3] == np.repeat(np.arange(len(lengths)), lengths).tolist()
        assert all(0 <= b < len(lengths) for b in got)
    for cu in ([5, -9, 2**31 - 1, 3, -(2**31)], [-1, -1], [2**31 - 1, 7]):
        cu = np.array(cu, np.int32)
        for row in range(10):
            assert (
                0
                <= packed.sequence_at(ctypes.c_void_p(cu.ctypes.data), len(cu) - 1, 10, row)
                < len(cu) - 1
            )
