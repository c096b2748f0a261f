"""Builds fastattn._C: every C file of csrc/, and with nvcc what is in the folders of kernels/.

One object per C file, per variant of a kernel (kernels/table.py) and per other CUDA file, compiled
in parallel and kept in build/objects. An object is compiled again when its command line or a file
that its depfile names has changed, so touching one kernel compiles that kernel alone.

Environment:
    FASTATTN_CUDA=0      no CUDA kernels, even where nvcc is found
    FASTATTN_CUDA=1      kernels, even where no NVIDIA driver is found: see packages_wanted()
    FASTATTN_NVCC=PATH   the compiler to use (else CUDA_HOME/bin/nvcc, else nvcc on PATH)
    FASTATTN_VARIANTS=RE only the variants in whose name the regular expression is found
    FASTATTN_STRICT=1    fail on what slows a kernel down silently (CI sets it); else a warning
    FASTATTN_SANITIZE=1  AddressSanitizer and UBSan in the C code (run with LD_PRELOAD=libasan.so)
    FASTATTN_JOBS=N      compilers at once (default: the cores this process may use)
"""

import ctypes
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent / "kernels"))
import sass
import table

ROOT = Path(__file__).resolve().parent
KERNELS = ROOT / "kernels"
OBJECTS = ROOT / "build" / "objects"
BINDING = ROOT / "csrc" / "binding"  # the only files that see Python.h

# Free-threaded CPython has no stable ABI: there the module is built for one version.
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
ABI3 = "0x030A0000"  # CPython 3.10, as in [tool.distutils.bdist_wheel] of the wheel below

C_FLAGS = (
    "-std=c11 -O3 -fno-math-errno -fPIC -fvisibility=hidden -Wall -Wextra "
    "-Wno-missing-field-initializers -Werror=implicit-function-declaration -Icsrc"
)
SANITIZE_FLAGS = (
    "-g -O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"
)
# Without exceptions, RTTI and guarded statics the host pass of nvcc needs no C++ runtime.
NVCC_FLAGS = (
    "-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden,-fno-exceptions,-fno-rtti,"
    "-fno-threadsafe-statics,-fno-asynchronous-unwind-tables -Icsrc -Ikernels "
    "-DFASTATTN_CUDA"
)
LINK_FLAGS = "-shared -Wl,--exclude-libs,ALL -Wl,--as-needed -Wl,-z,relro,-z,now"


# NVIDIA's compiler as the package index has it: the parts of one CUDA release, in one folder of
# site-packages. Its kernels run on drivers from 580 on. The index has no nvcc of CUDA 12, only
# its assembler: an older driver needs a toolkit of CUDA 12, installed as NVIDIA says.
PACKAGED = Path("nvidia", "cu13")
PACKAGED_CUDA = 13000  # as cuDriverGetVersion() counts
PACKAGES = (
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
)
PACKAGED_FILES = (
    "bin/nvcc",
    "nvvm/bin/cicc",
    "include/crt/host_config.h",
    "include/cuda_runtime.h",
    "include/nv/target",
    "lib/libcudart_static.a",
)


@dataclass(frozen=True)
class Job:
    """One compilation: `command` lacks the output and the depfile, which are named after it."""

    name: str
    command: tuple[str, ...]

    @property
    def object(self) -> Path:
        digest = hashlib.sha256("\0".join(self.command).encode()).hexdigest()[:12]
        return OBJECTS / f"{self.name}-{digest}.o"

    @property
    def log(self) -> Path:
        return self.object.with_suffix(".log")

    def fingerprint(self) -> str:
        """Names, times and sizes of all that the object was made from."""
        text = self.object.with_suffix(".d").read_text().replace("\\\n", " ")
        files = [ROOT / name for name in shlex.split(text.partition(":")[2])]
        stats = [(file, file.stat()) for file in files]
        return "\n".join(f"{file} {s.st_mtime_ns} {s.st_size}" for file, s in stats)

    def stale(self) -> bool:
        try:
            key = self.object.with_suffix(".key").read_text()
            return not self.object.exists() or key != self.fingerprint()
        except OSError:
            return True

    def run(self) -> float:
        """The seconds that it took."""
        start = time.monotonic()
        partial = self.object.with_suffix(".tmp.o")
        depfile = self.object.with_suffix(".d")
        command = [*self.command, "-MD", "-MF", str(depfile), "-o", str(partial)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
        self.log.write_text(done.stdout + done.stderr)
        partial.replace(self.object)
        self.object.with_suffix(".key").write_text(self.fingerprint())
        return time.monotonic() - start


def find_nvcc() -> Path | None:
    if os.environ.get("FASTATTN_CUDA") == "0":
        return None
    if chosen := os.environ.get("FASTATTN_NVCC"):
        return Path(chosen)
    home = os.environ.get("CUDA_HOME")
    if home and (Path(home) / "bin" / "nvcc").is_file():
        return Path(home) / "bin" / "nvcc"
    if found := shutil.which("nvcc"):
        return Path(found).resolve()
    for home in (Path(folder) / PACKAGED for folder in sys.path):
        if all((home / file).is_file() for file in PACKAGED_FILES):
            return home / "bin" / "nvcc"
    return None


def driver_cuda() -> int | None:
    """The CUDA version that the NVIDIA driver serves, 1000 major + 10 minor; None: no driver."""
    version = ctypes.c_int(0)
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed else version.value


def why_no_kernels() -> str:
    """Why find_nvcc() found nothing, for the build's log and for what the built module says."""
    if os.environ.get("FASTATTN_CUDA") == "0":
        return "it was built with FASTATTN_CUDA=0"
    driver = driver_cuda()
    if driver is None and os.environ.get("FASTATTN_CUDA") != "1":
        return "neither nvcc nor an NVIDIA driver was found when it was built"
    if driver is not None and driver < PACKAGED_CUDA:
        return (
            "nvcc was not found when it was built, and that of the package index needs a driver "
            f"for CUDA {PACKAGED_CUDA // 1000}, not {driver // 1000}.{driver % 1000 // 10}"
        )
    return (
        "nvcc was not found when it was built, neither on PATH nor, by an isolated build, in the "
        "package index"
    )


def can_install(packages: tuple[str, ...]) -> bool:
    """Whether pip, as it is set up here, finds them: a build that asks for what cannot be had
    fails. Other installers cannot be asked; those that got setuptools will get these."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--retries=0"]
        # Inside an isolated build PYTHONPATH hides what is installed, pip too.
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(
            [*command, "--target", folder, *packages],
            env=environment,
            capture_output=True,
            text=True,
        )
    return done.returncode == 0 or "No module named pip" in done.stderr


def packages_wanted() -> list[str]:
    """What an isolated build needs besides pyproject.toml's: NVIDIA's compiler, where kernels are
    wanted (a driver that serves them is there, or FASTATTN_CUDA=1) and no other nvcc is."""
    # Installers ask by running this file in setuptools.build_meta with "egg_info". In any other
    # run, setuptools would fetch setup_requires itself.
    if "setuptools.build_meta" not in sys.modules or sys.argv[-1] != "egg_info":
        return []
    driver = driver_cuda()
    if driver is None and os.environ.get("FASTATTN_CUDA") != "1":
        return []
    if driver is not None and driver < PACKAGED_CUDA:
        return []
    if os.environ.get("FASTATTN_CUDA") == "0" or find_nvcc() or not can_install(PACKAGES):
        return []
    return list(PACKAGES)


def cudart_flags(nvcc: Path) -> list[str]:
    """The static runtime, from where nvcc itself would take it."""
    plan = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
    libraries = re.search(r"^#\$ LIBRARIES=(.*)$", plan, re.M)
    flags = shlex.split(libraries[1] if libraries else "")
    # The package index's nvcc would take it from lib64, and has lib.
    return [*flags, f"-L{nvcc.parent.parent / 'lib'}", "-lcudart_static", "-ldl", "-lrt"]


def chosen_variants() -> list[table.Variant]:
    """Those of all tables, in whose name FASTATTN_VARIANTS is found, where it is set."""
    wanted = os.environ.get("FASTATTN_VARIANTS", "")
    try:
        variants = [v for path in table.tables() for v in table.read(path)]
        chosen = [v for v in variants if re.search(wanted, v.name)]
    except re.error as error:
        raise SystemExit(f"FASTATTN_VARIANTS must be a regular expression: {error}") from None
    except ValueError as error:
        raise SystemExit(error) from None
    if not chosen:
        raise SystemExit(f"FASTATTN_VARIANTS must match some variant's name, got {wanted!r}")
    return chosen


def some_tables(chosen: list[table.Variant]) -> list[str]:
    """What makes the chosen variants the tables that C reads: copies with those alone, in front of
    kernels/ on the path."""
    if not os.environ.get("FASTATTN_VARIANTS"):
        return []
    digest = hashlib.sha256("\n".join(v.line for v in chosen).encode()).hexdigest()[:12]
    folder = OBJECTS / f"variants-{digest}"
    for path in table.tables():
        copy = folder / path.relative_to(KERNELS)
        copy.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(f"{v.line}\n" for v in chosen if v.table == path)
        if not copy.exists() or copy.read_text() != text:
            copy.write_text(text)
    return [f"-I{folder.relative_to(ROOT)}", "-DFA_SOME_VARIANTS"]


def c_jobs(cuda: bool) -> list[Job]:
    import numpy

    compiler = shlex.split(os.environ.get("CC", "cc"))
    flags = shlex.split(C_FLAGS) + ["-DFASTATTN_CUDA"] * cuda
    why = [] if cuda else [f"-DFA_NO_KERNELS={json.dumps(why_no_kernels())}"]
    if os.environ.get("FASTATTN_SANITIZE") == "1":
        flags += shlex.split(SANITIZE_FLAGS)
    python = ["-isystem", sysconfig.get_path("include"), "-isystem", numpy.get_include()]
    if not FREE_THREADED:
        python.append(f"-DPy_LIMITED_API={ABI3}")
    return [
        Job(
            path.stem,
            (
                *compiler,
                *flags,
                *(python if path.parent == BINDING else []),
                *(why if path.stem == "dispatch" else []),
                "-c",
                str(path.relative_to(ROOT)),
            ),
        )
        for path in sorted((ROOT / "csrc").rglob("*.c"))
    ]


def cuda_jobs(nvcc: Path) -> list[Job]:
    """A source with a table beside it is compiled once per variant, any other once: for the
    architecture of its folder, or, in common/, for all of them."""

    def job(name: str, source: Path, *flags: str) -> Job:
        words = str(nvcc), *flags, *shlex.split(NVCC_FLAGS), "-c", str(source.relative_to(ROOT))
        return Job(name, words)

    chosen = chosen_variants()
    jobs = [job(v.name, v.source, *table.gencode(v.architecture), *v.defines()) for v in chosen]
    architectures = sorted({path.parent.name for path in KERNELS.glob("sm*/*.cu")})
    flags = {a: [*some_tables(chosen), *table.gencode(a)] for a in architectures}
    flags["common"] = table.gencode(*architectures)
    for source in sorted(KERNELS.glob("*/*.cu")):
        if not source.with_suffix(".def").exists():
            folder = source.parent.name
            jobs.append(job(f"{folder}_{source.stem}", source, *flags[folder]))
    return jobs


def run_jobs(jobs: list[Job]) -> None:
    OBJECTS.mkdir(parents=True, exist_ok=True)
    # The last take longest, so they come first: else one of them runs alone at the end.
    stale = [job for job in reversed(jobs) if job.stale()]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"fastattn: compiling {len(stale)} of {len(jobs)} objects", file=sys.stderr)
    with ThreadPoolExecutor(int(os.environ.get("FASTATTN_JOBS") or cores or 1)) as pool:
        for job, seconds in zip(stale, pool.map(Job.run, stale), strict=True):
            print(f"fastattn: compiled {job.name}, {seconds:.1f} s", file=sys.stderr)
            if text := job.log.read_text().strip():
                print(text, file=sys.stderr)


def check_kernels(jobs: list[Job]) -> None:
    """The rules of kernels/sass.py: a warning for a user, an error under FASTATTN_STRICT=1."""
    problems = [
        f"{job.name}: {problem}"
        for job in jobs
        for problem in sass.check(job.object.read_bytes(), job.log.read_text())
    ]
    for problem in problems:
        print(f"fastattn: {problem}", file=sys.stderr)
    if problems and os.environ.get("FASTATTN_STRICT") == "1":
        raise SystemExit(f"fastattn: {len(problems)} problems in the kernels, FASTATTN_STRICT=1")


class BuildExtension(build_ext):
    def build_extension(self, extension: Extension) -> None:
        nvcc = find_nvcc()
        if not nvcc:
            print(f"fastattn has no CUDA kernels: {why_no_kernels()}", file=sys.stderr)
        kernels = cuda_jobs(nvcc) if nvcc else []
        jobs = kernels + c_jobs(cuda=bool(kernels))
        run_jobs(jobs)
        check_kernels(kernels)

        command = shlex.split(os.environ.get("CC", "cc")) + shlex.split(LINK_FLAGS)
        if os.environ.get("FASTATTN_SANITIZE") == "1":
            command += shlex.split(SANITIZE_FLAGS)
        command += [str(job.object) for job in jobs]
        if kernels:
            command += cudart_flags(nvcc)
        command += ["-static-libgcc", "-lm", "-ldl"]
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([*command, "-o", str(target)], check=True, cwd=ROOT)


class Wheel(bdist_wheel):
    """One wheel for CPython 3.10 and newer, where there is a stable ABI."""

    def finalize_options(self) -> None:
        if not FREE_THREADED:
            self.py_limited_api = "cp310"
        super().finalize_options()


setup(
    setup_requires=packages_wanted(),
    ext_modules=[Extension("fastattn._C", [], py_limited_api=not FREE_THREADED)],
    cmdclass={"build_ext": BuildExtension, "bdist_wheel": Wheel},
)
