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
def sparsek(scores: Any, k: float, lengths: Any, /) -> tuple[Any, Any]: ...
def sparsek_lists(
    scores: Any,
    k: float,
    sq: int,
    window: int,
    q_offset: Any,
    q_lengths: Any,
    k_lengths: Any,
    k_start: Any,
    /,
) -> tuple[Any, Any, Any]: ...
def sparsek_backward(tau: Any, dgates: Any, scores: Any, k: float, lengths: Any, /) -> Any: ...
def sparsek_lists_backward(
    tau: Any,
    dgates: Any,
    key_lists: Any,
    scores: Any,
    k: float,
    sq: int,
    window: int,
    q_offset: Any,
    q_lengths: Any,
    k_lengths: Any,
    k_start: Any,
    /,
) -> Any: ...
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
