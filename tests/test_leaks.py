"""A call that fails on its way leaves nothing behind: at each step in Python, each allocation."""

import contextlib
import gc
import inspect
import itertools
import sys

import fastattn
import numpy as np
import pytest
from conftest import has, python
from fastattn import _frameworks
from handmade import Tensor

F32 = np.float32
SHAPE = (1, 2, 3, 8)


class StepError(Exception):
    pass


def numbers(make=lambda x: x, shape=SHAPE):
    return {name: make(np.ones(shape, F32)) for name in "qkv"}


def drop_in(arguments):
    """The same arguments by the names of scaled_dot_product_attention."""
    renamed = {"q": "query", "k": "key", "v": "value"}
    return {renamed.get(name, name): x for name, x in arguments.items()}


def tensor(x):
    import torch

    return torch.from_numpy(x)


def steps():
    """For each function of fastattn._frameworks: a call that needs it, as (function, arguments)."""
    here = {
        "export": (fastattn.attention, numbers(Tensor)),
        "empty": (fastattn.attention, numbers(Tensor)),
        "never_written": (fastattn.attention, {**numbers(), "out": Tensor(np.ones(SHAPE, F32))}),
        "truth": (fastattn.attention, {**numbers(), "causal": np.bool_(True)}),
        "is_plain_ndarray": (fastattn.attention, numbers(lambda x: x.view(np.ma.MaskedArray))),
    }
    if has("torch"):
        import torch
        from torch.nn.attention.bias import causal_lower_right

        class Other(torch.Tensor):
            pass

        q = numbers(tensor)
        here |= {
            "refusal": (fastattn.attention, {**q, "v": q["v"].as_subclass(Other)}),
            "is_number": (fastattn.attention, {**q, "scale": torch.tensor(0.5)}),
            "is_frozen": (fastattn.attention, {**q, "out": torch.ones(SHAPE)}),
            "mark_written": (fastattn.attention, {**q, "out": torch.ones(SHAPE)}),
            "has_tangent": (fastattn.attention, q),
            "autocast": (fastattn.attention, q),
            "draw_seed": (fastattn.attention, {**q, "dropout_p": 0.5, "return_lse": True}),
            "causal_bias": (
                fastattn.scaled_dot_product_attention,
                {**drop_in(q), "attn_mask": causal_lower_right(3, 3)},
            ),
        }
    if has("jax"):
        import jax

        here["hand_over"] = (fastattn.attention, {**numbers(jax.numpy.asarray), "return_lse": True})
    return here


STEPS = {  # and the framework that it is of
    "export": "numpy",
    "empty": "numpy",
    "never_written": "numpy",
    "truth": "numpy",
    "is_plain_ndarray": "numpy",
    "refusal": "torch",
    "is_number": "torch",
    "is_frozen": "torch",
    "mark_written": "torch",
    "has_tangent": "torch",
    "autocast": "torch",
    "draw_seed": "torch",
    "causal_bias": "torch",
    "hand_over": "jax",
}


@contextlib.contextmanager
def surroundings(step):
    """The mode of torch without which the step is not taken."""
    with contextlib.ExitStack() as stack:
        if step == "has_tangent":
            import torch

            stack.enter_context(torch.autograd.forward_ad.dual_level())
        if step == "autocast":
            import torch

            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        yield


def balance(call, arguments):
    """Neither references to the arguments nor Python's blocks grow with the number of calls."""
    handmade = [x for x in arguments.values() if isinstance(x, Tensor)]

    def counts(times):
        for _ in range(times):
            call()
        for x in handmade:
            assert x.exported == x.deleted, "a capsule is kept"
            x.forget()
        gc.collect()  # a ctypes callback is a cycle
        return sys.getallocatedblocks(), [sys.getrefcount(x) for x in arguments.values()]

    gc.freeze()  # what was there before is not looked at again: a collection takes no time
    counts(100)  # the first ones import and cache
    (first, references), *rest = [counts(100) for _ in range(4)]
    gc.unfreeze()
    assert all(now == references for _, now in rest)
    # Python's own pools fill in some rounds; what leaks grows by 100 in each.
    blocks = [first, *(now for now, _ in rest)]
    assert min(after - before for before, after in itertools.pairwise(blocks)) < 50


@pytest.mark.parametrize("returns", ["raises", "an int", "None", "its own"])
@pytest.mark.parametrize("step", STEPS)
def test_a_step_in_python_that_fails(step, returns, monkeypatch):
    """Where it raises, that exception comes out; nonsense never crashes, and all is given back."""
    if not has(STEPS[step]):
        pytest.skip(f"{STEPS[step]} is not installed")
    function, arguments = steps()[step]
    taken, itself = [], getattr(_frameworks, step)

    def fails(*given):
        taken.append(1)
        if returns == "raises":
            raise StepError
        if returns == "its own":  # a refusal too, or a result
            return itself(*given)
        return 17 if returns == "an int" else None

    monkeypatch.setattr(_frameworks, step, fails)

    expected = (
        StepError
        if returns == "raises"
        else (TypeError, ValueError, SystemError, AssertionError, NotImplementedError)
    )

    def call():
        try:
            with surroundings(step):
                function(**arguments)
        except expected:
            return
        assert returns != "raises", "the exception is lost"

    balance(call, arguments)
    assert taken, "the call does not need it"


def test_every_function_of_frameworks_is_a_step():
    functions = inspect.getmembers(_frameworks, inspect.isfunction)
    called = {n for n, f in functions if n[0] != "_" and f.__module__ == _frameworks.__name__}
    assert called == {*STEPS, "loaded", "is_fake"}  # that one is called in Python alone


NO_MEMORY = """
import gc, sys
import _testcapi, numpy as np, fastattn
{prepare}
def counts():
    gc.collect()
    return [sys.getrefcount(x) for x in arrays]
for _ in range(3):
    call()
before, failed = counts(), 0
for n in range(1, 100):
    _testcapi.set_nomemory(n, n + 1)
    try:
        call()
    except MemoryError:
        failed += 1
    finally:
        _testcapi.remove_mem_hooks()
    assert counts() == before, n
assert failed
call()
print(failed)
"""
CALLS = {
    "served": """
arrays = [np.ones((1, 2, 3, 8), np.float32) for _ in range(4)]
q, k, v, out = arrays
def call():
    fastattn.attention(q, k, v, causal=True, mask=np.ones((3, 3), bool), return_lse=True)
    fastattn.attention(q, k, v, out=out)
    fastattn.merge_states((q, k), (q[..., 0], k[..., 0]))
    gates, tau = fastattn.sparsek(q, 2.5)
    lists, gates, tau = fastattn.sparsek_lists(q[0], 2.5, sq=3, q_offset=0)
    fastattn._C.sparsek_lists_backward(tau, gates, lists, q[0], 2.5, 3, 0, 0, None, None, None)
""",
    "refused": """
arrays = [np.ones((1, 2, 3, 8), np.float32) for _ in range(3)]
q, k, v = arrays
def call():
    for wrong in ({"window": 7}, {"softcap": "x"}, {"seed": 2**70, "dropout_p": 0.5}, {"v": None}):
        try:
            fastattn.attention(**{"q": q, "k": k, "v": v, **wrong})
        except (TypeError, ValueError):
            pass
""",
}


@pytest.mark.parametrize("kind", CALLS)
def test_every_allocation_of_pythons_fails_once(kind):
    """One after the other: a MemoryError, or a call that did without. (torch ends the process.)"""
    pytest.importorskip("_testcapi")
    assert int(python("-c", NO_MEMORY.format(prepare=CALLS[kind]))) > 3
