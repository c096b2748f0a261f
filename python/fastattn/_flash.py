"""What FlashAttention 2's and 3's interfaces have in common."""

import math
import operator
from typing import Any

import torch

from . import _attention
from ._renaming import renaming

_NAMES = {"scale": "softmax_scale", "window": "window_size", "sink": "s_aux"}
attention = renaming(_attention.attention, _NAMES)
_BLOCKS = _NAMES | {"page_table": "block_table"}
attention_varlen = renaming(_attention.attention_varlen, _BLOCKS)
attention_kvcache = renaming(_attention.attention_kvcache, _NAMES)
attention_in_blocks = renaming(_attention.attention_kvcache, _NAMES | {"page_table": "block_table"})


def options(
    softmax_scale: float | None,
    causal: bool,
    window_size: Any,
    softcap: float,
    deterministic: bool | None,
    s_aux: Any,
) -> dict[str, Any]:
    """As arguments of attention. A window's bounds may be a tensor's; those below 0 are none.

    deterministic: None where there is no backward pass.
    """
    left, right = _bounds(window_size)
    if s_aux is not None:
        _check_tensor("s_aux", s_aux)
    given = {
        "scale": softmax_scale,
        "causal": bool(causal),
        "window": None if left is None and right is None else (left, right),
        # 0 and below is off.
        "softcap": 0.0 if isinstance(softcap, int | float) and softcap < 0 else softcap,
        "sink": None if s_aux is None else s_aux.float(),
    }
    return given if deterministic is None else given | {"deterministic": deterministic}


def _bounds(window_size: Any) -> list[int | None]:
    try:
        bounds = [operator.index(n) for n in window_size]
    except TypeError:
        bounds = []
    if len(bounds) != 2:
        raise TypeError(f"`window_size` must hold two ints, got {window_size!r}")
    return [None if n < 0 else n for n in bounds]


def _check_tensor(name: str, x: Any) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"`{name}` must be a tensor, got {type(x).__name__}")


def attend(q: Any, k: Any, v: Any, return_lse: bool, keywords: dict[str, Any]) -> Any:
    return attention(q, k, v, layout="bshd", return_lse=bool(return_lse), **keywords)


def attend_varlen(
    arrays: tuple[Any, Any, Any],
    cu_seqlens: tuple[Any, Any],
    max_seqlens: tuple[Any, Any],
    return_lse: bool,
    keywords: dict[str, Any],
) -> Any:
    return attention_varlen(
        *arrays, *cu_seqlens, *max_seqlens, return_lse=bool(return_lse), **keywords
    )


def attend_cache(
    function: Any,
    arrays: tuple[Any, Any, Any],
    new: tuple[Any, Any],
    cache_seqlens: Any,
    page_table: Any,
    return_lse: bool,
    keywords: dict[str, Any],
) -> Any:
    """attention_kvcache, whose cache is full where nothing is said of its lengths."""
    if cache_seqlens is None:
        if any(x is not None for x in new):
            raise ValueError("`cache_seqlens` must say where new `k` and `v` come, got None")
        _check_tensor("k_cache", arrays[1])
        pages = () if page_table is None else page_table.shape[1:2]
        cache_seqlens = math.prod((*arrays[1].shape[1:2], *pages))
    return function(
        *arrays,
        cache_seqlens,
        k=new[0],
        v=new[1],
        page_table=page_table,
        return_lse=bool(return_lse),
        **keywords,
    )


def unpack(name: str, packed: Any, axis: int, count: int) -> Any:
    """The `count` arrays that are stacked along an axis; their gradients come back as one."""
    rank = axis + 3
    _check_tensor(name, packed)
    if packed.ndim != rank or packed.shape[axis] != count:
        shape = {2: "(b, s, {}, h, d)", 1: "(total, {}, h, d)"}[axis].format(count)
        raise ValueError(f"`{name}` must be {shape}, got {tuple(packed.shape)}")
    return packed.unbind(axis)
