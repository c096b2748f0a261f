"""The variant tables, read: the one parser, for setup.py and the tests.

kernels/<architecture>/<operation>.def has one line per variant, which C reads as well:

    FA_VARIANT(sm90_fwd_bf16_d64_2x64, .dtype=FA_BF16, .d=64, .dv=64, .warpgroups=2)

It is compiled from <operation>.cu beside it with -DVARIANT_NAME=sm90_fwd_bf16_d64_2x64,
-DVARIANT_D=64 and so on; a column that a line leaves out is 0, as in C. A name begins with those of
its folder and table, so that none can stand in another's.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

KERNELS = Path(__file__).resolve().parent

COMMENT = re.compile(r"\s*(//.*)?")
LINE = re.compile(r"FA_VARIANT\((\w+),\s*(.*)\)\s*")
COLUMN = re.compile(r"\.([a-z]\w*)\s*=\s*(\w+)")


@dataclass(frozen=True)
class Variant:
    """variant["d"] is a column's value: a number, or the name of a constant of C."""

    table: Path
    line: str  # of the table
    columns: dict[str, int | str]  # "name" is the first

    def __getitem__(self, column: str) -> int | str:
        return self.columns[column]

    @property
    def name(self) -> str:
        return str(self["name"])

    @property
    def architecture(self) -> str:
        return self.table.parent.name

    @property
    def source(self) -> Path:
        return self.table.with_suffix(".cu")

    def defines(self) -> list[str]:
        return [f"-DVARIANT_{column.upper()}={value}" for column, value in self.columns.items()]


def tables(kernels: Path = KERNELS) -> list[Path]:
    return sorted(kernels.glob("sm*/*.def"))


def read(table: Path) -> list[Variant]:
    """The variants of a table, in its order."""
    prefix = f"{table.parent.name}_{table.stem}_"
    variants: dict[str, Variant] = {}
    for number, line in enumerate(table.read_text().splitlines(), 1):
        if COMMENT.fullmatch(line):
            continue
        where = f"{table.parent.name}/{table.name}:{number}"
        if not (found := LINE.fullmatch(line)):
            raise ValueError(f"{where} must be FA_VARIANT(name, .column=value, ...), got {line!r}")
        name, pairs = found[1], [COLUMN.fullmatch(x.strip()) for x in found[2].split(",")]
        columns = {x[1]: int(x[2]) if x[2].isdecimal() else x[2] for x in pairs if x}
        if len(columns) < len(pairs):
            raise ValueError(f"{where} must set each column once, .column=value, got {found[2]}")
        if not name.startswith(prefix) or name in variants:
            raise ValueError(f"{where} must have a name of its own, {prefix}..., got {name}")
        variants[name] = Variant(table, line, {"name": name, **columns})
    zeros = {column: 0 for v in variants.values() for column in v.columns}
    return [replace(v, columns=zeros | v.columns) for v in variants.values()]


def gencode(*architectures: str) -> list[str]:
    """What nvcc makes for folders: from sm90 on, code that may use what that architecture alone
    has; before, portable code, also for 9.0 unless that is among them. (No PTX for newer GPUs: it
    would make the wheel half as large again.)"""
    flags = []
    for number in (int(a.removeprefix("sm")) for a in architectures):
        if number >= 90:
            flags.append(f"-gencode=arch=compute_{number}a,code=sm_{number}a")
        else:
            flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if "sm90" not in architectures:
                flags.append("-gencode=arch=compute_90,code=sm_90")
    return flags
