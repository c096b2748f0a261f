"""Refusals of where arrays lie, and of what is not there: shared memory, devices, functions."""

import fastattn
import handmade
import numpy as np
import pytest
from conftest import has
from handmade import ones
from test_errors import F32, a, call


@pytest.mark.parametrize("name", ["q", "k", "v", "mask", "sink"])
def test_out_that_overlaps_an_input(name):
    arrays = {
        "q": a(2, 4, 5, 8),
        "k": a(2, 4, 5, 8),
        "v": a(2, 4, 5, 8),
        "mask": a(2, 4, 5, 5),
        "sink": a(4),
    }
    memory = np.ones(2000, F32)
    size = arrays[name].size
    arrays[name] = memory[100 : 100 + size].reshape(arrays[name].shape)
    for first in (100, 100 + size - 1):
        out = memory[first : first + 320].reshape(2, 4, 5, 8)
        with pytest.raises(ValueError, match=f"`out` must not overlap `{name}` in memory"):
            fastattn.attention(**arrays, out=out)
        assert (memory == 1).all()
    out = memory[100 + size : 100 + size + 320].reshape(2, 4, 5, 8)  # just behind it is fine
    fastattn.attention(**arrays, out=out)


def test_numpy_out_that_is_read_only():
    out = np.zeros((2, 4, 5, 8), F32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="`out` must be writeable, got a read-only array"):
        call(out=out)


def test_promise_3_a_gpu_that_no_kernel_serves():
    """Arrays that say they are on a GPU where there is none: refused before any launch."""
    if has("torch"):
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
    arrays = [ones(1, 2, 5, 64, dtype=np.float16, device=(handmade.CUDA, 0)) for _ in range(3)]
    with pytest.raises(NotImplementedError, match=r"no backend takes this call: .*cpu: "):
        fastattn.attention(*arrays)
    for x in arrays:
        assert x.exported == x.deleted == 1
        assert x.asked[0]["stream"] == 1  # an unknown producer orders its work before this stream


def test_cpu_arrays_for_a_gpu_backend():
    for backend in ("sm90", "sm80"):
        with pytest.raises(NotImplementedError, match=backend):
            call(backend=backend)


def test_arguments_must_be_named():
    with pytest.raises(TypeError):
        fastattn.attention(a(1, 1, 2, 8), a(1, 1, 2, 8), a(1, 1, 2, 8), True)
    with pytest.raises(TypeError):
        call(casual=True)
