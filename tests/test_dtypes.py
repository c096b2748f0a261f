"""The contract's element types, for every type that DLPack can say; the table is never overrun."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = """
#include <stdio.h>
#include "check_array.h"

int main(void) {
    char name[32];
    for (int code = 0; code < 256; code++)
        for (int bits = 0; bits < 256; bits++)
            for (int lanes = 0; lanes < 3; lanes++) {
                fa_any_dtype t = {code, bits, lanes};
                printf("%d %d %d %d %s\\n", code, bits, lanes, fa_contract_dtype(t) != 0,
                       fa_dtype_name(t, name));
            }
    return 0;
}
"""
# (code, bits, lanes) of the standard: kDLFloat 2, kDLBfloat 4, kDLBool 6.
NAMES = {
    (2, 64, 1): "float64",
    (2, 32, 1): "float32",
    (2, 16, 1): "float16",
    (4, 16, 1): "bfloat16",
    (6, 8, 1): "bool",
}
OTHERS = {  # what the contract does not hold is named in errors
    (10, 8, 1): "float8_e4m3fn",
    (12, 8, 1): "float8_e5m2",
    (11, 8, 1): "dtype (11, 8, 1)",
    (10, 8, 2): "dtype (10, 8, 2)",
    (10, 16, 1): "dtype (10, 16, 1)",
    (0, 32, 1): "int32",
    (0, 32, 2): "dtype (0, 32, 2)",
    (1, 8, 1): "uint8",
    (5, 64, 1): "complex64",
    (2, 128, 1): "float128",
    (6, 16, 1): "bool16",
    (7, 8, 1): "dtype (7, 8, 1)",
}


@pytest.mark.skipif(
    not (ROOT / "csrc").exists() or not shutil.which("gcc"), reason="needs the sources and gcc"
)
def test_every_type(tmp_path):
    source, program = tmp_path / "dtypes.c", tmp_path / "dtypes"
    source.write_text(SOURCE)
    flags = ["-std=c11", "-g", "-fsanitize=undefined", "-fno-sanitize-recover", f"-I{ROOT}/csrc"]
    subprocess.run(
        ["gcc", *flags, source, ROOT / "csrc" / "check_array.c", "-o", program], check=True
    )
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    held, names = {}, {}
    for line in done.stdout.splitlines():
        *numbers, name = line.split(" ", 4)
        *kind, is_held = map(int, numbers)
        (held if is_held else names)[tuple(kind)] = name
    assert held == NAMES
    assert {kind: names[kind] for kind in OTHERS} == OTHERS
