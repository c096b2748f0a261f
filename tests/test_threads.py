"""Whose threads compute: those of torch's OpenMP runtime where torch is, else our own."""

import os
import shutil
import subprocess

import pytest
from conftest import needs, python

pytestmark = needs("torch")
TWO = {"FASTATTN_NUM_THREADS": "2", "OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "1"}
START = """
import os, threading, torch, fastattn
x = torch.randn(1, 4, 700, 32, generator=torch.Generator().manual_seed(0))
def call(): return fastattn.attention(x, x, x, causal=True)
def same(want): return torch.equal(call(), want)
def torchs_own(): return (torch.randn(1000, 1000) @ torch.randn(1000, 1000)).relu()
def threads(): return len(os.listdir("/proc/self/task"))
"""


def run(program, **environment):
    return python("-c", START + program, timeout=60, **{**TWO, **environment}).split()


def test_torchs_threads_are_used():
    """After an operator of torch a call starts no thread; before any, it starts torch's own."""
    assert run("torchs_own(); n = threads(); call(); print(threads() - n)") == ["0"]
    assert run("call(); n = threads(); torchs_own(); print(threads() - n)") == ["0"]


def test_torch_may_come_later():
    """Our own threads serve until torch is loaded; the bits stay."""
    program = """
import os, numpy as np, fastattn
x = np.random.default_rng(0).standard_normal((1, 4, 700, 32)).astype(np.float32)
def threads(): return len(os.listdir("/proc/self/task"))
alone = threads(); want = fastattn.attention(x, x, x); ours = threads() - alone
import torch
a = torch.randn(1000, 1000); a @ a
n = threads()
print(ours, np.array_equal(fastattn.attention(x, x, x), want), threads() - n)
"""
    assert python("-c", program, **TWO).split() == ["1", "True", "0"]


@pytest.mark.parametrize("binds", ["OMP_PROC_BIND", "GOMP_CPU_AFFINITY"])
def test_a_runtime_that_binds_its_threads(binds):
    """The caller is bound to one core then; its team has the others, and we use as many."""
    program = "n = fastattn.get_num_threads(); fastattn.set_num_threads(7); "
    program += "fastattn.set_num_threads(None); "
    program += "print(n, fastattn.get_num_threads(), torch.get_num_threads())"
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    bound = {binds: "true" if binds == "OMP_PROC_BIND" else cores}
    none = {"FASTATTN_NUM_THREADS": "", "OMP_NUM_THREADS": ""}
    free = int(run(program, **none)[0])
    first, again, team = map(int, run(program, **none, **bound))
    assert first == again >= min(free, team)
    assert run(program, **bound, FASTATTN_NUM_THREADS="1")[:2] == ["1", "1"]


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_any_number_of_threads_gives_the_same_bits(threads):
    """More threads than torch's team come from our own pool; of a larger team some stand by."""
    program = "want = call(); torch.set_num_threads(1); a = same(want)\n"
    program += "torch.set_num_threads(4); print(a, same(want), float(want.double().sum()))"
    one = run(program, FASTATTN_NUM_THREADS="1")
    assert run(program, FASTATTN_NUM_THREADS=str(threads)) == one
    assert one[:2] == ["True", "True"]


def test_a_team_that_torch_keeps():
    """A call on fewer threads than torch's team has does not end the others."""
    program = """
torch.set_num_threads(4); torchs_own(); before = set(os.listdir("/proc/self/task"))
for _ in range(5): call(); torchs_own()
print(set(os.listdir("/proc/self/task")) == before)
"""
    assert run(program) == ["True"]


@pytest.mark.parametrize("used", ["torchs_own()", "torchs_own(); call()", "call()", "pass"])
def test_a_fork_after_torch_has_used_its_threads(used):
    """The runtime's threads do not live in the child, where torch itself would wait for them; so
    NumPy compares."""
    program = f"""
{used}
child = os.fork()
if child == 0:
    results = [call().numpy().tobytes() for _ in range(3)]
    os._exit(0 if len(set(results)) == 1 and threads() == 2 else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), bool(call().isfinite().all()))
"""
    assert run(program) == ["0", "True"]


def test_the_package_is_loaded_in_a_fork():
    """So it did not see the fork, nor torch's threads before it."""
    program = """
import os, torch
x = torch.ones(1, 4, 700, 32)
a = torch.randn(1000, 1000); a @ a
child = os.fork()
if child == 0:
    import fastattn
    ok = all((fastattn.attention(x, x, x).numpy() == 1).all() for _ in range(3))
    os._exit(0 if ok else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert python("-c", program, timeout=60, **TWO).split() == ["0"]


def test_inside_a_parallel_region():
    """A call from a thread of a team stays on that thread."""
    program = """
import ctypes
want = call(); torchs_own(); before = threads()
openmp = ctypes.CDLL(torch.__path__[0] + "/lib/libtorch_cpu.so")
fine = []
body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: fine.append(same(want)))
openmp.omp_set_max_active_levels(4)
openmp.GOMP_parallel(body, None, 2, 0)
print(len(fine), all(fine), threads() - before)
"""
    assert run(program) == ["2", "True", "0"]


def test_many_python_threads():
    """Each may have a team of torch's; one job at a time has threads, and all bits are the same."""
    program = """
want, fine = call(), []
def work():
    for _ in range(30): fine.append(same(want)); torchs_own()
workers = [threading.Thread(target=work) for _ in range(4)]
for w in workers: w.start()
for w in workers: w.join()
print(len(fine), all(fine))
"""
    assert run(program) == ["120", "True"]


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_a_preloaded_runtime_is_torchs(tmp_path):
    """LD_PRELOAD gives torch another runtime: then it is that one which has to be used."""
    (tmp_path / "count.c").write_text(
        """
        #define _GNU_SOURCE
        #include <dlfcn.h>
        int count;
        void GOMP_parallel(void (*work)(void *), void *context, unsigned n, unsigned flags) {
            void (*next)(void (*)(void *), void *, unsigned, unsigned);
            *(void **)&next = dlsym(RTLD_NEXT, "GOMP_parallel");
            count++;
            next(work, context, n, flags);
        }
        """
    )
    library = tmp_path / "libcount.so"
    command = ["cc", "-shared", "-fPIC", "-o", library, tmp_path / "count.c", "-ldl"]
    subprocess.run(command, check=True)
    program = "import ctypes; count = ctypes.c_int.in_dll(ctypes.CDLL(None), 'count')\n"
    program += "n = count.value; call(); print(count.value - n)"
    preload = os.pathsep.join(filter(None, [str(library), os.environ.get("LD_PRELOAD")]))
    assert run(program, LD_PRELOAD=preload) == ["1"]
