"""attention_kvcache of arrays that JAX traces, or has on a GPU: keys in a cache are read, none are
written.

Entries and pages are gathered, then it is attention, or attention_varlen where queries are packed.
"""

import inspect
from typing import Any

import jax.numpy as jnp
import numpy

from . import _C, _attention
from ._renaming import renaming

_NAMES = tuple(inspect.signature(_attention.attention_kvcache).parameters)
_THEIRS = {
    **{"k": "k_cache", "v": "v_cache", "k_lengths": "cache_seqlens", "k_start": "cache_leftpad"},
    "seqused_k": "cache_seqlens",
}
_PASSED = ("causal", "window", "softcap", "alibi_slopes", "sink", "scale", "batch_invariant")


def _outline(value: Any) -> Any:
    """Zeros of an array's shape and dtype, which take no memory, for the checks in C."""
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        return value
    return numpy.broadcast_to(numpy.zeros((), value.dtype), value.shape)


def _check(given: dict[str, Any]) -> None:
    for name in ("k", "v"):
        if given[name] is not None:
            raise TypeError(
                f"`{name}` must be None in JAX, whose arrays are never written: "
                "jax.lax.dynamic_update_slice puts new keys into a cache before the call"
            )
    if given["out"] is not None:
        raise TypeError("`out` must be None: JAX arrays are never written")
    for name, value in given.items():
        if not all(isinstance(n, int) for n in getattr(value, "shape", ())):
            raise NotImplementedError(
                f"`{name}` must have a known shape, got {value.shape}: symbolic ones are not served"
            )
    outlines = {name: _outline(value) for name, value in given.items()}
    _C.explain("attention_kvcache", **outlines | {"backend": None})
    if given["return_mass"]:
        raise NotImplementedError("`return_mass` must be False in JAX's programs")
    if given["cu_seqlens_q"] is not None and given["cache_leftpad"] is not None:
        raise NotImplementedError(
            "`cache_leftpad` must be None with `cu_seqlens_q` in JAX's programs"
        )


def _gathered(cache: Any, given: dict[str, Any]) -> Any:
    """Of each sequence, (b, s, hk, d) or (b, hk, s, d); numbers of no page count as the nearest."""
    table, entries = given["page_table"], given["cache_batch_idx"]
    if table is None and entries is None:
        return cache
    if cache.shape[0] == 0:
        return jnp.zeros((given["q"].shape[0], *cache.shape[1:]), cache.dtype)
    found = jnp.take(cache, entries if table is None else table, axis=0, mode="clip")
    if table is None:
        return found
    axis = 1 if given["layout"] == "bshd" else 2
    found = jnp.moveaxis(found, 1, axis)  # pages beside their keys
    shape = found.shape
    return found.reshape(*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])


def attend(values: Any) -> Any:
    """The call, given every argument in the order of its signature."""
    given = dict(zip(_NAMES, values, strict=True))
    _check(given)
    ends, layout = given["cu_seqlens_q"], given["layout"]
    q, k_cache, v_cache = (jnp.asarray(given[x]) for x in ("q", "k_cache", "v_cache"))
    b = q.shape[0] if ends is None else ends.shape[0] - 1
    lengths = given["cache_seqlens"]
    if not hasattr(lengths, "shape"):
        lengths = jnp.full((b,), lengths, jnp.int32)
    k, v = (_gathered(x, given) for x in (k_cache, v_cache))
    options = {name: given[name] for name in (*_PASSED, "backend", "return_lse")}
    if ends is None:
        return renaming(_attention.attention, _THEIRS)(
            *(q, k, v), **options, layout=layout, k_lengths=lengths, k_start=given["cache_leftpad"]
        )
    if layout == "bhsd":
        k, v = (x.swapaxes(1, 2) for x in (k, v))
    room = k.shape[1]
    starts = room * jnp.arange(b + 1, dtype=jnp.int32)
    longest = q.shape[0] if given["max_seqlen_q"] is None else given["max_seqlen_q"]
    packed = (x.reshape(b * room, *x.shape[2:]) for x in (k, v))
    return renaming(_attention.attention_varlen, _THEIRS)(
        *(q, *packed, ends, starts, longest, room), **options, seqused_k=lengths
    )
