"""The public functions: names, defaults, types and their specification; the work is in C.

Stop 1 of 6. The functions that are called for every layer of a model are builtins: _in_c() makes
them from the definitions here, whose bodies never run. Next: attention() in csrc/binding/call.c.
"""

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar, cast, overload

from . import _C

if TYPE_CHECKING:
    from typing_extensions import Unpack

Array = TypeVar("Array")
Function = TypeVar("Function", bound=Callable[..., Any])
Layout = Literal["bhsd", "bshd"]


class _Options(TypedDict, total=False):
    """The keywords of attention and attention_varlen but return_lse, for their overloads.

    The lse is Any there: of q's kind, but of another dtype and rank, which a type may name.
    """

    causal: bool | Literal["top-left"]
    window: tuple[int | None, int | None] | None
    q_offset: Any
    mask: Any
    softcap: float
    alibi_slopes: Any
    sink: Any
    scale: float | None
    dropout_p: float
    seed: Any
    out: Any
    deterministic: bool
    batch_invariant: bool
    backend: Literal["sm90", "sm80", "cpu"] | None


class _Padded(_Options, total=False):
    q_lengths: Any
    k_lengths: Any
    k_start: Any
    layout: Layout


class _Packed(_Options, total=False):
    seqused_q: Any
    seqused_k: Any
    page_table: Any


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

    Same signature and meaning as PyTorch's, with exact zeros for rows that see nothing. Inside a
    torch.autocast region of their device, torch tensors are cast as by torch's.

    Args:
        query: (..., hq, sq, d) of float64, float32, float16 or bfloat16; rank 2 and up.
        key: (..., hk, sk, d). Leading dimensions of the three broadcast as in matmul.
        value: (..., hk, sk, dv). d and dv as in attention.
        attn_mask: broadcastable to (..., hq, sq, sk). bool: True takes part. float32 or query's
            dtype: added to the scaled score. Or torch's CausalBias.
        dropout_p: 0 to 1, as in attention, and applied whether training or not. The seed comes from
            torch's generator; other than torch arrays: ValueError, attention takes a seed.
        is_causal: query i sees keys j <= i (top-left, also where sq != sk).
        scale: multiplies query . key; as in attention.
        enable_gqa: hq may be a multiple of hk; query head h uses key head h // (hq / hk). Value may
            have another number of heads than key, of which hq is a multiple too.

    Returns:
        (..., hq, sq, dv), the kind, dtype and device of query. Contiguous; a torch tensor is dense,
        its axes in the order of query's in memory, the last one innermost.

    Raises:
        ValueError: a shape or value, or attn_mask together with is_causal. A RuntimeError too, as
            torch's.
        TypeError: no array, a dtype, or a torch subclass. A RuntimeError too, but for no array.
        NotImplementedError: no backend serves the call, or its gradient where one is asked for.

    Source: Vaswani et al., "Attention Is All You Need", 2017, equation 1.
    """
    raise NotImplementedError  # never runs: see csrc/binding/call.c


@overload
def attention(
    q: Array, k: Any, v: Any, *, return_lse: Literal[False] = ..., **options: "Unpack[_Padded]"
) -> Array: ...
@overload
def attention(
    q: Array, k: Any, v: Any, *, return_lse: Literal[True], **options: "Unpack[_Padded]"
) -> tuple[Array, Any]: ...
@overload
def attention(
    q: Array, k: Any, v: Any, *, return_lse: bool, **options: "Unpack[_Padded]"
) -> Array | tuple[Array, Any]: ...
@_in_c
def attention(
    q: Array,
    k: Any,
    v: Any,
    *,
    causal: bool | Literal["top-left"] = False,
    window: tuple[int | None, int | None] | None = None,
    q_offset: Any = None,
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
    last key; i' = i for causal="top-left"; i' = i + q_offset where that is given), in this order:

        s_j = scale * (q_i . k_j)
        s_j = softcap * tanh(s_j / softcap)          if softcap > 0
        s_j = s_j + mask_ij                          bool mask: -inf where False
        s_j = s_j - slope_h * |i' - j|               with alibi_slopes
        s_j = -inf                                   outside causal, window and lengths
        lse = log(exp(sink_h) + sum_j exp(s_j))      no first term without a sink
        p_j = exp(s_j - lse)
        p_j = p_j * keep_ij / (1 - dropout_p)        with dropout_p, which leaves lse as it is
        o_i = sum_j p_j v_j

    A row that sees nothing has output 0 and lse -inf (the sink's value, if there is one).

    Torch tensors q, k, v, mask and sink may require grad: out and lse then have a grad_fn, on which
    derivatives of any order can be taken.

    Inside a torch.autocast region of their device, torch tensors q, k, v and a float mask are cast
    to its dtype first, but for float64, as by torch's own operators.

    Args:
        q: (b, hq, sq, d), or (b, sq, hq, d) with layout="bshd"; float64, float32, float16 or
            bfloat16. Any strides, 0 and negative included.
        k: (b, hk, sk, d); hq is a multiple of hk, query head h uses key head h // (hq / hk).
        v: (b, hk, sk, dv). d and dv of any size on the CPU, from 1 to 256 on a GPU. Of d = 0 every
            score is 0, of hq = 0 or dv = 0 the output is empty.
        causal: False, True (keys j <= i') or "top-left" (keys j <= i).
        window: (left, right), keys i' - left to i' + right, inclusive, each of any sign but
            left + right >= 0; None: unbounded on that side. With causal: the intersection.
        q_offset: an int, or (b,) int32: where row 0 lies on the key axis. 0 is the top left, for
            windows too; the number of keys that came before is what a cache wants. None: sk - sq.
            Window bounds and offsets beyond 2^30 count as that, the sign kept.
        q_lengths: (b,) int32, true query lengths; later rows give output 0 and lse -inf.
        k_lengths: (b,) int32, true key lengths; i' counts from the true lengths.
        k_start: (b,) int32, first key that counts; it does not move i'. All three on the CPU: from
            0 to sq or sk, else ValueError; on a GPU the nearest number counts.
        mask: broadcastable to (b, hq, sq, sk) whatever the layout; bool (True = attend), or
            float32, float16, bfloat16: added to the scaled score.
        softcap: any finite value >= 0; 0 is off. One of 2^40 or more changes nothing on a GPU.
        alibi_slopes: (hq,) or (b, hq) float32.
        sink: (hq,) float32, an extra logit per head that carries no value.
        scale: default d ** -0.5, or 1 for d = 0; any finite value. Beyond 1e30 (of float64: 1e300)
            it counts as that, the sign kept: only a row's greatest scores are left.
        dropout_p: 0 (off) to 1 (output 0). keep_ij is 1 where 16 random bits are at least
            65,536 * dropout_p, rounded. The bits are Philox4x32-7's, a function of the seed and of
            b, h, i and j: the same on every backend, whatever the strides and the other arguments.
        seed: of dropout; without meaning where dropout_p is 0. An int from -2^63 to 2^63 - 1, or an
            array () or (1,) on q's device: int64, on the CPU and in JAX's programs int32 or uint32.
            None: with torch tensors one is drawn from the generator of their device, anew by each
            replay of a CUDA graph; with others ValueError.
        layout: "bhsd" or "bshd", of q, k, v and the output.
        return_lse: also return lse, (b, hq, sq) whatever the layout, natural logarithm; float32,
            or float64 where q is.
        out: the output is written here; same shape, dtype and device. It may lie between elements
            of inputs, as one of buffer.unbind(2), but shares none with them: ValueError, also where
            strides are too odd to tell.
        deterministic: of the backward pass; the forward pass always is.
        batch_invariant: a sequence's bits do not depend on the other sequences or the batch size.
        backend: None is the best that can; or "sm90", "sm80", "cpu".

    Returns:
        out, or (out, lse), of the kind and on the device of q. Of a library that is none of NumPy,
        torch, JAX, CuPy, MLX and Paddle, and has no array namespace with the dtype and device of q:
        a NumPy array, on the CPU only.

    Raises:
        ValueError: a shape or value; the message names the argument, the rule and what came.
        TypeError: no array, or a dtype.
        NotImplementedError: no backend serves the call, or its gradient where one is asked for
            (each one's reason is in the message); that of alibi_slopes is not served; in JAX nor is
            forward mode, nor are second derivatives.
        RuntimeError: CUDA's name and text for a failure; in a program of JAX also what only numbers
            tell, as lengths out of range.

    Source: Vaswani et al., 2017, equation 1; online softmax: Milakov and Gimelshein, 2018; tiling:
    Dao et al., "FlashAttention", 2022, algorithm 1; ALiBi: Press et al., 2021; softcap: Gemma 2,
    2024; sinks: gpt-oss, 2025; Philox: Salmon et al., 2011, section 3.
    """
    raise NotImplementedError  # never runs: see csrc/binding/call.c


@overload
def attention_varlen(
    q: Array,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    return_lse: Literal[False] = ...,
    **options: "Unpack[_Packed]",
) -> Array: ...
@overload
def attention_varlen(
    q: Array,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    return_lse: Literal[True],
    **options: "Unpack[_Packed]",
) -> tuple[Array, Any]: ...
@overload
def attention_varlen(
    q: Array,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    return_lse: bool,
    **options: "Unpack[_Packed]",
) -> Array | tuple[Array, Any]: ...
@_in_c
def attention_varlen(
    q: Array,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    seqused_q: Any = None,
    seqused_k: Any = None,
    q_offset: Any = None,
    page_table: Any = None,
    causal: bool | Literal["top-left"] = False,
    window: tuple[int | None, int | None] | None = None,
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
    """attention over b sequences of any lengths, packed end to end without padding.

    Sequence n is the rows cu_seqlens_q[n] to cu_seqlens_q[n + 1] - 1 of q and the output, and those
    of k and v that cu_seqlens_k says. Its result is attention's on these rows alone; i, j, sq and
    sk are its own. Rows of q past seqused_q or in no sequence give output 0 and lse -inf.

    On a GPU only the kernels see cu_seqlens; whatever they hold, nothing is read or written out of
    bounds. The first number counts as 0, each other as the nearest from 0 to the total; a sequence
    that ends before it starts is empty; of one longer than max_seqlen the first so many rows count,
    and later ones are as past seqused. Where two sequences claim rows of q, out may hold anything.

    Args:
        q: (total_q, hq, d) of float64, float32, float16 or bfloat16. Any strides.
        k: (total_k, hk, d); hq is a multiple of hk, query head h uses key head h // (hq / hk).
        v: (total_k, hk, dv). d and dv as in attention. Autocast as in attention.
        cu_seqlens_q: (b + 1,) int32, non-decreasing from 0 to at most total_q.
        cu_seqlens_k: (b + 1,) int32, non-decreasing from 0 to at most total_k.
        max_seqlen_q: no sequence has more queries; the time taken does not depend on it, but for a
            bool mask on a GPU, which is read whole.
        max_seqlen_k: no sequence has more keys.
        seqused_q: (b,) int32, true query lengths, from 0 to the sequence's rows; on the CPU others
            are a ValueError, on a GPU the nearest counts.
        seqused_k: (b,) int32, likewise true key lengths; i' counts from the true lengths.
        q_offset: as in attention: an int, or (b,) int32, one for each sequence.
        page_table: (b, pages) int32, as in attention_kvcache: k is (num_pages, page_size, hk, d), v
            likewise, and key j of sequence n is row j % page_size of page page_table[n, j //
            page_size]. Then cu_seqlens_k must be None, seqused_k is required, max_seqlen_k is at
            most pages * page_size, and there is no gradient. Not in JAX's programs, and on a GPU
            not with a mask or dropout.
        causal: as in attention, by each sequence's own lengths.
        window: likewise.
        mask: broadcastable to (b, hq, max_seqlen_q, max_seqlen_k), where i and j are positions in
            the sequence; dtypes as in attention.
        softcap: as in attention.
        alibi_slopes: (hq,) or (b, hq) float32.
        sink: as in attention.
        scale: as in attention.
        dropout_p: as in attention; b of the random bits is the sequence, i and j positions in it.
        seed: as in attention.
        return_lse: also return lse, (hq, total_q), natural logarithm; dtype as in attention.
        out: as in attention; of shape (total_q, hq, dv).
        deterministic: as in attention.
        batch_invariant: as in attention.
        backend: as in attention.

    Returns:
        out (total_q, hq, dv), or (out, lse), of the kind and on the device of q.

    Raises:
        ValueError: a shape or value; cu_seqlens on the CPU that do not start at 0, decrease, run
            past the total or hold a sequence longer than max_seqlen; seqused of more rows there.
        TypeError, NotImplementedError, RuntimeError: as attention.

    Source: as attention; the packed layout is flash-attn's.
    """
    raise NotImplementedError  # never runs: see csrc/binding/call.c


def _tuple(name: str, arrays: Sequence[Array]) -> tuple[Array, ...]:
    try:
        each = iter(arrays)
    except TypeError:
        kind = type(arrays).__name__
        raise TypeError(f"`{name}` must be a sequence of arrays, got {kind}") from None
    return tuple(each)


def merge_states(
    outs: Sequence[Array], lses: Sequence[Any], *, layout: Layout = "bhsd"
) -> tuple[Array, Any]:
    """Partial results of the same queries over disjoint keys, merged into the result over all.

    lse = log(sum_i exp(lse_i)), out = sum_i exp(lse_i - lse) * out_i. A part is empty where its lse
    is -inf, or +inf as flash-attn has it; where all parts are empty, out is 0 and lse -inf. A sink
    belongs to exactly one of the parts.

    Args:
        outs: any number of (b, h, s, dv), or (b, s, h, dv) with layout="bshd".
        lses: as many (b, h, s), natural logarithm, as attention(return_lse=True) gives: float64
            where outs are, else float32.
        layout: "bhsd" or "bshd", of outs and the output.

    Returns:
        (out, lse), of the kind and dtype of the first part.

    Raises:
        ValueError, TypeError, NotImplementedError: as attention.

    Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, section 3.1.
    """
    return _C.merge_states(_tuple("outs", outs), _tuple("lses", lses), layout)


@_in_c
def attention_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    *,
    dlse: Any = None,
    need_dq: bool = True,
    need_dk: bool = True,
    need_dv: bool = True,
    need_dmask: bool = False,
    need_dsink: bool = False,
    dq: Any = None,
    dk: Any = None,
    dv: Any = None,
    causal: bool | Literal["top-left"] = False,
    window: tuple[int | None, int | None] | None = None,
    q_offset: Any = None,
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
    backend: Literal["sm90", "sm80", "cpu"] | None = None,
) -> tuple[Any, Any, Any, Any, Any]:
    """The gradients of attention: of a loss, given those of out and lse.

    Exactly 0 for what no row sees, and for rows that see nothing. Torch tensors that require grad
    need no call of this: attention itself then has a grad_fn. Here autocast does nothing: arrays
    have the dtype in which the forward pass ran.

    Args:
        dout: gradient of the loss with respect to out, of its shape and dtype, any strides; None:
            zeros, with dlse given.
        q: as in attention, as are all arguments that are not described here: what the forward call
            had.
        k: likewise.
        v: likewise.
        out: what the forward call gave.
        lse: what it gave with return_lse=True.
        dlse: gradient with respect to lse, of its shape and dtype; None: zeros.
        need_dq: whether dq is wanted; what is not is not computed.
        need_dk: likewise.
        need_dv: likewise.
        need_dmask: likewise; of a float mask.
        need_dsink: likewise.
        dq: an array that dq is written into, of q's shape, dtype and device, any strides; it
            overlaps no other array. None: a new one.
        dk: likewise.
        dv: likewise.
        causal: the forward's.
        window: the forward's.
        q_offset: the forward's.
        q_lengths: the forward's.
        k_lengths: the forward's.
        k_start: the forward's.
        mask: the forward's.
        softcap: the forward's.
        alibi_slopes: the forward's; they have no gradient.
        sink: the forward's.
        scale: the forward's.
        dropout_p: the forward's.
        seed: the forward's, by which the same elements are dropped; None with dropout: ValueError.
        layout: of q, k, v, out and all their gradients.
        deterministic: the same bits in every run; on the CPU it always is so.
        batch_invariant: as in attention.
        backend: as in attention.

    Returns:
        (dq, dk, dv, dmask, dsink), each like the array that it is the gradient of, None where not
        wanted. dmask is summed in float32, float64 for float64, over what the mask broadcasts to.

    Raises:
        ValueError: a shape or value; dout, out or lse of another call.
        TypeError: no array, or a dtype.
        NotImplementedError: no backend serves the call: each one's reason is in the message.

    Source: Dao et al., "FlashAttention", 2022, algorithm 4; Dao, "FlashAttention-2", 2023.
    """
    raise NotImplementedError  # never runs: see csrc/binding/backward.c


@_in_c
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
    q_offset: Any = None,
    page_table: Any = None,
    dlse: Any = None,
    need_dq: bool = True,
    need_dk: bool = True,
    need_dv: bool = True,
    need_dmask: bool = False,
    need_dsink: bool = False,
    dq: Any = None,
    dk: Any = None,
    dv: Any = None,
    causal: bool | Literal["top-left"] = False,
    window: tuple[int | None, int | None] | None = None,
    mask: Any = None,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    sink: Any = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Any = None,
    deterministic: bool = False,
    batch_invariant: bool = False,
    backend: Literal["sm90", "sm80", "cpu"] | None = None,
) -> tuple[Any, Any, Any, Any, Any]:
    """The gradients of attention_varlen: of a loss, given those of out and lse.

    As attention_backward, of packed sequences; rows in no sequence have gradients of 0.

    Args:
        dout: as in attention_backward; of out's shape (total_q, hq, dv).
        q: as in attention_varlen, as are all arguments that are not described here.
        k: likewise.
        v: likewise.
        out: what the forward call gave.
        lse: what it gave with return_lse=True, (hq, total_q).
        cu_seqlens_q: the forward's.
        cu_seqlens_k: the forward's.
        max_seqlen_q: the forward's.
        max_seqlen_k: the forward's.
        seqused_q: the forward's.
        seqused_k: the forward's.
        q_offset: the forward's.
        page_table: None: keys in pages have no gradient.
        dlse: as in attention_backward.
        need_dq: as in attention_backward.
        need_dk: likewise.
        need_dv: likewise.
        need_dmask: likewise.
        need_dsink: likewise.
        dq: as in attention_backward.
        dk: likewise.
        dv: likewise.
        causal: the forward's.
        window: the forward's.
        mask: the forward's.
        softcap: the forward's.
        alibi_slopes: the forward's; they have no gradient.
        sink: the forward's.
        scale: the forward's.
        dropout_p: the forward's.
        seed: the forward's; None with dropout: ValueError.
        deterministic: as in attention_backward.
        batch_invariant: as in attention.
        backend: as in attention.

    Returns:
        (dq, dk, dv, dmask, dsink), as attention_backward.

    Raises:
        ValueError, TypeError, NotImplementedError: as attention_backward.

    Source: as attention_backward.
    """
    raise NotImplementedError  # never runs: see csrc/binding/backward.c


@_in_c
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
    """attention of new queries to cached keys and values, into which new ones are written first.

    Sequence n has cache_seqlens[n] keys in the cache. New ones, if there are any, are written after
    them, in place, and the queries attend to all: the result is attention's on the keys and values
    gathered, k_lengths the sum, k_start cache_leftpad. What no row sees, unused pages, the ends of
    tables, reaches nothing. A call that raises has written nothing, a failure of the machine
    excepted; one call is meant to be the only one that writes a cache at a time.

    There is no gradient, and no autocast: the cache has one dtype. Graphs of torch hold the call as
    an operator that writes the caches, or where no new keys come reads them; `out` must be None. In
    JAX's programs keys are only read, and pages are gathered first, each number as the nearest.

    Args:
        q: (b, sq, hq, d) of float64, float32, float16 or bfloat16; or (b, hq, sq, d) with
            layout="bhsd". Any strides, of every array. More than some 64 rows run as attention's.
        k_cache: (b_cache, s_max, hk, d), or with page_table (num_pages, page_size, hk, d), of any
            page_size >= 1. Where new keys come it is written: no two elements share memory.
        v_cache: (b_cache, s_max, hk, dv) or (num_pages, page_size, hk, dv); a view of k_cache too.
        cache_seqlens: an int, or (b,) int32: the keys that are there before the new ones. On the
            CPU others than from 0 to what the cache has room for are a ValueError, on a GPU the
            nearest counts.
        k: (b, s_new, hk, d), new keys; s_new may be other than sq. None: none.
        v: (b, s_new, hk, dv), new values; where the caches share memory, k stays.
        page_table: (b, pages) int32: key j of sequence n is row j % page_size of page
            page_table[n, j // page_size]. On the CPU a page that some row sees, or that new keys
            come to, has a number from 0 to num_pages - 1, and no two sequences write to one page,
            else ValueError; on a GPU the nearest page counts, and what two wrote is either's.
        cache_batch_idx: (b,) int32: the entry of the caches that a sequence has; checked as pages
            are. None: its own number, and b_cache = b.
        cache_leftpad: (b,) int32: the first key that counts, as attention's k_start.
        cu_seqlens_q: (b + 1,) int32, as in attention_varlen: q and the output are (total_q, hq, d),
            whatever the layout, each sequence's rows of any number; lse is (hq, total_q). A row in
            no sequence gives output 0 and lse -inf.
        max_seqlen_q: with cu_seqlens_q: no sequence has more queries. None: total_q.
        rotary_cos: (s_max, rotary_dim / 2) of float32 or q's dtype, with new keys only; a row for
            every position. New key i is rotated at position cache_seqlens + i; so is row i of q if
            there is a causal mask or a window, else all rows at cache_seqlens. The elements from
            rotary_dim on stay.
        rotary_sin: like rotary_cos.
        rotary_interleaved: pairs are (0, 1), (2, 3), ...; else (0, rotary_dim / 2), ...
        k_scale: not built yet: NotImplementedError.
        v_scale: not built yet: NotImplementedError.
        causal: as in attention, whose sk is the sum of cached and new keys.
        num_splits: of the keys, how many parts are computed at once, at most; 0: as is best. It
            changes no bit on the CPU.
        layout: "bshd" or "bhsd", of q, the caches, new keys and values and the output.
        return_lse: also return lse, as in attention.
        return_mass: also return mass, (b, hk, sk) float32 whatever the layout, sk the keys that the
            cache has room for: the sum of p_j over the group's heads and the call's rows.
        window: as in attention.
        softcap: as in attention.
        alibi_slopes: (hq,) or (b, hq) float32.
        sink: as in attention.
        scale: as in attention.
        batch_invariant: as in attention.
        out: as in attention; shares no element with a cache.
        backend: None is the best that can; or "sm90", "sm80", "cpu".

    Returns:
        out, or a tuple of out, lse and mass, as far as asked for; kind and device of q.

    Raises:
        ValueError: a shape or value; the message names the argument, the rule and what came.
        TypeError: no array, or a dtype; a cache of JAX where new keys come, for those are never
            written.
        NotImplementedError: no backend serves the call (each one's reason is in the message); a
            tensor that requires grad, or is inside of torch.vmap or torch.func.grad; the mass where
            JAX traces.

    Source: paging: Kwon et al., "Efficient Memory Management for Large Language Model Serving with
    PagedAttention", 2023; rotary positions: Su et al., "RoFormer", 2021, equation 34.
    """
    raise NotImplementedError  # never runs: see csrc/binding/kvcache.c


@dataclass(frozen=True)
class Explanation:
    """What a call would run, and why each other backend would not; prints as a short text."""

    backend: str | None
    """Name of the backend that would run, None if all refuse."""
    kernel: str | None
    """Name of the kernel, the variant that would run."""
    reasons: dict[str, str]
    """For each backend that refuses: why."""

    def __str__(self) -> str:
        first = f"{self.backend}: {self.kernel}" if self.backend else "no backend takes this call"
        return "\n".join([first, *(f"  not {name}: {why}" for name, why in self.reasons.items())])


def explain(function: Callable[..., Any], *args: Any, **keywords: Any) -> Explanation:
    """Which backend and kernel `function(*args, **keywords)` would run. Nothing is computed.

    Args:
        function: attention, attention_varlen, attention_kvcache, attention_sparse,
            attention_sparse_varlen, sparsek_attention, sparsek_attention_varlen,
            scaled_dot_product_attention, or attention_backward, attention_varlen_backward,
            attention_sparse_backward, sparsek_attention_backward.

    Returns:
        An Explanation with .backend, .kernel and .reasons.

    Raises:
        What the call would raise before it chooses a backend; TypeError for another function.
    """
    # By identity: where the function was forgotten, it is an array with an equality of its own.
    from . import _sparse, _sparsek_attention

    known = (
        *(attention, attention_varlen, attention_kvcache, scaled_dot_product_attention),
        *(attention_backward, attention_varlen_backward),
        *(_sparse.attention_sparse, _sparse.attention_sparse_varlen),
        _sparse.attention_sparse_backward,
        *(_sparsek_attention.sparsek_attention, _sparsek_attention.sparsek_attention_varlen),
        _sparsek_attention.sparsek_attention_backward,
    )
    if not any(function is f for f in known):
        name = getattr(function, "__name__", None)
        raise TypeError(
            "`function` must be attention, attention_varlen, attention_kvcache, attention_sparse, "
            "attention_sparse_varlen, sparsek_attention, sparsek_attention_varlen, "
            "scaled_dot_product_attention or one's backward, got "
            + (name or f"{type(function).__name__}: explain(fastattn.attention, q, k, v)")
        )
    return Explanation(*_C.explain(function.__name__, *args, **keywords))


def set_num_threads(n: int | None) -> None:
    """How many threads a call on the CPU may use, the caller's own included; for all later calls.

    Where this was never called: FASTATTN_NUM_THREADS, else OMP_NUM_THREADS (both read at the first
    call on the CPU), else the cores that the process may run on, or fewer where a container's
    cpu.max grants less. A FASTATTN_NUM_THREADS that is no number from 1 to 1024 is ignored with a
    RuntimeWarning. The number changes the time that a call takes, never its bits.

    Args:
        n: from 1 to 1024, more than there are cores too; None: as if this was never called.

    Raises:
        ValueError, TypeError: no such number.
    """
    _C.set_num_threads(n)


def get_num_threads() -> int:
    """How many threads a call on the CPU may use; see set_num_threads."""
    return _C.get_num_threads()


def info() -> dict[str, Any]:
    """What this build and this machine have, as a dict of plain values.

    version: of fastattn. backends: their names, best first. cpu: vector level and threads.
    glibc_needed: the oldest that this build runs on. cuda: None for a CPU-only build, else toolkit
    built with, CUDA version that the driver found and the one needed (13.0 is driver 580, 12.0 is
    525; None: no driver), devices with name, capability, sms and memory in bytes, kernels built
    in, and CUDA's error where devices cannot be listed. no_kernels: why a CPU-only build is one.

    support: what each backend declares to take, whether it is built in or not, as support[backend]
    [operation] with dtypes, the range of d and dv, features, and apart: sets of features that it
    does not take together. It refuses nothing else, but for a device that it does not run on. An
    operation is forward (attention and its kin), backward, kvcache, merge (merge_states), sparsek
    (sparsek_lists too), sparsek_backward, sparse or sparse_backward (attention_sparse and its
    gradients), sparsek_attention or sparsek_attention_backward.
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
    return {
        "version": __version__,
        "backends": found["backends"],
        "cpu": found["cpu"],
        "glibc_needed": found["glibc_needed"],
        "cuda": cuda,
        "no_kernels": found["no_kernels"],
        "support": found["support"],
    }
