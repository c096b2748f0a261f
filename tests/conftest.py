"""What all tests share: the backends present, the frameworks, and skips that say why."""

import gc
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import cases
import pytest

ROOT = Path(__file__).resolve().parent.parent
LEVELS = ("portable", "avx2", "avx512", "avx512_bf16")  # of the CPU backend, the plainest first
EXAMPLES = int(os.environ.get("FASTATTN_TEST_EXAMPLES", "2000"))


def has(module):
    return importlib.util.find_spec(module) is not None


def needs(module):
    """A mark: skips, and says so, where the framework is not installed."""
    return pytest.mark.skipif(not has(module), reason=f"{module} is not installed")


def python(*arguments, timeout=300, **environment):
    """Runs python with our import path, checks that it ends well, returns the output."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "PYTEST_ADDOPTS": "",  # a pytest in there is one process
        **environment,
    }
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, (
        f"exit {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    )
    return done.stdout


def gpu_present(backend="sm90"):
    """Whether it can serve a CUDA tensor of torch here."""
    if not has("torch"):
        return False
    import fastattn
    import torch

    return torch.cuda.is_available() and backend in fastattn.info()["backends"]


PLACES = [  # (framework, backend): where a case runs
    pytest.param((cases.NumPy(), "cpu"), id="cpu-numpy"),
    pytest.param((cases.Torch("cpu"), "cpu"), id="cpu-torch", marks=needs("torch")),
    *(
        pytest.param(
            (cases.Torch("cuda"), gpu), id=f"{gpu}-torch", marks=[pytest.mark.gpu, needs("torch")]
        )
        for gpu in ("sm90", "sm80")
    ),
]


@pytest.fixture(params=PLACES)
def place(request):
    """(framework, backend): where a case runs."""
    backend = request.param[1]
    if backend != "cpu" and not gpu_present(backend):
        pytest.skip(f"no GPU that the {backend} backend serves")
    return request.param


KERNELS = [PLACES[0], *PLACES[2:]]  # for what is the kernel's alone: the CPU's has no framework


@pytest.fixture
def frozen():
    """What was there before is not looked at by gc.collect(), which then takes no time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def calls(monkeypatch):
    """The functions that use_fastattn() called."""
    import fastattn
    from fastattn import _routing

    seen = []

    def counted(function):
        def call(*args, **keywords):
            seen.append(function.__name__)
            return function(*args, **keywords)

        return call

    for function in (fastattn.scaled_dot_product_attention, fastattn.attention_varlen):
        monkeypatch.setattr(_routing, function.__name__, counted(function))
    return seen


@pytest.fixture(scope="session")
def cpu_levels():
    """The levels of instructions that this CPU can run, the plainest first."""
    ask = "import fastattn; print(fastattn.info()['cpu']['level'])"
    return LEVELS[: LEVELS.index(python("-c", ask, FASTATTN_CPU_LEVEL="").strip()) + 1]


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a GPU that a backend of ours serves")
    if has("hypothesis"):
        from hypothesis import HealthCheck, settings

        slow_is_fine = [HealthCheck.too_slow, HealthCheck.data_too_large]
        settings.register_profile(
            "fastattn",
            max_examples=EXAMPLES,
            deadline=None,
            derandomize=True,
            suppress_health_check=slow_is_fine,
        )
        settings.load_profile("fastattn")


def pytest_runtest_teardown(item):
    """Processes that share a GPU do not keep what a large test has taken."""
    torch = sys.modules.get("torch")
    used = item.get_closest_marker("gpu") and torch and torch.cuda.is_initialized()
    if used and torch.cuda.memory_reserved() > 2**32:
        torch.cuda.empty_cache()


def pytest_terminal_summary(terminalreporter):
    if cases.luck.redrawn:
        terminalreporter.write_line(str(cases.luck))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # one of several processes, by pytest-xdist
        session.config.workeroutput["luck"] = cases.luck.judged, cases.luck.redrawn
    elif cases.luck.strained:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    judged, redrawn = getattr(node, "workeroutput", {}).get("luck", (0, 0))
    cases.luck.judged += judged
    cases.luck.redrawn += redrawn


def pytest_report_header():
    import fastattn

    found = fastattn.info()
    return [
        f"fastattn {found['version']}, {', '.join(found['backends'])}, CPU level "
        f"{found['cpu']['level']}, {found['cpu']['threads']} threads: {fastattn.__file__}",
        f"property-based: {EXAMPLES} examples, the same ones each time (derandomized)",
    ]
