"""sparsek_attention as an operator of torch, and its backward: for graphs, and for gradients.

csrc/binding/selection.c hands a call here that has a gradient, or is recorded; one operator serves
padded and packed sequences.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from ._derivatives import are_deterministic
from ._operators import Untraced, define, lse_dtype
from ._sparsek_attention import (
    sparsek_attention,
    sparsek_attention_backward,
    sparsek_attention_varlen,
)

_FOLLOWED = ("q", "k", "v", "scores", "sink")  # may have a gradient
_ARRAYS = (
    *(*_FOLLOWED, "q_offset", "q_lengths", "k_lengths", "k_start"),
    *("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k"),
)
_OPTIONS = {
    "k_keep": "float",
    "window": "SymInt",
    "max_seqlen_q": "SymInt?",
    "max_seqlen_k": "SymInt?",
    "key_gate": "bool",
    "keep_all": "bool",
    "offset": "SymInt?",  # q_offset that is no array
    "softcap": "float",
    "scale": "float?",
    "layout": "str",
    "deterministic": "bool",
    "backend": "str?",
}
_NEEDS = ("need_dq", "need_dk", "need_dv", "need_dscores", "need_dsink")
_RESULTS = ("out", "lse", "tau", "ends")
_NAMES = {
    function.__name__: tuple(inspect.signature(function).parameters)
    for function in (
        *(sparsek_attention, sparsek_attention_backward),
        sparsek_attention_varlen,
    )
}


def _schema() -> str:
    needed = ("q", "k", "v", "scores")
    arrays = [f"Tensor {n}" if n in needed else f"Tensor? {n}" for n in _ARRAYS]
    return ", ".join([*arrays, *(f"{kind} {n}" for n, kind in _OPTIONS.items())])


def _keywords(values: Sequence[Any]) -> dict[str, Any]:
    """An operator's arguments as those of the public functions."""
    given = dict(zip((*_ARRAYS, *_OPTIONS), values, strict=True))
    if (offset := given.pop("offset")) is not None:
        given["q_offset"] = offset
    return given


def _values(given: dict[str, Any]) -> list[Any]:
    """The other way round."""
    given = {"layout": "bhsd", **given}
    if not isinstance(given["q_offset"], torch.Tensor):
        given["offset"], given["q_offset"] = given["q_offset"], None
    for name in ("k_keep", "softcap", "scale"):
        if given[name] is not None:
            given[name] = float(given[name])
    return [given.get(n) for n in (*_ARRAYS, *_OPTIONS)]


def _forward(*values: Any) -> tuple[Any, ...]:
    given = _keywords(values)
    packed = given["cu_seqlens_q"] is not None
    function = sparsek_attention_varlen if packed else sparsek_attention
    names = _NAMES[function.__name__]
    given = {n: x for n, x in given.items() if n in names}
    with torch.no_grad(), Untraced():
        return tuple(function(**given, return_lse=True, return_selection=True))


def _fake(*values: Any) -> tuple[Any, ...]:
    given = _keywords(values)
    q, v, scores = given["q"], given["v"], given["scores"]
    shape = [*q.shape[:-1], v.shape[-1]]
    if given["cu_seqlens_q"] is not None:
        lse = [shape[1], shape[0]]
    else:
        lse = shape[:3] if given["layout"] == "bhsd" else [shape[0], shape[2], shape[1]]
    real = lse_dtype(q)
    return (
        q.new_empty(shape),
        q.new_empty(lse, dtype=real),
        q.new_empty([*scores.shape[:-1], lse[-1]], dtype=real),
        q.new_empty(scores.shape, dtype=torch.int32),
    )


def _backward(dout: Any, dlse: Any, results: Sequence[Any], needs: Any, *values: Any) -> Any:
    given = _keywords(values)
    given |= dict(zip(_NEEDS, needs, strict=True), dout=dout, dlse=dlse)
    given |= dict(zip(_RESULTS, results, strict=True))
    with torch.no_grad(), Untraced():
        found = sparsek_attention_backward(**given)
    return tuple(given["q"].new_empty(0) if x is None else x for x in found)


def _backward_fake(dout: Any, dlse: Any, results: Any, needs: Any, *values: Any) -> Any:
    return tuple(
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else values[0].new_empty(0)
        for x, need in zip(values[: len(_FOLLOWED)], needs, strict=True)
    )


def _set_up(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*inputs[: len(_ARRAYS)], *output)
    ctx.options = inputs[len(_ARRAYS) :]


def _differentiate(ctx: Any, dout: Any, dlse: Any, *_: Any) -> Any:
    arrays, results = ctx.saved_tensors[: len(_ARRAYS)], ctx.saved_tensors[len(_ARRAYS) :]
    count = len(_ARRAYS) + len(_OPTIONS)
    if dout is None and dlse is None:
        return (None,) * count
    needs = [
        bool(need) and x is not None
        for need, x in zip(ctx.needs_input_grad[: len(_FOLLOWED)], arrays, strict=False)
    ]
    options = list(ctx.options)
    if are_deterministic():
        options[list(_OPTIONS).index("deterministic")] = True
    operator = torch.ops.fastattn.sparsek_attention_backward
    found = operator(dout, dlse, list(results), needs, *arrays, *options)
    given = [x if need else None for x, need in zip(found, needs, strict=True)]
    return (*given, *(None,) * (count - len(given)))


def _set_up_nothing(ctx: Any, inputs: Any, output: Any) -> None:
    pass


def _refuse_second(ctx: Any, *_: Any) -> Any:
    raise NotImplementedError("sparsek_attention has no second derivatives")


define(
    f"sparsek_attention({_schema()}) -> (Tensor out, Tensor lse, Tensor tau, Tensor ends)",
    *(_forward, _fake, _set_up, _differentiate),
)
define(
    "sparsek_attention_backward(Tensor? dout, Tensor? dlse, Tensor[] results, bool[] needs, "
    f"{_schema()}) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dscores, Tensor dsink)",
    *(_backward, _backward_fake, _set_up_nothing, _refuse_second),
)


def call(name: str, values: tuple[Any, ...]) -> Any:
    """A public function as the operator; `values` in the order of its signature."""
    from . import torch as ours

    given = dict(zip(_NAMES[name], values, strict=True))
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            f"{name} takes plain tensors, none inside of torch.vmap or torch.func"
        )
    ours._check_queries(given["q"])
    if name.endswith("_backward"):
        needs = [given[x] for x in _NEEDS]
        results = [given[x] for x in _RESULTS]
        operator = torch.ops.fastattn.sparsek_attention_backward
        found = operator(given["dout"], given["dlse"], results, needs, *_values(given))
        return tuple(x if need else None for x, need in zip(found, needs, strict=True))
    if given["out"] is not None:
        raise ValueError("`out` must be None where torch records the call, got an array")
    given |= {n: ours._as_tensor(x) for n, x in given.items() if n in _ARRAYS}
    given |= zip(("q", "k", "v"), ours._cast(*(given[x] for x in ("q", "k", "v"))), strict=True)
    found = torch.ops.fastattn.sparsek_attention(*_values(given))
    wanted = (True, given["return_lse"], *(given["return_selection"],) * 2)
    asked = tuple(x for x, is_wanted in zip(found, wanted, strict=True) if is_wanted)
    return asked[0] if len(asked) == 1 else asked
