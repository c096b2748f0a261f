from collections.abc import Callable
from typing import Any

class SDPAValueError(ValueError, RuntimeError): ...
class SDPATypeError(TypeError, RuntimeError): ...

def function(
    text: bytes, names: tuple[str, ...], defaults: tuple[Any, ...], positional: int
) -> Callable[..., Any]: ...
def forward(
    context: Any, call: tuple[str, tuple[Any, ...], str], /, *tensors: Any
) -> Any: ...  # out, or (out, lse); without a context (out, lse, seed)
def gradients(
    call: tuple[str, tuple[Any, ...], str],
    saved: tuple[Any, ...],
    needs: tuple[bool, ...],
    dout: Any,
    dlse: Any,
    deterministic: bool,
    /,
) -> tuple[Any, ...]: ...
def merge_states(outs: tuple[Any, ...], lses: tuple[Any, ...], layout: str) -> tuple[Any, Any]: ...
def explain(
    name: str, /, *args: Any, **keywords: Any
) -> tuple[str | None, str | None, dict[str, str]]: ...
def jax_plan(
    name: str, arguments: tuple[Any, ...], /
) -> tuple[
    list[tuple[str, Any]], dict[str, int | float | str], list[tuple[str, tuple[int, ...], str]]
]: ...
def jax_workspace(
    target: str,
    operands: tuple[tuple[str, tuple[int, ...], int, int], ...],
    attributes: dict[str, Any],
    results: tuple[tuple[str, tuple[int, ...], int, int], ...],
    /,
) -> int: ...
def jax_handlers() -> dict[str, tuple[Any, Any]]: ...
def explain_forward(
    name: str, arguments: tuple[Any, ...], /
) -> tuple[str | None, str | None, dict[str, str]]: ...
def info() -> dict[str, Any]: ...
def get_num_threads() -> int: ...
def set_num_threads(n: int | None, /) -> None: ...
