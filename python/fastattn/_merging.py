"""merge_states of torch tensors that have a gradient, or are seen by one of torch's transforms.

csrc/binding/merge.c hands such calls to merge_parts().
"""

from collections.abc import Sequence
from typing import Any

import torch

from . import _C, _operators
from ._attention import merge_states
from ._transforms import (
    apply,
    each,
    has_proxy,
    has_tangent,
    is_pushed_forward,
    is_recorded,
    leave_in_graph,
)


def _columns(x: Any, layout: str) -> Any:
    """A (b, h, s) array beside the columns of outs."""
    return (x if layout == "bhsd" else x.transpose(1, 2))[..., None]


def _formula(outs: Sequence[Any], lses: Sequence[Any], layout: str) -> tuple[Any, Any]:
    """merge_states itself, which torch can push tangents through."""
    real = torch.float64 if outs[0].dtype == torch.float64 else torch.float32
    lse = torch.stack([torch.where(x == torch.inf, -torch.inf, x) for x in lses])
    peak = lse.amax(0).detach()
    shift = torch.where(peak == -torch.inf, 0.0, peak)
    weights = torch.exp(lse - shift)
    total = weights.sum(0)
    none = total == 0
    total = torch.where(none, 1.0, total)
    weights = weights / total
    out = torch.zeros((), dtype=real, device=outs[0].device)
    for x, weight, part in zip(outs, weights, lse, strict=True):
        x = torch.where(_columns(part == -torch.inf, layout), 0.0, x.to(real))
        out = out + _columns(weight, layout) * x
    return out.to(outs[0].dtype), torch.where(none, -torch.inf, torch.log(total) + shift)


def _gradients(
    parts: Sequence[Any], out: Any, lse: Any, dout: Any, dlse: Any, layout: str
) -> tuple[list[Any], list[Any]]:
    """Of outs and of lses, which are parts: w_i = exp(lse_i - lse) of each reaches out, and
    w_i (out_i - out) what lse_i changes of it. Torch can differentiate them once more."""
    n, real = len(parts) // 2, lse.dtype
    shift = torch.where(lse == -torch.inf, 0.0, lse)
    dout, out = dout.to(real), out.to(real)
    douts, dlses = [], []
    for x, part in zip(parts[:n], parts[n:], strict=True):
        empty = torch.isinf(part)
        none = _columns(empty, layout)
        weight = torch.exp(torch.where(empty, shift, part) - shift)
        flow = (dout * (torch.where(none, 0.0, x.to(real)) - out)).sum(-1)
        flow = dlse + (flow if layout == "bhsd" else flow.transpose(1, 2))
        douts.append(torch.where(none, 0.0, _columns(weight, layout) * dout).to(x.dtype))
        dlses.append(torch.where(empty, 0.0, weight * flow))
    return douts, dlses


class _Merge(torch.autograd.Function):
    """(out, lse) of layout, outs and lses."""

    @staticmethod
    def forward(layout: str, *parts: Any) -> Any:
        n = len(parts) // 2
        return _C.merge_states(parts[:n], parts[n:], layout)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.layout, *parts = inputs
        ctx.save_for_backward(*parts, *output)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return each(_Merge, info, in_dims, arguments)

    @staticmethod
    def backward(ctx: Any, dout: Any, dlse: Any) -> Any:
        *parts, out, lse = ctx.saved_tensors
        douts, dlses = _gradients(parts, out, lse, dout, dlse, ctx.layout)
        return None, *douts, *dlses


def merge_parts(outs: tuple[Any, ...], lses: tuple[Any, ...], layout: str) -> Any:
    """merge_states of tensors that have a gradient, or that a transform sees."""
    parts = (*outs, *lses)
    if has_proxy(parts):
        return leave_in_graph(merge_states, (outs, lses, layout))
    if is_recorded(parts):
        return torch.ops.fastattn.merge_states(list(outs), list(lses), layout)
    if any(map(has_tangent, parts)) or is_pushed_forward():
        return _formula(outs, lses, layout)
    return apply(_Merge, layout, *parts)


# ------------------------------------------------------------------------------------ the operator


def _forward(outs: list[Any], lses: list[Any], layout: str) -> Any:
    with torch.no_grad(), _operators.Untraced():
        return merge_states(outs, lses, layout=layout)  # type: ignore[arg-type]


def _forward_fake(outs: list[Any], lses: list[Any], layout: str) -> Any:
    return outs[0].new_empty(outs[0].shape), lses[0].new_empty(lses[0].shape)


def _set_up(ctx: Any, inputs: Any, output: Any) -> None:
    outs, lses, ctx.layout = inputs
    ctx.save_for_backward(*outs, *lses, *output)


def _differentiate(ctx: Any, dout: Any, dlse: Any) -> Any:
    *parts, out, lse = ctx.saved_tensors
    return (*_gradients(parts, out, lse, dout, dlse, ctx.layout), None)


_operators.define(
    "merge_states(Tensor[] outs, Tensor[] lses, str layout) -> (Tensor out, Tensor lse)",
    *(_forward, _forward_fake, _set_up, _differentiate),
)
