"""sparsek_attention as an operation of JAX, with a gradient; see jax.py, whose end this is."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from . import _C
from .jax import _NAMES, _bind, _Call, _describe

_RESULTS = ("out", "lse", "tau", "ends")
_GRADIENTS = ("dq", "dk", "dv", "dscores", "dsink")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call: _Call, *arrays: Any) -> list[Any]:
    """out, lse, tau and ends."""
    return _bind(call, arrays)


def _forward(call: _Call, *arrays: Any) -> tuple[list[Any], Any]:
    found = _bind(call, arrays)
    return found, (arrays, found)


def _backward(call: _Call, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    arrays, found = residuals
    of = call.named(arrays)
    wanted = [name for name in ("q", "k", "v", "scores", "sink") if name in of]
    gradient = dataclasses.replace(
        call,
        target="sparsek_attention_backward",
        operands=(*call.operands, *_RESULTS, "dout", "dlse"),
        results=tuple((f"d{name}", of[name].shape, of[name].dtype) for name in wanted),
    )
    gradients = _bind(gradient, [*arrays, *found, *cotangents[:2]])
    by_name = dict(zip(wanted, gradients, strict=True))
    return tuple(by_name.get(name) for name in call.operands)


_attend.defvjp(_forward, _backward)


def call(name: str, values: Sequence[Any]) -> Any:
    """A public function, given every argument in the order of its signature."""
    given = dict(zip(_NAMES[name], values, strict=True))
    is_backward = name.endswith("backward")
    if not is_backward and given["out"] is not None:
        raise TypeError("`out` must be None: JAX arrays are never written")
    described = {key: _describe(key, value) for key, value in given.items()}
    asked = (True, given.get("return_lse"), *(given.get("return_selection"),) * 2)
    if not is_backward:
        described |= {"return_lse": True, "return_selection": True}
    operands, options, results = _C.jax_plan(name, tuple(described.values()))
    one = _Call(
        "sparsek_attention_backward" if is_backward else "sparsek_attention",
        tuple(key for key, _ in operands),
        tuple((key, shape, jnp.dtype(dtype)) for key, shape, dtype in results),
        tuple(sorted(options.items())),
    )
    arrays = [array.array for _, array in operands]
    if is_backward:
        names = (key for key, _, _ in results)
        gradients = dict(zip(names, _bind(one, arrays), strict=True))
        return tuple(gradients.get(key) for key in _GRADIENTS)
    found = [x for x, is_asked in zip(_attend(one, *arrays), asked, strict=True) if is_asked]
    return found[0] if len(found) == 1 else tuple(found)
