"""Each header of kernels/ includes what it uses: it compiles alone, whatever came before it.

Those of a kernel are compiled for a variant of it: what only some variants include, for one of
those.
"""

import shutil
import subprocess

import pytest

from gpu_host import EVERY_VARIANT, INCLUDES, KERNELS, VARIANTS, marks

pytestmark = marks

HEADERS = [p.relative_to(KERNELS).as_posix() for p in sorted(KERNELS.glob("*/*.*h"))]
WITHOUT_CUDA = [  # all but the one about CUDA's devices
    name
    for name in HEADERS
    if name.endswith(".h") and "cuda_runtime.h" not in (KERNELS / name).read_text()
]
GENERAL = {"bool_mask", "general_loop", "mask_tiles", "scores", "scores_launch", "tags"}
RAW = {"load_raw", "load_strided"}


def variant_for(header):
    """The first of its table that includes it."""
    if header.startswith("sm80/"):
        dtypes = {"products_f32.cuh": "FA_F32", "products_f64.cuh": "FA_F64"}
        dtype = dtypes.get(header.partition("/")[2], "FA_BF16")
        kind = "sm80_bwd_" if "/bwd_" in header else "sm80_fwd_"
        portable = (v for v in EVERY_VARIANT if v.name.startswith(kind))
        return next(v for v in portable if v["dtype"] == dtype and v["general"])
    if "/bwd_" in header:
        kind = (
            header.endswith("load_strided.cuh"),
            header.endswith(("scores.cuh", "walk.cuh", "mask.cuh")),
            2 * header.endswith(("pair.cuh", "roles.cuh")),
        )
        backward = (v for v in EVERY_VARIANT if v.name.startswith("sm90_bwd_"))
        return next(v for v in backward if (v["strided"], v["general"], v["cluster"]) == kind)
    if "/decode_" in header:
        return next(v for v in EVERY_VARIANT if v.name.startswith("sm90_decode_"))
    if "/sparse_" in header:
        table = "sm90_sparse_bwd_" if "/sparse_bwd_" in header else "sm90_sparse_"
        return next(v for v in EVERY_VARIANT if v.name.startswith(table))
    stem = header.rpartition("/fwd_")[2].partition(".")[0]
    return next(
        v
        for v in VARIANTS
        if v["general"] == (stem in GENERAL)
        and v["paged"] == (stem == "load_pages")
        and v["loads"] == ("FA_RAW" if stem in RAW else "FA_BOXES")
    )


def compiles(command, header, folder, suffix):
    program = folder / f"alone{suffix}"
    program.write_text(f'#include "{header}"\n#include "{header}"\n')
    done = subprocess.run([*command, *INCLUDES, program], capture_output=True, text=True)
    return done.returncode == 0, done.stderr


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
@pytest.mark.parametrize("header", HEADERS)
def test_it_compiles_alone_by_nvcc(header, tmp_path):
    """As device code, as far as PTX."""
    flags = ["-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-ptx", "-o", "/dev/null"]
    command = ["nvcc", *flags, *variant_for(header).defines()]
    fine, said = compiles(command, header, tmp_path, ".cu")
    assert fine, said


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
@pytest.mark.parametrize("header", WITHOUT_CUDA)
def test_it_compiles_alone_without_cuda(header, tmp_path):
    """What ends in .h is for the host too: plain C++, if not plain C."""
    command = ["g++", "-std=c++17", "-Wall", "-Wno-unused", "-Wno-parentheses", "-fsyntax-only"]
    fine, said = compiles([*command, *variant_for(header).defines()], header, tmp_path, ".cpp")
    assert fine, said


def test_a_header_that_does_not_is_found(tmp_path):
    """One that uses what it does not include, and one without a guard."""
    command = ["g++", "-std=c++17", "-fsyntax-only", f"-I{tmp_path}"]
    (tmp_path / "uses.h").write_text("#ifndef USES_H\n#define USES_H\nint32_t x;\n#endif\n")
    (tmp_path / "twice.h").write_text("struct twice {};\n")
    assert not compiles(command, "uses.h", tmp_path, ".cpp")[0]
    assert not compiles(command, "twice.h", tmp_path, ".cpp")[0]
