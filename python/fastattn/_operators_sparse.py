"""attention_sparse as an operator of torch, and its backward: for graphs, and for gradients.

csrc/binding/sparse.c hands a call here that has a gradient, or is recorded; one operator serves
padded and packed sequences.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from . import _C
from ._derivatives import are_deterministic
from ._operators import Untraced, define, flat, lse_dtype, whole
from ._sparse import attention_sparse, attention_sparse_backward, attention_sparse_varlen
from ._transforms import is_recorded

_FOLLOWED = ("q", "k", "v", "gate", "sink")  # may have a gradient
_PACKED = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")
_PADDED = ("q_lengths", "k_lengths", "k_start")
_ARRAYS = (*_FOLLOWED, "key_lists", "counts", "q_offset", *_PADDED, *_PACKED)
_OPTIONS = {
    "max_seqlen_q": "SymInt?",
    "max_seqlen_k": "SymInt?",
    "q_block": "int",
    "k_block": "int",
    "key_gate": "bool",
    "union": "bool",  # whether there is a window_union, of
    "union_left": "SymInt?",
    "union_right": "SymInt?",
    "left": "SymInt?",
    "right": "SymInt?",
    "offset": "SymInt?",
    "causal": "str",
    "softcap": "float",
    "scale": "float?",
    "layout": "str",
    "deterministic": "bool",
    "backend": "str?",
}
_NEEDS = ("need_dq", "need_dk", "need_dv", "need_dgate", "need_dsink")
_NAMES = {
    function.__name__: tuple(inspect.signature(function).parameters)
    for function in (attention_sparse, attention_sparse_backward, attention_sparse_varlen)
}


def _schema() -> str:
    needed = ("q", "k", "v", "key_lists")
    arrays = [f"Tensor {n}" if n in needed else f"Tensor? {n}" for n in _ARRAYS]
    return ", ".join([*arrays, *(f"{kind} {n}" for n, kind in _OPTIONS.items())])


def _keywords(values: Sequence[Any]) -> dict[str, Any]:
    """An operator's arguments as those of the public functions."""
    given = whole(dict(zip((*_ARRAYS, *_OPTIONS), values, strict=True)))
    ends = given.pop("union_left"), given.pop("union_right")
    given["window_union"] = ends if given.pop("union") else None
    return given


def _values(given: dict[str, Any]) -> list[Any]:
    """The other way round."""
    given = {"layout": "bhsd", **flat(given)}
    ends = given.pop("window_union")
    given["union"] = ends is not None
    given["union_left"], given["union_right"] = ends or (None, None)
    return [given.get(n) for n in (*_ARRAYS, *_OPTIONS)]


def _forward(*values: Any, mass: bool) -> tuple[Any, ...]:
    given = _keywords(values)
    packed = given["cu_seqlens_q"] is not None
    function = attention_sparse_varlen if packed else attention_sparse
    names = _NAMES[function.__name__]
    given = {n: x for n, x in given.items() if n in names}
    with torch.no_grad(), Untraced():
        found = function(**given, return_lse=True, return_mass=mass)
    return found if mass else (*found, given["q"].new_empty(0, dtype=torch.float32))


def _compute(mass: bool, *values: Any) -> tuple[Any, ...]:
    return _forward(*values, mass=mass)


def _fake(mass: bool, *values: Any) -> tuple[Any, ...]:
    given = _keywords(values)
    q, v, lists = given["q"], given["v"], given["key_lists"]
    shape = [*q.shape[:-1], v.shape[-1]]
    if given["cu_seqlens_q"] is not None:
        lse = [shape[1], shape[0]]
    else:
        lse = shape[:3] if given["layout"] == "bhsd" else [shape[0], shape[2], shape[1]]
    of_mass = q.new_empty(lists.shape if mass else 0, dtype=torch.float32)
    return q.new_empty(shape), q.new_empty(lse, dtype=lse_dtype(q)), of_mass


def _backward(dout: Any, dlse: Any, out: Any, lse: Any, needs: Sequence[bool], *values: Any) -> Any:
    given = _keywords(values)
    q, k, v, lists = (given.pop(x) for x in ("q", "k", "v", "key_lists"))
    given |= dict(zip(_NEEDS, needs, strict=True))
    with torch.no_grad(), Untraced():
        found = attention_sparse_backward(dout, q, k, v, out, lse, lists, dlse=dlse, **given)
    return tuple(q.new_empty(0) if x is None else x for x in found)


def _backward_fake(dout: Any, dlse: Any, out: Any, lse: Any, needs: Any, *values: Any) -> Any:
    return tuple(
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else values[0].new_empty(0)
        for x, need in zip(values[: len(_FOLLOWED)], needs, strict=True)
    )


def _set_up(ctx: Any, inputs: Any, output: Any) -> None:
    _, *given = inputs
    out, lse, mass = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mass)
    ctx.save_for_backward(*given[: len(_ARRAYS)], out, lse)
    ctx.options = given[len(_ARRAYS) :]


def _differentiate(ctx: Any, dout: Any, dlse: Any, _: Any) -> Any:
    *arrays, out, lse = ctx.saved_tensors
    count = 1 + len(_ARRAYS) + len(_OPTIONS)
    if dout is None and dlse is None:
        return (None,) * count
    needs = [
        bool(need) and x is not None
        for need, x in zip(ctx.needs_input_grad[1 : 1 + len(_FOLLOWED)], arrays, strict=False)
    ]
    options = list(ctx.options)
    if are_deterministic():
        options[list(_OPTIONS).index("deterministic")] = True
    operator = torch.ops.fastattn.attention_sparse_backward
    found = operator(dout, dlse, out, lse, needs, *arrays, *options)
    given = [x if need else None for x, need in zip(found, needs, strict=True)]
    return (None, *given, *(None,) * (count - 1 - len(given)))


def _set_up_nothing(ctx: Any, inputs: Any, output: Any) -> None:
    pass


def _refuse_second(ctx: Any, *_: Any) -> Any:
    raise NotImplementedError("attention_sparse has no second derivatives")


define(
    f"attention_sparse(bool mass, {_schema()}) -> (Tensor out, Tensor lse, Tensor mass_out)",
    *(_compute, _fake, _set_up, _differentiate),
)
define(
    "attention_sparse_backward(Tensor? dout, Tensor? dlse, Tensor out, Tensor lse, bool[] needs, "
    f"{_schema()}) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dgate, Tensor dsink)",
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
        results = [given[x] for x in ("dout", "dlse", "out", "lse")]
        operator = torch.ops.fastattn.attention_sparse_backward
        found = operator(*results, needs, *_values(given))
        return tuple(x if need else None for x, need in zip(found, needs, strict=True))
    if given["out"] is not None:
        raise ValueError("`out` must be None where torch records the call, got an array")
    if given["validate"]:
        if is_recorded(values):
            raise NotImplementedError("`validate` must be False where a program is recorded")
        with torch.no_grad():
            _C.explain(name, **given)
    given |= {n: ours._as_tensor(x) for n, x in given.items() if n in _ARRAYS}
    given |= zip(("q", "k", "v"), ours._cast(*(given[x] for x in ("q", "k", "v"))), strict=True)
    found = torch.ops.fastattn.attention_sparse(given["return_mass"], *_values(given))
    wanted = (True, given["return_lse"], given["return_mass"])
    asked = tuple(x for x, is_wanted in zip(found, wanted, strict=True) if is_wanted)
    return asked[0] if len(asked) == 1 else asked
