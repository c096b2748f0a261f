"""Calls with a gradient leave nothing behind: the calls of growth.py, which makes any number."""

import ctypes

import growth
from conftest import needs, python


@needs("torch")
def test_calls_with_a_gradient():
    assert "7000 calls" in python(growth.__file__, 7000)


def test_what_leaks_is_seen():
    kept, c = [], ctypes.CDLL(None)
    c.malloc.restype = ctypes.c_void_p
    assert growth.growth(lambda: kept.append(object()), 1000)[1] >= 0.9
    # Of the whole process: what other threads free meanwhile has been seen to take 3 of the 40.
    assert growth.growth(lambda: c.malloc(40), 1000)[0] >= growth.LEAST
    assert max(growth.growth(lambda: c.free(ctypes.c_void_p(c.malloc(40))), 1000)) < 0.05
