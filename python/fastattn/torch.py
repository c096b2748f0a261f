"""Torch tensors that have a gradient, or are seen by one of torch's transforms.

csrc/binding/ hands such calls to call(): the functions of this module's name are fastattn's own.
"""

import contextlib
import inspect
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from ._needs import need

need(__name__, "torch", "2.10")

import torch

from . import (
    _C,
    _frameworks,
    _operators,
    _operators_kvcache,
    _operators_sparse,
    _operators_sparsek_attention,
    _provider,
)
from ._attention import (
    attention,
    attention_backward,
    attention_kvcache,
    attention_varlen,
    attention_varlen_backward,
    merge_states,
    scaled_dot_product_attention,
)
from ._derivatives import Problem, are_deterministic, gradients_of_gradients, in_blocks
from ._merging import merge_parts  # noqa: F401 - csrc/binding/merge.c calls it
from ._operators_sparsek import take_sparsek, take_sparsek_lists  # noqa: F401 - as merge_parts
from ._routing import use_fastattn
from ._sparse import attention_sparse, attention_sparse_backward, attention_sparse_varlen
from ._sparsek_attention import (
    sparsek_attention,
    sparsek_attention_backward,
    sparsek_attention_varlen,
)
from ._sparsek_module import SparseKAttention, SparseKCache
from ._transforms import (
    apply,
    each,
    has_proxy,
    has_tangent,
    is_pushed_forward,
    is_recorded,
    leave_in_graph,
    primal,
    unwrapped,
)

__all__ = [
    "SparseKAttention",
    "SparseKCache",
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
    of_backward: tuple[str, ...]  # the arguments of its backward pass
    side: tuple[str, ...]  # the names of the arrays after the first five
    out: int
    return_lse: int


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
    places = tuple(map(names.index, arrays))
    ends = names.index("out"), names.index("return_lse")
    of_backward = tuple(inspect.signature(backward).parameters)
    return _Function(names, places, tuple(options), of_backward, side, *ends)


_FUNCTIONS = {
    "attention": _describe(attention, attention_backward),
    "attention_varlen": _describe(attention_varlen, attention_varlen_backward),
}


def _places(numbers: Iterable[int]) -> str:
    return "".join(map(chr, numbers))


class _Call(NamedTuple):
    """A call without its tensors, as csrc/binding/autograd.c has it."""

    name: str
    values: tuple[Any, ...]  # its arguments in order, None for tensors
    places: str  # where those stand, a character each

    def whole(self, arrays: Sequence[Any]) -> tuple[Any, ...]:
        """The values, the arrays among them again."""
        values = list(self.values)
        for place, x in zip(self.places, arrays, strict=True):
            values[ord(place)] = values[ord(place)] if x is None else x
        return tuple(values)

    def problem(self, side: Sequence[Any]) -> Problem:
        """Of attention and attention_varlen; side: the tensors after the five with gradients."""
        function = _FUNCTIONS[self.name]
        options = {name: self.values[at] for name, at in function.options}
        given = zip(function.side, side, strict=True)
        return Problem(options | {name: x for name, x in given if x is not None})


def _gradients(
    call: Any, saved: tuple[Any, ...], needs: tuple[bool, ...], dout: Any, dlse: Any
) -> tuple[Any, ...]:
    """None, and one for each tensor; saved: out, lse, a seed that was drawn, the tensors."""
    return _C.gradients(call, saved, needs, dout, dlse, are_deterministic())


_NEEDS = ("need_dq", "need_dk", "need_dv", "need_dmask", "need_dsink")


def _together(
    function: Any, info: Any, in_dims: Any, arguments: Sequence[Any], first: int
) -> tuple[Any, Any]:
    """The same by one call of a larger batch, of arguments that all have one from `first` on."""
    size = info.batch_size

    def joined(x: Any, d: Any) -> Any:
        if x is None:
            return None
        moved = x.expand(size, *x.shape) if d is None else x.movedim(d, 0)
        return moved.flatten(0, 1)

    together = map(joined, arguments[first:], in_dims[first:])
    found = apply(function, *arguments[:first], *together)
    apart = tuple(None if x is None else x.unflatten(0, (size, x.shape[0] // size)) for x in found)
    return apart, tuple(None if x is None else 0 for x in apart)


def _has_batch(call: _Call, arrays: Sequence[Any]) -> bool:
    """Whether q, k and v are all its arrays, and no random bits count sequences."""
    alone = call.name == "attention" and all(x is None for x in arrays[3:])
    return alone and not call.problem(arrays[5:]).get("dropout_p")


class _Transformed(torch.autograd.Function):
    """(out, lse, seed) of a call and its arrays; seed is the one that was drawn, or None."""

    @staticmethod
    def forward(call: _Call, *arrays: Any) -> Any:
        if is_recorded(arrays):  # inside of a graph's making, as by torch.compile
            return (*_operators.record(call.name, call.whole(arrays)), None)
        return _C.forward(None, call, *arrays)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.call, *arrays = inputs
        ctx.save_for_backward(*output, *arrays)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        if info.batch_size and _has_batch(arguments[0], arguments[1:]):
            return _together(_Transformed, info, in_dims, arguments, 1)
        return each(_Transformed, info, in_dims, arguments)

    @staticmethod
    def backward(ctx: Any, dout: Any, dlse: Any, _: Any) -> Any:
        return _gradients(ctx.call, ctx.saved_tensors, ctx.needs_input_grad, dout, dlse)


class _Attention(torch.autograd.Function):
    """The same outside of torch.func, in C: out, or (out, lse), as the call asks for."""

    forward = staticmethod(_C.forward)

    @staticmethod
    def backward(ctx: Any, dout: Any, dlse: Any = None) -> Any:
        return _gradients(ctx.call, ctx.saved_tensors, ctx.needs_input_grad, dout, dlse)


# Called at once; torch's own apply() looks for the function's way of differentiation every time.
_Attention._backward_cls.apply = _Attention.backward  # type: ignore[attr-defined]


class _Gradients(torch.autograd.Function):
    """(dq, dk, dv, dmask, dsink), whose own gradients torch takes of the formula."""

    @staticmethod
    def forward(
        call: _Call, needs: Any, dout: Any, dlse: Any, out: Any, lse: Any, *arrays: Any
    ) -> Any:
        rest = (False,) * (len(arrays) - len(needs))
        found = _gradients(call, (out, lse, None, *arrays), (False, *needs, *rest), dout, dlse)
        return found[1:6]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.call, _, dout, dlse, _, _, *arrays = inputs
        ctx.save_for_backward(dout, dlse, *arrays)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        if info.batch_size and _has_batch(arguments[0], arguments[6:]):
            return _together(_Gradients, info, in_dims, arguments, 2)
        return each(_Gradients, info, in_dims, arguments)

    @staticmethod
    def backward(ctx: Any, *given: Any) -> Any:
        dout, dlse, *arrays = ctx.saved_tensors
        if all(x is None for x in given):
            return (None,) * (6 + len(arrays))
        problem = ctx.call.problem(arrays[5:])
        *found, ddout, ddlse = gradients_of_gradients(problem, arrays[:5], dout, dlse, given)
        return (None, None, ddout, ddlse, None, None, *found, *(None,) * (len(arrays) - 5))


# csrc/binding/autograd.c calls it, too.
follow: Any = super(torch.autograd.Function, _Attention).apply


# ------------------------------------------------------------------------------------- the calls


def call(name: str, values: tuple[Any, ...]) -> Any:
    """A public function that was given a tensor with a gradient; `values` in its order."""
    return _CALLS[name](name, values)


def _check_queries(q: Any, name: str = "q") -> None:
    if not isinstance(q, torch.Tensor):
        kind = type(q).__qualname__
        raise TypeError(
            f"`{name}` must be a torch tensor where a gradient is asked for, got {kind}"
        )


def _refuse(out: Any, slopes: Any) -> None:
    if out is not None:
        raise ValueError("`out` must be None where a gradient is asked for, got an array")
    if getattr(slopes, "requires_grad", False) or has_tangent(slopes):
        raise NotImplementedError(
            "`alibi_slopes` requires grad, and its gradient is not served: pass its detach()"
        )


def _as_tensor(x: Any) -> Any:
    """An array of another framework as a tensor; anything else as it is."""
    if isinstance(x, torch.Tensor) or not hasattr(x, "__dlpack__"):
        return x
    if str(getattr(x, "dtype", None)) == "bool":
        return torch.tensor(x)  # of which old NumPy's DLPack knows nothing
    return torch.from_dlpack(x)  # type: ignore[attr-defined]


def _has_tangents(tensors: Sequence[Any]) -> bool:
    if torch.autograd.forward_ad._current_level < 0:
        return False
    return any(map(has_tangent, tensors)) or is_pushed_forward()


def _draw(values: dict[str, Any]) -> None:
    """Draws the seed of dropout where C does not: a transform or a graph is to see it."""
    p = values["dropout_p"]
    if values["seed"] is None and isinstance(p, (int, float)) and 0 < p <= 1:
        values["seed"] = _frameworks.draw_seed(values["q"])


def _take_arrays(function: _Function, arguments: list[Any]) -> list[Any]:
    """Its tensors out of the arguments, None for the others."""
    arrays: list[Any] = [None] * len(function.arrays)
    for n, at in enumerate(function.arrays):
        if isinstance(arguments[at], torch.Tensor):
            arrays[n], arguments[at] = arguments[at], None
    return arrays


def _call_attention(name: str, values: tuple[Any, ...]) -> Any:
    function = _FUNCTIONS[name]
    _check_queries(values[0])
    _refuse(values[function.out], values[function.arrays[5]])
    rest = list(map(_as_tensor, values))
    if torch.is_autocast_enabled(rest[0].device.type):
        for at in function.arrays[:4]:
            if isinstance(rest[at], torch.Tensor):
                rest[at] = _frameworks.autocast(rest[at])
    if torch._C._are_functorch_transforms_active():
        given = dict(zip(function.names, rest, strict=True))
        _draw(given)
        rest = list(given.values())
    arrays = _take_arrays(function, rest)
    wants_lse, rest[function.return_lse] = rest[function.return_lse], True
    call = _Call(name, tuple(rest), _places(function.arrays))
    if _has_tangents(arrays):
        out, lse = in_blocks(call.problem(arrays[5:]), *arrays[:5])
    elif torch._C._are_functorch_transforms_active():
        out, lse, _ = apply(_Transformed, call, *arrays)
    else:
        out, lse = follow(call, *arrays)
    return (out, lse) if wants_lse else out


def _cast(*arrays: Any) -> Sequence[Any]:
    """What autocast makes of them."""
    if not torch.is_autocast_enabled(arrays[0].device.type):
        return arrays
    return [_frameworks.autocast(x) if isinstance(x, torch.Tensor) else x for x in arrays]


_DEFAULTS = {n: p.default for n, p in inspect.signature(attention).parameters.items()}


def _call_sdpa(name: str, values: tuple[Any, ...]) -> Any:
    _check_queries(values[0], "query")
    query, key, value, mask, dropout_p, is_causal, scale, enable_gqa = map(_as_tensor, values)
    query, key, value, mask = _cast(query, key, value, mask)
    bias = _frameworks.causal_bias(mask)
    _check_bias(query, key, mask, bias, is_causal)
    shape = None
    tensors = [x for x in (query, key, value, mask) if isinstance(x, torch.Tensor)]
    is_seen = torch._C._are_functorch_transforms_active() or is_recorded(tensors)
    is_seen = is_seen or _has_tangents(tensors)
    if not _is_plain(query, key, value, enable_gqa):
        with contextlib.nullcontext() if is_seen else torch.no_grad():
            is_seen or _C.explain(
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
    if is_seen:
        general = dict(_DEFAULTS, q=query, k=key, v=value, scale=scale, dropout_p=dropout_p)
        general["causal"] = "top-left" if is_causal or (bias and bias[0]) else bias is not None
        general["mask"] = None if bias else mask
        out = _in_order(general)
        return out if shape is None else out.reshape(shape)
    rest = (None, None, None, mask if bias else None, dropout_p, is_causal, scale, enable_gqa)
    tensors = [query, key, value] if bias else [query, key, value, mask]
    out = follow(_Call(name, rest, _places(range(len(tensors)))), *tensors)
    return out if shape is None else out.reshape(shape)


def _check_bias(query: Any, key: Any, mask: Any, bias: Any, is_causal: Any) -> None:
    """What a graph leaves no trace of, as prepare_sdpa() in csrc/binding/ has it."""
    if mask is not None and is_causal:
        raise _C.SDPAValueError("`attn_mask` must be None with is_causal=True, got both")
    if bias is None or bias[0] or query.dim() < 2 or key.dim() < 2:
        return
    if bias[1:] != (query.shape[-2], key.shape[-2]):
        raise _C.SDPAValueError(
            f"`attn_mask` must be the CausalBias of {query.shape[-2]} queries and "
            f"{key.shape[-2]} keys, got one of {bias[1]} and {bias[2]}"
        )


def _in_order(given: dict[str, Any]) -> Any:
    """attention, its output's axes in the order of q's: as the layout has them, or by the other."""
    q = given["q"]
    swapped = q.shape[1] > 1 and q.shape[2] > 1 and q.stride(1) < q.stride(2)
    if swapped:
        given["layout"] = "bshd"
        given |= {n: given[n].transpose(1, 2) for n in ("q", "k", "v")}
    out = record("attention", tuple(given.values()))
    return out.transpose(1, 2) if swapped else out


def _is_plain(query: Any, key: Any, value: Any, enable_gqa: Any) -> bool:
    """Whether they are what attention takes, too: rank 4, nothing to broadcast but whole groups."""
    if not query.dim() == key.dim() == value.dim() == 4:
        return False
    b, hq = query.shape[:2]
    of_keys, of_values = key.shape[:2], value.shape[:2]
    return bool(of_keys == of_values and of_keys[0] == b and 0 < of_keys[1] <= hq)


def _as_rank_4(q: Any, k: Any, v: Any, mask: Any) -> tuple[Any, Any, Any, Any, Any]:
    """(b, h, s, d) of what the drop-in has checked, and the result's shape."""
    has_heads = max(q.dim(), k.dim(), v.dim()) > 2
    rank = max(q.dim(), k.dim(), v.dim(), 3)
    q, k, v = (x[(None,) * (rank - x.dim())] if x.dim() < rank else x for x in (q, k, v))
    lead = torch.broadcast_shapes(  # type: ignore[no-untyped-call]
        *(x.shape[:-3] for x in (q, k, v))
    )
    heads = max(x.shape[-3] for x in (q, k, v))
    if not heads or not q.shape[-3]:
        heads = q.shape[-3]
    shape = (*lead, *((heads,) if has_heads else ()), q.shape[-2], v.shape[-1])
    b = math.prod(lead)

    def rank_4(x: Any) -> Any:
        if x.shape[-3] not in (1, heads) or k.shape[-3] != v.shape[-3]:
            x = x.repeat_interleave(heads // max(1, x.shape[-3]), -3)
        elif x is q or x.shape[-3] != k.shape[-3]:
            x = x.expand(*x.shape[:-3], heads, *x.shape[-2:])
        return x.expand(*lead, *x.shape[-3:]).reshape(b, *x.shape[-3:])

    if mask is not None:
        mask = mask[(None,) * (rank - mask.dim())] if mask.dim() < rank else mask
        if any(n != 1 for n in mask.shape[:-3]):
            mask = mask.expand(*lead, *mask.shape[-3:]).reshape(b, *mask.shape[-3:])
        else:
            mask = mask.reshape(mask.shape[-3:])
    return rank_4(q), rank_4(k), rank_4(v), mask, shape


def _call_backward(name: str, values: tuple[Any, ...]) -> Any:
    """attention_backward of arrays that have a gradient themselves."""
    forward = name.removesuffix("_backward")
    function = _FUNCTIONS[forward]
    given = dict(zip(function.of_backward, map(_as_tensor, values), strict=True))
    _check_queries(given["q"])
    _refuse(None, given["alibi_slopes"])
    for x in ("dq", "dk", "dv"):
        if given[x] is not None:
            raise ValueError(f"`{x}` must be None where a gradient is asked for, got an array")
    rest = [given.get(n) for n in function.names]
    rest[function.out] = None  # of the backward pass it is another
    arrays = _take_arrays(function, rest)
    call = _Call(forward, tuple(rest), _places(function.arrays))
    needs = tuple(given[n] for n in _NEEDS)
    of = (given[x] for x in ("dout", "dlse"))
    results = (given[x].detach() for x in ("out", "lse"))
    return apply(_Gradients, call, needs, *of, *results, *arrays)


def _call_kvcache(name: str, values: tuple[Any, ...]) -> Any:
    raise NotImplementedError(
        "attention_kvcache takes plain tensors, none inside of torch.vmap or torch.func.grad"
    )


def record(name: str, values: tuple[Any, ...]) -> Any:
    """A public function that was given what torch transforms, or records into a graph."""
    values = tuple(map(unwrapped, values))
    if has_proxy(values):
        return leave_in_graph(_PUBLIC[name], values)
    if name.startswith(("attention_sparse", "sparsek_attention")):
        return call(name, values)
    if name != "scaled_dot_product_attention" and is_recorded(values):
        if name == "attention_kvcache":
            return _operators_kvcache.record(values)
        return _operators.record(name, values)
    return call(name, values)


_CALLS = {
    "attention": _call_attention,
    "attention_varlen": _call_attention,
    "attention_kvcache": _call_kvcache,
    **dict.fromkeys(
        ("attention_sparse", "attention_sparse_backward", "attention_sparse_varlen"),
        _operators_sparse.call,
    ),
    **dict.fromkeys(
        ("sparsek_attention", "sparsek_attention_backward", "sparsek_attention_varlen"),
        _operators_sparsek_attention.call,
    ),
    "scaled_dot_product_attention": _call_sdpa,
    "attention_backward": _call_backward,
    "attention_varlen_backward": _call_backward,
}


_PUBLIC = {
    function.__name__: function
    for function in (
        *(attention, attention_kvcache, attention_varlen, scaled_dot_product_attention),
        *(attention_backward, attention_varlen_backward),
        *(attention_sparse, attention_sparse_backward, attention_sparse_varlen),
        *(sparsek_attention, sparsek_attention_backward, sparsek_attention_varlen),
    )
}


def explain(name: str, values: tuple[Any, ...]) -> Any:
    """_C.explain() of tensors that have a gradient, so that a backward pass is to serve it, too."""
    tensors = [x for x in values if isinstance(x, torch.Tensor)]
    if any(_frameworks.refusal(x) is True for x in tensors):
        raise NotImplementedError("explain needs tensors with values, outside of what is traced")
    if function := _FUNCTIONS.get(name):
        _refuse(values[function.out], values[function.arrays[5]])
    is_followed = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    primals = tuple(map(primal, values))
    with torch.no_grad():
        listed = name.startswith(("attention_sparse", "sparsek_attention"))  # served both ways
        if is_followed and not listed and not name.endswith("_backward"):
            return _C.explain_forward(name, primals)
        names = inspect.signature(_PUBLIC[name]).parameters
        return _C.explain(name, **dict(zip(names, primals, strict=True)))
