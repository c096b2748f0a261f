"""attention_kvcache as operators of torch, for graphs; an eager call does not pass here.

There are two, because a schema says once for all what a call writes: attention_kvcache reads the
caches, attention_kvcache_ writes new keys and values into them first.
"""

import inspect
from typing import Any

import torch

from ._attention import attention_kvcache
from ._operators import Untraced, define, flat, lse_dtype, whole

_NAMES = tuple(inspect.signature(attention_kvcache).parameters)
_KINDS = {  # of the arguments, in order; lse there always is, and out is new
    **dict.fromkeys(("q", "k_cache", "v_cache"), "Tensor"),
    "cache_seqlens": "Tensor?",
    "length": "SymInt?",  # cache_seqlens, an int
    **dict.fromkeys(("k", "v", "page_table", "cache_batch_idx", "cache_leftpad"), "Tensor?"),
    "cu_seqlens_q": "Tensor?",
    "max_seqlen_q": "SymInt?",
    **dict.fromkeys(("rotary_cos", "rotary_sin"), "Tensor?"),
    "rotary_interleaved": "bool",
    **dict.fromkeys(("k_scale", "v_scale"), "Tensor?"),
    "causal": "str",
    "num_splits": "SymInt",
    "layout": "str",
    "return_mass": "bool",
    **dict.fromkeys(("left", "right"), "SymInt?"),
    "softcap": "float",
    **dict.fromkeys(("alibi_slopes", "sink"), "Tensor?"),
    "scale": "float?",
    "batch_invariant": "bool",
    "backend": "str?",
}


def _schema(name: str, **written: str) -> str:
    kinds = _KINDS | written
    arguments = ", ".join(f"{kind} {n}" for n, kind in kinds.items())
    return f"{name}({arguments}) -> (Tensor out, Tensor lse, Tensor mass)"


def _compute(*values: Any) -> Any:
    given = whole(dict(zip(_KINDS, values, strict=True)))
    with Untraced():
        out, lse, *mass = attention_kvcache(**given, return_lse=True)
    return (out, lse, *(mass or [out.new_empty(0)]))


def _fake(*values: Any) -> Any:
    given = dict(zip(_KINDS, values, strict=True))
    q, cache, table = given["q"], given["k_cache"], given["page_table"]
    rows, heads = (1, 2) if given["layout"] == "bshd" else (2, 1)
    room = cache.shape[rows] * (1 if table is None else table.shape[1])
    if (ends := given["cu_seqlens_q"]) is None:
        b, lse_shape = q.shape[0], [q.shape[0], q.shape[heads], q.shape[rows]]
    else:
        b, lse_shape = ends.shape[0] - 1, [q.shape[1], q.shape[0]]
    out = q.new_empty([*q.shape[:-1], given["v_cache"].shape[-1]])
    lse = q.new_empty(lse_shape, dtype=lse_dtype(q))
    mass = [b, cache.shape[heads], room] if given["return_mass"] else [0]
    return out, lse, q.new_empty(mass, dtype=torch.float32 if given["return_mass"] else q.dtype)


define(_schema("attention_kvcache"), _compute, _fake)
define(_schema("attention_kvcache_", k_cache="Tensor(a!)", v_cache="Tensor(b!)"), _compute, _fake)


def record(values: tuple[Any, ...]) -> Any:
    """A call as one of them; `values` in the order of the signature."""
    given = dict(zip(_NAMES, values, strict=True))
    if given["out"] is not None:
        raise ValueError("`out` must be None where torch records the call, got an array")
    for name, x in given.items():
        if torch.is_grad_enabled() and getattr(x, "requires_grad", False):
            raise NotImplementedError(
                f"`{name}` requires grad, and its gradient is not served: pass its detach()"
            )
    writes = given["k"] is not None or given["v"] is not None
    operator = "attention_kvcache_" if writes else "attention_kvcache"
    arguments = flat(given)
    found = getattr(torch.ops.fastattn, operator)(*(arguments.get(n) for n in _KINDS))
    wanted = (True, given["return_lse"], given["return_mass"])
    results = tuple(x for x, is_wanted in zip(found, wanted, strict=True) if is_wanted)
    return results[0] if len(results) == 1 else results
