"""use_fastattn(): torch's own attention operators, answered by fastattn.

Below torch's functions, in its dispatcher: whoever imported them by name, C++ and torch.nn's fast
paths all call these operators. Whether a thread is routed is asked in each call.
"""

import contextlib
import ctypes
import functools
import re
import threading
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch

from ._attention import attention_varlen, scaled_dot_product_attention

Fallback = Literal["torch", "raise"]

_ATTENTION: Any = torch.ops.aten.scaled_dot_product_attention.default
_MULTI_HEAD: Any = torch.ops.aten._native_multi_head_attention.default
_FRONT = "FuncTorchDynamicLayerFrontMode"


class _Route(NamedTuple):
    """One `with` of this thread, inside of another."""

    fallback: Fallback
    outer: "_Route | None"


@functools.cache  # routes live for ever
def _route(fallback: Fallback, outer: _Route | None) -> _Route:
    return _Route(fallback, outer)


# Torch hands thread-local objects of its own on to the threads that run a backward pass, where
# activation checkpointing calls the forward again; threading.local does not go there.
_KEY = "fastattn"


def _innermost() -> _Route | None:
    route: _Route | None = None
    if torch._C._is_key_in_tls(_KEY):
        route = torch._C._get_obj_in_tls(_KEY)
    return route


_everywhere: list["Routing"] = []  # those installed for all threads; the last one counts


def _set_innermost(route: _Route | None) -> None:
    # Torch 2.10 takes no reference and drops one later: this is it. Where torch counts right, what
    # lives for ever has one too many.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(route))
    torch._C._stash_obj_in_tls(_KEY, route)


def _fallback() -> Fallback | None:
    """What this thread does with a call that fastattn refuses; None where it is not routed."""
    if route := _innermost():
        return route.fallback
    installed = _everywhere[-1:]  # a copy: another thread may remove it meanwhile
    return installed[0].fallback if installed else None


_warned: set[str] = set()


def _warn(refusal: Exception) -> None:
    reason = re.sub(r"\d+", "#", str(refusal))  # another shape is no other reason
    if reason not in _warned:
        _warned.add(reason)
        text = f"torch's own attention is used here, because of fastattn: {refusal}"
        warnings.warn(text, stacklevel=4)  # the line that called torch


def _answer(ours: Callable[..., Any], theirs: Callable[..., Any], *args: Any, **keys: Any) -> Any:
    fallback = _fallback()
    if fallback is None:
        return theirs(*args, **keys)
    try:
        return ours(*args, **keys)
    except (ValueError, TypeError, NotImplementedError) as error:
        if fallback == "raise":
            raise
        refusal = error
    result = theirs(*args, **keys)  # where torch refuses too, its error is what the caller expects
    _warn(refusal)
    return result


def _attend(*args: Any, **keys: Any) -> Any:
    return _answer(scaled_dot_product_attention, _ATTENTION.decompose, *args, **keys)


def _attend_in_front() -> Callable[..., Any]:
    """Before torch.func's transforms take attention apart: fastattn's has their rules."""
    kernel = torch.library.get_kernel(_ATTENTION, _FRONT)

    def attend(keyset: Any, *args: Any, **keys: Any) -> Any:
        def theirs(*args: Any, **keys: Any) -> Any:
            return kernel.call_boxed(keyset, *args, **keys)

        return _answer(scaled_dot_product_attention, theirs, *args, **keys)

    return attend


def _project(rows: Any, heads: int, weights: tuple[Any, ...]) -> Any:
    """q, k and v of one projection, (..., h, d) each."""
    qkv = torch.nn.functional.linear(rows, *weights[:2])
    return qkv.view(*rows.shape[:-1], 3, heads, -1).unbind(-3)


def _multi_head_nested(x: Any, width: int, heads: int, weights: tuple[Any, ...]) -> Any:
    """Sequences of their own lengths, as torch.nn.TransformerEncoder packs a padded batch."""
    if not x.is_contiguous():
        raise NotImplementedError("a nested tensor must be contiguous")
    rows, sizes = x.values().view(-1, width), x._nested_tensor_size()
    lengths = sizes[:, 0]
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(rows.device, torch.int32)
    longest = int(lengths.max()) if len(lengths) else 0
    q, k, v = _project(rows, heads, weights)
    out = attention_varlen(q, k, v, ends, ends, longest, longest)
    out = torch.nn.functional.linear(out.flatten(-2), *weights[2:])
    places = x._nested_tensor_strides(), x._nested_tensor_storage_offsets()
    return torch._nested_view_from_buffer(out.flatten(), sizes, *places)


def _multi_head_dense(
    x: Any, heads: int, weights: tuple[Any, ...], mask: Any, mask_type: int | None
) -> Any:
    if mask is not None and mask.dtype == torch.bool:
        mask = ~mask  # True hides here
    if mask is not None and mask_type == 1:  # (b, sk): padding
        mask = mask[:, None, None, :]
    q, k, v = (part.transpose(1, 2) for part in _project(x, heads, weights))
    out = scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)
    return torch.nn.functional.linear(out.flatten(-2), *weights[2:])


def _multi_head_on(place: str) -> Callable[..., Any]:
    """torch.nn.MultiheadAttention's and TransformerEncoder's fast path, without gradients."""
    kernel = torch.library.get_kernel(_MULTI_HEAD, place)

    def multi_head(
        keyset: Any,
        query: Any,
        key: Any,
        value: Any,
        embed_dim: int,
        num_head: int,
        qkv_weight: Any,
        qkv_bias: Any,
        proj_weight: Any,
        proj_bias: Any,
        mask: Any = None,
        need_weights: bool = True,
        average_attn_weights: bool = True,
        mask_type: int | None = None,
    ) -> Any:
        weights = (qkv_weight, qkv_bias, proj_weight, proj_bias)

        def theirs() -> Any:
            width = embed_dim, num_head
            last = mask, need_weights, average_attn_weights, mask_type
            return kernel.call_boxed(keyset, query, key, value, *width, *weights, *last)

        def ours() -> Any:
            if query.is_nested:
                return _multi_head_nested(query, embed_dim, num_head, weights), None
            return _multi_head_dense(query, num_head, weights, mask, mask_type), None

        # Attention weights are the whole matrix, which fastattn never makes.
        if need_weights or key is not query or value is not query:
            return theirs()
        return _answer(ours, theirs)

    return multi_head


def _register() -> Any:
    """Our kernels in torch's dispatcher, as long as the result lives."""
    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    with warnings.catch_warnings():  # torch's, that a kernel of its own is replaced
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
        for place in ("CPU", "AutogradCPU", "CUDA", "AutogradCUDA"):
            library.impl(_ATTENTION, _attend, place)
        library.impl(_ATTENTION, _attend_in_front(), _FRONT, with_keyset=True)
        for place in ("CPU", "CUDA", "NestedTensorCPU", "NestedTensorCUDA"):
            if has_kernel(_MULTI_HEAD.name(), place):
                library.impl(_MULTI_HEAD, _multi_head_on(place), place, with_keyset=True)
    _forget()
    return library


def _forget() -> None:
    """What modes that trace have found for an operator they keep for good, and would not ask
    again; torch forgets it for the very keys that are registered alone."""
    for operator in (_ATTENTION, _MULTI_HEAD):
        operator._dispatch_cache.clear()


class _Operators:
    """Our kernels, there while a thread is routed. Kernels ask themselves which thread that is.

    Torch's table of operators is written without regard to threads that read it, so what the last
    one leaves behind another thread is removed by the next who leaves and is alone.
    """

    def __init__(self) -> None:
        self.lock, self.users = threading.Lock(), 0
        self.library: Any = None

    def acquire(self) -> None:
        with self.lock:
            self.library = self.library or _register()
            self.users += 1

    def release(self) -> None:
        with self.lock:
            self.users -= 1
            if not self.users and threading.active_count() == 1:
                self.library = None  # its last reference: torch's kernels are back
                _forget()


_operators = _Operators()


class Routing(contextlib.ContextDecorator):
    """What use_fastattn() returns: to be entered by one thread, or installed for all."""

    def __init__(self, fallback: Fallback) -> None:
        if fallback not in ("torch", "raise"):
            raise ValueError(f'`fallback` must be "torch" or "raise", got {fallback!r}')
        self.fallback = fallback

    def __enter__(self) -> "Routing":
        _operators.acquire()
        _set_innermost(_route(self.fallback, _innermost()))
        return self

    def __exit__(self, *_: Any) -> None:
        route = _innermost()
        assert route is not None
        _set_innermost(route.outer)
        _operators.release()

    def install(self) -> "Routing":
        """Routes every thread, until remove()."""
        _operators.acquire()
        _everywhere.append(self)
        return self

    def remove(self) -> None:
        """Ends what one install() began."""
        if self not in _everywhere:
            raise ValueError("use_fastattn() was not installed, or is removed already")
        _everywhere.remove(self)
        _operators.release()


def use_fastattn(fallback: Fallback = "torch") -> Routing:
    """Routes torch.nn.functional.scaled_dot_product_attention to fastattn's, under every name.

        with use_fastattn():                  # this thread; also @use_fastattn(), a decorator
            loss = model(batch).mean()
            loss.backward()

        routing = use_fastattn().install()    # every thread ...
        routing.remove()                      # ... until here

    Reached are all callers of torch's operator on CPU and CUDA tensors: functions imported by name
    before, torch.nn.MultiheadAttention, TransformerEncoder and Decoder with their fast paths,
    transformers' attn_implementation="sdpa", C++, torch.func's transforms; and the threads in which
    a backward pass inside of the `with` recomputes checkpoints. They nest, and the innermost
    counts; after the last one torch's operators are its own again, also after an exception (where
    other threads run, which must not meet that change, ours stay and hand calls on, some
    microseconds each).

    Not reached are: a graph that torch.compile made before (one made inside keeps fastattn for
    good); attention weights (MultiheadAttention with need_weights=True, its default); nested
    tensors other than those inside of TransformerEncoder; code that calls one of torch's backends
    itself. torch.nn.attention.sdpa_kernel chooses among torch's own backends only.

    Args:
        fallback: what becomes of calls that fastattn refuses. "torch": torch's own attention, with
            one warning per reason. "raise": fastattn's error.

    Returns:
        A Routing: a context manager with install() and remove().

    Raises:
        ValueError: another fallback.
    """
    return Routing(fallback)
