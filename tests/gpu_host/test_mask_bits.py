"""Where the bits of a packed mask lie."""

import ctypes
import itertools

import numpy as np

import gpu_host
from gpu_host import shapes

pytestmark = gpu_host.marks


def mask_bits(host, b, hq, sq, sk, strides, lengths=0, totals=(0, 0)):
    """The layout as {name: number}, and how often each of its 16 bytes are used."""
    layout, uses = (ctypes.c_int64 * 11)(), None
    for _ in range(2):
        host.mask_bits(
            *map(ctypes.c_int, (b, hq, sq, sk)),
            *map(ctypes.c_int64, strides[:2]),
            *map(ctypes.c_int, (strides[2], lengths, *totals)),
            layout,
            uses if uses is None else ctypes.c_void_p(uses.ctypes.data),
        )
        if uses is None:
            uses = np.zeros(layout[7] // 16, np.uint8)
    names = (
        "batches",
        "heads",
        "groups",
        "blocks",
        "words",
        "columns",
        "bits",
        "bytes",
        "mask_only",
    )
    return dict(zip((*names, "rows", "keys"), layout, strict=True)), uses


def check_pieces(n, uses):
    """Every piece has its own 16 bytes, and all lie inside."""
    assert 64 * n["groups"] >= n["rows"] and n["groups"] % 2 == 0 and 32 * n["words"] >= n["blocks"]
    assert 128 * (n["blocks"] - 1) < n["keys"] <= 128 * n["blocks"] and n["bytes"] % 256 == 0
    planes = n["batches"] * n["heads"]
    used = planes * n["groups"] * (n["words"] + n["blocks"] + 64 * n["blocks"])
    assert uses.max() == 1 and uses.sum() == used and (uses[:used] == 1).all()


def test_a_packed_mask_fits_its_workspace(host):
    strides = (0, 0), (0, 1 << 20), (1 << 20, 0), (1 << 24, 1 << 20)
    for (b, _, _, sq, sk), (stride_b, stride_h), lengths in itertools.product(
        itertools.islice(shapes(20), 20), strides, (0, 1)
    ):
        b, hq, sq, sk = min(b, 3), 2, min(sq, 700), min(sk, 9000)
        for stride_q in (0, sk):
            n, uses = mask_bits(host, b, hq, sq, sk, (stride_b, stride_h, stride_q), lengths)
            assert n["batches"] == (b if stride_b or lengths else 1)
            assert n["heads"] == (hq if stride_h else 1)
            assert (n["mask_only"], n["rows"], n["keys"]) == (0, sq, sk)
            check_pieces(n, uses)


def test_the_mask_of_packed_sequences_has_planes_of_its_own(host):
    """As many as the mask itself, whatever the lengths, and no longer than all rows and keys."""
    rng = np.random.default_rng(4)
    strides = (0, 0), (0, 1 << 20), (1 << 20, 0), (1 << 24, 1 << 20)
    for (stride_b, stride_h), lengths, alike in itertools.product(strides, (0, 1), (0, 1)):
        sq, sk, total_q, total_k = (int(2 ** rng.uniform(0, 11)) for _ in range(4))
        planes = (stride_b, stride_h, 0 if alike else sk)
        n, uses = mask_bits(host, 3, 2, sq, sk, planes, lengths, (total_q, total_k))
        assert n["batches"] == (3 if stride_b else 1) and n["heads"] == (2 if stride_h else 1)
        rows = 128 if alike else min(sq, total_q)
        assert (n["mask_only"], n["rows"], n["keys"]) == (1, rows, min(sk, total_k))
        check_pieces(n, uses)
        for i in range(0, min(sq, total_q), 7):
            assert host.bits_row(sq, planes[2], total_q, i) == (i % 128 if alike else i)
            assert host.bits_row(sq, planes[2], 0, i) == i
    # 100,000 sequences, one of them long: one mask, one plane.
    n, _ = mask_bits(host, 100_000, 8, 12_000, 12_000, (0, 0, 12_000), 1, (10**6, 10**6))
    assert n["bytes"] < 12_000 * 12_000 / 4
    n, _ = mask_bits(host, 1, 8, 1 << 20, 1 << 20, (0, 0, 0), 1, (1 << 20, 1 << 20))
    assert n["bytes"] < 32 << 20  # a mask of keys


def test_a_packed_mask_lies_behind_the_list(host):
    """The list's own bytes end where the mask begins, on 256 bytes; without a list, at 0."""
    host.packed_bytes.restype = ctypes.c_int64
    for b, total, block_m in itertools.product((1, 7, 100_000), (1, 999, 10**7), (64, 128, 192)):
        size, entries = host.packed_bytes(b, total, block_m, 1), total // block_m + b + 1
        assert size % 256 == 0 and 16 + 8 * entries <= size < 16 + 8 * entries + 256
        assert host.packed_bytes(b, total, block_m, 0) == 0
