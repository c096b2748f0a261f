"""The backward pass from many threads and after a fork, on torch's threads and on our own."""

import pytest
from conftest import has, python

THREE = {"FASTATTN_NUM_THREADS": "3", "OMP_NUM_THREADS": "3", "OPENBLAS_NUM_THREADS": "1"}
WHERE = ["numpy", pytest.param("torch", marks=pytest.mark.skipif(not has("torch"), reason="none"))]

START = """
import hashlib, os, threading
import numpy as np, fastattn
{load}
rng = np.random.default_rng(0)
q, dout = (rng.standard_normal((1, 4, 300, 32)).astype(np.float32) for _ in range(2))
k, v = (rng.standard_normal((1, 2, 300, 32)).astype(np.float32) for _ in range(2))
def bits():
    out, lse = fastattn.attention(q, k, v, causal=True, return_lse=True)
    found = fastattn.attention_backward(dout, q, k, v, out, lse, causal=True)
    return hashlib.sha256(b"".join(x.tobytes() for x in found[:3])).digest()
want = bits()
"""
LOAD = {"numpy": "", "torch": "import torch; a = torch.randn(500, 500); a @ a"}


def run(where, program):
    return python("-c", START.format(load=LOAD[where]) + program, timeout=60, **THREE).split()


@pytest.mark.parametrize("where", WHERE)
def test_many_threads_at_once(where):
    program = """
fine = []
def work():
    for _ in range(20): fine.append(bits() == want)
workers = [threading.Thread(target=work) for _ in range(4)]
for w in workers: w.start()
for w in workers: w.join()
print(len(fine), all(fine))
"""
    assert run(where, program) == ["80", "True"]


@pytest.mark.parametrize("where", WHERE)
def test_after_a_fork(where):
    """In the child, in a thread of the child, and in the parent after it."""
    program = """
def in_child():
    fine = [bits() == want]
    worker = threading.Thread(target=lambda: fine.append(bits() == want))
    worker.start(); worker.join()
    return fine == [True, True]
child = os.fork()
if child == 0:
    os._exit(0 if in_child() else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), bits() == want)
"""
    assert run(where, program) == ["0", "True"]


@pytest.mark.parametrize("where", WHERE)
def test_a_fork_beside_threads_that_compute(where):
    """At any moment of other threads' calls."""
    program = """
done = []
def work():
    while not done: bits()
worker = threading.Thread(target=work)
worker.start()
codes = []
for _ in range(5):
    child = os.fork()
    if child == 0:
        os._exit(0 if bits() == want else 1)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
done.append(1); worker.join()
print(codes == [0] * 5, bits() == want)
"""
    assert run(where, program) == ["True", "True"]
