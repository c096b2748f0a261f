"""What FlashAttention 2's and 3's interfaces have in common."""

import operator
from typing import Any

import torch

from . import _attention
from ._renaming import renaming

_NAMES = {"scale": "softmax_scale", "window": "window_size", "sink": "s_aux"}
attention = renaming(_attention.attention, _NAMES)
attention_varlen = renaming(_attention.attention_varlen, _NAMES)


def options(
    softmax_scale: float | None,
    causal: bool,
    window_size: Any,
    softcap: float,
    deterministic: bool,
    s_aux: Any,
) -> dict[str, Any]:
    """As arguments of attention. A window's bounds may be a tensor's; those below 0 are none."""
    left, right = _bounds(window_size)
    if s_aux is not None:
        _check_tensor("s_aux", s_aux)
    return {
        "scale": softmax_scale,
        "causal": bool(causal),
        "window": None if left is None and right is None else (left, right),
        # 0 and below is off.
        "softcap": 0.0 if isinstance(softcap, int | float) and softcap < 0 else softcap,
        "deterministic": deterministic,
        "sink": None if s_aux is None else s_aux.float(),
    }


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


def unpack(name: str, packed: Any, axis: int, count: int) -> Any:
    """The `count` arrays that are stacked along an axis; their gradients come back as one."""
    rank = axis + 3
    _check_tensor(name, packed)
    if packed.ndim != rank or packed.shape[axis] != count:
        shape = {2: "(b, s, {}, h, d)", 1: "(total, {}, h, d)"}[axis].format(count)
        raise ValueError(f"`{name}` must be {shape}, got {tuple(packed.shape)}")
    return packed.unbind(axis)


NO_CACHE = (
    "flash_attn_with_kvcache is not built yet: use fastattn.attention_kvcache, or flash_attn_func "
    "on the part of the cache that is filled"
)
