"""The Hopper decode kernel itself, without a GPU: its threads are fibers (decode_host.h), what it
leaves in parts is merged by merge.cuh on the host.

A fault may end a process, or keep its threads waiting for ever: each variant has a process of its
own. Keys that no row sees, table tails and pages that nobody has are NaN, or wrong.
"""

import ctypes
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import reference
from conftest import python

import gpu_host
from gpu_host import HAS_LEFT, HAS_RIGHT
from gpu_host.test_merging import DTYPES, Stack, Tensor, aligned, described

VARIANTS = (
    "sm90_decode_bf16_d128_16",
    "sm90_decode_bf16_d64_64",
    "sm90_decode_f16_d256_64",
    "sm90_decode_bf16_d128_16_strided",
    "sm90_decode_bf16_d64_64_strided",
)
MANY = [n * 37 % 261 for n in range(45)]
CASES = {  # hq: of each key head; many: rows of a tile of 64
    "one token": {"sk": 300, "parts": 3, "k_lengths": [300, 37]},
    "causal": {"many": 5, "sk": 200, "causal": True, "k_lengths": [200, 3], "q_lengths": [5, 4]},
    "window": {"many": 3, "sk": 400, "window": (150, 1), "parts": 2, "k_start": [3, 130]},
    "offset": {"many": 2, "sk": 150, "causal": True, "q_offset": [-1, 40], "sink": True},
    "changes": {"sk": 200, "softcap": 4.0, "alibi": True, "sink": True, "parts": 2, "scale": 0.9},
    "invariant": {"sk": 1100, "b": 1, "parts": 2, "invariant": True, "k_lengths": [1030]},
    "columns": {"sk": 130, "d": -24, "dv": -8, "scale": -0.2, "hk": 2, "beside": True},
    "a cluster": {"sk": 300, "parts": 4, "cluster": 4, "k_lengths": [300, 70], "sink": True},
    "clusters": {"many": 2, "sk": 420, "parts": 4, "cluster": 2, "causal": True, "b": 1},
    "a key and a sink": {"sk": 70, "k_lengths": [1, 1], "sink": True},
    "that in parts": {"sk": 300, "parts": 3, "k_lengths": [1, 200], "sink": True},
    "that in a cluster": {"sk": 300, "parts": 2, "cluster": 2, "k_lengths": [1, 70], "sink": True},
    "dealt": {
        "sk": 900,
        "parts": 4,
        "deal": 5,
        "b": 4,
        "k_lengths": [200, 900, 0, 64],
        "sink": True,
    },
    "dealt rows": {"many": 3, "sk": 600, "parts": 3, "deal": 4, "window": (200, 0), "hk": 2},
    "dealt to many": {"sk": 260, "parts": 2, "deal": 45, "b": 45, "k_lengths": MANY},
    "empty": {"sk": 64, "k_lengths": [0, 64], "parts": 2},
    "pages of 256": {"sk": 500, "size": 256, "k_lengths": [500, 200], "parts": 2},
    "pages of 16": {"many": 2, "sk": 200, "size": 16, "k_lengths": [190, 33], "causal": True},
    "a place each": {"sk": 200, "size": 200, "k_lengths": [200, 130]},
}
STRIDED = {
    "pages of 1": {"sk": 150, "size": 1, "k_lengths": [150, 70], "parts": 2},
    "pages of 24": {"many": 2, "sk": 150, "size": 24, "k_lengths": [141, 33], "causal": True},
    "by 8 bytes": {"sk": 150, "apart": 4, "k_lengths": [150, 70]},
    "by 4 bytes": {"sk": 70, "apart": 2, "d": -6, "dv": -2, "b": 1},
    "by elements": {"sk": 70, "apart": 1, "d": -3, "dv": -1, "b": 1},
}
SLOW = {"sm90_decode_f16_d256_64": ("causal", "columns")}  # name: its cases
HERE = Path(__file__).parent


class Call(ctypes.Structure):
    _fields_ = (
        *((name, Tensor) for name in ("q", "k", "v", "out", "lse")),
        ("single", Tensor * 2),
        *((name, ctypes.c_int64) for name in ("out_step", "lse_step")),
        ("lengths", ctypes.c_void_p * 4),
        ("table", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("columns", "size", "count", "flags", "left")),
        *((name, ctypes.c_int32) for name in ("right", "sk", "parts", "cluster")),
        *((name, ctypes.c_int32) for name in ("deal", "invariant")),
        *((name, ctypes.c_double) for name in ("scale", "softcap")),
        *((name, ctypes.c_void_p) for name in ("slopes", "sink")),
    )


def variant_of(name):
    return next(v for v in gpu_host.EVERY_VARIANT if v.name == name)


def in_pages(x, size, table, count):
    """x (b, h, s, d) in pages (count, h, size, d); what no sequence has is NaN."""
    b, h, s, d = x.shape
    pages = aligned((count, h, size, d), x.dtype)
    for n in range(b):
        for j in range(s):
            pages[table[n, j // size], :, j % size] = x[n, :, j]
    return pages


def rows_apart(x, apart):
    """The same, each row as many elements further from the one before than it is long."""
    wide = aligned((*x.shape[:3], x.shape[3] + apart), x.dtype)
    wide[..., : x.shape[3]] = x
    return wide[..., : x.shape[3]]


def heads_beside(x):
    """The same, (b, s, h, d) in memory."""
    b, h, s, d = x.shape
    y = aligned((b, s, h, d), x.dtype).swapaxes(1, 2)
    y[:] = x
    return y


class Problem:
    """The arrays of one call, and what is right."""

    def __init__(
        self, variant, sk, many=1, b=2, hk=1, d=0, dv=0, size=None, apart=0, beside=False, **rest
    ):
        self.rng = np.random.default_rng(1)
        self.parts, self.cluster = rest.pop("parts", 1), rest.pop("cluster", 1)
        self.deal = rest.pop("deal", 0)
        self.sums, self.invariant = self.parts // self.cluster, rest.pop("invariant", False)
        rows = variant["rows"]
        group, sq = (5, many) if rows == 64 and many > 1 else (3, many)
        group = 17 if rows == 64 and many == 1 else group
        hq, self.sk = group * hk, sk
        if rows == 64 and many > 1:
            sq = many + 2
            rest = self.longer(rest, many)
        dtype = {"FA_BF16": ml_dtypes.bfloat16, "FA_F16": np.float16}[variant["dtype"]]
        d, dv = variant["d"] + d, variant["dv"] + dv
        self.q, self.k, self.v = (
            self.normal(dtype, *shape)
            for shape in ((b, hq, sq, d), (b, hk, sk, d), (b, hk, sk, dv))
        )
        self.out, self.lse = aligned((b, hq, sq, dv), dtype), aligned((b, hq, sq), np.float32)
        if rest.pop("alibi", False):
            rest["alibi_slopes"] = (self.rng.random(hq) / 8).astype(np.float32)
        if rest.pop("sink", False):
            rest["sink"] = self.rng.standard_normal(hq).astype(np.float32)
        rest["scale"] = rest.get("scale", d**-0.5)
        self.keywords = rest
        self.judge_by(b, hq, sq)
        self.table, self.size, self.count = None, size or 0, 0
        if size:
            columns = -(-sk // size)
            self.count = b * columns + 2
            self.table = self.rng.permutation(self.count)[: b * columns].astype(np.int32)
            self.table = self.table.reshape(b, columns)
            self.k, self.v = (in_pages(x, size, self.table, self.count) for x in (self.k, self.v))
            for n, length in enumerate(rest.get("k_lengths", [sk] * b)):
                self.table[n, -(-length // size) :] = (-1, 2**30)[n % 2]
        if beside:
            self.q, self.k, self.v, self.out = map(heads_beside, (self.q, self.k, self.v, self.out))
        if apart:
            self.k, self.v = (rows_apart(x, apart) for x in (self.k, self.v))

    @staticmethod
    def longer(rest, many):
        lengths = rest.get("q_lengths")
        return {**rest, "q_lengths": [n + 2 for n in lengths]} if lengths else rest

    def normal(self, dtype, *shape):
        x = aligned(shape, dtype)
        x[:] = self.rng.standard_normal(shape)
        return x

    def judge_by(self, b, hq, sq):
        wide = reference.widen(self.v, b * hq * sq)
        self.exact = reference.attention(self.q, self.k, wide, **self.keywords)
        self.low = list(reference.careful(self.q, self.k, wide, **self.keywords))
        names = ("causal", "window", "q_offset", "q_lengths", "k_lengths", "k_start")
        limits = {name: x for name, x in self.keywords.items() if name in names}
        seen = reference.visible(b, 1, sq, self.sk, **limits)[:, 0]
        self.single = seen.sum(2) == 1
        self.judged_v = self.v.copy()
        self.q.transpose(0, 2, 1, 3)[~seen.any(2)] = np.nan
        for x in (self.k, self.v):
            x.transpose(0, 2, 1, 3)[~seen.any(1)] = np.nan

    def call(self, out, lse, kept):
        """`kept`: a list, which holds what the call points to."""

        def pointer(x, dtype=np.int32):
            if x is None:
                return None
            kept.append(np.array(x, dtype))
            return kept[-1].ctypes.data

        c = Call(*(described(x) for x in (self.q, self.k, self.v, out, lse)))
        c.single[:] = described(self.out), described(self.lse)
        c.out_step, c.lse_step = out[0].size * len(out), lse[0].size * len(lse)
        names = ("q_lengths", "k_lengths", "k_start", "q_offset")
        lengths = [pointer(self.keywords.get(name)) for name in names]
        c.lengths = (ctypes.c_void_p * 4)(*lengths)
        if self.table is not None:
            c.table, c.columns = pointer(self.table), self.table.shape[1]
            c.size, c.count = self.size, self.count
        if self.keywords.get("causal"):
            c.flags = HAS_RIGHT
        elif "window" in self.keywords:
            c.flags = HAS_LEFT | HAS_RIGHT
            c.left, c.right = self.keywords["window"]
        c.sk, c.parts, c.cluster, c.deal = self.sk, self.parts, self.cluster, self.deal
        c.invariant = self.invariant
        c.scale, c.softcap = self.keywords["scale"], self.keywords.get("softcap", 0)
        c.slopes = pointer(self.keywords.get("alibi_slopes"), np.float32)
        c.sink = pointer(self.keywords.get("sink"), np.float32)
        return c

    def run(self, library, merging, name, late):
        """Complaints."""
        kept = []
        self.out[:], self.lse[:] = np.nan, np.nan
        outs, lses = self.out, self.lse
        if self.sums > 1:
            outs = aligned((self.sums, *self.out.shape), np.float32)
            lses = aligned((self.sums, *self.lse.shape), np.float32)
            call = self.call(outs[0], lses[0], kept)
        else:
            call = self.call(outs, lses, kept)
        assert library.chosen(ctypes.byref(call)).decode() == name
        assert library.decode(ctypes.byref(call), late) == 0
        if self.sums > 1:
            self.merge(merging, outs, lses)
        complaints = reference.judge(self.out, self.lse, self.exact, self.low, self.judged_v)
        return complaints + self.judge_single()

    def judge_single(self):
        """P of a row's only key is 1, beside a sink or not: nothing but the result is rounded."""
        out = self.out.astype(np.float64).swapaxes(1, 2)[self.single]
        exact = self.exact.out[..., : self.out.shape[3]].swapaxes(1, 2)[self.single]
        ulp = np.ldexp(1.0, np.frexp(exact)[1] - reference.finfo(self.out.dtype).nmant - 1)
        off = np.max(np.abs(out - exact) / ulp, initial=0)
        return [f"a row of one key is off by {off} ulp"] if off > 0.51 else []

    def merge(self, merging, outs, lses):
        single = (np.isneginf(lses).all(0), self.out.copy(), self.lse.copy())
        stack = Stack(DTYPES["fp32"][1], outs[0].size, lses[0].size)
        given = [ctypes.byref(described(x)) for x in (outs[0], lses[0], self.out, self.lse)]
        number = {"bfloat16": 4, "float16": 3}[str(self.out.dtype)]
        assert merging.merge(len(outs), *given, number, ctypes.byref(stack), None, 2) == 0
        if self.deal:
            where, out, lse = single
            self.out[where], self.lse[where] = out[where], lse[where]


@gpu_host.marks
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
@pytest.mark.parametrize("name", VARIANTS)
def test_decode(name, tmp_path, merging):
    flags = (*variant_of(name).defines(), f"-I{HERE}/include", "-w", "-O2")
    gpu_host.library(HERE / "decode_shim.cpp", tmp_path, *flags)
    paths = [str(tmp_path / "decode_shim.so"), merging._name]
    assert python("-c", f"from {__name__} import main; main({name!r}, *{paths!r})") == "right\n"


def main(name, path, merging):
    library, merging, variant = ctypes.CDLL(path), ctypes.CDLL(merging), variant_of(name)
    library.chosen.restype = ctypes.c_char_p
    cases = STRIDED if variant["strided"] else CASES
    for late in (0, 1):
        for case in SLOW.get(name, cases):
            keywords = cases[case]
            complaints = Problem(variant, **keywords).run(library, merging, name, late)
            assert not complaints, f"{case}, late={late}: {complaints}"
    print("right")
