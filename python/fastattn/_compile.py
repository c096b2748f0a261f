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
        dynamo.allow_in_graph(function)


def watch(functions: Sequence[Callable[..., Any]]) -> None:
    """Makes the functions known to torch.compile, now or once it is loaded."""
    dynamo = sys.modules.get(_DYNAMO)
    if hasattr(dynamo, "allow_in_graph"):
        _tell(dynamo, functions)
    else:
        sys.meta_path.insert(0, _Watch(functions))
