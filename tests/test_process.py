"""A good guest in the process: threads, forks, memory, environment."""

import threading

import cases
import pytest
import random_cases
from conftest import needs, python


def test_threads_at_once():
    """Many Python threads call with different shapes; each result has the bits it has alone."""
    jobs = [random_cases.random_case(seed) for seed in range(60)]
    given = [cases.arguments(c, cases.make_inputs(c), cases.NumPy()) for c in jobs]
    calls = [cases.function(case) for case in jobs]
    alone = [[x.tobytes() for x in f(**keywords)] for f, keywords in zip(calls, given, strict=True)]
    wrong = []

    def work(first):
        for n in range(300):
            i = (first * 7 + n) % len(given)
            if [x.tobytes() for x in calls[i](**given[i])] != alone[i]:
                wrong.append(jobs[i])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_gil_is_released():
    """While one thread is in a long call, another one runs Python."""
    said = python(
        "-c",
        """
import sys, threading, time
import numpy as np, fastattn
x = np.ones((1, 8, 2048, 64), np.float32)
outs, lses = [x] * 40, [x[..., 0]] * 40
ticks, seen = 0, []
tiny = x[:, :, :2]
fastattn.merge_states([fastattn.attention(tiny, tiny, tiny)], [tiny[..., 0]])  # imports are done
def work():
    for call in (lambda: fastattn.attention(x, x, x), lambda: fastattn.merge_states(outs, lses)):
        before = ticks
        call()
        seen.append(ticks - before)
sys.setswitchinterval(1000)  # so that nobody runs but where the other gives the GIL away
thread = threading.Thread(target=work)
thread.start()
while thread.is_alive():
    ticks += 1
    time.sleep(0)
print(*seen)
""",
    )
    during = list(map(int, said.split()))
    assert len(during) == 2 and min(during) > 0, during


def test_fork_after_use():
    """The child starts with threads of its own; parent and child both go on computing."""
    said = python(
        "-c",
        """
import os, threading
import numpy as np, fastattn
x = np.random.default_rng(0).standard_normal((1, 4, 700, 32)).astype(np.float32)
want = fastattn.attention(x, x, x)
stop = False
def busy():
    while not stop: fastattn.attention(x[:, :, :90], x, x)
thread = threading.Thread(target=busy)
thread.start()  # so that some forks happen in the middle of a call
children = []
for _ in range(20):
    child = os.fork()
    if child == 0:
        fine = all(np.array_equal(fastattn.attention(x, x, x), want) for _ in range(2))
        threads = len(os.listdir("/proc/self/task"))
        os._exit((0 if fine else 1) + (0 if threads == 3 else 2))
    children.append(child)
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
stop = True
thread.join()
assert codes == [0] * 20, codes
assert np.array_equal(fastattn.attention(x, x, x), want)
print("fine")
""",
        FASTATTN_NUM_THREADS="3",
        timeout=120,
    )
    assert said.strip() == "fine"


@needs("torch")
def test_a_data_loader_that_forks():
    """torch's worker processes, after the parent has used its threads."""
    said = python(
        "-c",
        """
import torch, fastattn
x = torch.randn(1, 4, 300, 32)
want = fastattn.attention(x, x, x)
class Set(torch.utils.data.Dataset):
    def __len__(self): return 6
    def __getitem__(self, n): return torch.equal(fastattn.attention(x, x, x), want)
loader = torch.utils.data.DataLoader(Set(), num_workers=2, multiprocessing_context="fork")
print(all(bool(ok) for batch in loader for ok in batch))
""",
        timeout=120,
    )
    assert said.strip() == "True"


def test_exit_while_a_thread_computes():
    python(
        "-c",
        """
import sys, threading, numpy as np, fastattn
x = np.ones((1, 8, 3000, 64), np.float32)
def forever():
    while True: fastattn.attention(x, x, x)
sys.setswitchinterval(1000)  # start() returns once the thread is in a call
threading.Thread(target=forever, daemon=True).start()
""",
        timeout=60,
    )


MEMORY = """
import resource, numpy as np, fastattn
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
s, d = 65536, 64
q = np.zeros((1, 1, s, d), np.{dtype})
k, v, out = q + 1, q + 1, np.zeros_like(q)
lse = fastattn.attention(q[:, :, :256], k[:, :, :256], v[:, :, :256])
keywords = {keywords}
before = peak()
few = slice(0, 512)  # rows of one length of keys, then the whole: what grows with sq shows too
fastattn.attention(q[:, :, few], k, v, out=out[:, :, few], **keywords)
fastattn.attention(q, k, v, out=out, causal=True, window=(2047, 0), **keywords)
fastattn.attention(q, k[:, :, few], v[:, :, few], out=out, **keywords)
print(peak() - before)
"""


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("keywords", ["{}", "{'mask': np.ones((1, s), bool)}"])
def test_promise_5_memory_at_65536(dtype, keywords):
    """At most 8 MB a thread beyond the outputs at sq = sk = 65,536; O(sq * sk) would be GBs."""
    program = MEMORY.format(dtype=dtype, keywords=keywords)
    if keywords != "{}":
        rows = "k[:, :, few], v[:, :, few], out=out"
        program = program.replace(rows, "k, v, out=out, window=(9, 9)")
    grown = int(python("-c", program, FASTATTN_NUM_THREADS="2", OPENBLAS_NUM_THREADS="1"))
    assert grown <= 2 * 8 * 2**20, f"{grown / 2**20:.1f} MB"


TINY = """
import resource, sys
import numpy as np, fastattn
{make}
def resident():
    with open("/proc/self/statm") as f: return int(f.read().split()[1]) * resource.getpagesize()
def calls(n):
    for _ in range(n): fastattn.attention(q, k, v)
calls(100_000)
before = resident()
calls(900_000)
print(resident() - before)
"""


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_a_million_tiny_calls_leak_nothing(framework):
    """Resident memory grows by less than 1 MB from call 100,000 on."""
    make = "q = k = v = np.ones((1, 1, 2, 4), np.float32)"
    if framework == "torch":
        pytest.importorskip("torch")
        make = "import torch\nq = k = v = torch.ones(1, 1, 2, 4)"
    grown = int(python("-c", TINY.format(make=make), timeout=600))
    assert grown < 2**20, f"{grown} bytes"


def test_refusals_leak_nothing():
    """Each kind of exception 20,000 times, and what comes with a call: out, lse, every option."""
    said = python(
        "-c",
        """
import resource, numpy as np, fastattn
q = k = v = np.ones((1, 1, 2, 4), np.float32)
def resident():
    with open("/proc/self/statm") as f: return int(f.read().split()[1]) * resource.getpagesize()
wrong = [dict(softcap=-1.0), dict(mask=q[0, 0]), dict(mask=q.astype("i4")), dict(window=(-1, 0)),
         dict(out=q), dict(backend="sm90"), dict(layout=3), dict(k=k.tolist()), dict(q=None)]
fine = [dict(return_lse=True), dict(mask=np.ones((2, 2), bool), sink=np.ones(1, np.float32)),
        dict(out=np.ones_like(q)), dict(alibi_slopes=np.ones((1, 1), np.float32), causal=True)]
def calls(n):
    for _ in range(n):
        for keywords in wrong:
            try: fastattn.attention(**{"q": q, "k": k, "v": v, **keywords})
            except (ValueError, TypeError, NotImplementedError): pass
            else: raise AssertionError(keywords)
        for keywords in fine: fastattn.attention(q, k, v, **keywords)
        fastattn.merge_states([q, q], [q[..., 0], q[..., 0]])
        fastattn.explain(fastattn.attention, q, k, v)
        fastattn.info() if _ % 100 == 0 else None
calls(2000)
before = resident()
calls(20_000)
print(resident() - before)
""",
        timeout=600,
    )
    assert int(said) < 2**20, f"{said} bytes"
