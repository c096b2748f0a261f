"""xFormers' memory_efficient_attention and attn_bias classes: `import fastattn.xformers as xops`.

Layouts are (b, s, h, d), (b, s, g, h, d) with g groups of h heads, and (b, s, d). Objects of
xFormers' own attn_bias classes are taken as these modules' are.
"""

import itertools
import sys
from typing import Any, NamedTuple

from .._needs import need

need(__name__, "torch", "2.10")

import torch

from .. import _attention
from .._renaming import renaming
from . import attn_bias
from .attn_bias import *  # noqa: F403

__all__ = [
    "attn_bias",
    "fmha",
    "memory_efficient_attention",
    "memory_efficient_attention_backward",
    "memory_efficient_attention_forward",
    "memory_efficient_attention_forward_requires_grad",
]
__all__ += attn_bias.__all__

_NAMES = {
    **{"q": "query", "k": "key", "v": "value", "mask": "attn_bias", "dropout_p": "p"},
    **{"out": "output", "dout": "grad", "window": "attn_bias"},
}
attention, attention_varlen, attention_backward, attention_varlen_backward = (
    renaming(function, _NAMES)
    for function in (
        *(_attention.attention, _attention.attention_varlen),
        *(_attention.attention_backward, _attention.attention_varlen_backward),
    )
)

fmha = sys.modules[__name__]  # programs say xops.fmha.BlockDiagonalMask, too


def memory_efficient_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: None = None,
) -> Any:
    """fastattn.attention with xFormers' arguments.

    Args:
        query: (b, sq, h, d), (b, sq, g, h, d) or (b, sq, d).
        key: (b, sk, h, d) and so on. With groups the h heads may be one, expanded, or 1: it is
            then read once, but for an expanded one that requires grad, which has a gradient of its
            own for each head and is copied.
        value: likewise, (..., dv).
        attn_bias: None, a float tensor (b, h, sq, sk), (b, g, h, sq, sk) or (b, sq, sk) that is
            added to the scores (it may require grad), or an AttentionBias.
        p: of dropout; the seed comes from torch's generator.
        scale: default d ** -0.5.
        op: must be None: it chooses among xFormers' kernels.

    Returns:
        (b, sq, h, dv), (b, sq, g, h, dv) or (b, sq, dv). A row that sees nothing is 0.

    Raises:
        ValueError, TypeError, NotImplementedError: as attention; sequences of keys that overlap,
            or lie in pages, are NotImplementedError.
    """
    return _prepare(query, key, value, attn_bias, p, scale, op).attend()[0]


def memory_efficient_attention_forward(
    query: Any,
    key: Any,
    value: Any,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: None = None,
) -> Any:
    """memory_efficient_attention without a gradient."""
    with torch.no_grad():
        return memory_efficient_attention(query, key, value, attn_bias, p, scale, op=op)


def memory_efficient_attention_forward_requires_grad(
    query: Any,
    key: Any,
    value: Any,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: None = None,
) -> tuple[Any, Any]:
    """The output and the lse (b, h, sq), (b, g, h, sq) or (b, 1, sq), for
    memory_efficient_attention_backward; p must be 0."""
    _refuse_dropout(p)
    with torch.no_grad():
        return _prepare(query, key, value, attn_bias, p, scale, op).attend(return_lse=True)


def memory_efficient_attention_backward(
    grad: Any,
    output: Any,
    lse: Any,
    query: Any,
    key: Any,
    value: Any,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: None = None,
) -> tuple[Any, Any, Any]:
    """The gradients of query, key and value, of what the function above gave; p must be 0."""
    _refuse_dropout(p)
    with torch.no_grad():
        return _prepare(query, key, value, attn_bias, p, scale, op, True).gradients(
            grad, output, lse
        )


def _refuse_dropout(p: float) -> None:
    if p:
        raise NotImplementedError(f"`p` must be 0 outside of memory_efficient_attention, got {p}")


class _Call(NamedTuple):
    """attention's arguments, or attention_varlen's."""

    arrays: tuple[Any, Any, Any]
    places: tuple[Any, Any, int, int] | None  # cu_seqlens and max_seqlens of packed sequences
    keywords: dict[str, Any]
    shapes: list[Any]  # of query, key and value as they came

    def attend(self, return_lse: bool = False) -> tuple[Any, Any]:
        if self.places is None:
            found: Any = attention(*self.arrays, return_lse=return_lse, **self.keywords)
        else:
            found = attention_varlen(
                *self.arrays, *self.places, return_lse=return_lse, **self.keywords
            )
        out, lse = found if return_lse else (found, None)
        query, _, value = self.shapes
        out = out.reshape(*query[:-1], value[-1])
        return out, lse if lse is None else lse.reshape(_lse_shape(query))

    def gradients(self, grad: Any, output: Any, lse: Any) -> tuple[Any, Any, Any]:
        q, _, v = self.arrays
        if tuple(lse.shape) != _lse_shape(self.shapes[0]):
            raise ValueError(f"`lse` must be {_lse_shape(self.shapes[0])}, got {tuple(lse.shape)}")
        expected = (*self.shapes[0][:-1], self.shapes[2][-1])
        for name, x in (("grad", grad), ("output", output)):
            if tuple(x.shape) != expected:
                raise ValueError(f"`{name}` must be {expected}, got {tuple(x.shape)}")
        dout, out = (x.reshape(*q.shape[:-1], v.shape[-1]) for x in (grad, output))
        lse = lse.flatten(1, -2)
        if self.places is None:
            found = attention_backward(dout, *self.arrays, out, lse, **self.keywords)
        else:
            arrays = (*self.arrays, out, lse[0], *self.places)
            found = attention_varlen_backward(dout, *arrays, **self.keywords)
        dq, dk, dv = (x.reshape(shape) for x, shape in zip(found, self.shapes, strict=False))
        return dq, dk, dv


def _lse_shape(query: Any) -> tuple[int, ...]:
    b, s, *heads, _ = query
    return (b, *(heads or [1]), s)


def _prepare(
    query: Any,
    key: Any,
    value: Any,
    bias: Any,
    p: float,
    scale: float | None,
    op: Any,
    whole: bool = False,
) -> _Call:
    """Of key and value, `whole` if a gradient of each head is wanted."""
    if op is not None:
        raise ValueError("`op` must be None: it chooses among xFormers' kernels")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not hasattr(x, "ndim"):
            raise TypeError(f"`{name}` must be a tensor, got {type(x).__name__}")
    rank = query.ndim
    if rank not in (3, 4, 5) or key.ndim != rank or value.ndim != rank:
        raise ValueError(
            "`query`, `key` and `value` must all have 3, 4 or 5 dimensions, got "
            f"{rank}, {key.ndim} and {value.ndim}"
        )
    shapes = [x.shape for x in (query, key, value)]
    arrays = _in_heads(query, key, value, whole)
    keywords: dict[str, Any] = {"dropout_p": p, "scale": scale}
    if bias is None or (
        isinstance(bias, torch.Tensor) and type(bias).__name__ not in attn_bias.KINDS
    ):
        mask = None if bias is None else _mask(bias, rank)
        return _Call(arrays, None, keywords | {"mask": mask, "layout": "bshd"}, shapes)
    keywords["causal"], keywords["window"] = attn_bias.limits_of(bias)
    if hasattr(bias, "q_seqinfo"):
        return _blocks(bias, arrays, keywords, shapes)
    dense = getattr(bias, "_bias", getattr(bias, "_subtensor", None))
    if issubclass(attn_bias.kind_of(bias), attn_bias.LowerTriangularMaskWithTensorBias):
        keywords["mask"] = _mask(dense, rank)
    return _Call(arrays, None, keywords | {"layout": "bshd"}, shapes)


def _in_heads(query: Any, key: Any, value: Any, whole: bool) -> tuple[Any, Any, Any]:
    """(b, s, h, d) of any of the layouts."""
    if query.ndim == 3:
        return query.unsqueeze(2), key.unsqueeze(2), value.unsqueeze(2)
    if query.ndim == 4:
        return query, key, value
    heads, of_keys = tuple(query.shape[2:4]), tuple(key.shape[2:4])
    if of_keys not in (heads, (heads[0], 1)) or tuple(value.shape[2:4]) != of_keys:
        raise ValueError(
            f"`key` and `value` must have {heads} heads like `query`, or both one a group, got "
            f"{of_keys} and {tuple(value.shape[2:4])}"
        )
    if all(_is_one_head(x, whole) for x in (key, value)):
        key, value = key[:, :, :, :1], value[:, :, :, :1]
    return query.flatten(2, 3), key.flatten(2, 3), value.flatten(2, 3)


def _is_one_head(x: Any, whole: bool) -> bool:
    """Whether a group's heads are the same one, and have no gradient each."""
    expanded = x.stride(3) == 0 and not whole and not (x.requires_grad and torch.is_grad_enabled())
    return expanded or x.shape[3] == 1


def _mask(bias: Any, rank: int) -> Any:
    if not bias.is_floating_point():
        raise TypeError(f"`attn_bias` must be of floats, which are added, got {bias.dtype}")
    if bias.ndim != rank:
        raise ValueError(f"`attn_bias` must have {rank} dimensions like `query`, got {bias.ndim}")
    return bias.unsqueeze(1) if rank == 3 else bias.flatten(1, -3)


def _blocks(
    bias: Any, arrays: tuple[Any, Any, Any], keywords: dict[str, Any], shapes: Any
) -> _Call:
    q, k, v = arrays
    if any(len(x) != 1 for x in arrays):
        raise ValueError(
            "`query`, `key` and `value` must have b = 1 with a block-diagonal `attn_bias`, got "
            f"{len(q)}, {len(k)} and {len(v)}"
        )
    queries, keys = bias.q_seqinfo, bias.k_seqinfo
    for name, x, rows in (("query", q, queries), ("key", k, keys)):
        if x.shape[1] != rows.seqstart_py[-1]:
            raise ValueError(
                f"`{name}` must have the {rows.seqstart_py[-1]} rows that `attn_bias` divides, got "
                f"{x.shape[1]}"
            )
    starts = keys.seqstart_py
    places = [queries.seqstart.to(q.device), keys.seqstart.to(q.device)]
    if hasattr(keys, "seqlen"):
        _check_order(starts, keys.seqlen_py)
        used = keys.seqlen.to(q.device)
        if starts[0]:  # the keys before the first sequence's are one's without queries
            starts = [0, *starts]
            *places, used = (torch.nn.functional.pad(x, (1, 0)) for x in (*places, used))
        keywords["seqused_k"] = used
    longest = max((b - a for a, b in itertools.pairwise(starts)), default=0)
    ends = (*places, max(queries.max_seqlen, 0), longest)
    return _Call((q[0], k[0], v[0]), ends, keywords, shapes)


def _check_order(starts: Any, lengths: Any) -> None:
    for n, length in enumerate(lengths):
        if starts[n] + length > starts[n + 1]:
            raise NotImplementedError(
                "`attn_bias` must have sequences of keys that follow each other and share none: "
                f"{n} ends at {starts[n] + length}, after {n + 1} starts, at {starts[n + 1]}"
            )
