"""What torch does to functions: grad, vmap, tangents, graphs; and how a call finds out."""

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from . import _frameworks


def apply(function: Any, *arguments: Any) -> Any:
    """function.apply(), which outside of torch.func needs no Python: a signature is bound there at
    every call."""
    if torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    return super(torch.autograd.Function, function).apply(*arguments)


def each(function: Any, info: Any, in_dims: Any, arguments: Sequence[Any]) -> tuple[Any, Any]:
    """torch.vmap's rule for an autograd function: one call for each, the results stacked."""
    found = [
        apply(
            function,
            *(
                x.select(d, n) if isinstance(x, torch.Tensor) and d is not None else x
                for x, d in zip(arguments, in_dims, strict=True)
            ),
        )
        for n in range(info.batch_size)
    ]
    stacked = tuple(None if x[0] is None else torch.stack(x) for x in zip(*found, strict=True))
    return stacked, tuple(None if x is None else 0 for x in stacked)


def has_tangent(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and _frameworks.has_tangent(x)


def primal(x: Any) -> Any:
    """x without its tangent."""
    forward_ad: Any = torch.autograd.forward_ad
    return forward_ad.unpack_dual(x).primal if has_tangent(x) else x


def unwrapped(x: Any) -> Any:
    """x itself where a transform that has ended wrapped it, as one that vjp's pullback saved."""
    return torch._C._functorch.unwrap_if_dead(x) if isinstance(x, torch.Tensor) else x


def is_pushed_forward() -> bool:
    """Whether torch.func.jvp is around, whose tangents other transforms may hide."""
    functorch = torch._C._functorch
    if not torch._C._are_functorch_transforms_active():
        return False
    return any(x.key() == functorch.TransformType.Jvp for x in functorch.get_interpreter_stack())


def is_recorded(values: Sequence[Any]) -> bool:
    """Whether operators go into a graph; what vmap and grad have wrapped, they unwrap first."""
    functorch = torch._C._functorch
    tensors = [x for x in values if isinstance(x, torch.Tensor)]
    if any(functorch.is_batchedtensor(x) or functorch.is_gradtrackingtensor(x) for x in tensors):
        return False
    return _frameworks._is_recorded(torch) or any(
        functorch.is_functionaltensor(x)
        or functorch.is_legacy_batchedtensor(x)
        or _frameworks.is_fake(x)
        for x in tensors
    )


def _proxies(values: Any) -> Iterator[Any]:
    """Those of torch.fx among them, in tuples too."""
    fx: Any = sys.modules.get("torch.fx")
    for x in values if fx else ():
        if isinstance(x, tuple):
            yield from _proxies(x)
        elif isinstance(x, fx.Proxy):
            yield x


def has_proxy(values: Any) -> bool:
    """Whether torch.fx traces any of them."""
    return any(True for _ in _proxies(values))


def leave_in_graph(function: Callable[..., Any], values: tuple[Any, ...]) -> Any:
    """A node of torch.fx that calls the public function."""
    by_place, by_name = [], {}
    for x, p in zip(values, inspect.signature(function).parameters.values(), strict=True):
        if p.kind is p.KEYWORD_ONLY:
            if x is not p.default:
                by_name[p.name] = x
        else:
            by_place.append(x)
    tracer = next(_proxies(values)).tracer
    return tracer.create_proxy("call_function", function, tuple(by_place), by_name)
