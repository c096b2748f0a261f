"""XLA's FFI: our declaration against the header that jaxlib ships, and programs for a GPU."""

import functools
import re
import shutil
import subprocess
from pathlib import Path

import fastattn
import pytest
from conftest import ROOT

jax = pytest.importorskip("jax")

import jaxlib  # noqa: E402
from jax_calls import qkv  # noqa: E402

HEADER = Path(next(iter(jaxlib.__path__))) / "include"
# Ours: its name in XLA, and of each field of ours XLA's name of it.
STRUCTS = {
    "xla_extension": ("XLA_FFI_Extension_Base", {}),
    "xla_version": (
        "XLA_FFI_Api_Version",
        {"extensions": "extension_start", "major": "major_version", "minor": "minor_version"},
    ),
    "xla_buffer": ("XLA_FFI_Buffer", {"extensions": "extension_start"}),
    "xla_span": ("XLA_FFI_ByteSpan", {"data": "ptr", "size": "len"}),
    "xla_scalar": ("XLA_FFI_Scalar", {}),
    "xla_arrays": (
        "XLA_FFI_Args",
        {"extensions": "extension_start", "count": "size", "buffers": "args"},
    ),
    "xla_attributes": (
        "XLA_FFI_Attrs",
        {"extensions": "extension_start", "count": "size", "values": "attrs"},
    ),
    "xla_error_create": (
        "XLA_FFI_Error_Create_Args",
        {"extensions": "extension_start", "code": "errc"},
    ),
    "xla_stream_get": (
        "XLA_FFI_Stream_Get_Args",
        {"extensions": "extension_start", "context": "ctx"},
    ),
    "xla_ordinal_get": (
        "XLA_FFI_DeviceOrdinal_Get_Args",
        {"extensions": "extension_start", "context": "ctx", "ordinal": "device_ordinal"},
    ),
    "xla_api": (
        "XLA_FFI_Api",
        {
            "extensions": "extension_start",
            "version": "api_version",
            "internal": "internal_api",
            "create_error": "XLA_FFI_Error_Create",
            "get_stream": "XLA_FFI_Stream_Get",
            "get_ordinal": "XLA_FFI_DeviceOrdinal_Get",
        },
    ),
    "xla_frame": (
        "XLA_FFI_CallFrame",
        {
            "extensions": "extension_start",
            "context": "ctx",
            "arguments": "args",
            "results": "rets",
            "attributes": "attrs",
        },
    ),
    "xla_metadata": (
        "XLA_FFI_Metadata",
        {"version": "api_version", "state_type": "state_type_id"},
    ),
    "xla_metadata_extension": (
        "XLA_FFI_Metadata_Extension",
        {"extension": "extension_base"},
    ),
}
WORDS = {  # of ours that are not spelled as XLA's with a type before
    "METADATA": "Extension_Metadata",
    "MAJOR": "API_MAJOR",
    "SCALAR": "AttrType_SCALAR",
    "STRING": "AttrType_STRING",
    "EXECUTE": "ExecutionStage_EXECUTE",
    "COMMAND_BUFFER_COMPATIBLE": "HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE",
}


def ours():
    """{struct: its fields}, and our constants."""
    text = re.sub(r"/\*.*?\*/", " ", (ROOT / "csrc/binding/xla_ffi.h").read_text(), flags=re.S)
    structs = {}
    for body, name in re.findall(r"typedef struct \w+ \{(.*?)\} (\w+);", text, re.S):
        declared = re.sub(r"\(\*(\w+)\)\([^)]*\)", r"\1", body)
        fields = [
            f
            for line in declared.split(";")
            for f in re.findall(r"(\w+)(?:\[\d+\])?(?:,|$)", line.strip())
        ]
        structs[name] = [f for f in fields if not f.startswith("unused")]
    return structs, re.findall(r"\bXLA_(\w+) = ", text)


@pytest.mark.skipif(not shutil.which("cc"), reason="no cc")
def test_xlas_header_says_the_same(tmp_path):
    if not (ROOT / "csrc").exists():
        pytest.skip("no source tree")
    structs, constants = ours()
    assert structs.keys() == STRUCTS.keys()
    header = (HEADER / "xla/ffi/api/c_api.h").read_text()
    lines = []
    for name, (theirs, renamed) in STRUCTS.items():
        theirs = theirs if re.search(rf"\b{theirs}\b", header) else "XLA_FFI_InternalExtension"
        for field in structs[name]:
            other = renamed.get(field, field)
            if other == "state_type_id" and "XLA_FFI_TypeId state_type_id" not in header:
                continue  # JAX 0.6
            at = f"offsetof({name}, {field}) == offsetof({theirs}, {other})"
            size = f"sizeof((({name} *)0)->{field}) == sizeof((({theirs} *)0)->{other})"
            lines.append(f'_Static_assert({at} && {size}, "{name}.{field}");')
        if name not in ("xla_api", "xla_frame", "xla_metadata"):  # of which XLA has more
            lines.append(f'_Static_assert(sizeof({name}) == sizeof({theirs}), "{name}");')
    for constant in constants:
        if constant == "MINOR":
            lines.append('_Static_assert(XLA_MINOR <= XLA_FFI_API_MINOR, "MINOR");')
            continue
        kinds = (WORDS.get(constant), f"DataType_{constant}", f"Error_Code_{constant}")
        (other,) = {f"XLA_FFI_{k}" for k in kinds if k and re.search(rf"\bXLA_FFI_{k}\b", header)}
        lines.append(f'_Static_assert((int)XLA_{constant} == (int){other}, "{constant}");')
    assert len(lines) > 80
    program = tmp_path / "both.c"
    includes = '#include "xla/ffi/api/c_api.h"\n#include "binding/xla_ffi.h"\n'
    program.write_text(includes + "\n".join(lines) + "\nint main(void) { return 0; }\n")
    # XLA's header names its structs without `struct`, as C++ does; the traits declare them in C.
    command = ["cc", "-std=c11", "-fsyntax-only", f"-I{HEADER}", f"-I{ROOT}/csrc", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


# --------------------------------------------------------------- what JAX compiles for a GPU, unrun


def lowered(function, *arrays):
    return jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def test_a_program_for_a_gpu_has_room_for_the_workspace(monkeypatch):
    asked = []

    def workspace(*call):
        asked.append(call)
        return 4096

    monkeypatch.setattr(fastattn._C, "jax_workspace", workspace)
    q, k, v = qkv().values()
    program = lowered(lambda q: fastattn.attention(q, k, v, causal=True, scale=0.5), q)
    assert 'results = "out workspace"' in program and "tensor<4096xui8>" in program
    shapes = tuple((name, x.shape, 2, 32) for name, x in zip("qkv", (q, k, v), strict=True))
    options = {"causal": 1, "has_scale": 1, "scale": 0.5}
    assert asked == [("forward", shapes, options, (("out", (*q.shape[:3], 6), 2, 32),))]


def test_a_program_for_a_gpu_is_the_call_alone(monkeypatch):
    """No copy, transposition or fill beside it, in either layout and under jax.nn's names."""
    monkeypatch.setattr(fastattn._C, "jax_workspace", lambda *_: 0)
    q = qkv()["q"]
    for function in (
        functools.partial(fastattn.attention, causal=True, return_lse=True),
        functools.partial(fastattn.attention, layout="bshd", window=(2, None)),
        functools.partial(fastattn.jax.dot_product_attention, is_causal=True),
    ):
        operations = re.findall(r"%\S+ = (\S+?)[ (]", lowered(function, q, q, q))
        assert operations == ["stablehlo.custom_call"]


@pytest.mark.skipif("sm90" in fastattn.info()["backends"], reason="kernels are built in")
def test_a_program_for_a_gpu_is_refused_without_kernels():
    """While JAX compiles, with the sentence of every other call."""
    q, k, v = qkv().values()
    with pytest.raises(NotImplementedError, match=r"^no backend takes this call: cpu: the arrays"):
        lowered(lambda q: fastattn.attention(q, k, v, dropout_p=0.5, seed=3), q)
    with pytest.raises(NotImplementedError, match=r"^no backend takes this call: cpu: the arrays"):
        lowered(jax.vmap(lambda q: fastattn.attention(q, k, v)), q[None])


def test_what_is_asked_of_the_workspace_is_checked():
    ask = fastattn._C.jax_workspace
    q = ("q", (2, 3, 4, 5), 2, 16)
    with pytest.raises(TypeError, match=r"^_C has no target sideways$"):
        ask("sideways", (q,), {}, ())
    with pytest.raises(TypeError, match=r"^there is no operand `w`$"):
        ask("forward", (("w", *q[1:]),), {}, ())
    with pytest.raises(TypeError, match=r"^`q`, `k` and `v` are operands$"):
        ask("forward", (q,), {}, ())
    with pytest.raises(ValueError, match=r"^`k` must have d = 5 like `q`, got 6$"):
        ask("forward", (q, ("k", (2, 3, 4, 6), 2, 16), ("v", *q[1:])), {}, ())
    with pytest.raises(ValueError, match=r"^`q` must have 7 runs$"):
        ask("forward", (q,), {"runs": 7, "stepped": 1}, ())
