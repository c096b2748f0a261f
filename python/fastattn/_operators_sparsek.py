"""sparsek and sparsek_lists of torch tensors that have a gradient, or are seen by one of torch's
transforms; and as operators, for graphs.

csrc/binding/sparsek.c hands such calls to take_sparsek() and take_sparsek_lists().
"""

import math
from typing import Any

import torch

from . import _C
from ._operators import Untraced, define, lse_dtype
from ._sparsek import sparsek, sparsek_lists
from ._transforms import (
    apply,
    has_proxy,
    has_tangent,
    is_pushed_forward,
    is_recorded,
    leave_in_graph,
    unwrapped,
)

_ROWS = "Tensor scores, float k, Tensor? lengths"
_LISTS = (
    "Tensor scores, float k, SymInt sq, SymInt window, Tensor? q_offset, Tensor? q_lengths, "
    "Tensor? k_lengths, Tensor? k_start, SymInt? offset"
)


# --------------------------------------------------------------------------------------- the work


def _rows(*values: Any) -> Any:
    with torch.no_grad(), Untraced():
        return _C.sparsek(*values)


def _rows_backward(*values: Any) -> Any:
    with torch.no_grad(), Untraced():
        return _C.sparsek_backward(*values)


def _whole(values: tuple[Any, ...]) -> list[Any]:
    """An operator's arguments as the function has them: q_offset is an array or an int."""
    *rest, offset = values
    rest[-4] = offset if rest[-4] is None else rest[-4]
    return rest


def _lists(*values: Any) -> Any:
    with torch.no_grad(), Untraced():
        lists, gates, tau = _C.sparsek_lists(*_whole(values))
    return gates, tau, lists  # the first has the gradient, as torch's opcheck wants it


def _lists_backward(*values: Any) -> Any:
    with torch.no_grad(), Untraced():
        return _C.sparsek_lists_backward(*_whole(values))


# ---------------------------------------------------------------------- what graphs know of it


def _rows_fake(scores: Any, k: float, lengths: Any) -> Any:
    dtype = lse_dtype(scores)
    return scores.new_empty(scores.shape, dtype=dtype), scores.new_empty(
        scores.shape[:-1], dtype=dtype
    )


def _rows_backward_fake(tau: Any, dgates: Any, scores: Any, *_: Any) -> Any:
    return scores.new_empty(scores.shape)


def _lists_fake(scores: Any, k: float, sq: Any, *_: Any) -> Any:
    rows, dtype = [*scores.shape[:-1], sq], lse_dtype(scores)
    listed = [*rows, max(0, math.ceil(k))]
    return (
        scores.new_empty(listed, dtype=dtype),
        scores.new_empty(rows, dtype=dtype),
        scores.new_empty(listed, dtype=torch.int32),
    )


def _lists_backward_fake(tau: Any, dgates: Any, lists: Any, scores: Any, *_: Any) -> Any:
    return scores.new_empty(scores.shape)


# ------------------------------------------------------------------------------------- derivatives


def _set_up_rows(ctx: Any, inputs: Any, output: Any) -> None:
    scores, ctx.k, lengths = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], scores, lengths)


def _differentiate_rows(ctx: Any, dgates: Any, dtau: Any) -> Any:
    tau, scores, lengths = ctx.saved_tensors
    found = torch.ops.fastattn.sparsek_backward(tau, dgates, scores, ctx.k, lengths)
    return found, None, None


def _set_up_lists(ctx: Any, inputs: Any, output: Any) -> None:
    scores, ctx.k, ctx.sq, ctx.window, *arrays, ctx.offset = inputs
    _, tau, lists = output
    ctx.mark_non_differentiable(lists, tau)
    ctx.save_for_backward(tau, lists, scores, *arrays)


def _differentiate_lists(ctx: Any, dgates: Any, dtau: Any, dlists: Any) -> Any:
    tau, lists, scores, *arrays = ctx.saved_tensors
    rest = (ctx.k, ctx.sq, ctx.window, *arrays, ctx.offset)
    found = torch.ops.fastattn.sparsek_lists_backward(tau, dgates, lists, scores, *rest)
    return (found, *(None,) * 8)


def _refuse_second(ctx: Any, *_: Any) -> Any:
    raise NotImplementedError(
        "second derivatives of sparsek and sparsek_lists are not served: their gradient has none"
    )


define(
    f"sparsek({_ROWS}) -> (Tensor gates, Tensor tau)",
    *(_rows, _rows_fake, _set_up_rows, _differentiate_rows),
)
define(
    f"sparsek_backward(Tensor tau, Tensor dgates, {_ROWS}) -> Tensor",
    *(_rows_backward, _rows_backward_fake, lambda ctx, inputs, output: None, _refuse_second),
)
define(
    f"sparsek_lists({_LISTS}) -> (Tensor gates, Tensor tau, Tensor key_lists)",
    *(_lists, _lists_fake, _set_up_lists, _differentiate_lists),
)
define(
    f"sparsek_lists_backward(Tensor tau, Tensor dgates, Tensor key_lists, {_LISTS}) -> Tensor",
    *(_lists_backward, _lists_backward_fake, lambda ctx, inputs, output: None, _refuse_second),
)


# ------------------------------------------------------------------------------- outside of graphs

_COMPUTE = {
    "sparsek": _rows,
    "sparsek_backward": _rows_backward,
    "sparsek_lists": _lists,
    "sparsek_lists_backward": _lists_backward,
}


def _compute(name: str, *values: Any) -> Any:
    if is_recorded(values):  # inside of a graph's making, as by torch.compile
        return getattr(torch.ops.fastattn, name)(*values)
    return _COMPUTE[name](*values)


def _in_front(n: int, x: Any, d: int | None) -> Any:
    """A tensor with the mapped axis first; anything else as it is."""
    if not isinstance(x, torch.Tensor):
        return x
    return x.expand(n, *x.shape) if d is None else x.movedim(d, 0)


def _map(function: Any, info: Any, in_dims: Any, arguments: Any) -> Any:
    """torch.vmap's rule: one more leading axis, to which lengths then broadcast, too; of lists a
    larger batch."""
    (name, *values), n = arguments, info.batch_size
    moved = [_in_front(n, x, d) for x, d in zip(values, in_dims[1:], strict=True)]
    if "lists" in name:
        moved = [x.flatten(0, 1) if isinstance(x, torch.Tensor) else x for x in moved]
    elif moved[-1] is not None:
        missing = moved[-3].dim() - 1 - moved[-1].dim()
        moved[-1] = moved[-1][(slice(None), *(None,) * missing)]
    found = apply(function, name, *moved)
    if "lists" in name:
        b = moved[0].shape[0] // n if n else 0
        of = found if isinstance(found, tuple) else (found,)
        apart = tuple(x.unflatten(0, (n, b)) for x in of)
        found = apart if isinstance(found, tuple) else apart[0]
    return found, (0,) * len(found) if isinstance(found, tuple) else 0


class _Gates(torch.autograd.Function):
    """(gates, tau), or (gates, tau, key_lists)."""

    forward = staticmethod(_compute)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.name, *values = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:], *(x for x in values if isinstance(x, torch.Tensor)))
        ctx.values = [None if isinstance(x, torch.Tensor) else (x,) for x in values]

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return _map(_Gates, info, in_dims, arguments)

    @staticmethod
    def backward(ctx: Any, dgates: Any, *_: Any) -> Any:
        n = 2 if "lists" in ctx.name else 1
        tau, *lists = ctx.saved_tensors[:n]
        tensors = iter(ctx.saved_tensors[n:])
        values = [next(tensors) if x is None else x[0] for x in ctx.values]
        found = apply(_Gradient, f"{ctx.name}_backward", tau, dgates, *lists, *values)
        return (None, found, *(None,) * (len(values) - 1))


class _Gradient(torch.autograd.Function):
    """dscores."""

    forward = staticmethod(_compute)
    backward = staticmethod(_refuse_second)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return _map(_Gradient, info, in_dims, arguments)


# --------------------------------------------------------------------------------------- the calls


def _as_tensor(x: Any) -> Any:
    if isinstance(x, torch.Tensor) or not hasattr(x, "__dlpack__"):
        return unwrapped(x)
    return torch.from_dlpack(x)  # type: ignore[attr-defined]


def _prepared(values: tuple[Any, ...]) -> list[Any]:
    scores, k, *rest = map(_as_tensor, values)
    if not isinstance(scores, torch.Tensor):
        raise TypeError(f"`scores` must be a torch tensor here, got {type(scores).__name__}")
    return [scores, float(k) if isinstance(k, int) else k, *rest]


def _call(name: str, values: list[Any]) -> Any:
    if is_recorded(values):
        return getattr(torch.ops.fastattn, name)(*values)
    if any(map(has_tangent, values)) or is_pushed_forward():
        raise NotImplementedError(f"forward-mode derivatives of {name} are not served")
    return apply(_Gates, name, *values)


def take_sparsek(*values: Any) -> Any:
    """sparsek, given every argument in the order of its signature."""
    if has_proxy(values):
        return leave_in_graph(sparsek, values)
    return _call("sparsek", _prepared(values))


def take_sparsek_lists(*values: Any) -> Any:
    """sparsek_lists, likewise."""
    if has_proxy(values):
        return leave_in_graph(sparsek_lists, values)
    given = _prepared(values)
    offset = None
    if not isinstance(given[4], torch.Tensor):
        offset, given[4] = given[4], None
    gates, tau, lists = _call("sparsek_lists", [*given, offset])
    return lists, gates, tau
