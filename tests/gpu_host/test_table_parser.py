"""The variant tables: the one parser, C's reading of the same lines, and what a table does not do
to another's choices."""

import ctypes
import shutil
import subprocess

import pytest

import gpu_host
from gpu_host import EVERY_VARIANT, KERNELS, VARIANTS

pytestmark = gpu_host.marks

GOOD = "FA_VARIANT(sm90_fwd_a, .d=64, .loads=FA_RAW)\n"


@pytest.fixture
def read(tmp_path):
    """A function of a table's text, architecture and operation that reads it."""
    import table

    def read(text, architecture="sm90", operation="fwd"):
        path = tmp_path / architecture / f"{operation}.def"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        assert table.tables(tmp_path) == [path]
        return table.read(path)

    return read


def test_a_column_that_a_line_leaves_out_is_0(read):
    first, second = read(f"// a comment\n\n{GOOD}FA_VARIANT(sm90_fwd_b,  .ones = 1, .d=8)\n")
    assert first.columns == {"name": "sm90_fwd_a", "d": 64, "loads": "FA_RAW", "ones": 0}
    assert second.columns == {"name": "sm90_fwd_b", "d": 8, "loads": 0, "ones": 1}
    assert first.source.name == "fwd.cu" and first.architecture == "sm90"
    names = {"-DVARIANT_NAME=sm90_fwd_a", "-DVARIANT_D=64", "-DVARIANT_LOADS=FA_RAW"}
    assert {*first.defines()} == {*names, "-DVARIANT_ONES=0"}


@pytest.mark.parametrize(
    "line, rule",
    [
        ("FA_VARIANT(sm90_fwd_b)", "must be FA_VARIANT(name, .column=value, ...)"),
        ("FA_VARIANT(sm90_fwd_b, .d=64", "must be FA_VARIANT(name, .column=value, ...)"),
        ("FA_ROW(sm90_fwd_b, .d=64)", "must be FA_VARIANT(name, .column=value, ...)"),
        ("FA_VARIANT(sm90_fwd_b, .d=64) FA_VARIANT(sm90_fwd_c, .d=64)", "set each column once"),
        ("FA_VARIANT(sm90_fwd_b, 64)", "must set each column once, .column=value, got 64"),
        ("FA_VARIANT(sm90_fwd_b, .d=64, )", "must set each column once"),
        ("FA_VARIANT(sm90_fwd_b, .d=64, .d=65)", "must set each column once"),
        ("FA_VARIANT(sm90_fwd_b, .d=-64)", "must set each column once"),
        ("FA_VARIANT(sm90_fwd_b, .d=64 .dv=64)", "must set each column once"),
        ("FA_VARIANT(sm90_fwd_a, .d=65)", "must have a name of its own, sm90_fwd_..., got"),
        ("FA_VARIANT(sm80_fwd_b, .d=64)", "must have a name of its own, sm90_fwd_..., got sm80_"),
        ("FA_VARIANT(sm90_bwd_b, .d=64)", "must have a name of its own, sm90_fwd_..., got sm90_b"),
    ],
)
def test_a_line_that_is_no_variant_of_this_table(read, line, rule):
    with pytest.raises(ValueError) as refused:
        read(f"{GOOD}\n{line}\n{GOOD.replace('fwd_a', 'fwd_z')}")
    assert str(refused.value).startswith("sm90/fwd.def:3 ") and rule in str(refused.value)


def test_what_nvcc_makes_for_a_folder():
    import table

    assert table.gencode("sm90") == ["-gencode=arch=compute_90a,code=sm_90a"]
    assert table.gencode("sm100") == ["-gencode=arch=compute_100a,code=sm_100a"]
    of_80 = "-gencode=arch=compute_80,code=sm_80"
    assert table.gencode("sm80") == [of_80, "-gencode=arch=compute_90,code=sm_90"]
    assert table.gencode("sm80", "sm90") == [of_80, "-gencode=arch=compute_90a,code=sm_90a"]


# ------------------------------------------------------------------------------------- what C reads

SHIM = r"""
#include <stddef.h>

#include "sm90/fwd_choice.h"

int count(void) { return FA_VARIANTS; }
const char *name(int i) { return fa_variants[i].name; }
/* A column of a variant, and a constant that the table names. */
int column(int i, int column) {
    const fa_variant *v = &fa_variants[i];
    const int all[] = {@COLUMNS@};
    return all[column];
}
int constant(int i) {
    const int all[] = {@CONSTANTS@};
    return all[i];
}
/* The choice for contiguous arrays. */
int choose(int dtype, int b, int h, int sq, int sk, int d, int flags, int lse, int softcap) {
    fa_params p = {.what = {.dtype = dtype, .b = b, .hq = h, .hk = h, .hv = h, .sq = sq, .sk = sk,
                            .d = d, .dv = d},
                   .masks = {.flags = flags}};
    fa_tensor *t[] = {&p.what.q, &p.what.k, &p.what.v, &p.what.out};
    for (int i = 0; i < 4; ++i) {
        int64_t s = i == 0 || i == 3 ? sq : sk;
        *t[i] = (fa_tensor){(void *)4096, {b, h, s, d}, {h * s * d, s * d, d, 1}};
    }
    p.what.lse.data = lse ? &p : NULL;
    p.scores.softcap = softcap;
    return fa_choose_variant(&p, 132);
}
"""
COLUMNS = [column for column in VARIANTS[0].columns if column != "name"] if VARIANTS else []
CONSTANTS = sorted({v[c] for v in VARIANTS for c in COLUMNS if isinstance(v[c], str)})
FLAGS = ("-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")


def compiled(folder, kernels, *flags):
    columns = ", ".join(f"v->{column}" for column in COLUMNS)
    shim = SHIM.replace("@COLUMNS@", columns).replace("@CONSTANTS@", ", ".join(CONSTANTS))
    (folder / "shim.c").write_text(shim)
    command = [
        "gcc",
        *FLAGS,
        *flags,
        f"-I{kernels}",
        f"-I{KERNELS.parent}/csrc",
        "shim.c",
        "-o",
        "shim.so",
    ]
    subprocess.run(command, cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "shim.so"))
    library.name.restype = ctypes.c_char_p
    return library


def test_c_reads_the_same_columns(tmp_path):
    library = compiled(tmp_path, KERNELS)
    assert [library.name(i).decode() for i in range(library.count())] == [v.name for v in VARIANTS]
    meaning = {name: library.constant(i) for i, name in enumerate(CONSTANTS)}
    assert len({*meaning.values()}) >= 4 and len(COLUMNS) >= 14
    for i, v in enumerate(VARIANTS):
        read = [library.column(i, n) for n in range(len(COLUMNS))]
        assert read == [meaning.get(v[column], v[column]) for column in COLUMNS], v.name


def choices(library):
    """The names of what is chosen for many shapes."""
    shapes = [
        (dtype, b, h, sq, sk, d, flags, lse, softcap)
        for dtype in (3, 4)
        for b, h, sq, sk in ((1, 8, 128, 128), (4, 16, 4096, 4096), (2, 32, 1, 8192), (8, 1, 60, 9))
        for d in (8, 64, 80, 96, 128, 160, 192, 256)
        for flags, lse, softcap in ((0, 0, 0), (2, 1, 0), (2, 0, 50))
    ]
    found = [library.choose(*shape) for shape in shapes]
    assert -1 not in found
    return [library.name(i).decode() for i in found]


def test_variants_of_others_never_change_a_choice(tmp_path):
    """The Hopper forward's choices are the same beside tables that offer everything it offers, and
    more: of another architecture, and of another operation."""
    (tmp_path / "a").mkdir()
    before = choices(compiled(tmp_path / "a", KERNELS))
    assert len({*before}) > 20
    copy = tmp_path / "kernels"
    shutil.copytree(KERNELS, copy)
    lines = [v.line.replace(".block_n=64,", ".block_n=128,") for v in VARIANTS]
    (copy / "sm99").mkdir()
    for other in ("sm99_fwd", "sm90_other"):
        path = copy / f"{other.replace('_', '/')}.def"
        path.write_text("\n".join(x.replace("sm90_fwd", other) for x in lines))
    (tmp_path / "b").mkdir()
    assert choices(compiled(tmp_path / "b", copy)) == before

    import table

    read = {v.name: v for path in table.tables(copy) for v in table.read(path)}
    assert len(read) == len(EVERY_VARIANT) + 2 * len(VARIANTS)
    first = VARIANTS[0].name.replace("sm90_fwd", "sm90_other")
    assert read[first].source == copy / "sm90" / "other.cu"


def test_a_table_of_none(tmp_path):
    """Where another table's variants alone were asked for: nothing is chosen, nothing is read."""
    (tmp_path / "some" / "sm90").mkdir(parents=True)
    (tmp_path / "some" / "sm90" / "fwd.def").write_text("")
    library = compiled(tmp_path, KERNELS, f"-I{tmp_path}/some")
    assert library.count() == 0 and library.choose(4, 1, 1, 64, 64, 64, 0, 0, 0) == -1
