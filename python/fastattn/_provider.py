"""fastattn in torch's registry of flash-attention providers.

    torch.nn.attention.activate_flash_attention_impl("fastattn")

puts it behind the five aten operators that torch calls its flash backend, on CUDA tensors; torch's
restore_flash_attention_impl() takes it away. What it refuses raises: torch has chosen the backend
before it is asked.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch

from . import _C
from ._attention import (
    attention,
    attention_backward,
    attention_varlen,
    attention_varlen_backward,
)
from ._derivatives import are_deterministic


def _bound(size: int | None) -> int | None:
    return None if size is None or size < 0 else size  # flash-attn's -1


def _masks(is_causal: bool, left: int | None, right: int | None) -> dict[str, Any]:
    return {"causal": is_causal, "window": (_bound(left), _bound(right))}


def _refuse(**unserved: bool) -> None:
    for name, is_given in unserved.items():
        if is_given:
            raise NotImplementedError(
                f"`{name}` is not served by fastattn as torch's flash-attention provider: call "
                'torch.nn.attention.restore_flash_attention_impl(), or activate "FA3" or "FA4"'
            )


def _seed(state: Any) -> Any:
    return state.view(torch.int64)[:1]  # torch knows the two words of a generator as uint64


def _random_state(query: Any, dropout_p: float) -> tuple[Any, Any]:
    state = torch.zeros(2, dtype=torch.int64, device=query.device)
    if dropout_p:
        state.random_()
    return state.view(torch.uint64), torch.zeros((), dtype=torch.uint64, device=query.device)


def _compute(followed: bool, function: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
    """(out, lse); where a gradient will be asked for, only if a backward pass serves the call."""
    if not followed:
        return function(*args, **keywords)
    bound = inspect.signature(function).bind(*args, **keywords)
    bound.apply_defaults()
    return _C.forward(None, (function.__name__, tuple(bound.arguments.values()), ""))[:2]


def _flash_attention_forward(
    query: Any,
    key: Any,
    value: Any,
    cum_seq_q: Any,
    cum_seq_k: Any,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Any = None,
    alibi_slopes: Any = None,
    block_table: Any = None,
    num_splits: int | None = None,
    out: Any = None,
) -> tuple[Any, ...]:
    """(b, s, h, d), or with cum_seq_q (total, h, d)."""
    followed = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    _refuse(
        return_debug_mask=return_debug_mask,
        block_table=block_table is not None,
        num_splits=(num_splits or 1) > 1,
        # The backward operator is not told of them.
        alibi_slopes=followed and alibi_slopes is not None,
        seqused_k=followed and seqused_k is not None,
    )
    state, offset = _random_state(query, dropout_p)
    keywords = _masks(is_causal, window_size_left, window_size_right) | {
        "scale": scale,
        "dropout_p": dropout_p,
        "seed": _seed(state),
        "alibi_slopes": alibi_slopes,
        "batch_invariant": num_splits == 1,  # torch's switch for that
        "out": out,
        "return_lse": True,
    }
    q, k, v = (x.detach() for x in (query, key, value))  # autograd is torch's own here
    if cum_seq_q is None:
        out, lse = _compute(
            followed, attention, q, k, v, layout="bshd", k_lengths=seqused_k, **keywords
        )
    else:
        places: tuple[Any, ...] = (cum_seq_q, cum_seq_k, max_q, max_k)
        arrays = q, k, v, *places
        out, lse = _compute(followed, attention_varlen, *arrays, seqused_k=seqused_k, **keywords)
    return out, lse, state, offset, query.new_empty(0)


def _flash_attention_forward_no_dropout_inplace(
    out: Any, query: Any, key: Any, value: Any, *args: Any, **keywords: Any
) -> Any:
    """The lse; args from cum_seq_q on as of the operator above."""
    _refuse(dropout_p=args[4] > 0)
    return _flash_attention_forward(query, key, value, *args, out=out, **keywords)[1]


def _flash_attention_backward(
    grad_out: Any,
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    logsumexp: Any,
    cum_seq_q: Any,
    cum_seq_k: Any,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Any,
    unused: Any,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Any, Any, Any]:
    keywords = _masks(is_causal, window_size_left, window_size_right) | {
        "scale": scale,
        "dropout_p": dropout_p,
        "seed": _seed(rng_state) if dropout_p else None,
        "deterministic": are_deterministic(),
    }
    arrays: tuple[Any, ...] = (grad_out, query, key, value, out, logsumexp)
    if cum_seq_q is None:
        found = attention_backward(*arrays, layout="bshd", **keywords)
    else:
        places: tuple[Any, ...] = (cum_seq_q, cum_seq_k, max_q, max_k)
        found = attention_varlen_backward(*arrays, *places, **keywords)
    dq, dk, dv, _, _ = found
    return dq, dk, dv


def _rows_first(*arrays: Any) -> tuple[Any, ...]:
    return tuple(x.transpose(1, 2) for x in arrays)


def _scaled_dot_product_flash_attention(
    query: Any,
    key: Any,
    value: Any,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """(b, h, s, d); the output lies in memory as query does."""
    out = torch.empty_like(query, requires_grad=False)
    max_q, max_k = query.size(2), key.size(2)
    places = None, None, max_q, max_k
    call: tuple[Any, ...] = (*_rows_first(query, key, value), *places, dropout_p, is_causal)
    (into,) = _rows_first(out)
    _, lse, *rest = _flash_attention_forward(*call, return_debug_mask, scale=scale, out=into)  # type: ignore[misc]
    return out, lse, *places, *rest


def _scaled_dot_product_flash_attention_backward(
    grad_out: Any,
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    logsumexp: Any,
    cum_seq_q: Any,
    cum_seq_k: Any,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Any,
    philox_offset: Any,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    do, q, k, v, o = _rows_first(grad_out, query, key, value, out)
    switches = max_q, max_k, dropout_p, is_causal, philox_seed, philox_offset
    places: tuple[Any, ...] = (None, None, *switches)
    return _rows_first(*_flash_attention_backward(do, q, k, v, o, logsumexp, *places, scale=scale))


OPERATORS = (
    _flash_attention_forward,
    _flash_attention_forward_no_dropout_inplace,
    _flash_attention_backward,
    _scaled_dot_product_flash_attention,
    _scaled_dot_product_flash_attention_backward,
)


class _Handle:
    def __init__(self, library: Any) -> None:
        self._library = library

    def remove(self) -> None:
        self._library = None  # its last reference: torch's kernels are back


def _activate() -> _Handle:
    library: Any = torch.library.Library("aten", "IMPL", "CUDA")  # type: ignore[no-untyped-call]
    for operator in OPERATORS:
        if hasattr(torch.ops.aten, operator.__name__):  # torch 2.10 has one fewer
            library.impl(operator.__name__, operator, "CUDA")
    return _Handle(library)


def register() -> None:
    """Makes "fastattn" a name that torch knows; a torch from before its registry knows none."""
    import torch.nn.attention

    if hasattr(torch.nn.attention, "register_flash_attention_impl"):
        torch.nn.attention.register_flash_attention_impl("fastattn", register_fn=_activate)
