"""How many threads the CPU backend uses: what the program, the environment, the container say."""

import os
import shutil
import subprocess
from pathlib import Path

import fastattn
import numpy as np
import pytest
from conftest import ROOT, python


def cores():
    """What this process gets where nobody says anything, read anew."""
    most = len(os.sched_getaffinity(0))
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    groups = [line[4:] for line in lines if line.startswith("0::/")]
    folder = Path("/sys/fs/cgroup", *groups)
    for each in (folder, *folder.parents):
        limit = each / "cpu.max"
        if groups and limit.is_file() and not (text := limit.read_text()).startswith("max"):
            quota, period = map(int, text.split())
            most = min(most, -(-quota // period))
    return most


COUNT = """
import os, numpy as np, fastattn
x = np.ones((1, 8, 600, 64), np.float32)
before = len(os.listdir("/proc/self/task"))
for _ in range(5): fastattn.attention(x, x, x)
print(fastattn.get_num_threads(), fastattn.info()["cpu"]["threads"],
      len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.parametrize(
    "ours, openmp, threads",
    [
        ("1", "", 1),
        ("3", "", 3),
        (" 3 ", "2", 3),
        ("", "", None),
        ("", "3", 3),
        ("", "3,2,1", 3),
        ("", " 3 , 2", 3),
        ("", "none", None),
        ("", "0", None),
        ("", "-3", None),
        ("1", "3", 1),
    ],
)
def test_the_environment(ours, openmp, threads):
    """FASTATTN_NUM_THREADS, OMP_NUM_THREADS, else the cores; and as many run, no more."""
    environment = {"FASTATTN_NUM_THREADS": ours, "OMP_NUM_THREADS": openmp}
    said = python("-W", "error", "-c", COUNT, OPENBLAS_NUM_THREADS="1", **environment)
    number, informed, started = (int(n) for n in said.split())
    assert number == informed == (threads or cores())
    assert started == number - 1


@pytest.mark.parametrize("bad", ["abc", "1.5", "0", "-2", "3x", "3,2", "1025", "9" * 30, " "])
def test_a_bad_value_is_warned_of_once(bad):
    program = """
import warnings, numpy as np, fastattn
x = np.ones((1, 1, 2, 4), np.float32)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(3):
        fastattn.attention(x, x, x)
        fastattn.get_num_threads()
print(*(f"{w.category.__name__}: {w.message}" for w in seen), sep="\\n")
"""
    for openmp in ("", "3"):
        said = python("-c", program, FASTATTN_NUM_THREADS=bad, OMP_NUM_THREADS=openmp)
        assert said.strip() == (
            "RuntimeWarning: FASTATTN_NUM_THREADS must be a number from 1 to 1024, "
            f'got "{bad}": the number used is {openmp or cores()}'
        )


def test_a_warning_that_is_an_error_writes_nothing():
    program = """
import numpy as np, fastattn
x, out = np.ones((1, 1, 2, 4), np.float32), np.zeros((1, 1, 2, 4), np.float32)
try: fastattn.attention(x, x, x, out=out)
except RuntimeWarning as warning: print(out.sum(), warning)
fastattn.attention(x, x, x, out=out)  # it was said
print(out.sum())
"""
    said = python("-W", "error", "-c", program, FASTATTN_NUM_THREADS="many").splitlines()
    assert said[0].startswith("0.0 FASTATTN_NUM_THREADS must be") and said[1] == "8.0"


def test_the_affinity_of_the_process_counts():
    said = python(
        "-c",
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "import fastattn; print(fastattn.get_num_threads())",
        FASTATTN_NUM_THREADS="",
        OMP_NUM_THREADS="",
    )
    assert said.strip() == "1"


# ---------------------------------------------------------------------------------- set_num_threads


@pytest.fixture
def restored():
    yield
    fastattn.set_num_threads(None)


def test_set_num_threads(restored):
    default = fastattn.get_num_threads()
    x = np.random.default_rng(0).standard_normal((1, 4, 300, 32)).astype(np.float32)
    want = fastattn.attention(x, x, x)
    for n in (1, 5, np.int64(2), 1024, 3):
        assert fastattn.set_num_threads(n) is None
        assert fastattn.get_num_threads() == fastattn.info()["cpu"]["threads"] == n
        if n < 1024:
            assert np.array_equal(fastattn.attention(x, x, x), want)
    fastattn.set_num_threads(None)
    assert fastattn.get_num_threads() == default


def test_set_num_threads_outranks_the_environment():
    """Before the first call and after it; threads that run sleep where fewer are wanted."""
    program = COUNT.replace("before =", "fastattn.set_num_threads(4); before =")
    said = python("-c", program, FASTATTN_NUM_THREADS="2", OPENBLAS_NUM_THREADS="1")
    assert said.split() == ["4", "4", "3"]
    program = """
import os, numpy as np, fastattn
x = np.ones((1, 8, 600, 64), np.float32)
fastattn.attention(x, x, x)
count = lambda: [int(open(f"/proc/self/task/{t}/stat").read().rsplit(")")[1].split()[11])
                 for t in sorted(os.listdir("/proc/self/task")) if int(t) != os.getpid()]
fastattn.set_num_threads(1)
before = count()
for _ in range(30): fastattn.attention(x, x, x)
print(len(before), sum(count()) - sum(before))
"""
    said = python("-c", program, FASTATTN_NUM_THREADS="3", OPENBLAS_NUM_THREADS="1")
    assert said.split() == ["2", "0"]  # the others' clocks stand still


@pytest.mark.parametrize(
    "n, exception",
    [
        (0, ValueError),
        (-1, ValueError),
        (1025, ValueError),
        (2**70, ValueError),
        (True, TypeError),
        (1.0, TypeError),
        ("2", TypeError),
    ],
)
def test_numbers_that_are_none(n, exception):
    before = fastattn.get_num_threads()
    with pytest.raises(exception, match="`n` must be an int from 1 to 1024 or None, got"):
        fastattn.set_num_threads(n)
    assert fastattn.get_num_threads() == before


# --------------------------------------------------------------------------------------- containers

DRIVER = """
#define _GNU_SOURCE
#include "cpu/threads.h"
int main(int count, char **words) {
    if (count == 3) printf("%ld", fa_cgroup_cpus(words[1], words[2]));
    return fa_default_threads(0, (char[160]){0}, 160) < 1;
}
"""


@pytest.fixture(scope="module")
def granted(tmp_path_factory):
    """granted(group, {folder: text of cpu.max}): the CPUs that a container gets, 0 for all."""
    if not shutil.which("cc"):
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("groups")
    (folder / "x.c").write_text(DRIVER)
    command = ["cc", "-std=c11", "-Wall", "-Wextra", "-Werror", f"-I{ROOT}/csrc", "x.c", "-o", "x"]
    subprocess.run(command, cwd=folder, check=True)

    def granted(group, limits):
        root = folder / "root"
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        (folder / "self").write_text(f"4:memory:/elsewhere\n1:cpu:/old\n0::{group}\n")
        for name, text in limits.items():
            (root / name).mkdir(parents=True, exist_ok=True)
            (root / name / "cpu.max").write_text(text + "\n")
        command = [folder / "x", folder / "self", root]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    return granted


@pytest.mark.parametrize(
    "group, limits, cpus",
    [
        ("/", {}, 0),
        ("/", {"": "max 100000"}, 0),
        ("/", {"": "200000 100000"}, 2),
        ("/", {"": "150000 100000"}, 2),  # what is granted in part counts as one
        ("/", {"": "1000 100000"}, 1),
        ("/a/b", {"a/b": "300000 100000"}, 3),
        ("/a/b", {"a": "300000 100000", "a/b": "max 100000"}, 3),
        ("/a/b", {"a": "300000 100000", "a/b": "800000 100000"}, 3),
        ("/a/b", {"a": "800000 100000", "a/b": "300000 100000"}, 3),
        ("/not/seen/here", {"": "200000 100000"}, 2),
        ("/a", {"a": "nonsense"}, 0),
        ("/a", {"a": "0 0"}, 0),
        ("/a", {"a": "-5 100000"}, 0),
        ("/a", {"a": ""}, 0),
        ("/" + "x" * 3000, {"": "200000 100000"}, 2),  # too long a name: those around it
    ],
)
def test_the_limit_of_a_container(granted, group, limits, cpus):
    assert granted(group, limits) == cpus
