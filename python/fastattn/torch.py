"""Torch tensors that have a gradient, or are seen by one of torch's transforms.

csrc/binding/ hands such calls to call(): the functions of this module's name are fastattn's own.
"""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from . import _C, _arrays, _provider
from ._attention import (
    attention,
    attention_backward,
    attention_varlen,
    attention_varlen_backward,
    merge_states,
    scaled_dot_product_attention,
)
from ._derivatives import Problem, gradients_of_gradients, in_blocks, merge
from ._routing import use_fastattn

__all__ = [
    "attention",
    "attention_varlen",
    "merge_states",
    "scaled_dot_product_attention",
    "use_fastattn",
]

_provider.register()


class _Function(NamedTuple):
    """A public function: its arguments in order, and where its arrays stand."""

    names: tuple[str, ...]
    arrays: tuple[int, ...]  # q, k, v, mask and sink first; those of the drop-in are fewer
    options: tuple[tuple[str, int], ...]  # what the backward pass takes of the others, and where
    backward: Any


_FOLLOWED = ("q", "k", "v", "mask", "sink")  # may have a gradient
_AT_THE_SIDE = (
    *("alibi_slopes", "q_offset", "q_lengths", "k_lengths", "k_start", "seed"),
    *("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k"),
)
_FORWARD_ONLY = ("return_lse", "out", "page_table")


def _describe(function: Any, backward: Any) -> _Function:
    names = tuple(inspect.signature(function).parameters)
    side = tuple(name for name in _AT_THE_SIDE if name in names)
    arrays = (*_FOLLOWED, *side)
    options = [
        (name, n) for n, name in enumerate(names) if name not in (*_FOLLOWED, *_FORWARD_ONLY)
    ]
    return _Function(names, tuple(map(names.index, arrays)), tuple(options), backward)


_FUNCTIONS = {
    "attention": _describe(attention, attention_backward),
    "attention_varlen": _describe(attention_varlen, attention_varlen_backward),
}


class _Call(NamedTuple):
    """A call without its arrays."""

    name: str  # whose backward pass it has
    forward: str  # what computes it: that, or the drop-in
    values: tuple[Any, ...]  # arguments of `forward` in order, None for arrays
    at: tuple[int, ...]  # where they stand
    options: dict[str, Any]  # of the backward pass
    side: tuple[str, ...]  # the names of the arrays after the five that have gradients

    def compute(self, arrays: Sequence[Any]) -> tuple[Any, Any, Any]:
        values = list(self.values)
        for at, array in zip(self.at, arrays, strict=False):
            if array is not None:
                values[at] = array
        (out, lse), seed = _C.forward(self.forward, tuple(values))
        return out, lse, seed

    def keywords(self, side: Sequence[Any]) -> dict[str, Any]:
        """Of the backward pass, but for mask and sink."""
        given = {n: x for n, x in zip(self.side, side, strict=False) if x is not None}
        deterministic = torch.are_deterministic_algorithms_enabled()
        more = {"deterministic": True} if deterministic else {}
        return self.options | given | more

    def problem(self, side: Sequence[Any]) -> Problem:
        return Problem(self.keywords(side))


def _gradients(
    call: _Call, needs: Sequence[bool], dout: Any, dlse: Any, arrays: Sequence[Any], results: Any
) -> tuple[Any, ...]:
    q, k, v, mask, sink, *side = arrays
    keywords = call.keywords(side)
    ends = [keywords.pop(x) for x in _PLACES] if call.name == "attention_varlen" else []
    need = dict(zip(_NEEDS, needs, strict=True))
    return _FUNCTIONS[call.name].backward(  # type: ignore[no-any-return]
        dout, q, k, v, *results, *ends, dlse=dlse, mask=mask, sink=sink, **need, **keywords
    )


_PLACES = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
_NEEDS = ("need_dq", "need_dk", "need_dv", "need_dmask", "need_dsink")


class _Attention(torch.autograd.Function):
    """(out, lse, seed) of a call and its arrays; seed is the one that was drawn, or None."""

    @staticmethod
    def forward(call: _Call, *arrays: Any) -> Any:
        return call.compute(arrays)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.call = inputs[0]
        ctx.save_for_backward(*inputs[1:], *output)

    @staticmethod
    def backward(ctx: Any, dout: Any, dlse: Any, _: Any) -> Any:
        *arrays, out, lse, seed = ctx.saved_tensors
        call = ctx.call
        if seed is not None:  # drawn
            call = call._replace(options=call.options | {"seed": seed})
        if dout is None and dlse is None:
            return (None,) * (1 + len(arrays))
        needs = ctx.needs_input_grad[1:6]
        needs = (*needs, *(False,) * (5 - len(needs)))
        whole = (*arrays, *(None,) * (5 - len(arrays)))
        if torch.is_grad_enabled():  # somebody may differentiate this, too
            found = _apply(_Gradients, call, needs, dout, dlse, out.detach(), lse.detach(), *whole)
        else:
            found = _gradients(call, needs, dout, dlse, whole, (out, lse))
        return (None, *found, *(None,) * (len(arrays) - 5))[: 1 + len(arrays)]


class _Gradients(torch.autograd.Function):
    """(dq, dk, dv, dmask, dsink), whose own gradients torch takes of the formula."""

    @staticmethod
    def forward(
        call: _Call, needs: Any, dout: Any, dlse: Any, out: Any, lse: Any, *arrays: Any
    ) -> Any:
        return _gradients(call, needs, dout, dlse, arrays, (out, lse))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.call, _, dout, dlse, _, _, *arrays = inputs
        ctx.save_for_backward(dout, dlse, *arrays)

    @staticmethod
    def backward(ctx: Any, *given: Any) -> Any:
        dout, dlse, *arrays = ctx.saved_tensors
        if all(x is None for x in given):
            return (None,) * (6 + len(arrays))
        problem = ctx.call.problem(arrays[5:])
        *found, ddout, ddlse = gradients_of_gradients(problem, arrays[:5], dout, dlse, given)
        return (None, None, ddout, ddlse, None, None, *found, *(None,) * (len(arrays) - 5))


def _apply(function: Any, *arguments: Any) -> Any:
    """function.apply(), which outside of torch.func needs no Python: a signature is bound there at
    every call."""
    if torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    return super(torch.autograd.Function, function).apply(*arguments)


# ------------------------------------------------------------------------------------- the calls


def call(name: str, values: tuple[Any, ...]) -> Any:
    """A public function that was given a tensor with a gradient; `values` in its order."""
    return _CALLS[name](name, values)


def _refuse(out: Any, slopes: Any) -> None:
    if out is not None:
        raise ValueError("`out` must be None where a gradient is asked for, got an array")
    if getattr(slopes, "requires_grad", False) or _has_tangent(slopes):
        raise NotImplementedError(
            "`alibi_slopes` requires grad, and its gradient is not served: pass its detach()"
        )


def _has_tangent(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and _arrays.has_tangent(x)


def _run(described: _Call, arrays: Sequence[Any]) -> tuple[Any, Any]:
    """out and lse, with a gradient of any order; with a tangent by the formula."""
    if torch.autograd.forward_ad._current_level >= 0 and any(map(_has_tangent, arrays)):
        whole = (*arrays, *(None,) * (5 - len(arrays)))
        return in_blocks(described.problem(whole[5:]), *whole[:5])
    out, lse, _ = _apply(_Attention, described, *arrays)
    return out, lse


def _call_attention(name: str, values: tuple[Any, ...]) -> Any:
    function = _FUNCTIONS[name]
    given = dict(zip(function.names, values, strict=True))
    _refuse(given["out"], given["alibi_slopes"])
    given["q"], given["k"], given["v"], given["mask"] = _cast(*(given[x] for x in _FOLLOWED[:4]))
    arrays = [
        x if isinstance(x := given[function.names[at]], torch.Tensor) else None
        for at in function.arrays
    ]
    rest = [x if not isinstance(x, torch.Tensor) else None for x in given.values()]
    options = {n: rest[at] for n, at in function.options}
    side = tuple(function.names[at] for at in function.arrays[5:])
    described = _Call(name, name, tuple(rest), function.arrays, options, side)
    out, lse = _run(described, arrays)
    return (out, lse) if given["return_lse"] else out


def _cast(*arrays: Any) -> Sequence[Any]:
    """What autocast makes of them."""
    if not torch.is_autocast_enabled(arrays[0].device.type):
        return arrays
    return [_arrays.autocast(x) if isinstance(x, torch.Tensor) else x for x in arrays]


_SDPA = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def _call_sdpa(name: str, values: tuple[Any, ...]) -> Any:
    query, key, value, mask, dropout_p, is_causal, scale, enable_gqa = values
    query, key, value, mask = _cast(query, key, value, mask)
    bias = _arrays.causal_bias(mask)
    shape = None
    if not _is_plain(query, key, value, enable_gqa):
        with torch.no_grad():
            _C.explain(
                name,
                query,
                key,
                value,
                mask,
                dropout_p,
                is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
            )
        query, key, value, mask, shape = _as_rank_4(query, key, value, None if bias else mask)
        enable_gqa = True
    rest = (None, None, None, mask if bias else None, dropout_p, is_causal, scale, enable_gqa)
    causal: Any = "top-left" if is_causal else False
    if bias is not None:
        causal, mask = "top-left" if bias[0] else True, None
    options = {"causal": causal, "scale": scale, "dropout_p": dropout_p}
    arrays = [query, key, value, mask]
    described = _Call("attention", name, rest, (0, 1, 2, 3)[: 3 if bias else 4], options, ())
    out, _ = _run(described, arrays[: len(described.at)])
    return out if shape is None else out.reshape(shape)


def _is_plain(query: Any, key: Any, value: Any, enable_gqa: Any) -> bool:
    """Whether they are what attention takes, too: rank 4, nothing to broadcast but whole groups."""
    if not query.dim() == key.dim() == value.dim() == 4:
        return False
    b, hq = query.shape[:2]
    of_keys, of_values = key.shape[:2], value.shape[:2]
    return bool(of_keys == of_values and of_keys[0] == b and 0 < of_keys[1] <= hq)


def _as_rank_4(q: Any, k: Any, v: Any, mask: Any) -> tuple[Any, Any, Any, Any, Any]:
    """(b, h, s, d) of what the drop-in has checked, and the result's shape."""
    rank = max(q.dim(), k.dim(), v.dim(), 3)
    q, k, v = (x[(None,) * (rank - x.dim())] if x.dim() < rank else x for x in (q, k, v))
    lead = torch.broadcast_shapes(  # type: ignore[no-untyped-call]
        *(x.shape[:-3] for x in (q, k, v))
    )
    heads = max(x.shape[-3] for x in (q, k, v))
    if not heads or not q.shape[-3]:
        heads = q.shape[-3]
    shape = (*lead, heads, q.shape[-2], v.shape[-1])

    def rank_4(x: Any) -> Any:
        if x.shape[-3] not in (1, heads) or k.shape[-3] != v.shape[-3]:
            x = x.repeat_interleave(heads // x.shape[-3], -3)
        elif x is q or x.shape[-3] != k.shape[-3]:
            x = x.expand(*x.shape[:-3], heads, *x.shape[-2:])
        return x.expand(*lead, *x.shape[-3:]).reshape(-1, *x.shape[-3:])

    if mask is not None:
        mask = mask[(None,) * (rank - mask.dim())] if mask.dim() < rank else mask
        if any(n != 1 for n in mask.shape[:-3]):
            mask = mask.expand(*lead, *mask.shape[-3:]).reshape(-1, *mask.shape[-3:])
        else:
            mask = mask.reshape(mask.shape[-3:])
    return rank_4(q), rank_4(k), rank_4(v), mask, shape


def _call_backward(name: str, values: tuple[Any, ...]) -> Any:
    """attention_backward of arrays that have a gradient themselves."""
    forward = name.removesuffix("_backward")
    function = _FUNCTIONS[forward]
    given = dict(zip(inspect.signature(function.backward).parameters, values, strict=True))
    _refuse(None, given["alibi_slopes"])
    for x in ("dq", "dk", "dv"):
        if given[x] is not None:
            raise ValueError(f"`{x}` must be None where a gradient is asked for, got an array")
    arrays = [
        x if isinstance(x := given[function.names[at]], torch.Tensor) else None
        for at in function.arrays
    ]
    options = {
        n: None if isinstance(x := given[n], torch.Tensor) else x for n, _ in function.options
    }
    side = tuple(function.names[at] for at in function.arrays[5:])
    described = _Call(forward, forward, (), function.arrays, options, side)
    needs = tuple(given[n] for n in _NEEDS)
    of = (given[x] for x in ("dout", "dlse"))
    results = (given[x].detach() for x in ("out", "lse"))
    return _apply(_Gradients, described, needs, *of, *results, *arrays)


_CALLS = {
    "attention": _call_attention,
    "attention_varlen": _call_attention,
    "scaled_dot_product_attention": _call_sdpa,
    "attention_backward": _call_backward,
    "attention_varlen_backward": _call_backward,
}


def explain(name: str, values: tuple[Any, ...]) -> Any:
    """_C.explain() of tensors that have a gradient."""
    function = {**globals()}[name]
    keywords = dict(zip(inspect.signature(function).parameters, values, strict=True))
    with torch.no_grad():
        return _C.explain(name, **keywords)


def merge_parts(outs: tuple[Any, ...], lses: tuple[Any, ...], layout: str) -> tuple[Any, Any]:
    """merge_states of tensors that have a gradient."""
    with torch.no_grad():
        _C.merge_states(outs, lses, layout)  # or a sentence says what is wrong
    return merge(outs, lses, layout)
