"""attention as operators of torch, fastattn::attention and its backward: for graphs.

torch.compile, torch.export, make_fx and torch.jit.trace record them; an eager call does not pass
here. The public functions become operators by record(), in what is traced.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from ._attention import (
    attention,
    attention_backward,
    attention_varlen,
    attention_varlen_backward,
)
from ._derivatives import Problem, are_deterministic, gradients_of_gradients

# The arguments of both operators but dout and dlse: those of attention and attention_varlen, of
# which each call has one kind. None where Python's None means a default; a window is two.
_ARRAYS = (
    *("q", "k", "v", "mask", "sink", "alibi_slopes", "q_offset", "q_lengths", "k_lengths"),
    *("k_start", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "page_table"),
    "seed",
)
_OPTIONS = {
    "max_seqlen_q": "SymInt?",
    "max_seqlen_k": "SymInt?",
    "left": "SymInt?",
    "right": "SymInt?",
    "offset": "SymInt?",
    "number": "int?",  # of the seed
    "causal": "str",
    "softcap": "float",
    "scale": "float?",
    "dropout_p": "float",
    "layout": "str",
    "deterministic": "bool",
    "batch_invariant": "bool",
    "backend": "str?",
}
_CAUSAL = {"": False, "bottom-right": True, "top-left": "top-left"}
# An argument that is an array or an int, and its name as an int.
_NUMBERS = {"q_offset": "offset", "seed": "number", "cache_seqlens": "length"}
_NEEDS = ("need_dq", "need_dk", "need_dv", "need_dmask", "need_dsink")


def _schema() -> str:
    arrays = [f"Tensor {n}" if n in "qkv" else f"Tensor? {n}" for n in _ARRAYS]
    return ", ".join([*arrays, *(f"{kind} {n}" for n, kind in _OPTIONS.items())])


def flat(given: dict[str, Any]) -> dict[str, Any]:
    """A public function's arguments as an operator has them, where each is of one type."""
    given = dict(given)
    given["left"], given["right"] = given.pop("window") or (None, None)
    for name, number in _NUMBERS.items():
        if name in given and not isinstance(given[name], torch.Tensor):
            given[number], given[name] = given[name], None
    given["causal"] = {False: "", True: "bottom-right"}.get(given["causal"], "top-left")
    for name in ("softcap", "dropout_p", "scale"):
        if given.get(name) is not None:
            given[name] = float(given[name])
    return given


def whole(given: dict[str, Any]) -> dict[str, Any]:
    """The other way round."""
    given = dict(given)
    left, right = given.pop("left"), given.pop("right")
    given["causal"] = _CAUSAL[given["causal"]]
    given["window"] = None if left is None and right is None else (left, right)
    for name, number in _NUMBERS.items():
        if (value := given.pop(number, None)) is not None:
            given[name] = value
    return given


def _keywords(values: Sequence[Any]) -> dict[str, Any]:
    """An operator's arguments as those of attention or attention_varlen, in one dict."""
    given = whole(dict(zip((*_ARRAYS, *_OPTIONS), values, strict=True)))
    packed = given["cu_seqlens_q"] is not None
    elsewhere = (
        ("q_lengths", "k_lengths", "k_start", "layout")
        if packed
        else (
            "cu_seqlens_q",
            "cu_seqlens_k",
            "seqused_q",
            "seqused_k",
            "max_seqlen_q",
            "max_seqlen_k",
            "page_table",
        )
    )
    return {n: x for n, x in given.items() if n not in elsewhere}


def _values(given: dict[str, Any]) -> list[Any]:
    """The other way round, of what attention or attention_varlen was given."""
    given = {"layout": "bhsd", **flat(given)}
    return [given.get(n) for n in (*_ARRAYS, *_OPTIONS)]


def _shapes(given: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """Of out and lse."""
    shape = [*given["q"].shape[:-1], given["v"].shape[-1]]
    if "cu_seqlens_q" in given:
        return shape, [shape[1], shape[0]]
    b, h, s = shape[:3] if given["layout"] == "bhsd" else (shape[0], shape[2], shape[1])
    return shape, [b, h, s]


def lse_dtype(q: Any) -> Any:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


class Untraced:
    """torch.jit.trace goes on recording while an operator runs."""

    def __enter__(self) -> None:
        self.state = torch._C._get_tracing_state()
        if self.state is not None:
            torch._C._set_tracing_state(None)  # type: ignore[attr-defined]

    def __exit__(self, *_: Any) -> None:
        if self.state is not None:
            torch._C._set_tracing_state(self.state)  # type: ignore[attr-defined]


def _forward(*values: Any) -> tuple[Any, Any]:
    given = _keywords(values)
    q, k, v = (given.pop(x) for x in "qkv")
    with torch.no_grad(), Untraced():
        if "cu_seqlens_q" not in given:
            return attention(q, k, v, return_lse=True, **given)
        ends = [given.pop(x) for x in _PLACES]
        return attention_varlen(q, k, v, *ends, return_lse=True, **given)


_PLACES = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")


def _forward_fake(*values: Any) -> tuple[Any, Any]:
    given = _keywords(values)
    q = given["q"]
    shape, lse_shape = _shapes(given)
    return q.new_empty(shape), q.new_empty(lse_shape, dtype=lse_dtype(q))


def _backward(dout: Any, dlse: Any, out: Any, lse: Any, needs: Sequence[bool], *values: Any) -> Any:
    given = _keywords(values)
    q, k, v = (given.pop(x) for x in "qkv")
    more = dict(zip(_NEEDS, needs, strict=True), dlse=dlse, **given)
    with torch.no_grad(), Untraced():
        if "cu_seqlens_q" not in given:
            found = attention_backward(dout, q, k, v, out, lse, **more)
        else:
            ends = [more.pop(x) for x in _PLACES]
            found = attention_varlen_backward(dout, q, k, v, out, lse, *ends, **more)
    return tuple(q.new_empty(0) if x is None else x for x in found)


def _backward_fake(dout: Any, dlse: Any, out: Any, lse: Any, needs: Any, *values: Any) -> Any:
    of = (*values[:5],)
    return tuple(
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else values[0].new_empty(0)
        for x, need in zip(of, needs, strict=True)
    )


def _set_up(ctx: Any, inputs: Any, output: Any) -> None:
    arrays = inputs[: len(_ARRAYS)]
    ctx.save_for_backward(*arrays, *output)
    ctx.options = inputs[len(_ARRAYS) :]


def _differentiate(ctx: Any, dout: Any, dlse: Any) -> Any:
    *arrays, out, lse = ctx.saved_tensors
    needs = [
        bool(need) and x is not None and x.is_floating_point()
        for need, x in zip(ctx.needs_input_grad[:5], arrays[:5], strict=True)
    ]
    options = list(ctx.options)
    if are_deterministic():
        options[list(_OPTIONS).index("deterministic")] = True
    operator = torch.ops.fastattn.attention_backward
    found = operator(dout, dlse, out, lse, needs, *arrays, *options)
    given = [x if need else None for x, need in zip(found, needs, strict=True)]
    return (*given, *(None,) * (len(_ARRAYS) + len(_OPTIONS) - 5))


def _set_up_backward(ctx: Any, inputs: Any, output: Any) -> None:
    dout, dlse, _, _, needs, *rest = inputs
    ctx.save_for_backward(dout, dlse, *rest[: len(_ARRAYS)])
    ctx.needs, ctx.options = needs, rest[len(_ARRAYS) :]


def _differentiate_backward(ctx: Any, *given: Any) -> Any:
    dout, dlse, *arrays = ctx.saved_tensors
    given = tuple(x if need else None for x, need in zip(given, ctx.needs, strict=True))
    problem = Problem(_keywords([*arrays, *ctx.options]))
    *found, ddout, ddlse = gradients_of_gradients(problem, arrays[:5], dout, dlse, given)
    return (ddout, ddlse, None, None, None, *found, *(None,) * (len(arrays) + len(_OPTIONS) - 5))


_library: Any = torch.library.Library("fastattn", "DEF")  # type: ignore[no-untyped-call]


def define(
    schema: str, function: Any, fake: Any, set_up: Any = None, differentiate: Any = None
) -> None:
    """An operator fastattn::name of this schema, for the CPU and CUDA."""
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _library.impl(name, function, key)
    torch.library.register_fake(f"fastattn::{name}", fake, lib=_library)
    if differentiate:
        torch.library.register_autograd(
            f"fastattn::{name}", differentiate, setup_context=set_up, lib=_library
        )


define(
    f"attention({_schema()}) -> (Tensor out, Tensor lse)",
    *(_forward, _forward_fake, _set_up, _differentiate),
)
define(
    "attention_backward(Tensor? dout, Tensor? dlse, Tensor out, Tensor lse, bool[] needs, "
    f"{_schema()}) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dmask, Tensor dsink)",
    *(_backward, _backward_fake, _set_up_backward, _differentiate_backward),
)


# ------------------------------------------------------------------------------ what is traced


def record(name: str, values: tuple[Any, ...]) -> Any:
    """A public function's call as an operator; `values` in the order of its signature."""
    from . import torch as ours

    function: Any = {
        "attention": attention,
        "attention_varlen": attention_varlen,
        "attention_backward": attention_backward,
        "attention_varlen_backward": attention_varlen_backward,
    }[name]
    given = dict(zip(inspect.signature(function).parameters, values, strict=True))
    if name.endswith("_backward"):
        return _record_backward(given)
    if given["out"] is not None:
        raise ValueError("`out` must be None where torch records the call, got an array")
    ours._refuse(None, given["alibi_slopes"])
    is_followed = any(getattr(x, "requires_grad", False) for x in values)
    if given.get("page_table") is not None and torch.is_grad_enabled() and is_followed:
        raise NotImplementedError(
            "`page_table` must be None where a gradient is asked for: keys in pages have none"
        )
    cast = ours._cast(*(given[x] for x in ("q", "k", "v", "mask")))
    given |= zip(("q", "k", "v", "mask"), cast, strict=True)
    ours._draw(given)
    out, lse = torch.ops.fastattn.attention(*_values(given))
    return (out, lse) if given["return_lse"] else out


def _record_backward(given: dict[str, Any]) -> Any:
    needs = [given[x] for x in _NEEDS]
    results = [given[x] for x in ("dout", "dlse", "out", "lse")]
    found = torch.ops.fastattn.attention_backward(*results, needs, *_values(given))
    return tuple(x if need else None for x, need in zip(found, needs, strict=True))
