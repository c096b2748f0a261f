"""What `python kernels/sass.py compare` calls the same machine code, and what it does not."""

import dataclasses
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.skipif(
    not (ROOT / "kernels" / "sass.py").exists(), reason="no source tree"
)

OTHER, BARRIER, LEAVE = (0x308 | 7 << 12, 0), (0xB1D | 7 << 12, 0), (0x94D | 7 << 12, 0)


@pytest.fixture(scope="module")
def sass():
    sys.path.insert(0, str(ROOT / "kernels"))
    import sass

    return sass


def load(offset, bank=0, opcode=0xB82):
    """LDC or ULDC of a constant."""
    return opcode | 7 << 12 | offset << 38 | bank << 54, 0


def kernel(sass, *code, name="_Z5first4args", registers=168):
    return sass.Kernel(name, (*code, LEAVE), registers)


def test_symbols_and_places_of_parameters_may_differ(sass):
    old = kernel(sass, load(0x210), OTHER, load(0x218, opcode=0xAB9), load(0x210))
    new = kernel(sass, load(0x220), OTHER, load(0x210, opcode=0xAB9), load(0x220), name="_Z1x1y")
    assert sass.difference(old, old) is None
    assert sass.difference(old, new) is None


@pytest.mark.parametrize(
    "before, after, said",
    [
        ((OTHER,), ((OTHER[0] | 1 << 16, 0),), "instruction 0 is"),
        ((OTHER,), ((OTHER[0], 1 << 41),), "instruction 0 is"),  # its scheduling
        ((OTHER,), (OTHER, OTHER), "instruction 1 is"),
        ((OTHER,), (BARRIER,), "instruction 0 is"),
        ((BARRIER,), ((BARRIER[0] | 3 << 54, 0),), "instruction 0 is"),
        ((load(0x210),), ((load(0x210)[0] | 1 << 16, 0),), "instruction 0 is"),
        ((load(0x210),), (load(0x28),), "instruction 0 is"),  # a parameter, and the stack's top
        ((load(0x28),), (load(0x2C),), "instruction 0 is"),
        ((load(0x210, bank=3),), (load(0x218, bank=3),), "instruction 0 is"),
        # One parameter has become two, two have become one.
        ((load(0x210), load(0x210)), (load(0x210), load(0x214)), "instruction 1 reads parameter"),
        ((load(0x210), load(0x214)), (load(0x210), load(0x210)), "instruction 1 reads parameter"),
    ],
)
def test_anything_else_is_a_difference(sass, before, after, said):
    assert said in sass.difference(kernel(sass, *before), kernel(sass, *after))


def test_lengths_and_registers_are_compared(sass):
    old = kernel(sass, OTHER)
    longer = dataclasses.replace(old, code=(*old.code, LEAVE))
    assert sass.difference(old, longer) == "3 instructions, 2 before"
    assert sass.difference(longer, old) == "2 instructions, 3 before"
    fewer = dataclasses.replace(old, registers=160)
    assert sass.difference(old, fewer) == "160 registers, 168 before"


def test_a_variant_that_is_missing_fails(sass, capsys):
    old = {"first": kernel(sass, OTHER), "second": kernel(sass, LEAVE)}
    new = {"first": old["first"], "third": kernel(sass, OTHER)}
    assert sass.compare(old, old) == 0
    assert sass.compare(old, new) == 2
    assert sass.compare(old, new, common=True) == 0
    assert sass.compare(old, {"third": old["first"]}, common=True) == 1  # nothing was compared
    assert "second: only in the old build" in capsys.readouterr().out


def test_a_variant_is_named_as_in_the_source(sass):
    for symbol in ("_Z14sm90_fwd_d64_111kernel_args", "_ZL14sm90_fwd_d64_14args", "sm90_fwd_d64_1"):
        assert kernel(sass, name=symbol).variant() == "sm90_fwd_d64_1"
    few = ["_Z9merge_fewILi2ELi16EEv10merge_argsIXT0_EE", "_ZL9merge_fewILi4ELi16EEv10merge_args"]
    names = {kernel(sass, name=symbol).variant() for symbol in few}  # of a template, each its own
    assert len(names) == 2 and all(name.startswith("merge_fewILi") for name in names)


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
def test_objects_are_compared(sass, tmp_path):
    """Of folders; a swapped parameter, a changed constant and another name are seen."""
    source = "__global__ void {name}({args}) {{ x[threadIdx.x] = {value}; }}\n"
    programs = {
        "old": source.format(name="k", args="float *x, int a, int b", value="a - b"),
        "moved": source.format(name="k", args="float *none, float *x, int a, int b", value="a - b"),
        "swapped": source.format(name="k", args="float *x, int a, int b", value="a - b - a"),
        "changed": source.format(name="k", args="float *x, int a, int b", value="a - b + 2"),
        "renamed": source.format(name="m", args="float *x, int a, int b", value="a - b"),
    }
    for name, text in programs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "k.cu").write_text(text)
        command = ["nvcc", "-gencode", "arch=compute_90a,code=sm_90a", "-c", "k.cu"]
        subprocess.run(command, cwd=tmp_path / name, check=True)

    def status(new):
        command = [sys.executable, ROOT / "kernels" / "sass.py", "compare", "old", new]
        return subprocess.run(command, cwd=tmp_path, capture_output=True).returncode

    assert {name: status(name) for name in programs} == {
        "old": 0,
        "moved": 0,
        "swapped": 1,
        "changed": 1,
        "renamed": 1,
    }
    assert sass.read(tmp_path / "old")["k"].registers > 0
