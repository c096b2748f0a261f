"""The public functions: names, defaults, types and their specification; the work is in C.

Stop 1 of 6. The two functions that are called for every layer of a model are builtins: _in_c()
makes them from the definitions here, whose bodies never run.
"""

import inspect
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from . import _C

Array = TypeVar("Array")
Function = TypeVar("Function", bound=Callable[..., Any])
Layout = Literal["bhsd", "bshd"]


def _in_c(function: Function) -> Function:
    """The C function of this one's name, with its parameters, defaults and documentation.

    A Python layer would cost a tenth of a small call: Python looks every default up by name.
    """
    bare = inspect.signature(function)
    parameters = [p.replace(annotation=p.empty) for p in bare.parameters.values()]
    signature = inspect.Signature(parameters)
    name = function.__name__
    text = f"{name}\0{name}{signature}\n--\n\n{inspect.getdoc(function)}"
    names = tuple(sys.intern(p.name) for p in parameters)
    defaults = tuple(p.default for p in parameters if p.default is not p.empty)
    positional = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    return cast(Function, _C.function(text.encode(), names, defaults, positional))


@_in_c
def scaled_dot_product_attention(
    query: Array,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Array:
    """`torch.nn.functional.scaled_dot_product_attention`, for every framework.

    Same signature and meaning as PyTorch's, with exact zeros for rows that see nothing.

    Args:
        query: (..., hq, sq, d) of float64, float32, float16 or bfloat16; rank 2 and up.
        key: (..., hk, sk, d). Leading dimensions of the three broadcast as in matmul.
        value: (..., hk, sk, dv). d and dv from 1 to 256.
        attn_mask: broadcastable to (..., hq, sq, sk). bool: True takes part. float32 or query's
            dtype: added to the scaled score.
        dropout_p: not built yet: NotImplementedError above 0 (other than torch arrays: ValueError).
        is_causal: query i sees keys j <= i (top-left, also where sq != sk).
        scale: multiplies query . key; default d ** -0.5, any finite value.
        enable_gqa: hq may be a multiple of hk; query head h uses key head h // (hq / hk).

    Returns:
        (..., hq, sq, dv), contiguous, the kind, dtype and device of query.

    Raises:
        ValueError: a shape or value, or attn_mask together with is_causal.
        TypeError: no array, a dtype, or a torch subclass.
        NotImplementedError: no backend serves the call, or a gradient is asked for.

    Source: Vaswani et al., "Attention Is All You Need", 2017, equation 1.
    """
    raise NotImplementedError  # never runs


@_in_c
def attention(
    q: Array,
    k: Any,
    v: Any,
    *,
    causal: bool | Literal["top-left"] = False,
    window: tuple[int | None, int | None] | None = None,
    q_lengths: Any = None,
    k_lengths: Any = None,
    k_start: Any = None,
    mask: Any = None,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    sink: Any = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Any = None,
    layout: Layout = "bhsd",
    return_lse: bool = False,
    out: Any = None,
    deterministic: bool = False,
    batch_invariant: bool = False,
    backend: Literal["sm90", "sm80", "cpu"] | None = None,
) -> Any:
    """softmax(scale * q k^T) v, with everything that may change it.

    For row i of a sequence of sq queries and sk keys, i' = i + sk - sq (the last query sees the
    last key; i' = i for causal="top-left"), in this order:

        s_j = scale * (q_i . k_j)
        s_j = softcap * tanh(s_j / softcap)          if softcap > 0
        s_j = s_j + mask_ij                          bool mask: -inf where False
        s_j = s_j - slope_h * |i' - j|               with alibi_slopes
        s_j = -inf                                   outside causal, window and lengths
        lse = log(exp(sink_h) + sum_j exp(s_j))      no first term without a sink
        o_i = sum_j exp(s_j - lse) v_j

    A row that sees nothing has output 0 and lse -inf (the sink's value, if there is one).

    Args:
        q: (b, hq, sq, d), or (b, sq, hq, d) with layout="bshd"; float64, float32, float16 or
            bfloat16. Any strides, 0 and negative included.
        k: (b, hk, sk, d); hq is a multiple of hk, query head h uses key head h // (hq / hk).
        v: (b, hk, sk, dv). d and dv from 1 to 256.
        causal: False, True (keys j <= i') or "top-left" (keys j <= i).
        window: (left, right), keys i' - left to i' + right, inclusive; None: unbounded on that
            side. With causal: the intersection.
        q_lengths: (b,) int32, true query lengths; later rows give output 0 and lse -inf.
        k_lengths: (b,) int32, true key lengths; i' counts from the true lengths.
        k_start: (b,) int32, first key that counts; it does not move i'.
        mask: broadcastable to (b, hq, sq, sk) whatever the layout; bool (True = attend), or
            float32, float16, bfloat16: added to the scaled score.
        softcap: >= 0; 0 is off.
        alibi_slopes: (hq,) or (b, hq) float32.
        sink: (hq,) float32, an extra logit per head that carries no value.
        scale: default d ** -0.5; any finite value.
        dropout_p: not built yet: NotImplementedError above 0.
        seed: of dropout.
        layout: "bhsd" or "bshd", of q, k, v and the output.
        return_lse: also return lse, float32 (b, hq, sq) whatever the layout, natural logarithm.
        out: the output is written here; same shape, dtype and device, overlapping no input.
        deterministic: of the backward pass; the forward pass always is.
        batch_invariant: a sequence's bits do not depend on the other sequences or the batch size.
        backend: None is the best that can; or "sm90", "sm80", "cpu".

    Returns:
        out, or (out, lse), of the kind and on the device of q.

    Raises:
        ValueError: a shape or value; the message names the argument, the rule and what came.
        TypeError: no array, or a dtype.
        NotImplementedError: no backend serves the call (each one's reason is in the message), or
            a gradient is asked for.
        RuntimeError: CUDA's name and text for a failure.

    Source: Vaswani et al., 2017, equation 1; online softmax: Milakov and Gimelshein, 2018; tiling:
    Dao et al., "FlashAttention", 2022, algorithm 1; ALiBi: Press et al., 2021; softcap: Gemma 2,
    2024; sinks: gpt-oss, 2025.
    """
    raise NotImplementedError  # never runs


def merge_states(
    outs: Sequence[Array], lses: Sequence[Any], *, layout: Layout = "bhsd"
) -> tuple[Array, Any]:
    """Partial results of the same queries over disjoint keys, merged into the result over all.

    lse = log(sum_i exp(lse_i)), out = sum_i exp(lse_i - lse) * out_i; where all parts are empty,
    out is 0 and lse -inf. A sink belongs to exactly one of the parts.

    Args:
        outs: any number of (b, h, s, dv), or (b, s, h, dv) with layout="bshd".
        lses: as many float32 (b, h, s), natural logarithm, as attention(return_lse=True) gives.
        layout: "bhsd" or "bshd", of outs and the output.

    Returns:
        (out, lse), of the kind and dtype of the first part.

    Raises:
        ValueError, TypeError, NotImplementedError: as attention.

    Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, section 3.1.
    """
    return _C.merge_states(tuple(outs), tuple(lses), layout)


def attention_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    *,
    dlse: Any = None,
    need_dmask: bool = False,
    need_dsink: bool = False,
    dq: Any = None,
    dk: Any = None,
    dv: Any = None,
    causal: bool | Literal["top-left"] = False,
    window: tuple[int | None, int | None] | None = None,
    q_lengths: Any = None,
    k_lengths: Any = None,
    k_start: Any = None,
    mask: Any = None,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    sink: Any = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Any = None,
    layout: Layout = "bhsd",
    deterministic: bool = False,
    batch_invariant: bool = False,
) -> tuple[Any, Any, Any, Any, Any]:
    """Gradients (dq, dk, dv, dmask, dsink) of attention, None where not asked for.

    Not built yet: raises NotImplementedError.
    """
    raise NotImplementedError("attention_backward is not built yet: no backend has a backward pass")


def attention_varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    seqused_q: Any = None,
    seqused_k: Any = None,
    page_table: Any = None,
    causal: bool | Literal["top-left"] = False,
    window: tuple[int | None, int | None] | None = None,
    q_lengths: Any = None,
    k_lengths: Any = None,
    k_start: Any = None,
    mask: Any = None,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    sink: Any = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Any = None,
    return_lse: bool = False,
    out: Any = None,
    deterministic: bool = False,
    batch_invariant: bool = False,
    backend: Literal["sm90", "sm80", "cpu"] | None = None,
) -> Any:
    """attention over sequences packed end to end: q (total_q, hq, d), k and v (total_k, hk, d).

    cu_seqlens are int32 (b + 1,) offsets; lse is (hq, total_q). Not built yet: raises
    NotImplementedError; attention with q_lengths and k_lengths serves padded batches.
    """
    raise NotImplementedError(
        "attention_varlen is not built yet: use attention with q_lengths and k_lengths"
    )


def attention_varlen_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    seqused_q: Any = None,
    seqused_k: Any = None,
    dlse: Any = None,
    need_dmask: bool = False,
    need_dsink: bool = False,
    dq: Any = None,
    dk: Any = None,
    dv: Any = None,
    causal: bool | Literal["top-left"] = False,
    window: tuple[int | None, int | None] | None = None,
    q_lengths: Any = None,
    k_lengths: Any = None,
    k_start: Any = None,
    mask: Any = None,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    sink: Any = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Any = None,
    deterministic: bool = False,
    batch_invariant: bool = False,
) -> tuple[Any, Any, Any, Any, Any]:
    """Gradients (dq, dk, dv, dmask, dsink) of attention_varlen, None where not asked for.

    Not built yet: raises NotImplementedError.
    """
    raise NotImplementedError(
        "attention_varlen_backward is not built yet: no backend has a backward pass"
    )


def attention_kvcache(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    cache_seqlens: Any,
    *,
    k: Any = None,
    v: Any = None,
    page_table: Any = None,
    cache_batch_idx: Any = None,
    cache_leftpad: Any = None,
    cu_seqlens_q: Any = None,
    max_seqlen_q: int | None = None,
    rotary_cos: Any = None,
    rotary_sin: Any = None,
    rotary_interleaved: bool = False,
    k_scale: Any = None,
    v_scale: Any = None,
    causal: bool | Literal["top-left"] = True,
    num_splits: int = 0,
    layout: Layout = "bshd",
    return_lse: bool = False,
    return_mass: bool = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    sink: Any = None,
    scale: float | None = None,
    batch_invariant: bool = False,
    out: Any = None,
    backend: Literal["sm90", "sm80", "cpu"] | None = None,
) -> Any:
    """attention of new queries to a key and value cache, which new keys are written into first.

    q is (b, sq, hq, d), the caches (b_cache, s_max, hk, d) or paged (num_pages, page_size, hk, d).
    Not built yet: raises NotImplementedError; attention with k_lengths serves a padded cache.
    """
    raise NotImplementedError(
        "attention_kvcache is not built yet: use attention with k_lengths on the cache"
    )


@dataclass(frozen=True)
class Explanation:
    """What a call would run, and why each other backend would not; prints as a short text."""

    backend: str | None
    """Name of the backend that would run, None if all refuse."""
    kernel: str | None
    """Name of its kernel row."""
    reasons: dict[str, str]
    """For each backend that refuses: why."""

    def __str__(self) -> str:
        first = f"{self.backend}: {self.kernel}" if self.backend else "no backend takes this call"
        return "\n".join([first, *(f"  not {name}: {why}" for name, why in self.reasons.items())])


def explain(function: Callable[..., Any], *args: Any, **keywords: Any) -> Explanation:
    """Which backend and kernel `function(*args, **keywords)` would run. Nothing is computed.

    Args:
        function: attention or scaled_dot_product_attention.

    Returns:
        An Explanation with .backend, .kernel and .reasons.

    Raises:
        What the call would raise before it chooses a backend; TypeError for another function.
    """
    if function in (
        attention_backward,
        attention_varlen,
        attention_varlen_backward,
        attention_kvcache,
    ):
        function(*args, **keywords)  # raises why it is not built
    if function not in (attention, scaled_dot_product_attention):
        name = getattr(function, "__name__", repr(function))
        raise TypeError(f"`function` must be attention or scaled_dot_product_attention, got {name}")
    bound = inspect.signature(function).bind(*args, **keywords)
    bound.apply_defaults()
    sdpa = function is scaled_dot_product_attention
    return Explanation(*_C.explain(sdpa, *bound.arguments.values()))


def info() -> dict[str, Any]:
    """What this build and this machine have, as a dict of plain values.

    version: of fastattn. backends: their names, best first. cpu: vector level and threads.
    glibc_needed: the oldest that this build runs on. cuda: None for a CPU-only build, else toolkit
    built with, CUDA version that the driver found and the one needed (13.0 is driver 580, 12.0 is
    525; None: no driver), devices with name, capability, sms and memory in bytes, kernels built
    in, and CUDA's error where devices cannot be listed.
    """
    from . import __version__

    found = _C.info()
    if cuda := found["cuda"]:
        for device in cuda["devices"]:
            device["capability"] = "{}.{}".format(*device["capability"])
        # CUDA 13 runs on drivers from 580 on, CUDA 12 from 525 on, which report 13.0 and 12.0.
        cuda["driver_needed"] = f"{cuda['toolkit'] // 1000}.0"
        for version in ("toolkit", "driver"):
            major, minor = divmod(cuda[version], 1000)
            cuda[version] = f"{major}.{minor // 10}" if major else None
    needed = re.findall(rb"GLIBC_(\d+)\.(\d+)", Path(_C.__file__).read_bytes())
    glibc = max(((int(a), int(b)) for a, b in needed), default=None)
    return {
        "version": __version__,
        "backends": found["backends"],
        "cpu": found["cpu"],
        "glibc_needed": "{}.{}".format(*glibc) if glibc else None,
        "cuda": cuda,
    }
