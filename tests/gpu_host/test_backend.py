"""The Hopper backend itself, without a GPU: a module whose backend "sm90" takes arrays on the CPU,
its kernels' threads being fibers (backend_shim.cpp). All that the dispatch, the workspace and the
order of the launches decide is what runs on a GPU.

A fault may end a process, or keep its threads waiting for ever: the module has one of its own.
"""

import ctypes
import shutil
import subprocess
import sysconfig
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import python

import gpu_host

pytestmark = gpu_host.marks
HERE, SOURCES = Path(__file__).parent, gpu_host.KERNELS.parent
TABLES = {  # the variants that there are
    "fwd": ("sm90_fwd_bf16_d64_4x64",),
    "bwd": ("sm90_bwd_bf16_d64_128x128",),
    "decode": tuple(
        f"sm90_decode_bf16_d64_{rows}{how}" for rows in (16, 64) for how in ("", "_strided")
    ),
    "sparse": tuple(f"sm90_sparse_bf16_d64_{rows}" for rows in (16, 64, 128)),
    "sparse_bwd": tuple(f"sm90_sparse_bwd_bf16_d64_{rows}" for rows in (16, 64)),
}
FLAGS = {
    "decode": (),
    "sparse": ("-DOVER_LISTS",),
    "sparse_bwd": ("-DOVER_LISTS", "-DOF_GRADIENTS"),
}
FORWARD = """
#include <string.h>
#include "cpu/cpu.h"
#include "sm90/decode_choice.h"

/* NaN in what decode kernels write: the packed sequences of few rows. */
static void leave_few(const fa_params *p) {
    const fa_tensor *out = &p->what.out;
    for (int b = 0; b < p->what.b; b++) {
        const fa_sequence s =
            fa_find_cached(&p->varlen, &p->masks, b, p->what.sq, p->what.sk);
        if (!fa_is_short(s, fa_few_rows(p))) continue;
        for (int64_t h = 0; h < out->shape[1]; h++)
            for (int64_t i = s.q; i < s.q_end; i++)
                for (int64_t j = 0; j < out->shape[3]; j++)
                    memset((char *)out->data + 2 * (h * out->stride[1] + i * out->stride[2] +
                                                    j * out->stride[3]), 0xFF, 2);
    }
}

fa_status forward_here(const fa_params *p, fa_error *error) {
    const fa_status status = fa_cpu_forward(p, (fa_level)0, error);
    if (fa_is_cached(p) && fa_few_rows(p)) leave_few(p);
    return status;
}
"""


def compile_into(folder, source, name, *flags):
    target = folder / f"{name}.o"
    language = ["-std=c11"] if Path(source).suffix == ".c" else ["-std=c++17", "-w"]
    compiler = "gcc" if language == ["-std=c11"] else "g++"
    folders = (f"-I{folder}", f"-I{HERE}/include", f"-I{HERE}", *gpu_host.INCLUDES)
    options = ("-O1", "-fPIC", "-fvisibility=hidden", "-DFASTATTN_CUDA", f"-Draw=raw_of_{name}")
    subprocess.run(
        [compiler, *language, *options, *folders, *flags, "-c", source, "-o", target], check=True
    )
    return target


def make_module(folder):
    """python/fastattn with a module that has the backend."""
    (folder / "sm90").mkdir()
    for table, names in TABLES.items():
        lines = (v.line for v in gpu_host.EVERY_VARIANT if v.name in names)
        (folder / "sm90" / f"{table}.def").write_text("".join(f"{line}\n" for line in lines))
    (folder / "forward.c").write_text(FORWARD)
    shim = HERE / "backend_shim.cpp"
    found = [compile_into(folder, shim, "backend"), compile_into(folder, shim, "m", "-DMERGING")]
    found += [
        compile_into(folder, shim, v.name, *v.defines(), *flags)
        for table, flags in FLAGS.items()
        for v in gpu_host.EVERY_VARIANT
        if v.name in TABLES[table]
    ]
    python = ("-isystem", sysconfig.get_path("include"), "-isystem", np.get_include())
    if not sysconfig.get_config_var("Py_GIL_DISABLED"):
        python += ("-DPy_LIMITED_API=0x030A0000",)
    found.append(compile_into(folder, folder / "forward.c", "forward"))
    for n, source in enumerate(sorted((SOURCES / "csrc").rglob("*.c"))):
        found.append(compile_into(folder, source, f"c{n}", *python, "-O0"))
    package = folder / "fastattn"
    shutil.copytree(
        SOURCES / "python/fastattn",
        package,
        ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"),
    )
    subprocess.run(
        ["g++", "-shared", *found, "-lpthread", "-lm", "-o", package / "_C.abi3.so"], check=True
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    made = tmp_path_factory.mktemp("backend")
    make_module(made)
    return str(made)


@pytest.mark.parametrize("what", ["caches", "lists", "packed_lists", "sparsek"])
def test_backend(folder, what):
    said = f"import sys; sys.path.insert(0, {folder!r}); from {__name__} import {what}; "
    assert python("-c", f"{said}{what}({folder!r})") == "right\n"


def lists(folder):
    """Attention to lists of keys, and its gradients."""
    import fastattn
    import reference_sparse
    from sparse_cases import random_call, run

    assert fastattn.__file__.startswith(folder)
    for seed in (0, 3, 4):
        call = random_call(seed, "bfloat16")
        results = run(call, seed % 2 == 1, "sm90", deterministic=seed % 3 == 0)
        given = {"dout": call.dout, "dlse": call.dlse, **call.keywords}
        said = reference_sparse.complaints(results, *call.arrays.values(), **given)
        assert not said, f"seed {seed}: {call}: {said}"
    print("right")


def packed_lists(folder):
    """Each sequence is the call of its own; rows in no sequence give 0, and have gradients of 0."""
    import fastattn
    import sparse_cases

    assert fastattn.__file__.startswith(folder)
    for seed in (0, 5):
        sparse_cases.check_packed(seed, "bfloat16", "sm90")
    print("right")


def sparsek(folder):
    import fastattn
    import sparsek_cases

    assert fastattn.__file__.startswith(folder)
    for seed in (*range(16), 803):
        case = sparsek_cases.random_case(seed)
        said = sparsek_cases.run(case)
        assert not said, f"{case}: {said}"
    print("right")


def caches(folder):
    import cases
    import fastattn
    import kvcache_cases
    import test_varlen_pages as pages_of

    assert fastattn.__file__.startswith(folder)
    library = ctypes.CDLL(fastattn._C.__file__)
    sms = ctypes.c_int32.in_dll(library, "sms_now")
    drawn = [replace(kvcache_cases.random_case(seed), dtype="bfloat16") for seed in range(30)]
    packed = kvcache_cases.Case(seed=1, sq=5, rotary=16, packed=True, dtype="bfloat16")
    many = replace(packed, sq=70, hq=4, hk=2, room=160, page_size=16, mass=True)
    for seed, case in enumerate(
        [*drawn, packed, many, replace(many, batch_idx=True, page_size=None)]
    ):
        sms.value = (1, 4, 33, 132)[seed % 4]  # parts of the keys
        complaints = kvcache_cases.run(case, backend="sm90")
        assert not complaints, f"{case}: {complaints}"
    dtype = cases.dtype_of("bfloat16")
    q, cache = np.ones((2, 3, 4, 8), dtype), np.ones((2, 2, 50, 2, 8), dtype)
    _, mass = fastattn.attention_kvcache(q, *cache, 50, return_mass=True, backend="sm90")
    np.testing.assert_allclose(mass.sum(2), 6, rtol=1e-5)  # without the caller's lse
    rng = np.random.default_rng(2)  # parts are dealt to sequences whose lengths differ
    shapes = (4, 2, 6, 64), (4, 1200, 2, 64), (4, 1200, 2, 40)
    q, k, v = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    for sms.value, lengths in ((4, [1200, 70, 0, 600]), (132, [1, 2, 3, 1100])):
        keywords = {"layout": "bshd", "k_lengths": np.int32(lengths), "return_lse": True}
        got, want = (
            fastattn.attention(q, k, v, backend=name, **keywords) for name in ("sm90", "cpu")
        )
        for x, y in zip(got, want, strict=True):
            np.testing.assert_allclose(x.astype(float), y.astype(float), atol=2e-2)
    for n, (name, keywords) in enumerate(pages_of.FEATURES.items()):
        sms.value = (132, 4)[n % 2]
        q, _, pages, table = pages_of.arrays((1, 16, 3, 64)[n % 4], "bfloat16")
        want = pages_of.paged(q, pages, table, backend="cpu", **keywords)
        try:
            got = pages_of.paged(q, pages, table, backend="sm90", **keywords)
        except NotImplementedError:
            assert name in ("a bool mask", "a float mask", "dropout")
            continue
        for x, y in zip(got, want, strict=True):
            np.testing.assert_allclose(x.astype(float), y.astype(float), atol=2e-2, err_msg=name)
    print("right")
