"""The laws of the house, read from the source and from the built module."""

import ctypes
import re
import shutil
import subprocess

import fastattn
import handmade
import pytest
from conftest import ROOT, needs, python
from gpu_host import EVERY_VARIANT

MODULE = fastattn._C.__file__
SOURCES = [p for folder in ("csrc", "kernels") for p in sorted((ROOT / folder).rglob("*.[ch]*"))]
TEXT = {p.relative_to(ROOT).as_posix(): p.read_text() for p in SOURCES}
CONTRACT = (
    *("fastattn.h", "forward.h", "backward.h", "kvcache.h", "merge.h", "sparse.h", "sparsek.h"),
    *("sparsek_attention.h", "mask_fields.h", "support.h", "types.h", "dtype.h"),
)
SHARED = ("mask.h", "philox.h")  # what gcc and nvcc compile alike
BINDING = {n for n in TEXT if n.startswith("csrc/binding/")}


def code(text):
    """C without comments and string literals."""
    pattern = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"'
    return re.sub(pattern, " ", text, flags=re.S)


def includes(text):
    text = re.sub(r"/\*.*?\*/", " ", text, flags=re.S)
    return re.findall(r"^\s*#\s*include\s*[<\"]([^>\"]+)[>\"]", text, re.M)


def run(*command):
    return subprocess.run(
        list(map(str, command)), check=True, capture_output=True, text=True
    ).stdout


def needs_tool(name):
    return pytest.mark.skipif(not shutil.which(name), reason=f"no {name}")


# --------------------------------------------------------------------------------- who may see what


def test_law_1_python_only_in_the_binding():
    for name, text in TEXT.items():
        if name not in BINDING:
            sees = {i for i in includes(text) if i == "Python.h" or "binding/" in i}
            assert not sees, f"{name} includes {sees}"
            assert not re.search(r"\bPy[A-Z]\w+\(", code(text)), name


def test_each_frameworks_insides_are_known_to_one_file():
    """NumPy's C API, torch's symbols, and the owners of DLPack's capsules."""
    insides = {
        "numpy_internals": r"numpy/\w+\.h",
        "torch_abi": "aoti_|_ZN",
        "dlpack": "Capsule_SetName",
    }
    for file, pattern in insides.items():
        knowing = [n for n in TEXT if re.search(pattern, TEXT[n])]
        assert knowing == [f"csrc/binding/{file}.c"], pattern


def test_law_1_cuda_only_under_kernels():
    for name, text in TEXT.items():
        if name.startswith("csrc/"):
            cuda = [i for i in includes(text) if re.match(r"cuda|nv|cub/|cutlass|cute", i)]
            assert not cuda and not re.search(r"\bcuda[A-Z]\w*\(", code(text)), name
            assert not any("kernels/" in i or i.endswith(".cuh") for i in includes(text)), name


def test_law_1_the_contract_includes_only_stdint():
    for name in (*CONTRACT, *SHARED):
        assert set(includes(TEXT[f"csrc/{name}"])) <= {"stdint.h", *CONTRACT}, name
    for name in TEXT:
        if name.startswith("kernels/"):
            ours = {i for i in includes(TEXT[name]) if (ROOT / "csrc" / i).exists()}
            assert ours <= {*CONTRACT, *SHARED}, name


def test_the_contract_is_a_header_per_operation():
    """fastattn.h includes them all, none includes another's, and each has an op in fa_backend."""
    operations = set(CONTRACT) - {"fastattn.h", "mask_fields.h", "support.h", "types.h", "dtype.h"}
    assert set(includes(TEXT["csrc/fastattn.h"])) == operations
    for name in operations:
        operation = name.removesuffix(".h")
        holds = dict.fromkeys(("backward.h", "kvcache.h", "sparsek.h"), "forward.h")
        holds |= {"sparse.h": "backward.h", "forward.h": "mask_fields.h"}
        holds["sparsek_attention.h"] = "backward.h"
        base = holds.get(name, "types.h")  # whose request it holds
        assert includes(TEXT[f"csrc/{name}"]) == [base]
        assert f"FA_OPERATION({operation}, " in TEXT[f"csrc/{name}"]
        assert f"fa_{operation}_op *{operation};" in TEXT["csrc/fastattn.h"]


def test_a_forward_kernel_sees_no_other_operation():
    """So that touching another operation's header compiles no variant of it again."""
    seen, left = set(), ["kernels/sm90/fwd.cu"]
    while left:
        name = left.pop()
        for include in includes(TEXT[name]):
            for folder in ("csrc", "kernels", name.rpartition("/")[0]):
                if (found := f"{folder}/{include}") in TEXT and found not in seen:
                    seen.add(found)
                    left.append(found)
    ours = {name for name in seen if name.startswith("csrc/")}
    contract = ("forward.h", "mask_fields.h", "types.h", "dtype.h")
    assert ours == {f"csrc/{n}" for n in (*contract, *SHARED)}


def operation_of(path):
    """As files of kernels/ are named: fwd, of sm90/fwd_smem.h; of a shared one, its first word."""
    return re.split(r"[._]", path.rpartition("/")[2])[0]


def test_a_kernels_file_is_named_for_its_operation():
    """fwd_*, bwd_*: a file without such a prefix serves every operation and includes none that has
    one, as a file of one operation includes no other's. (The backend includes them all.)"""
    operations = {table.stem for table in (ROOT / "kernels").glob("sm*/*.def")}
    assert operations
    for name, text in TEXT.items():
        if name.startswith("kernels/") and not name.endswith("/backend.cu"):
            others = operations - {operation_of(name)}
            assert not [i for i in includes(text) if operation_of(i) in others], name


@pytest.mark.parametrize("compiler", ["gcc -std=c11", "g++ -std=c++17"])
def test_law_1_the_contract_compiles_alone(compiler, tmp_path):
    if not shutil.which(compiler.split()[0]):
        pytest.skip(f"no {compiler.split()[0]}")
    for name in (*CONTRACT, *SHARED):
        program = tmp_path / ("x.c" if compiler.startswith("gcc") else "x.cpp")
        program.write_text(f'#include "{name}"\nint main(void) {{ return 0; }}\n')
        flags = ["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-Wno-unused-function"]
        run(*compiler.split(), *flags, f"-I{ROOT}/csrc", "-fsyntax-only", program)


def test_check_knows_no_python_and_backends_no_check():
    for name in TEXT:
        if re.fullmatch(r"csrc/\w+\.[ch]", name):
            assert not re.findall(r"\bPy\w*", code(TEXT[name])), name
    for name in TEXT:
        if name.startswith(("csrc/cpu", "kernels/")):
            assert "check.h" not in includes(TEXT[name]), name


def test_each_stop_of_a_call_names_the_next():
    """From _attention.py to the kernel each says "Stop n of 6", and "Next: function() in path"."""
    paths, way = (
        ["python/fastattn/_attention.py"],
        r"(\w+)(?:<\w+>)?\(\)[^()]{0,30} in ([\w/]+\.\w+)",
    )
    for stop in range(1, 7):
        after = []
        for path in paths:
            text = re.sub(r"\n(?: \*)? *", " ", (ROOT / path).read_text())
            assert re.search(rf"\b[Ss]top {stop} of 6\b", text), path
            following = text.partition("Next: ")[2][:160]
            assert bool(following) == (stop < 6), path
            found = re.findall(way, following)
            assert bool(found) == (stop < 6), path
            for name, file in found:
                assert name in (ROOT / file).read_text(), f"{path} sends on to {name} in {file}"
                after.append(file)
        paths = after


# ------------------------------------------------------------------------------- memory and streams


def test_law_2_no_device_memory_and_no_synchronisation():
    calls = r"Malloc\w*|Free\w*|Mem[A-Z]\w*|\w*Synchronize|StreamCreate\w*|EventCreate\w*"
    banned = rf"\bcu(?:da)?(?:{calls})"
    for name, text in TEXT.items():
        assert not re.findall(banned + r"\s*\(", code(text)), name


def test_every_kernel_waits_for_its_stream():
    """They are launched before the stream's kernels before them have ended (stream.cuh)."""
    bodies = []
    for text in TEXT.values():
        for start in re.finditer(r"\b__global__\b[^;{]*\{", code(text)):  # not a declaration
            function = code(text)[start.start() :]
            bodies.append(function[: function.index("\n}")])
    assert len(bodies) >= 4 and all("wait_for_stream();" in body for body in bodies)


def test_law_3_variants_are_named_in_the_table_only():
    """Build, dispatch, tests and docs read the table; none of them repeats it."""
    names = [variant.name for variant in EVERY_VARIANT]
    others = [*SOURCES, *(ROOT / "python").rglob("*.py"), ROOT / "setup.py"]
    for path in others:
        assert not [n for n in names if re.search(rf"\b{n}\b", path.read_text())], path


def test_law_5_one_function_turns_a_status_into_an_exception():
    """Exceptions by a status are made in one place; the rest of the binding passes a status on."""
    maker = r"case (FA_\w+):\s*type = (?:sdpa \? state->\w+ : )?PyExc_(\w+)"
    makers = re.findall(maker, TEXT["csrc/binding/call.c"])
    assert dict(makers) == {
        "FA_VALUE": "ValueError",
        "FA_TYPE": "TypeError",
        "FA_UNSUPPORTED": "NotImplementedError",
        "FA_MEMORY": "MemoryError",
    }
    raised = r"PyErr_\w+\(\s*PyExc_(?:ValueError|NotImplementedError)"
    assert not [n for n in BINDING if re.search(raised, TEXT[n])]
    assert [n for n in BINDING if "PyErr_SetObject(" in TEXT[n]] == ["csrc/binding/call.c"]


def test_every_operation_gives_up_the_gil_by_one_helper():
    """call_begin_work() also asks the caller's allocator for the workspace. (XLA has neither.)"""
    assert sum(TEXT[n].count("PyEval_SaveThread(") for n in BINDING) == 1
    running = {n for n in BINDING if re.search(r"\bfa_run\w*\(", code(TEXT[n]))}
    assert len(running) >= 3
    for name in (n for n in running if not n.startswith("csrc/binding/jax_")):
        assert "call_begin_work(" in TEXT[name], name


def test_law_6_absent_is_never_a_magic_value():
    for name in CONTRACT:
        contract = code(TEXT[f"csrc/{name}"])
        assert not re.search(r"-1\b", contract), f"{name}: a flag or NULL says what is absent"


# --------------------------------------------------------------------------------- the built module


@needs_tool("nm")
def test_exports_only_the_init_function():
    names = [line.split()[-1] for line in run("nm", "-D", "--defined-only", MODULE).splitlines()]
    assert names == ["PyInit__C"]


@needs_tool("readelf")
def test_promise_1_needs_only_the_c_library():
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", MODULE)))
    sanitizers = {n for n in needed if n.startswith(("libasan", "libubsan"))}
    libc = {
        "libc.so.6",
        "libm.so.6",
        "libpthread.so.0",
        "libdl.so.2",
        "librt.so.1",
        "ld-linux-x86-64.so.2",
    }
    assert needed - sanitizers <= libc
    assert not re.search(r"R(UN)?PATH", run("readelf", "-d", MODULE))


@needs_tool("readelf")
def test_stack_and_relocations_are_protected():
    assert re.search(r"GNU_STACK.*\n?.*RW ", run("readelf", "-lW", MODULE))
    assert "GNU_RELRO" in run("readelf", "-lW", MODULE)
    assert "TEXTREL" not in run("readelf", "-d", MODULE)


@needs_tool("nm")
def test_uses_only_the_stable_abi():
    """Every Py symbol that the module asks for is part of CPython 3.10's limited API."""
    if not MODULE.endswith(".abi3.so"):
        pytest.skip("a free-threaded build has no stable ABI")
    pytest.importorskip("abi3audit")
    python("-m", "abi3audit", "--strict", "--assume-minimum-abi3", "3.10", MODULE)


# ----------------------------------------------------------------------------------- the DLPack ABI

ABI = r"""
#include <stddef.h>
#include <stdio.h>
#include "%s"
#define SIZE(type) printf(#type " %%zu\n", sizeof(type));
#define AT(type, field) \
    printf(#type "." #field " %%zu %%zu\n", offsetof(type, field), sizeof(((type *)0)->field));
int main(void) {
SIZE(DLDevice) AT(DLDevice, device_type) AT(DLDevice, device_id)
SIZE(DLDataType) AT(DLDataType, code) AT(DLDataType, bits) AT(DLDataType, lanes)
SIZE(DLTensor) AT(DLTensor, data) AT(DLTensor, device) AT(DLTensor, ndim) AT(DLTensor, dtype)
AT(DLTensor, shape) AT(DLTensor, strides) AT(DLTensor, byte_offset)
SIZE(DLManagedTensor) AT(DLManagedTensor, dl_tensor) AT(DLManagedTensor, manager_ctx)
AT(DLManagedTensor, deleter)
SIZE(DLManagedTensorVersioned) AT(DLManagedTensorVersioned, version)
AT(DLManagedTensorVersioned, manager_ctx) AT(DLManagedTensorVersioned, deleter)
AT(DLManagedTensorVersioned, flags) AT(DLManagedTensorVersioned, dl_tensor)
%s
return 0; }
"""
OURS = r"""
SIZE(DLExchangeHeader) SIZE(DLExchangeAPI)
AT(DLExchangeHeader, version) AT(DLExchangeHeader, prev_api)
printf("allocate %zu\n", offsetof(DLExchangeAPI, allocate));
printf("managed_from_object %zu\n", offsetof(DLExchangeAPI, managed_from_object));
printf("managed_to_object %zu\n", offsetof(DLExchangeAPI, managed_to_object));
printf("borrow_from_object %zu\n", offsetof(DLExchangeAPI, borrow_from_object));
printf("current_stream %zu\n", offsetof(DLExchangeAPI, current_stream));
printf("codes %d %d %d %d %d %d\n", FA_CODE_INT, FA_CODE_UINT, FA_CODE_FLOAT, FA_CODE_BFLOAT,
       FA_CODE_COMPLEX, FA_CODE_BOOL);
printf("devices %d %d %d %d\n", DL_CPU, DL_CUDA, DL_CUDA_HOST, DL_CUDA_MANAGED);
printf("version %d read only %d\n", DL_MAJOR, DL_READ_ONLY);
"""
THEIRS = r"""
SIZE(DLPackExchangeAPIHeader) SIZE(DLPackExchangeAPI)
AT(DLPackExchangeAPIHeader, version) AT(DLPackExchangeAPIHeader, prev_api)
printf("allocate %zu\n", offsetof(DLPackExchangeAPI, managed_tensor_allocator));
printf("managed_from_object %zu\n",
       offsetof(DLPackExchangeAPI, managed_tensor_from_py_object_no_sync));
printf("managed_to_object %zu\n", offsetof(DLPackExchangeAPI, managed_tensor_to_py_object_no_sync));
printf("borrow_from_object %zu\n", offsetof(DLPackExchangeAPI, dltensor_from_py_object_no_sync));
printf("current_stream %zu\n", offsetof(DLPackExchangeAPI, current_work_stream));
printf("codes %d %d %d %d %d %d\n", kDLInt, kDLUInt, kDLFloat, kDLBfloat, kDLComplex, kDLBool);
printf("devices %d %d %d %d\n", kDLCPU, kDLCUDA, kDLCUDAHost, kDLCUDAManaged);
printf("version %d read only %d\n", DLPACK_MAJOR_VERSION, (int)DLPACK_FLAG_BITMASK_READ_ONLY);
"""


def layout_of(header, rest, folder):
    program = folder / "abi.c"
    program.write_text(ABI % (header, rest))
    run("gcc", "-std=gnu11", "-w", f"-I{ROOT}/csrc", program, "-o", folder / "abi")
    said = run(folder / "abi").replace("DLPackExchangeAPIHeader", "DLExchangeHeader")
    return said.replace("DLPackExchangeAPI", "DLExchangeAPI").splitlines()


@needs("torch")
@needs_tool("gcc")
def test_dlpack_is_declared_as_in_torchs_header(tmp_path):
    import torch

    header = ROOT.__class__(torch.__file__).parent / "include" / "ATen" / "dlpack.h"
    if not header.exists() or "DLPackExchangeAPI" not in header.read_text():
        pytest.skip("this torch ships no header of DLPack 1.2 or newer")
    ours = layout_of(ROOT / "csrc" / "binding" / "dlpack.h", OURS, tmp_path)
    assert ours == layout_of(header, THEIRS, tmp_path)


@needs_tool("gcc")
def test_dlpack_is_declared_as_in_the_tests(tmp_path):
    said = layout_of(ROOT / "csrc" / "binding" / "dlpack.h", OURS, tmp_path)
    sizes = dict(line.split() for line in said if line.count(" ") == 1)
    assert int(sizes["DLTensor"]) == ctypes.sizeof(handmade.DLTensor)
    assert int(sizes["DLManagedTensor"]) == ctypes.sizeof(handmade.Managed)
    assert int(sizes["DLManagedTensorVersioned"]) == ctypes.sizeof(handmade.Versioned)


# --------------------------------------------------------------------------------- the kernel table


def test_law_3_variants_are_bounded():
    """Of an architecture: what bounds them is that a kernel has its features at run time, and each
    folder has kernels, tables and a choice of its own. (The build's time is bounded by itself.)"""
    for architecture in {v.architecture for v in EVERY_VARIANT}:
        assert sum(v.architecture == architecture for v in EVERY_VARIANT) <= 180
    for v in EVERY_VARIANT:
        assert re.fullmatch(r"[a-z0-9_]+", v.name) and v.source.exists()
        assert v["dtype"] in ("FA_F64", "FA_F32", "FA_F16", "FA_BF16")
        dv = v.columns.get("dv", v["d"])  # of a table that has no such column
        size = f"d{v['d']}" + (f"_{dv}" if dv != v["d"] else "")
        assert v.name.startswith(
            f"{v.architecture}_{v.table.stem}_{v['dtype'][3:].lower()}_{size}_"
        )


# ----------------------------------------------------------------------------------- the repository


def tracked():
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("no git checkout")
    names = run("git", "-C", ROOT, "ls-files", "-co", "--exclude-standard").splitlines()
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def test_the_top_level_is_fixed():
    allowed = {"setup.py", "pyproject.toml", "csrc", "kernels", "python", "tests", "benchmarks"}
    allowed |= {"README.md", "LICENSE", "CHANGELOG.md", "MANIFEST.in", "findings"}
    top = {p.relative_to(ROOT).parts[0] for p in tracked()}
    assert {name for name in top if not name.startswith(".")} <= allowed


def test_no_paths_or_hosts_of_a_machine():
    words = [r"/(?:root|work|tmp/[a-z]+|home)/[a-z]", r"pypi\.org/simple", "pythonhosted"]
    words += ["index-url", "extra-index"]
    for path in tracked():
        if path.suffix in {".png", ".so", ".gz"} or path == ROOT / "tests" / "test_laws.py":
            continue
        text = path.read_text(errors="replace")
        found = re.findall("|".join(words), text)
        assert not found, f"{path.relative_to(ROOT)}: {found}"


def functions(text):
    """Of each that a file of C defines: how it begins, its lines, and the comment right above."""
    for body in re.split(r"^\}\n", text, flags=re.M)[:-1]:
        lines = body.splitlines()
        head = max((i for i, x in enumerate(lines) if re.match(r"[A-Za-z_]", x)), default=0)
        above = head - (head > 0 and lines[head - 1].startswith("template"))
        comment = re.search(r"/\*(?:(?!\*/).)*\*/\s*\Z", "\n".join(lines[:above]), re.S)
        yield lines[head], len(lines) - head + 1, comment[0] if comment else ""


def test_long_functions_say_why():
    """More than 60 lines: the comment right above says why they are."""
    found = [(name, *function) for name, text in TEXT.items() for function in functions(text)]
    assert len(found) > 500
    wrong = [
        (name, head, lines)
        for name, head, lines, comment in found
        if lines > 60 and not re.search(r"longer\s+(?:\*\s+)?than\s+a\s+function", comment, re.I)
    ]
    assert not wrong


def test_a_long_function_is_seen():
    text = (
        "/* Why. */\ntemplate <int N>\nDEVICE void f(int a,\n    int b) {\n"
        + "    g();\n" * 60
        + "}\n"
    )
    assert list(functions(f"int x;\n\n{text}")) == [("DEVICE void f(int a,", 63, "/* Why. */")]


def test_sources_stay_readable():
    budget = {f"csrc/{name}": 220 for name in CONTRACT}
    for name, text in TEXT.items():
        lines = len(text.splitlines())
        limit = budget.get(name, 480 if name.startswith("kernels/") else 300)
        assert lines <= limit, f"{name} has {lines} lines, of {limit}"
        assert "\t" not in text and not re.search(r"[ ]+$", text, re.M), f"{name}: white space"
    tests = [p for p in (ROOT / "tests").rglob("*") if p.suffix in (".py", ".c", ".cpp", ".h")]
    assert not [p.name for p in tests if len(p.read_text().splitlines()) > 500] and tests
    for word in ("TO" + "DO", "FIX" + "ME", "XX" + "X"):
        assert not [name for name, text in TEXT.items() if re.search(rf"\b{word}\b", text)]
