"""What a user gets: source distribution, wheel, `python -m fastattn`."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import fastattn
import numpy as np
import pytest
from conftest import ROOT, gpu_present, python

# From the sources only: an installed package brings no setup.py.
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="no source tree")


def sources():
    """Every file of ROOT that is no product: as git tells, where it is a clone."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return [name for name in done.stdout.split("\0") if (ROOT / name).is_file()]
    product = r"(^|/)(build|dist|__pycache__|[^/]+\.egg-info|\.\w+_cache|\.hypothesis)/|\.so$"
    names = (path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*") if path.is_file())
    return [name for name in names if not re.search(product, name)]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The names in an sdist, and in the wheel (without CUDA) that this very sdist gives."""
    if not shutil.which("cc"):
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("package")
    tree = folder / "tree"
    for name in sources():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    run = "import setuptools.build_meta as b, sys; getattr(b, sys.argv[1])(sys.argv[2])"
    quick = folder / "cc"  # how fast the module is, is not looked at
    quick.write_text(f'#!/bin/sh\nexec {shutil.which("cc")} "$@" -O0\n')
    quick.chmod(0o755)
    environment = {**os.environ, "FASTATTN_CUDA": "0", "CC": str(quick)}

    def build(what, where):
        command = [sys.executable, "-c", run, what, folder]
        done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    build("build_sdist", tree)
    archive = next(folder.glob("*.tar.gz"))
    with tarfile.open(archive) as tar:
        members = [m for m in tar.getmembers() if m.isfile()]
        sdist = {m.name.partition("/")[2] for m in members}
        tar.extraction_filter = getattr(tarfile, "data_filter", None)  # not before 3.11.4
        tar.extractall(folder / "unpacked")
    build("build_wheel", next((folder / "unpacked").iterdir()))
    wheel = next(folder.glob("*.whl"))
    return sdist, wheel


def test_the_sdist_has_all_that_a_build_and_its_tests_need(built):
    sdist, _ = built
    wanted = set(sources())
    assert {"setup.py", "benchmarks/report.py", ".ci/run", ".github/CONTRIBUTING.md"} <= wanted
    assert wanted <= sdist, wanted - sdist
    assert not [n for n in sdist if n.endswith((".so", ".o", ".pyc"))]


def test_promise_1_the_wheel_is_the_package_and_nothing_else(built):
    _, wheel = built
    assert re.fullmatch(r"fastattn-[\d.]+-cp310-abi3-\w+\.whl", wheel.name)
    assert wheel.stat().st_size < 20 * 2**20
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
        metadata = next(n for n in archive.namelist() if n.endswith("/METADATA"))
        text = archive.read(metadata).decode()
    package = ROOT / "python"
    python_files = {p.relative_to(package).as_posix() for p in package.rglob("*.py")}
    python_files |= {f"fastattn/{p.name}" for p in package.rglob("*.pyi")}
    assert names == python_files | {"fastattn/_C.abi3.so", "fastattn/py.typed"}
    requires = [line for line in text.splitlines() if line.startswith("Requires-Dist")]
    assert [r for r in requires if "extra ==" not in r] == ["Requires-Dist: numpy>=1.23"]
    assert f"Version: {fastattn.__version__}" in text and "BSD-3-Clause" in text
    assert "Classifier: Development Status ::" in text and "GPU :: NVIDIA CUDA" in text


def test_promise_1_the_wheel_imports_with_nothing_beside_it(built, tmp_path):
    """Unpacked into an empty place, in isolated mode: no NumPy, no torch, no site-packages."""
    _, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import fastattn; print(fastattn.info()['backends'], fastattn.info()['cuda'])\n"
        "assert not [name for name in sys.modules if name.startswith('fastattn.bench')]"
    )
    said = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=True
    )
    assert said.stdout.strip() == "['cpu'] None"


def test_the_first_command():
    """`python -m fastattn` finds, computes, compares and says so."""
    said = python("-m", "fastattn", timeout=300)
    assert fastattn.__version__ in said and fastattn.info()["cpu"]["level"] in said
    kernel = fastattn.explain(fastattn.attention, *[np.ones((1, 1, 2, 4), np.float32)] * 3).kernel
    assert ("sm90" if gpu_present() else kernel.rpartition("_")[0]) in said
    assert re.search(r"fastattn\s+\d", said) and "error" in said


def test_the_first_command_with_numpy_alone():
    """Where torch, JAX and the rest are not installed."""
    hidden = ("torch", "jax", "cupy", "matplotlib", "tqdm", "ml_dtypes", "flash_attn")
    said = python(
        "-c",
        f"import sys\nfor name in {hidden!r}: sys.modules[name] = None\n"
        "import runpy\nsys.argv = ['fastattn']\n"
        "try: runpy.run_module('fastattn', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n",
    )
    assert "A first attention" in said


def test_versions_agree():
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert fastattn.__version__ == re.search(r"^## (\S+)", changes, re.MULTILINE)[1]
