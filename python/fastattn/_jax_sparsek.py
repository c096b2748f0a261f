"""sparsek and sparsek_lists as operations of JAX, with a gradient; see jax.py, whose end this is.

csrc/binding/sparsek.c hands calls of JAX's arrays to take_sparsek() and take_sparsek_lists().
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy

from . import _C
from .jax import Described, _bind, _Call


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gates(call: _Call, *arrays: Any) -> list[Any]:
    """gates, tau and with lists key_lists; scores are the first array."""
    return _bind(call, arrays)


def _forward(call: _Call, *arrays: Any) -> tuple[list[Any], Any]:
    found = _bind(call, arrays)
    return found, (arrays, found[1:])


def _backward(call: _Call, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    arrays, (tau, *lists) = residuals
    more = ("tau", "dgates", *("key_lists" for _ in lists))
    gradient = dataclasses.replace(
        call,
        target="sparsek_backward",
        operands=(*call.operands, *more),
        results=(("dscores", arrays[0].shape, arrays[0].dtype),),
    )
    (dscores,) = _bind(gradient, [*arrays, tau, cotangents[0], *lists])
    return dscores, *(None,) * (len(arrays) - 1)


_gates.defvjp(_forward, _backward)


def _take(
    given: dict[str, Any], options: dict[str, Any], rows: tuple[int, ...], listed: int | None
) -> list[Any]:
    """given: the arrays, some of them None; rows: the shape of tau; listed: the size of lists."""
    arrays = {name: x for name, x in given.items() if x is not None}
    scores = arrays["scores"]
    real = jnp.dtype("float64" if scores.dtype == jnp.float64 else "float32")
    last = scores.shape[-1] if listed is None else listed
    results: list[tuple[str, Any, Any]] = [("gates", (*rows, last), real), ("tau", rows, real)]
    if listed is not None:
        results.append(("key_lists", (*rows, listed), jnp.dtype("int32")))
    call = _Call("sparsek", tuple(arrays), tuple(results), tuple(sorted(options.items())))
    return _gates(call, *arrays.values())


def _is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, numpy.ndarray))


def _described(x: Any) -> Any:
    return Described(x) if _is_array(x) else x


def take_sparsek(scores: Any, k: Any, lengths: Any) -> tuple[Any, Any]:
    """sparsek, given every argument in the order of its signature."""
    scores, lengths = (jnp.asarray(x) if _is_array(x) else x for x in (scores, lengths))
    _C.sparsek(_described(scores), k, _described(lengths))
    given = {"scores": scores, "lengths": lengths}
    gates, tau = _take(given, {"k": float(k)}, scores.shape[:-1], None)
    return gates, tau


def take_sparsek_lists(
    scores: Any,
    k: Any,
    sq: Any,
    window: Any,
    q_offset: Any,
    q_lengths: Any,
    k_lengths: Any,
    k_start: Any,
) -> tuple[Any, Any, Any]:
    """sparsek_lists, likewise."""
    arrays = (scores, q_offset, q_lengths, k_lengths, k_start)
    scores, offset, *lengths = (jnp.asarray(x) if _is_array(x) else x for x in arrays)
    _C.sparsek_lists(
        *(_described(scores), k, sq, window, _described(offset)), *map(_described, lengths)
    )
    options = {"has_lists": 1, "k": float(k), "sq": int(sq), "window": min(int(window), 2**30)}
    if offset is not None and not _is_array(offset):
        options |= {"has_offset": 1, "offset": min(max(int(offset), -(2**30)), 2**30)}
        offset = None
    names = ("scores", "q_offset", "q_lengths", "k_lengths", "k_start")
    given = dict(zip(names, (scores, offset, *lengths), strict=True))
    rows = (*scores.shape[:2], int(sq))
    gates, tau, lists = _take(given, options, rows, max(0, math.ceil(k)))
    return lists, gates, tau
