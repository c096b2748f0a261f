"""torch.compile is told of the public functions when it is first loaded, before it meets them.

They are builtins, which it cannot look into: in a graph each is a call, of which fastattn.torch
makes operators. Torch itself is not imported for that, so its import of torch._dynamo is watched.
"""

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from typing import Any

_DYNAMO = "torch._dynamo"


class _Watch(importlib.abc.MetaPathFinder):
    """Finds nothing itself: it lets torch._dynamo load as ever, and then speaks to it."""

    def __init__(self, functions: Sequence[Callable[..., Any]]) -> None:
        self._functions = functions

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != _DYNAMO:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_tell(module: Any) -> None:
            load(module)
            _tell(module, self._functions)

        spec.loader.exec_module = load_and_tell  # type: ignore[method-assign]
        return spec


def _tell(dynamo: Any, functions: Sequence[Callable[..., Any]]) -> None:
    for function in functions:
        if function.__name__ == "scaled_dot_product_attention":
            _tell_of_bias(dynamo, function)
        else:
            dynamo.allow_in_graph(function)


def _tell_of_bias(dynamo: Any, sdpa: Callable[..., Any]) -> None:
    """torch's CausalBias would come into a graph without its class: what it says goes instead."""
    torch = sys.modules["torch"]
    bias = importlib.import_module("torch.nn.attention.bias")
    modes = importlib.import_module("torch.utils._python_dispatch")

    def call(query: Any, key: Any, value: Any, mask: Any, of: Any, *rest: Any, **more: Any) -> Any:
        if of is not None:
            with modes._disable_current_modes():  # a fake tensor is of no other class
                mask = torch.empty(0).as_subclass(bias.CausalBias)
            mask.variant, mask.seq_len_q, mask.seq_len_kv = of
        return sdpa(query, key, value, mask, *rest, **more)

    dynamo.allow_in_graph(call)

    def traced(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: Any = 0.0,
        is_causal: Any = False,
        *,
        scale: Any = None,
        enable_gqa: Any = False,
    ) -> Any:
        of = None
        if isinstance(attn_mask, bias.CausalBias):
            of = int(attn_mask.variant), attn_mask.seq_len_q, attn_mask.seq_len_kv
            attn_mask = None
        rest = dropout_p, is_causal
        return call(query, key, value, attn_mask, of, *rest, scale=scale, enable_gqa=enable_gqa)

    dynamo.substitute_in_graph(sdpa)(traced)


def watch(functions: Sequence[Callable[..., Any]]) -> None:
    """Makes the functions known to torch.compile, now or once it is loaded."""
    dynamo = sys.modules.get(_DYNAMO)
    if hasattr(dynamo, "allow_in_graph"):
        _tell(dynamo, functions)
    else:
        sys.meta_path.insert(0, _Watch(functions))
