"""What setup.py compiles, and when again; what kernels/sass.py sees in machine code."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT

pytestmark = [
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="no source tree"),
    pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler"),
]

ONE, TWO = (f"FA_VARIANT(sm90_fwd_{x}, .d={d})\n" for x, d in (("one", 64), ("two", 128)))
THREE = "FA_VARIANT(sm90_bwd_three, .d=64, .dq=1)\n"
VARIANTS = {"sm90_fwd_one", "sm90_fwd_two", "sm90_bwd_three"}
OTHERS = {"sm90_backend", "common_device", "common_merge"}  # CUDA files without a table
KERNELS = VARIANTS | OTHERS

SOURCES = {
    "sm90/fwd.def": "// two\n" + ONE + TWO,
    "sm90/bwd.def": THREE,
    "sm90/tile.cuh": "",
    "sm90/fwd.cu": '#include "sm90/tile.cuh"\nint VARIANT_NAME = VARIANT_D;\n',
    "sm90/bwd.cu": "int VARIANT_NAME = VARIANT_D + VARIANT_DQ;\n",
    # The tables, as a backend reads them.
    "sm90/backend.cu": '#include "common/launch.cuh"\n#define FA_VARIANT(name, ...) #name "\\n"\n'
    'const char fa_names[] = "names of the tables:\\n"\n'
    '#include "sm90/bwd.def"\n#include "sm90/fwd.def"\n;\n',
    "common/launch.cuh": "",
    "common/device.cu": '#include "common/launch.cuh"\n',
    "common/merge.cu": '#include "common/launch.cuh"\n#include "common/merge.cuh"\n',
    "common/merge.cuh": "",
}

# Stands for nvcc: compiles the file as C, and says where cudart is.
NVCC = r"""#!/bin/sh
if [ "$1" = --dryrun ]; then echo '#$ LIBRARIES= "-L{lib}"' >&2; exit; fi
echo "$@" >> {log}
words=
while [ $# -gt 0 ]; do
    case "$1" in
        -c | -o | -MF) words="$words $1 $2"; shift;;
        -I* | -D* | -MD) words="$words $1";;
    esac
    shift
done
echo "ptxas info    : (C7519) harmless"
cat {say} 2>/dev/null
exec cc -x c $words
"""


@pytest.fixture
def build(tmp_path):
    """A tree with three variants of two kernels, a backend and what all share, and one C file; a
    function that builds it and returns the names of what was compiled."""
    tree, lib = tmp_path / "tree", tmp_path / "lib"
    packages = [p.parent.relative_to(ROOT) for p in ROOT.glob("python/fastattn/*/__init__.py")]
    for folder in ("csrc", "kernels/sm90", "kernels/common", *packages):
        (tree / folder).mkdir(parents=True)
    shutil.copy(ROOT / "setup.py", tree)
    shutil.copy(ROOT / "pyproject.toml", tree)
    for name in ("sass.py", "table.py"):
        shutil.copy(ROOT / "kernels" / name, tree / "kernels")
    (tree / "python/fastattn/__init__.py").write_text('__version__ = "0"\n')
    (tree / "csrc/check.h").write_text("int fa_check(void);\n")
    (tree / "csrc/check.c").write_text('#include "check.h"\nint fa_check(void) { return 0; }\n')
    for name, text in SOURCES.items():
        (tree / "kernels" / name).write_text(text)
    lib.mkdir()
    subprocess.run(["ar", "rc", lib / "libcudart_static.a"], check=True)
    nvcc = tmp_path / "nvcc"
    say, log = tmp_path / "say", tmp_path / "log"
    plain = {name: "" for name in os.environ if name.startswith("FASTATTN_")}
    nvcc.write_text(NVCC.format(lib=lib, log=log, say=say))
    nvcc.chmod(0o755)

    def run(fails=False, **environment):
        done = subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
            cwd=tree,
            env={**os.environ, **plain, "FASTATTN_NVCC": str(nvcc), **environment},
            capture_output=True,
            text=True,
        )
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        run.said = done.stderr
        return set(re.findall(r"^fastattn: compiled (\w+), \d+\.\d s$", done.stderr, re.M))

    run.tree, run.say, run.log, run.nvcc = tree, say, log, nvcc
    return run


def later(path, text=None):
    """Changes a file, or only its time, by more than a clock's resolution."""
    if text is not None:
        path.write_text(text)
    time = path.stat().st_mtime_ns + 1_000_000_000
    os.utime(path, ns=(time, time))


def test_one_object_per_variant_and_again_only_what_changed(build):
    assert build() == KERNELS | {"check"}
    assert build() == set()
    later(build.tree / "kernels/sm90/bwd.cu")
    assert build() == {"sm90_bwd_three"}
    later(build.tree / "kernels/sm90/tile.cuh")
    assert build() == {"sm90_fwd_one", "sm90_fwd_two"}
    later(build.tree / "kernels/common/launch.cuh")
    assert build() == OTHERS
    later(build.tree / "csrc/check.h")
    assert build() == {"check"}


def test_merging_alone(build):
    """Its header compiles it again, and no variant."""
    build()
    later(build.tree / "kernels/common/merge.cuh")
    assert build() == {"common_merge"}
    later(build.tree / "kernels/common/merge.cu")
    assert build() == {"common_merge"}


def test_a_changed_line_compiles_that_variant_and_who_reads_the_table(build):
    build()
    table = build.tree / "kernels/sm90/fwd.def"
    later(table, table.read_text().replace("two, .d=128", "two, .d=96"))
    assert build() == {"sm90_fwd_two", "sm90_backend"}
    later(table, table.read_text().replace(ONE, "FA_VARIANT(sm90_fwd_new, .d=32)\n"))
    assert build() == {"sm90_fwd_new", "sm90_backend"}
    later(table, table.read_text() + THREE)
    build(fails=True)
    assert "sm90/fwd.def:4 must have a name of its own, sm90_fwd_..., got" in build.said


def command(build, name):
    (line,) = (x for x in build.log.read_text().splitlines() if f"/{name}-" in x)
    return shlex.split(line)


def test_a_line_becomes_a_command_line(build):
    build()
    words = command(build, "sm90_fwd_two")
    assert {"-DVARIANT_NAME=sm90_fwd_two", "-DVARIANT_D=128", "kernels/sm90/fwd.cu"} <= {*words}
    assert not [word for word in words if "DQ" in word]  # another table's
    assert "-DVARIANT_DQ=1" in command(build, "sm90_bwd_three")
    for name in KERNELS:
        gencode = [word for word in command(build, name) if word.startswith("-gencode")]
        assert gencode == ["-gencode=arch=compute_90a,code=sm_90a"]


def test_an_architecture_is_a_folder(build):
    """Its files, found where they lie, are built for it, and what all share for both."""
    build()
    build.log.unlink()
    folder = build.tree / "kernels" / "sm80"
    folder.mkdir()
    (folder / "fwd.def").write_text("FA_VARIANT(sm80_fwd_four, .d=64)\n")
    (folder / "fwd.cu").write_text("int VARIANT_NAME = VARIANT_D;\n")
    (folder / "backend.cu").write_text('#include "common/launch.cuh"\n')
    assert build() == {"sm80_fwd_four", "sm80_backend", "common_device", "common_merge"}
    of_80 = "-gencode=arch=compute_80,code=sm_80"
    newer = "-gencode=arch=compute_90,code=sm_90"
    assert {of_80, newer, "-DVARIANT_D=64"} <= {*command(build, "sm80_fwd_four")}
    gencode = [word for word in command(build, "common_merge") if word.startswith("-gencode")]
    assert gencode == [of_80, "-gencode=arch=compute_90a,code=sm_90a"]


def test_some_variants(build):
    """The tables that C reads have those alone; all tables are searched."""

    def names():
        (built,) = (build.tree / "python" / "fastattn").glob("*.so")
        listed = built.read_bytes().partition(b"names of the tables:\n")[2].partition(b"\0")[0]
        return listed.decode().split()

    assert build(FASTATTN_VARIANTS="_t") == KERNELS - {"sm90_fwd_one"} | {"check"}
    assert names() == ["sm90_bwd_three", "sm90_fwd_two"]
    assert build(FASTATTN_VARIANTS="three") == {"sm90_backend"}
    assert names() == ["sm90_bwd_three"]
    assert build() == {"sm90_fwd_one", "sm90_backend"}  # all of them: the tables as they stand
    assert names() == ["sm90_bwd_three", "sm90_fwd_one", "sm90_fwd_two"]
    for wrong in ("four", "("):
        build(fails=True, FASTATTN_VARIANTS=wrong)
        assert "FASTATTN_VARIANTS must" in build.said


# ------------------------------------------------------------------ where there is no CUDA toolkit

DRIVER = "int cuDriverGetVersion(int *version) {{ *version = {0}; return {0} ? 0 : 3; }}\n"


@pytest.fixture
def machine(build, tmp_path):
    """The environment of one without nvcc, whose driver serves a version of CUDA (0: no driver)
    and whose pip finds these packages and no others."""
    folders = os.environ["PATH"].split(os.pathsep)
    path = os.pathsep.join(f for f in folders if not os.path.exists(os.path.join(f, "nvcc")))

    def make(driver=0, packages=()):
        library = tmp_path / "driver" / "libcuda.so.1"
        library.parent.mkdir(exist_ok=True)
        (tmp_path / "driver.c").write_text(DRIVER.format(driver))
        command = ["cc", "-shared", "-fPIC", tmp_path / "driver.c", "-o", library]
        subprocess.run(command, check=True)
        for package in packages:
            name, version = package.replace("-", "_").split("==")
            info = f"{name}-{version}.dist-info"
            wheel = tmp_path / "index" / f"{name}-{version}-py3-none-any.whl"
            wheel.parent.mkdir(exist_ok=True)
            with zipfile.ZipFile(wheel, "w") as archive:
                said = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
                archive.writestr(f"{info}/METADATA", said)
                tag = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
                archive.writestr(f"{info}/WHEEL", tag)
                archive.writestr(f"{info}/RECORD", "")
        return {
            "FASTATTN_NVCC": "",
            "CUDA_HOME": "",
            "PATH": path,
            "LD_LIBRARY_PATH": str(library.parent),
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(tmp_path / "index"),
            "PIP_CONSTRAINT": "",
            "PIP_CONFIG_FILE": os.devnull,
        }

    return make


PACKAGES = re.findall(r'"(nvidia-[\w-]+==[\d.]+)"', (ROOT / "setup.py").read_text())


@pytest.mark.parametrize(
    "driver, packages, settings, asked",
    [
        (0, PACKAGES, {}, []),
        (0, PACKAGES, {"FASTATTN_CUDA": "1"}, PACKAGES),
        (13000, PACKAGES, {}, PACKAGES),
        (13020, PACKAGES, {"FASTATTN_CUDA": "1"}, PACKAGES),
        (13000, PACKAGES, {"FASTATTN_CUDA": "0"}, []),
        (12080, PACKAGES, {}, []),
        (12080, PACKAGES, {"FASTATTN_CUDA": "1"}, []),
        (13000, [], {}, []),
        (13000, PACKAGES[1:], {"FASTATTN_CUDA": "1"}, []),
        (13000, PACKAGES, {"FASTATTN_NVCC": "nvcc"}, []),
    ],
)
def test_an_isolated_build_asks_for_nvcc(build, machine, driver, packages, settings, asked):
    """Where kernels are wanted, no nvcc is there, and pip can get all of it."""
    assert len(PACKAGES) == 5
    program = "import setuptools.build_meta as b; print(*b.get_requires_for_build_wheel())"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=build.tree,
        env={**os.environ, "FASTATTN_CUDA": "", **machine(driver, packages), **settings},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1].split() == asked, done.stderr


def test_the_packages_nvcc_builds_the_kernels(build, machine, tmp_path):
    """It is found where an isolated build puts it, if all of its parts are there."""
    home = tmp_path / "site" / "nvidia" / "cu13"
    parts = ("nvvm/bin/cicc", "include/crt/host_config.h", "include/cuda_runtime.h")
    for part in (*parts, "include/nv/target", "bin/nvcc"):
        (home / part).parent.mkdir(parents=True, exist_ok=True)
        (home / part).touch()
    shutil.copy(build.nvcc, home / "bin" / "nvcc")
    site = {"PYTHONPATH": str(home.parent.parent)}
    assert build(**machine(13000), **site) == {"check"}
    (home / "lib").mkdir()
    shutil.move(tmp_path / "lib" / "libcudart_static.a", home / "lib")
    assert build(**machine(13000), **site) == KERNELS | {"check"}


@pytest.mark.parametrize(
    "driver, settings, why",
    [
        (13000, {"FASTATTN_CUDA": "0"}, "it was built with FASTATTN_CUDA=0"),
        (0, {}, "neither nvcc nor an NVIDIA driver was found"),
        (0, {"FASTATTN_CUDA": "1"}, "nvcc was not found when it was built, neither on PATH nor"),
        (13000, {}, "nvcc was not found when it was built, neither on PATH nor"),
        (12080, {}, "that of the package index needs a driver for CUDA 13, not 12.8"),
    ],
)
def test_without_nvcc_the_build_is_for_the_cpu_and_says_why(build, machine, driver, settings, why):
    """In its log, and in the module: the reason is dispatch.c's."""
    shutil.copy(build.tree / "csrc/check.c", build.tree / "csrc/dispatch.c")
    (build.tree / "csrc/dispatch.c").write_text("const char *fa_why = FA_NO_KERNELS;\n")
    # pip can get nvcc, but this build is none of pip's: nothing is fetched.
    assert build(**machine(driver, PACKAGES), **settings) == {"check", "dispatch"}
    said = re.findall("^fastattn has no CUDA kernels: (.*)$", build.said, re.M)
    assert len(said) == 1 and why in said[0]
    (built,) = (build.tree / "python" / "fastattn").glob("*.so")
    assert said[0].encode() in built.read_bytes()


def test_slow_kernels_warn_a_user_and_fail_a_strict_build(build):
    build.say.write_text("ptxas info    : (C7510) Potential Performance Loss: serialized\n")
    build()
    assert "sm90_fwd_one: ptxas info : (C7510) Potential Performance Loss: serialized" in build.said
    assert "C7519" not in "".join(x for x in build.said.splitlines() if x.startswith("fastattn"))
    build(fails=True, FASTATTN_STRICT="1")  # the objects are there, what was said of them too
    assert "6 problems in the kernels" in build.said


@pytest.fixture(scope="module")
def sass():
    sys.path.insert(0, str(ROOT / "kernels"))
    import sass

    return sass


def instruction(opcode, jump=None, guard=7):
    """The two words of an instruction; jump counts instructions from the next one."""
    offset = (jump or 0) * 4
    low = opcode | guard << 12 | (offset & 0xFF) << 16 | (offset >> 8 & (1 << 30) - 1) << 34
    return low, 7 << 23


@pytest.mark.parametrize("spill, inside, expected", [(0x983, True, 1), (0x387, False, 0)])
def test_local_memory_beside_wgmma(sass, monkeypatch, spill, inside, expected):
    wgmma, back, leave = instruction(0xDF0), instruction(0x947, -3, guard=0), instruction(0x94D)
    other = instruction(0x308)
    first = (wgmma, instruction(spill) if inside else other, back)
    second = (other, other if inside else instruction(spill), back)
    kernel = sass.Kernel("k", (*first, *second, leave))
    assert kernel.loops() == [{3, 4, 5}, {0, 1, 2}]
    monkeypatch.setattr(sass, "kernels", lambda data: [kernel])
    assert len(sass.check(b"", "")) == expected


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
def test_machine_code_is_read(sass, tmp_path):
    """A loop over an array that does not fit the registers: it is found, with its local memory."""
    (tmp_path / "spill.cu").write_text(
        "__global__ void spill(float *x, int n) {\n"
        "    float a[64];\n"
        "    for (int i = 0; i < 64; i++) a[i] = x[i];\n"
        "    for (int k = 0; k < n; k++) x[k] += a[(k * 7) & 63];\n"
        "}\n"
    )
    command = ["nvcc", "-gencode", "arch=compute_90a,code=sm_90a", "-c", "spill.cu"]
    subprocess.run(command, cwd=tmp_path, check=True)
    (kernel,) = sass.kernels((tmp_path / "spill.o").read_bytes())
    opcodes = kernel.opcodes()
    assert "spill" in kernel.name and opcodes.count(0x94D) >= 1
    loops = [{opcodes[i] for i in loop} for loop in kernel.loops()]
    assert any(0x983 in loop for loop in loops), "LDL"
    assert not any(loop & sass.WGMMA for loop in loops)


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
def test_machine_code_of_an_older_architecture_is_read(sass, tmp_path):
    """Its sections keep the number of registers beside the symbol's."""
    import table

    (tmp_path / "add.cu").write_text("__global__ void add(float *x) { x[threadIdx.x] += 1; }\n")
    command = ["nvcc", *table.gencode("sm80"), "-c", "add.cu"]
    subprocess.run(command, cwd=tmp_path, check=True)
    kernel, newer = sass.kernels((tmp_path / "add.o").read_bytes())
    assert (kernel.variant(), newer.variant()) == ("add on sm_80", "add")
    assert "add" in kernel.name and 0x94D in kernel.opcodes() and kernel.registers > 0
    assert sass.check((tmp_path / "add.o").read_bytes(), "") == []
