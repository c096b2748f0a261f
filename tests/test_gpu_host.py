"""What the GPU side promises, tested without one: row choice, budgets, schedule, CUDA's sentences.

The host code of kernels/ that decides something is plain C, so gcc compiles it here into a library
that the tests ask.
"""

import ast
import ctypes
import itertools
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

KERNELS = Path(__file__).resolve().parent.parent / "kernels"
VARIANTS = KERNELS / "sm90" / "fwd.def"
INCLUDES = (f"-I{KERNELS}", f"-I{KERNELS.parent}/csrc")
SMS = 132
LOADS = ("FA_BOXES", "FA_STRIDED", "FA_SLICES", "FA_RAW")

pytestmark = pytest.mark.skipif(
    not VARIANTS.exists() or not shutil.which("gcc"), reason="needs the sources and gcc"
)

SHIM = r"""
#include <string.h>
#include "common/driver.h"
#include "common/mask_bits.h"
#include "common/packed.h"
#include "sm90/rows.h"
#include "common/schedule.h"

int choose(int dtype, int b, int hq, int hk, int sq, int sk, int d, int dv, int invariant,
           int odd, int flags,
           int lse, int change, int sms) {
    fa_params p = {.what = {.dtype = dtype, .b = b, .hq = hq, .hk = hk, .sq = sq, .sk = sk, .d = d,
                            .dv = dv, .batch_invariant = invariant},
                   .masks = {.flags = flags}};
    p.what.v.data = (void *)(int64_t)odd;
    p.what.k.stride[3] = p.what.v.stride[3] = 1;
    p.what.lse.data = lse ? &p : NULL;
    p.scores.mask.data = change == 1 ? &p : NULL;
    p.scores.softcap = change == 2 ? 50 : 0;
    p.scores.alibi_slopes = change == 3 ? (const float *)&p : NULL;
    p.scores.sink = change == 4 ? (const float *)&p : NULL;
    p.dropout.p = change == 5 ? 0.1 : 0;
    return fa_choose_row(&p, sms);
}
/* The layout of a packed mask as {batches, heads, groups, blocks, words, columns, bits, bytes,
 * mask_only, rows, keys}, and how often each 16 bytes of it belong to something (`uses`, of bytes / 16
 * elements). `total_q`, `total_k`: of packed sequences, or 0. */
void mask_bits(int b, int hq, int sq, int sk, int64_t stride_b, int64_t stride_h, int stride_q,
               int lengths, int total_q, int total_k, int64_t *layout, unsigned char *uses) {
    fa_what w = {.b = b, .hq = hq, .sq = sq, .sk = sk};
    fa_masks m = {.k_lengths = lengths ? &w.b : NULL};
    fa_varlen v = {.cu_q = total_q ? &w.b : NULL, .total_q = total_q, .total_k = total_k};
    fa_tensor mask = {.stride = {stride_b, stride_h, stride_q, 1}};
    fa_mask_bits n = fa_mask_bits_make(&w, &m, &v, &mask);
    int64_t fields[] = {n.batches, n.heads, n.groups, n.blocks, n.words, n.columns,
                        n.bits,    n.bytes, n.mask_only,   n.rows,   n.keys};
    memcpy(layout, fields, sizeof fields);
    if (!uses) return;
    for (int i = 0; i < n.batches; ++i)
        for (int h = 0; h < n.heads; ++h) {
            int64_t plane = fa_bits_plane(&n, i, h);
            for (int group = 0; group < n.groups; ++group) {
                for (int word = 0; word < n.words; ++word)
                    uses[fa_map_at(&n, plane, word, group)]++;
                for (int block = 0; block < n.blocks; ++block)
                    uses[n.columns / 16 + fa_columns_at(&n, plane, block, group)]++;
            }
            for (int block = 0; block < n.blocks; ++block)
                for (int row = 0; row < 64 * n.groups; ++row)
                    uses[n.bits / 16 + fa_bits_at(&n, plane, block, row)]++;
        }
}
/* A row of the mask that is packed where row i's bits are, of a plane of `sq` rows in all. */
int64_t bits_row(int sq, int stride_q, int total_q, int i) {
    fa_what w = {.b = 1, .hq = 1, .sq = sq, .sk = 1};
    fa_masks m = {0};
    fa_varlen v = {.cu_q = total_q ? &w.b : NULL, .total_q = total_q, .total_k = 1};
    fa_tensor mask = {.stride = {0, 0, stride_q, 1}};
    fa_mask_bits n = fa_mask_bits_make(&w, &m, &v, &mask);
    if (fa_map_at(&n, 0, 0, i / 64) != fa_bits_at(&n, 0, 0, i) / 64 ||
        fa_columns_at(&n, 0, 0, i / 64) != fa_bits_at(&n, 0, 0, i) / 64)
        return -1;
    return fa_bits_at(&n, 0, 0, i);
}
int64_t packed_bytes(int b, int total, int block_m, int is_packed) {
    fa_varlen v = {.cu_q = is_packed ? &b : NULL, .total_q = total};
    return fa_packed_bytes(&v, b, block_m);
}
int choose_packed(int b, int h, int total, int longest, int d, int invariant, int flags,
                  int softcap, int odd, int sms) {
    static const int32_t cu;
    fa_params p = {.what = {.dtype = FA_BF16, .b = b, .hq = h, .hk = h, .sq = longest,
                            .sk = longest, .d = d, .dv = d, .batch_invariant = invariant}};
    p.masks.flags = flags;
    p.scores.softcap = softcap;
    p.what.v.data = (void *)(int64_t)odd;
    p.varlen = (fa_varlen){&cu, &cu, 0, 0, total, total};
    return fa_choose_row(&p, sms);
}
/* The row of arrays (b, s, h, d), of rows `padding` elements longer than their heads. */
int choose_heads_beside(int hq, int hk, int d, int dv, int padding, float softcap, int sms) {
    fa_params p = {.what = {.dtype = FA_BF16, .b = 2, .hq = hq, .hk = hk, .sq = 300, .sk = 300,
                            .d = d, .dv = dv}};
    fa_tensor *t[] = {&p.what.q, &p.what.k, &p.what.v, &p.what.out};
    for (int i = 0; i < 4; ++i) {
        int64_t h = i == 0 || i == 3 ? hq : hk, size = i < 2 ? d : dv, row = h * size + padding;
        fa_tensor x = {(void *)4096, {2, h, 300, size}, {300 * row, size, row, 1}};
        *t[i] = x;
    }
    p.scores.softcap = softcap;
    return fa_choose_row(&p, sms);
}
/* The row where K or V is this one; the other is contiguous, Q and the output take 256 columns. */
int choose_one(int which, int64_t base, const int64_t *shape, const int64_t *stride,
               float softcap) {
    int b = shape[0], h = shape[1], s = shape[2], d = shape[3];
    fa_params p = {.what = {.dtype = FA_BF16, .b = b, .hq = h, .hk = h, .sq = s, .sk = s,
                            .d = d, .dv = d}};
    fa_tensor plain = {(void *)4096, {b, h, s, d}, {h * s * d, s * d, d, 1}};
    fa_tensor wide = {(void *)4096, {b, h, s, d}, {h * s * 256, s * 256, 256, 1}};
    fa_tensor one = {.data = (void *)(4096 + base)};
    memcpy(one.shape, shape, sizeof one.shape);
    memcpy(one.stride, stride, sizeof one.stride);
    p.what.q = p.what.out = wide;
    p.what.k = which == 'k' ? one : plain;
    p.what.v = which == 'v' ? one : plain;
    p.scores.softcap = softcap;
    return fa_choose_row(&p, 132);
}
int rows(void) { return FA_ROWS; }
const char *row_name(int i) { return fa_variants[i].name; }
int row_field(int i, int field) {
    const fa_row *r = &fa_variants[i];
    int fields[] = {r->dtype, r->d, r->dv, r->loads, r->ones, r->general};
    return fields[field];
}
int tma_takes(int64_t base, const int64_t *shape, const int64_t *stride) {
    fa_tensor t = {.data = (void *)base};
    memcpy(t.shape, shape, sizeof t.shape);
    memcpy(t.stride, stride, sizeof t.stride);
    return fa_tma_takes(&t, 2);
}
const char *sentence(int toolkit, int driver, int code, const char *detail) {
    static char text[128];
    fa_driver_sentence(text, sizeof text, toolkit, driver, code, detail);
    return text;
}
int32_t divide(int32_t x, int32_t by) { return fa_divide(x, fa_divisor_make(by)); }
/* Counts how often the blocks of one launch visit each tile (head, m_block); returns the visits
 * outside of all tiles. `order` is the m_block of each tile number. */
int64_t visit(int b, int hq, int hk, int sq, int sk, int d, int flags, int block_m, int blocks,
              unsigned char *visits, int32_t *order) {
    fa_what w = {.b = b, .hq = hq, .hk = hk, .sq = sq, .sk = sk, .d = d, .dv = d};
    fa_masks m = {.flags = flags};
    fa_schedule s = fa_schedule_make(&w, &m, block_m, blocks);
    int64_t outside = 0;
    for (int block = 0; block < blocks; ++block)
        for (int32_t round = 0;;) {
            int32_t tile = fa_schedule_next(&s, blocks, block, &round);
            if (tile >= s.tiles) break;
            fa_tile t = fa_schedule_tile(&s, tile);
            if (t.head < 0 || t.head >= s.heads || t.m_block < 0 || t.m_block >= s.m_blocks) {
                ++outside;
                continue;
            }
            visits[t.head * s.m_blocks + t.m_block]++;
            order[tile] = t.m_block;
        }
    return outside;
}
/* Under a causal mask: what the busiest block computes over what the mean one does, in blocks of 64
 * keys and one for a tile's start and end. Writes how many heads a section has. */
double uneven(int b, int hq, int hk, int s, int d, int block_m, int blocks, int32_t *section) {
    fa_what w = {.b = b, .hq = hq, .hk = hk, .sq = s, .sk = s, .d = d, .dv = d};
    fa_masks m = {.flags = FA_HAS_RIGHT};
    fa_schedule plan = fa_schedule_make(&w, &m, block_m, blocks);
    int64_t most = 0, all = 0;
    for (int block = 0; block < blocks; ++block) {
        int64_t work = 0;
        for (int32_t round = 0;;) {
            int32_t tile = fa_schedule_next(&plan, blocks, block, &round);
            if (tile >= plan.tiles) break;
            int64_t rows = (int64_t)(fa_schedule_tile(&plan, tile).m_block + 1) * block_m;
            work += ((rows < s ? rows : s) + 63) / 64 + 1;
        }
        most = work > most ? work : most, all += work;
    }
    *section = plan.section;
    return (double)most * blocks / all;
}
"""

# The kernel that lists the tiles of packed sequences, and what blocks then find by number.
PACKED_SHIM = r"""
#include <string.h>
#include "fibers.h"
#include "common/packed.cuh"

static packed_args arguments;

/* Returns the number of entries; `visits` (hq, total_q) counts how often a row is in a tile. */
extern "C" int64_t list(int b, int hq, int hk, int total_q, int total_k, int sq, int sk,
                        const int32_t *cu_q, const int32_t *cu_k, int flags, int block_m,
                        int32_t *workspace, int64_t bytes, unsigned char *visits,
                        int32_t *keys) {
    fa_what w = {};
    w.b = b, w.hq = hq, w.hk = hk, w.sq = sq, w.sk = sk, w.d = w.dv = 128;
    fa_masks m = {};
    m.flags = flags;
    fa_varlen v = {cu_q, cu_k, 1, 1, total_q, total_k};
    if (fa_packed_bytes(&v, b, block_m) > bytes) return -1;
    fa_packed p = fa_packed_make(&w, &m, &v, block_m, workspace);
    arguments = packed_args{p, v, m, sq, sk};
    run_block([] { sm90_list_tiles(arguments); });
    if (p.counts->claimed != 0) return -2;
    int32_t tiles = p.counts->entries * hq;
    for (int32_t n = 0; n < tiles; ++n) {
        fa_packed_entry entry = p.entries[n / hq];
        fa_sequence s = fa_packed_sequence(&p, &v, &m, entry.sequence, sq, sk);
        int32_t m_blocks = fa_packed_m_blocks(&p, s);
        fa_tile t = fa_packed_tile(&p, n - entry.first * hq, m_blocks, s.lengths.sk);
        if (t.head < 0 || t.head >= hq || t.m_block < 0 || t.m_block >= m_blocks) return -3;
        keys[n / hq] = s.lengths.sk;
        for (int32_t i = t.m_block * block_m; i < (t.m_block + 1) * block_m; ++i)
            if (i < s.q_end - s.q) visits[(int64_t)t.head * total_q + s.q + i]++;
    }
    return p.counts->entries;
}
extern "C" int sequence_at(const int32_t *cu_q, int b, int total, int row) {
    fa_varlen v = {cu_q, cu_q, 1, 1, total, total};
    return fa_packed_at(&v, b, row);
}
extern "C" int length_class(int sk) { return fa_packed_class(sk); }
"""
F16, BF16 = 3, 4


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    folder = tmp_path_factory.mktemp("host")
    (folder / "shim.c").write_text(SHIM)
    command = [
        "gcc",
        "-std=c11",
        "-O1",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-shared",
        "-fPIC",
        *INCLUDES,
    ]
    subprocess.run([*command, "shim.c", "-o", "shim.so"], cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "shim.so"))
    library.row_name.restype = library.sentence.restype = ctypes.c_char_p
    return library


def read_rows():
    """fwd.def as a list of dicts, read as the build reads it."""
    text = VARIANTS.read_text()
    columns = re.search(r"// columns: (.*)", text).group(1).split()
    lines = re.findall(r"^FA_VARIANT\((.*)\)", text, re.MULTILINE)
    return [dict(zip(columns, map(str.strip, line.split(",")), strict=True)) for line in lines]


ROWS = read_rows() if VARIANTS.exists() else []

# ---------------------------------------------------------------------------------------- the table


def test_table_as_the_build_and_the_dispatch_read_it(host):
    assert [row["name"] for row in ROWS] == [host.row_name(i).decode() for i in range(host.rows())]
    assert 0 < len(ROWS) <= 150
    assert len({row["name"] for row in ROWS}) == len(ROWS)
    for row in ROWS:
        assert (KERNELS / f"{row['source']}.cu").exists(), row


# ------------------------------------------------------------------------------------------ budgets

BLOCK_LIMIT, SM_LIMIT = 227 << 10, 228 << 10  # shared memory, compute capability 9.0


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_shared_memory_fits(row):
    """Tiles in panels of 64 columns, 128 bytes a row: Q (then O) and the stages of K and V. (That
    the registers fit is a static_assert of the kernel: it does not build otherwise.)"""
    d, dv, block_n, stages = (int(row[column]) for column in ("d", "dv", "block_n", "stages"))
    q_slots, ones, blocks = (int(row[column]) for column in ("q_slots", "ones", "blocks_per_sm"))
    of_d, of_dv = -(-d // 64), -(-dv // 64)
    q = 64 * 128 * max(of_d, of_dv) * q_slots
    kv = 128 * block_n * ((of_d + of_dv) * stages + ones)
    room = 1024 + 1024  # to align the base; barriers and what the warps tell each other
    assert q + kv + room <= BLOCK_LIMIT
    assert (q + kv + room + 1024) * blocks <= SM_LIMIT  # 1024: what the system takes of each


# ------------------------------------------------------------------------------------ row selection


def shapes(n):
    rng = np.random.default_rng(3)
    for _ in range(n):
        hk = int(2 ** rng.uniform(0, 5))
        hq = hk * int(rng.choice([1, 1, 4, 8]))
        sq, sk = (int(2 ** rng.uniform(0, 15)) for _ in range(2))
        yield int(2 ** rng.uniform(0, 8)), hq, hk, sq, sk


@pytest.mark.parametrize("change", range(6))
@pytest.mark.parametrize("odd", [0, 2])
def test_every_head_size_has_its_row(host, odd, change):
    """The tightest row that holds d and dv, whatever the rest of the shape; none: -1. `odd` is the
    address of v: 2 is one that the copy engine cannot load from. What changes scores has general
    rows of its own; a `change` of 0 is none, 4 a sink."""
    dtypes, general = {"FA_F16": F16, "FA_BF16": BF16}, change not in (0, 4)
    way = 0 if not odd else 1 if general else 3
    for (name, dtype), d, dv in itertools.product(
        dtypes.items(), range(1, 257, 5), (64, 128, 192, 256)
    ):
        fits = [
            int(row["d"]) + int(row["dv"])
            for row in ROWS
            if (row["dtype"], row["loads"]) == (name, LOADS[way])
            and row["general"] == str(int(general))
            and (int(row["d"]) >= d and int(row["dv"]) >= dv)
        ]
        for (b, hq, hk, sq, sk), flags, lse in zip(
            shapes(4), (0, 2, 3, 6), (0, 1, 1, 0), strict=True
        ):
            i = host.choose(dtype, b, hq, hk, sq, sk, d, dv, 0, odd, flags, lse, change, SMS)
            if not fits:
                assert i == -1
                continue
            got = [host.row_field(i, field) for field in range(6)]
            assert got[0] == dtype and got[1] >= d and got[2] >= dv and got[3] == way
            assert got[5] == general
            assert got[1] + got[2] == min(fits) and not (lse and got[4])


def test_heads_that_begin_anywhere_in_a_row(host):
    """The copy engine brings them if rows are multiples of 16 bytes, and a head fits a row of the
    table from the 16 bytes on that it begins in; Q's and K's columns must lie in the same places.
    """

    def name(*arguments, softcap=0.0):
        row = host.choose_heads_beside(*arguments, ctypes.c_float(softcap), SMS)
        return host.row_name(row).decode().split("bf16_")[1]

    for d in range(1, 257):
        slack = 0 if d % 8 == 0 else 7
        fits = [size for size in (64, 128, 256) if size >= d + slack]
        assert name(8, 8, d, d, 8, softcap=1.0).endswith("strided" if d % 8 else "general")
        if d % 8 == 0:
            assert "slices" not in name(8, 8, d, d, 8)
        else:
            assert name(8, 8, d, d, 8) == (f"d{fits[0]}_slices" if fits else "d256_strided")
        if d < 250:  # rows of 2 bytes more than 16
            assert name(8, 8, d, d, 1).endswith("_strided")
    assert name(16, 8, 65, 65, 0) == name(16, 8, 65, 64, 0) == "d128_strided"
    assert name(16, 8, 64, 65, 0) == name(8, 8, 64, 65, 0) == "d128_slices"
    assert name(8, 8, 128, 124, 0) == "d256_slices"
    assert name(1, 1, 65, 65, 7) == "d128_slices"


@pytest.mark.parametrize("which", "kv")
def test_rows_side_by_side_come_as_they_lie(host, which):
    """Those of K and V that begin on less than 8 bytes; whole heads may lie anywhere."""

    def loads(b=2, h=4, s=300, d=64, step=1, pitch=None, base=0, head=None, softcap=0.0):
        pitch = d if pitch is None else pitch
        head = s * pitch if head is None else head
        shape, stride = (b, h, s, d), (h * head, head, pitch, step)
        args = [(ctypes.c_int64 * 4)(*x) for x in (shape, stride)]
        i = host.choose_one(ord(which), ctypes.c_int64(base), *args, ctypes.c_float(softcap))
        return LOADS[host.row_field(i, 3)].removeprefix("FA_").lower()

    assert loads() == loads(pitch=72) == "boxes"
    assert (
        loads(d=65) == loads(d=66) == loads(pitch=65) == loads(pitch=66) == loads(base=2) == "raw"
    )
    anywhere = "raw" if which == "k" else "slices"  # K's columns must lie where Q's do
    assert loads(head=300 * 64 + 2) == anywhere and loads(head=300 * 64 + 1) == "raw"
    assert loads(pitch=127) == loads(d=1, pitch=2) == loads(d=3, pitch=0, head=3) == "raw"
    assert loads(pitch=129) == loads(d=1, pitch=3) == "strided"  # too far from each other
    assert loads(d=100) == loads(pitch=68) == loads(base=8) == "strided"  # on 8 bytes
    assert loads(step=2, pitch=130) == loads(pitch=-65) == loads(head=-19201) == "strided"
    assert loads(d=65, softcap=1.0) == "strided"
    assert loads(d=1, step=7, pitch=1) == loads(d=1, step=-7, pitch=1) == "strided"


@pytest.mark.parametrize(
    ("d", "base", "expected"),
    [
        (96, 0, "d96_2x128"),
        (88, 0, "d96_3x96"),
        (96, 16, "d96_3x96"),
        (112, 0, "d128_2x128"),
        (104, 0, "d128_3x64"),
    ],
)
def test_rows_that_begin_on_16_bytes_are_read_for_taller_tiles(host, d, base, expected):
    """They come at half the speed (measured: 1.1 to 1.3 times faster by the taller tiles)."""
    shape, stride = (16, 16, 1024, d), (16 * 1024 * d, 1024 * d, d, 1)
    args = [(ctypes.c_int64 * 4)(*x) for x in (shape, stride)]
    row = host.choose_one(ord("k"), ctypes.c_int64(base), *args, ctypes.c_float(0))
    assert host.row_name(row).decode() == f"sm90_fwd_bf16_{expected}"


CAUSAL = 2
BEST = [  # (b, h, s, d, causal): the row that was fastest, or nearly, when all were measured
    ((4, 16, 4096, 128, 0), "d128_3x64"),
    ((1, 16, 16384, 128, 0), "d128_3x64"),
    ((1, 16, 16384, 128, CAUSAL), "d128_3x64"),
    ((16, 16, 1024, 128, 0), "d128_2x128"),
    ((4, 16, 4096, 128, CAUSAL), "d128_2x128"),
    ((2, 16, 8192, 128, CAUSAL), "d128_2x128"),
    ((1, 8, 2048, 128, 0), "d128_2x64"),
    ((2, 8, 1024, 128, 0), "d128_2x64"),
    ((32, 16, 512, 128, 0), "d128_2x64"),
    ((32, 16, 512, 128, CAUSAL), "d128_2x64"),
    ((8, 16, 2048, 128, CAUSAL), "d128_2x64"),
    ((4, 8, 1024, 128, CAUSAL), "d128_2x64"),
    ((512, 8, 64, 128, 0), "d128_1x64"),
    ((1, 8, 256, 128, 0), "d128_1x64"),
    ((1, 8, 1024, 128, CAUSAL), "d128_1x64"),
    ((1, 1, 8192, 128, 0), "d128_1x128"),
    ((1, 3, 4096, 128, CAUSAL), "d128_1x128"),
    ((4, 32, 4096, 64, 0), "d64_4x64"),
    ((16, 96, 512, 64, 0), "d64_4x64"),
    ((16, 96, 512, 64, CAUSAL), "d64_4x64"),
    ((64, 8, 256, 64, 0), "d64_4x64"),
    ((64, 8, 128, 64, 0), "d64_2x64"),
    ((8, 8, 256, 64, 0), "d64_2x64"),
    ((4, 8, 512, 64, CAUSAL), "d64_2x64"),
    ((512, 8, 64, 64, 0), "d64_1x64"),
    ((1, 8, 256, 64, 0), "d64_1x64"),
    ((8, 8, 128, 64, 0), "d64_1x64"),
    ((1, 1, 8192, 64, 0), "d64_1x128"),
    ((1, 8, 1024, 64, CAUSAL), "d64_1x128"),
    ((1, 8, 4096, 64, CAUSAL), "d64_1x128"),
    ((4, 16, 4096, 80, CAUSAL), "d80_3x96"),
    ((8, 16, 2048, 80, CAUSAL), "d80_2x128"),
    ((8, 16, 2048, 96, 0), "d96_3x96"),
    ((16, 8, 1024, 256, 0), "d256_2x64"),
    ((32, 8, 512, 256, 0), "d256_2x64"),
    ((32, 8, 512, 256, CAUSAL), "d256_2x64"),
]


BEST_F16 = [  # where it differs: 128 keys at a time follow P, 64 watch every score
    ((4, 16, 4096, 128, 0), "d128_2x128"),
    ((1, 16, 16384, 128, CAUSAL), "d128_2x128"),
    ((8, 16, 2048, 128, CAUSAL), "d128_2x128"),
    ((32, 16, 512, 128, 0), "d128_2x128"),
    ((32, 16, 512, 128, CAUSAL), "d128_2x64"),
]


@pytest.mark.parametrize(
    ("dtype", "shape", "expected"),
    [("bf16", *best) for best in BEST] + [("f16", *best) for best in BEST_F16],
)
def test_the_fastest_row_is_chosen(host, dtype, shape, expected):
    b, h, s, d, flags = shape
    number = {"bf16": BF16, "f16": F16}[dtype]
    i = host.choose(number, b, h, h, s, s, d, d, 0, 0, flags, 0, 0, SMS)
    assert host.row_name(i).decode() == f"sm90_fwd_{dtype}_{expected}"


def constants(name):
    """What a file of tests assigns, {name: its source's tree}: to import it takes a GPU."""
    tree = ast.parse((Path(__file__).parent / name).read_text())
    return {ast.unparse(n.targets[0]): n.value for n in tree.body if isinstance(n, ast.Assign)}


def check_every_row(host, shapes):
    """Every row of boxes is the best for one of (b, h, sq, sk, d, dv), with or without a change."""
    chosen = {
        host.choose(dtype, b, h, h, sq, sk, d, dv, 0, 0, 0, lse, change, SMS)
        for dtype, (b, h, sq, sk, d, dv), (lse, change) in itertools.product(
            (F16, BF16), shapes, [(0, 0), (1, 0), (0, 2)]
        )
    }
    boxes = {i for i, row in enumerate(ROWS) if row["loads"] == "FA_BOXES"}
    assert chosen == boxes, {ROWS[i]["name"] for i in boxes - chosen}


def test_small_cases_reach_every_row(host):
    """The sizes and shapes of gpu_cases.py, which the sanitizers run."""
    values = constants("gpu_cases.py")
    sizes, of_shapes = (ast.literal_eval(values[name]) for name in ("SIZES", "SHAPES"))
    check_every_row(host, [(*shape, *size) for shape in of_shapes for size in sizes])


def test_hostile_inputs_reach_every_row(host):
    check_every_row(host, ast.literal_eval(constants("test_gpu.py")["EVERY_ROW"]))


def test_no_row_for_other_dtypes(host):
    for dtype in (1, 2, 5):
        assert host.choose(dtype, 1, 1, 1, 64, 64, 64, 64, 0, 0, 0, 0, 0, SMS) == -1


def test_batch_invariant_choice_sees_one_sequence(host):
    for b, hq, hk, sq, sk in shapes(500):
        for d in (64, 128, 256):
            for change in (0, 1):
                rows = {
                    host.choose(BF16, n, hq, hk, sq, sk, d, d, 1, base, 0, 0, change, SMS)
                    for n in (1, 2, b, 4096)
                    for base in (0, 16)  # where a part of a batch begins
                }
                assert len(rows) == 1


def test_general_rows_watch(host):
    """They keep no offset, which a float mask could move by more than its range, and their key
    blocks are 64 or 128, the units of a packed mask."""
    general = [row for row in ROWS if row["general"] == "1"]
    assert {(row["dtype"], row["d"], row["loads"]) for row in general} == set(
        itertools.product(("FA_BF16", "FA_F16"), ("64", "128", "256"), ("FA_BOXES", "FA_STRIDED"))
    )
    for row in general:
        assert (row["offset"], row["ones"]) == ("WATCH", "0") and row["block_n"] in ("64", "128")


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


def test_tma_limits(host):
    four = ctypes.c_int64 * 4

    def takes(base, shape, stride):
        return bool(host.tma_takes(ctypes.c_int64(base), four(*shape), four(*stride)))

    shape = (2, 3, 100, 64)
    assert takes(1024, shape, (19200, 6400, 64, 1))
    assert takes(1024, shape, (0, 0, 64, 1))  # expanded
    assert not takes(1024, shape, (19200, 6400, 0, 1))  # one row, over and over
    assert takes(1024, (1, 3, 100, 64), (7, 6400, 64, 1))  # the stride of one element means nothing
    assert not takes(1026, shape, (19200, 6400, 64, 1))
    assert not takes(1024, shape, (19200, 6400, 65, 1))
    assert not takes(1024, shape, (19200, 6404, 64, 1))
    assert not takes(1024, shape, (19200, 6400, -64, 1))
    assert not takes(1024, shape, (19200, 6400, 64, 2))
    assert not takes(1024, shape, (1 << 40, 6400, 64, 1))


# ------------------------------------------------------------------------------------- the schedule

HAS_LEFT, HAS_RIGHT, TOP_LEFT = 1, 2, 4


def test_division_by_multiplication(host):
    rng = np.random.default_rng(4)
    largest = 2**31 - 1
    powers = [2**n + i for n in range(31) for i in (-1, 0, 1) if 0 < 2**n + i <= largest]
    for by in [*powers, *(int(largest ** rng.random()) for _ in range(2000))]:
        multiples = [int(rng.integers(largest // by + 1)) * by for _ in range(5)]
        for x in [0, largest, *(m + i for m in multiples for i in (-1, 0, 1))]:
            if 0 <= x <= largest:
                assert host.divide(x, by) == x // by, (x, by)


@pytest.mark.parametrize("flags", [0, HAS_RIGHT, HAS_RIGHT | TOP_LEFT, HAS_LEFT | HAS_RIGHT])
def test_each_tile_comes_exactly_once(host, flags):
    host.visit.restype = ctypes.c_int64
    for b, hq, hk, sq, sk in itertools.chain(
        shapes(1500), [(70_000, 1, 1, 16, 16), (1, 70_000, 1, 5, 5)]
    ):
        block_m = (64, 128, 192, 256)[sq % 4]
        m_blocks = -(-sq // block_m)
        tiles = b * hq * m_blocks
        if tiles > 300_000:
            continue
        visits, order = np.zeros(tiles, np.uint8), np.zeros(tiles, np.int32)
        blocks = min(tiles, SMS) if b % 3 else 7
        pointers = [ctypes.c_void_p(x.ctypes.data) for x in (visits, order)]
        outside = host.visit(
            b, hq, hk, sq, sk, (64, 128, 256)[sk % 3], flags, block_m, blocks, *pointers
        )
        assert outside == 0 and (visits == 1).all(), (b, hq, hk, sq, sk, flags, block_m, blocks)


@pytest.mark.parametrize(
    ("b", "hq", "hk", "s", "d", "block_m", "most", "heads"),
    [
        # 16,384 tokens, 2,048 columns: the grid that is measured
        (32, 32, 32, 512, 64, 256, 1.04, 66),
        (8, 32, 32, 2048, 64, 256, 1.02, 33),
        (4, 32, 32, 4096, 64, 256, 1.01, 33),
        (1, 32, 32, 16384, 64, 256, 1.01, 8),
        (32, 16, 16, 512, 128, 128, 1.02, 66),
        (16, 16, 16, 1024, 128, 128, 1.02, 33),
        (8, 16, 16, 2048, 128, 128, 1.01, 33),
        (4, 16, 16, 4096, 128, 128, 1.01, 16),
        (1, 16, 16, 16384, 128, 192, 1.01, 16),  # do not fit the L2, which costs little there
        (8, 8, 8, 2048, 256, 128, 1.04, 16),
        (2, 8, 8, 8192, 256, 128, 1.01, 8),
        # heads that do not fit rounds well, many of them: never all in one section
        (16, 25, 25, 1500, 128, 128, 1.05, 44),
        (6, 28, 28, 1280, 128, 128, 1.10, 52),
        (7, 12, 12, 5000, 64, 256, 1.03, 33),
        (2, 24, 24, 3000, 128, 128, 1.05, 24),
        # 71 heads that share one of K and V, which fit the L2 all
        (1, 71, 1, 2048, 64, 256, 1.05, 71),
    ],
)
def test_causal_sections_are_even_and_stay_in_the_l2(host, b, hq, hk, s, d, block_m, most, heads):
    """Measured: 400 heads of 1,500 rows in one section take 1.9 times as long as in sections."""
    host.uneven.restype = ctypes.c_double
    section = ctypes.c_int32()
    found = host.uneven(b, hq, hk, s, d, block_m, SMS, ctypes.byref(section))
    assert 1 <= found <= most and section.value <= heads, (found, section.value)


# --------------------------------------------------------------------------------- packed sequences


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    (folder / "packed.cpp").write_text(PACKED_SHIM)
    includes = [*INCLUDES, f"-I{Path(__file__).parent}"]
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Wno-unused-function", "-shared", "-fPIC"]
    command = ["g++", *flags, *includes, "packed.cpp", "-o", "packed.so"]
    subprocess.run(command, cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "packed.so"))
    library.list.restype = ctypes.c_int64
    return library


def list_tiles(packed, cu_q, cu_k, total_q, total_k, heads=(4, 2), longest=None, flags=2, block=64):
    """The list's entries, the visits of each row by each head, and the keys of each entry."""
    b, capacity = len(cu_q) - 1, total_q // block + len(cu_q)
    cu = [np.ascontiguousarray(x, np.int32) for x in (cu_q, cu_k)]
    longest = longest or (total_q, total_k)
    workspace = np.full(4 + 2 * capacity + 64 + 1000, -7, np.int32)
    visits, keys = np.zeros((heads[0], total_q), np.uint8), np.zeros(capacity, np.int32)
    pointers = [ctypes.c_void_p(x.ctypes.data) for x in (*cu, workspace, visits, keys)]
    entries = packed.list(
        b, *heads, total_q, total_k, *longest, *pointers[:2], flags, block, pointers[2],
        ctypes.c_int64(4 * (len(workspace) - 1000)), *pointers[3:],
    )  # fmt: skip
    assert 0 <= entries <= capacity, entries
    assert (workspace[4 + 2 * capacity :] == -7).all()  # nothing behind the list
    return workspace[4 : 4 + 2 * entries].reshape(-1, 2), visits, keys[:entries]


def ends(lengths):
    return np.append(0, np.cumsum(lengths))


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
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


def test_packed_classes(packed):
    got = [packed.length_class(n) for n in range(5000)]
    assert got == sorted(got, reverse=True) and got[0] == got[63] == 31 and got[64] == 30
    assert [packed.length_class(n) for n in (2**16, 2**20, 2**30 - 1)] == [10, 2, 1]


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
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


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
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


def test_packed_row_choice(host):
    """By the mean length; with batch_invariant by no length at all. Score changes have one row per
    head size and strides."""

    def name(*arguments, softcap=0, odd=0):
        row = host.choose_packed(*arguments, softcap, odd, SMS)
        return host.row_name(row).decode().split("bf16_")[1]

    assert name(64, 16, 64 * 2048, 8192, 128, 0, CAUSAL) == "d128_2x128"
    assert name(100_000, 2, 100_000 * 32, 64, 128, 0, 0) == "d128_1x64"
    assert name(100_000, 2, 100_000 * 32, 20_000, 64, 0, 0) == "d64_1x64"
    for d in (64, 128, 256):
        assert len({name(b, 8, t, s, d, 1, 2) for b, t, s in [(1, 9, 9), (64, 10**6, 10**5)]}) == 1
        for b, total, longest in [(1, 9, 9), (64, 10**6, 10**5), (100_000, 10**6, 64)]:
            shape = b, 8, total, longest, d, 0, CAUSAL
            assert name(*shape, softcap=5) == f"d{d}_general"
            assert name(*shape, softcap=5, odd=2) == f"d{d}_general_strided"


# -------------------------------------------------------------------------- sentences of the driver


@pytest.mark.parametrize(
    ("toolkit", "driver", "code", "expected"),
    [
        (13000, 13000, 0, "^$"),
        (13000, 13010, 0, "^$"),
        (13000, 0, 35, "no NVIDIA driver"),
        (13000, 0, 100, "no NVIDIA driver"),
        (
            13000,
            12040,
            35,
            r"too old: it serves CUDA 12\.4, this build needs CUDA 13\.0 \(driver 580 or newer",
        ),
        (
            12090,
            11080,
            35,
            r"too old: it serves CUDA 11\.8, this build needs CUDA 12\.0 \(driver 525 or newer",
        ),
        (13000, 13000, 100, "shows no GPU"),
        (13000, 13000, 999, "failed: unknown error"),
    ],
)
def test_driver_sentences(host, toolkit, driver, code, expected):
    assert re.search(expected, host.sentence(toolkit, driver, code, b"unknown error").decode())


def test_a_long_sentence_is_cut(host):
    assert len(host.sentence(13000, 13000, 999, b"x" * 500)) == 127
