"""The variants of the Hopper forward kernel that read a cache's pages, without a GPU: its threads
are fibers (hopper.h). Keys that no row sees, table tails and pages that nobody has are NaN, or
wrong.
"""

import ctypes
import shutil

import ml_dtypes
import numpy as np
import pytest
import reference
from conftest import python

import gpu_host
from gpu_host import HAS_LEFT, HAS_RIGHT
from gpu_host.test_decode_kernel import in_pages, rows_apart
from gpu_host.test_forward_kernel import HERE, unseen, variant_of
from gpu_host.test_merging import aligned, described

BOXES = {
    "pages of 256": {"sq": 200, "sk": 400, "size": 256, "causal": True, "k_lengths": [400, 131]},
    "pages of 64": {"sq": 150, "sk": 300, "size": 64, "causal": True, "k_start": [3, 100]},
    "pages of 16": {"sq": 70, "sk": 200, "size": 16, "window": (50, 3), "k_lengths": [199, 0]},
    "a place each": {"sq": 140, "sk": 200, "size": 200, "k_lengths": [200, 77]},
    "packed": {"rows": [130, 3, 1, 0, 70], "sk": 260, "size": 32, "causal": True, "few": 4},
    "packed, padded": {"rows": [90, 3], "q_lengths": [80, 2], "sk": 150, "size": 64, "few": 8},
    "packed, no pages": {"rows": [90, 140], "sk": 150, "causal": True},
    "columns": {"sq": 70, "sk": 140, "size": 64, "d": -16, "dv": -8},
    "large scores": {"sq": 140, "sk": 500, "size": 64, "b": 1, "factor": 60.0},
}
ROWS = {
    "pages of 1": {"sq": 70, "sk": 140, "size": 1, "causal": True, "k_lengths": [140, 33]},
    "pages of 24": {"rows": [70, 1, 20], "sk": 140, "size": 24, "causal": True, "few": 1},
    "by 8 bytes": {"sq": 66, "sk": 130, "size": 64, "apart": 4, "k_start": [3, 70]},
    "by elements": {"sq": 66, "sk": 70, "size": 7, "apart": 1, "d": -3, "dv": -1, "b": 1},
}
VARIANTS = {
    "sm90_fwd_bf16_d128_pages": list(BOXES),
    "sm90_fwd_f16_d64_pages": ["pages of 64", "packed", "columns"],
    "sm90_fwd_bf16_d128_pages_strided": list(ROWS),
}


def packed(x, rows):
    """(b, h, s, d) without the rows that sequences do not have, as (1, h, total, d)."""
    parts = [y[:, :n] for y, n in zip(x, rows, strict=True)]
    y = aligned((1, x.shape[1], sum(rows) + 2, x.shape[3]), x.dtype)
    y[:] = np.nan
    y[0, :, :-2] = np.concatenate(parts, 1)
    return y


def run(library, variant, late, sk, sq=None, rows=None, b=2, size=None, d=0, dv=0, **more):
    """Complaints about one call, on two multiprocessors."""
    rng = np.random.default_rng(1)
    few, apart, factor = (more.pop(x, y) for x, y in (("few", 0), ("apart", 0), ("factor", 1.0)))
    dtype = {"FA_BF16": ml_dtypes.bfloat16, "FA_F16": np.float16}[variant["dtype"]]
    d, dv, hq, hk = variant["d"] + d, variant["dv"] + dv, 2, 1
    if rows:
        b, sq = len(rows), max(rows)
        more.setdefault("q_lengths", rows)
        more.setdefault("k_lengths", [sk - 7 * n for n in range(b)])

    def normal(*shape):
        x = aligned(shape, dtype)
        x[:] = rng.standard_normal(shape)
        return x

    q, k, v = normal(b, hq, sq, d), normal(b, hk, sk, d), normal(b, hk, sk, dv)
    q *= dtype(factor)
    exact_of = {**more, "scale": d**-0.5}
    wide = reference.widen(v, b * hq * sq)
    exact = reference.attention(q, k, wide, **exact_of)
    low = list(reference.careful(q, k, wide, **exact_of))
    seen = reference.visible(b, 1, sq, sk, **more)[:, 0]
    judged = v.copy()
    unseen(q, seen.any(2))
    unseen(k, seen.any(1))
    unseen(v, seen.any(1))
    table = None
    if size:
        columns = -(-sk // size)
        table = rng.permutation(b * columns + 2)[: b * columns].astype(np.int32)
        table = table.reshape(b, columns)
        k, v = (in_pages(x, size, table, b * columns + 2) for x in (k, v))
        for n, length in enumerate(more.get("k_lengths", [sk] * b)):
            table[n, -(-length // size) :] = (-1, 2**30)[n % 2]
    if apart:
        k, v = (rows_apart(x, apart) for x in (k, v))
    given = packed(q, rows) if rows else q
    out = aligned((*given.shape[:3], dv), dtype)
    lse = aligned(given.shape[:3], np.float32)
    out[:], lse[:] = np.nan, np.nan
    lengths = [more.get(name) for name in ("q_lengths", "k_lengths", "k_start")]
    if rows and more["q_lengths"] == rows:
        lengths[0] = None
    lengths = [None if x is None else np.array(x, np.int32) for x in lengths]
    pointers = (ctypes.c_void_p * 3)(*(None if x is None else x.ctypes.data for x in lengths))
    masks = (HAS_LEFT | HAS_RIGHT, *more["window"]) if "window" in more else (0, 0, 0)
    masks = (HAS_RIGHT, 0, 0) if more.get("causal") else masks
    ends = np.cumsum([0, *rows]).astype(np.int32) if rows else None
    status = library.forward_pages(
        *(ctypes.byref(described(x)) for x in (given, k, v, out, lse)),
        *(ctypes.c_double(exact_of["scale"]), (ctypes.c_int32 * 3)(*masks), pointers),
        *(table.ctypes.data_as(ctypes.c_void_p) if size else None, table.shape[1] if size else 0),
        *(size or 0, sk, ends.ctypes.data_as(ctypes.c_void_p) if rows else None, b, sq, few, late),
    )
    assert status == 0, status
    if not rows:
        return reference.judge(out, lse, exact, low, judged)
    return unpacked(out, lse, exact, low, judged, rows, lengths[0], few)


def unpacked(out, lse, exact, low, v, rows, lengths, few):
    """Complaints about packed rows: those of few are another kernel's, and were not written; those
    of no sequence and padding are 0."""
    assert not out[:, :, -2:].any() and (lse[..., -2:] == -np.inf).all()
    every = np.zeros((*exact.out.shape[:3], out.shape[3]), out.dtype)
    logs = np.full(exact.lse.shape, -np.inf, np.float32)
    first = 0
    for n, count in enumerate(rows):
        mine = slice(first, first + count)
        first += count
        padded = lengths is not None and lengths[n] < count
        if count <= few and not padded:
            assert np.isnan(out[0, :, mine].astype(float)).all() and np.isnan(lse[0, :, mine]).all()
            every[n], logs[n] = exact.out[n, ..., : out.shape[3]], exact.lse[n]
        else:
            every[n, :, :count], logs[n, :, :count] = out[0, :, mine], lse[0, :, mine]
    return reference.judge(every, logs, exact, low, v)


@gpu_host.marks
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
@pytest.mark.parametrize("name", VARIANTS)
def test_pages(name, tmp_path):
    flags = (*variant_of(name).defines(), f"-I{HERE}/include", "-w", "-O2")
    gpu_host.library(HERE / "forward_shim.cpp", tmp_path, *flags)
    code = f"from {__name__} import main; main({str(tmp_path / 'forward_shim.so')!r}, {name!r})"
    assert python("-c", code) == "right\n"


def main(path, name):
    library, variant = ctypes.CDLL(path), variant_of(name)
    for late, case in enumerate(VARIANTS[name]):  # products are late in every second one
        complaints = run(library, variant, late % 2, **(BOXES | ROWS)[case])
        assert not complaints, f"{case}, late={late % 2}: {complaints}"
    print("right")
