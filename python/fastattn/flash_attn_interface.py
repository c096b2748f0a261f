"""FlashAttention 3's functions over fastattn.attention, as its flash_attn_interface has them.

Layouts are (b, s, h, d) and (total, h, d); causal and windows are aligned to the bottom right, and
a row that sees nothing gives 0, with lse -inf. Arguments that only tune FlashAttention's kernels
(num_splits, pack_gqa, scheduler_metadata) change nothing. Those with a meaning that no backend
serves (qv, descales, attention_chunk, sm_margin) are refused by name unless they are at their
defaults. Beyond FlashAttention 3: any device, dtype and head size that attention serves, and sinks
(`s_aux`).
"""

from typing import Any

from ._needs import need

need(__name__, "torch", "2.10")

from . import _flash
from ._attention import merge_states


def flash_attn_func(
    q: Any,
    k: Any,
    v: Any,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Any = None,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    s_aux: Any = None,
) -> Any:
    """fastattn.attention with FlashAttention 3's arguments.

    Args:
        q: (b, sq, hq, d).
        k: (b, sk, hk, d); hq is a multiple of hk.
        v: (b, sk, hk, dv).
        softmax_scale: default d ** -0.5.
        causal: the last query sees the last key.
        qv: must be None.
        q_descale: must be None, as k_descale and v_descale.
        window_size: (left, right), inclusive; below 0: unbounded.
        attention_chunk: must be 0.
        softcap: 0 or below: off.
        num_splits: changes nothing.
        pack_gqa: changes nothing.
        deterministic: of the backward pass.
        sm_margin: must be 0.
        return_attn_probs: return (out, lse), lse (b, hq, sq) float32.
        s_aux: (hq,), sinks, as transformers names them.

    Returns:
        out (b, sq, hq, dv), or (out, lse).
    """
    _refuse(qv, q_descale, k_descale, v_descale, attention_chunk, sm_margin)
    keywords = _flash.options(softmax_scale, causal, window_size, softcap, deterministic, s_aux)
    return _flash.attend(q, k, v, return_attn_probs, keywords)


def flash_attn_qkvpacked_func(
    qkv: Any,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """flash_attn_func of q, k and v in one array.

    Args:
        qkv: (b, s, 3, h, d), or (b, s, hq + 2 * hk, d) with num_heads_q = hq.

    All others as in flash_attn_func.
    """
    if qkv.ndim == 4:
        heads = qkv.shape[2] - (num_heads_q or 0)
        if num_heads_q is None or heads < 2 or heads % 2:
            raise ValueError(
                "`num_heads_q` must leave as many heads of k as of v in a `qkv` of (b, s, hq + 2 * "
                f"hk, d), got {num_heads_q} of {qkv.shape[2]}"
            )
        q, k, v = qkv.split([num_heads_q, heads // 2, heads // 2], 2)
    else:
        q, k, v = _flash.unpack("qkv", qkv, 2, 3)
    _refuse(None, q_descale, k_descale, v_descale, attention_chunk, sm_margin)
    keywords = _flash.options(softmax_scale, causal, window_size, softcap, deterministic, None)
    return _flash.attend(q, k, v, return_attn_probs, keywords)


def flash_attn_varlen_func(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Any = None,
    seqused_k: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Any = None,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    s_aux: Any = None,
) -> Any:
    """fastattn.attention_varlen with FlashAttention 3's arguments.

    Args:
        q: (total_q, hq, d).
        k: (total_k, hk, d).
        v: (total_k, hk, dv).
        cu_seqlens_q: (b + 1,) int32; sequence n is rows cu_seqlens_q[n] to cu_seqlens_q[n + 1] - 1.
        cu_seqlens_k: likewise, of k and v.
        max_seqlen_q: no sequence has more queries.
        max_seqlen_k: no sequence has more keys.
        seqused_q: (b,) int32, how many of a sequence's queries count.
        seqused_k: likewise, of keys.
        return_attn_probs: return (out, lse), lse (hq, total_q).

    All others as in flash_attn_func, by each sequence's own lengths.

    Returns:
        out (total_q, hq, dv), or (out, lse).
    """
    _refuse(qv, q_descale, k_descale, v_descale, attention_chunk, sm_margin)
    keywords = _flash.options(softmax_scale, causal, window_size, softcap, deterministic, s_aux)
    keywords |= {"seqused_q": seqused_q, "seqused_k": seqused_k}
    places = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    return _flash.attend_varlen((q, k, v), *places, return_attn_probs, keywords)


def flash_attn_combine(
    out_partial: Any, lse_partial: Any, out: Any = None, out_dtype: Any = None
) -> tuple[Any, Any]:
    """fastattn.merge_states of n partial results over disjoint keys.

    Args:
        out_partial: (n, b, s, h, d).
        lse_partial: (n, b, s, h).
        out: (b, s, h, d), written into; of out_dtype.
        out_dtype: default out_partial's.

    Returns:
        out (b, s, h, d) and lse (b, s, h).
    """
    if out_partial.ndim != 5 or lse_partial.shape != out_partial.shape[:-1]:
        raise ValueError(
            "`lse_partial` must be (n, b, s, h) where `out_partial` is (n, b, s, h, d), got "
            f"{tuple(lse_partial.shape)} and {tuple(out_partial.shape)}"
        )
    wanted = out_partial.dtype if out_dtype is None else out_dtype
    if out is not None and (out.dtype, out.shape) != (wanted, out_partial.shape[1:]):
        raise ValueError(
            f"`out` must be {wanted} of {tuple(out_partial.shape[1:])}, got {out.dtype} of "
            f"{tuple(out.shape)}"
        )
    lses = lse_partial.transpose(2, 3).unbind(0)
    merged, lse = merge_states(out_partial.unbind(0), lses, layout="bshd")
    merged = merged.to(wanted) if out is None else out.copy_(merged)
    return merged, lse.transpose(1, 2)


def flash_attn_with_kvcache(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    k: Any = None,
    v: Any = None,
    qv: Any = None,
    rotary_cos: Any = None,
    rotary_sin: Any = None,
    cache_seqlens: Any = None,
    cache_batch_idx: Any = None,
    cache_leftpad: Any = None,
    page_table: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k_new: Any = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Any = None,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Any = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    *,
    s_aux: Any = None,
) -> Any:
    """fastattn.attention_kvcache with FlashAttention 3's arguments.

    Args:
        q: (b, sq, hq, d).
        k_cache: (b_cache, s_max, hk, d), or with page_table (num_pages, page_size, hk, d).
        v_cache: likewise, of dv.
        k: (b, s_new, hk, d), written into the cache at cache_seqlens, in place.
        v: (b, s_new, hk, dv).
        rotary_cos: (s_max, rotary_dim / 2), with new keys only.
        rotary_sin: likewise.
        cache_seqlens: an int, or (b,) int32: the keys that are there. None: the cache is full.
        cache_batch_idx: (b,) int32: each sequence's entry of the cache.
        cache_leftpad: (b,) int32: the first key that counts.
        page_table: (b, pages) int32; any page_size.
        cu_seqlens_q: as in attention_kvcache, as max_seqlen_q and num_splits.
        cu_seqlens_k_new: must be None, as rotary_seqlens.
        rotary_interleaved: pairs are (0, 1), (2, 3), ...; else (0, rotary_dim / 2), ...
        scheduler_metadata: changes nothing.
        return_softmax_lse: return (out, lse), lse (b, hq, sq) float32.

    All others as in flash_attn_func.

    Returns:
        out (b, sq, hq, dv), or (out, lse). There is no gradient: what requires grad is refused.
    """
    _refuse(qv, q_descale, k_descale, v_descale, attention_chunk, sm_margin)
    _refuse_arrays(cu_seqlens_k_new=cu_seqlens_k_new, rotary_seqlens=rotary_seqlens)
    keywords = _flash.options(softmax_scale, causal, window_size, softcap, None, s_aux) | {
        "cache_batch_idx": cache_batch_idx,
        "cache_leftpad": cache_leftpad,
        "cu_seqlens_q": cu_seqlens_q,
        "max_seqlen_q": max_seqlen_q,
        "rotary_cos": rotary_cos,
        "rotary_sin": rotary_sin,
        "rotary_interleaved": rotary_interleaved,
        "num_splits": num_splits,
    }
    return _flash.attend_cache(
        _flash.attention_kvcache,
        (q, k_cache, v_cache),
        (k, v),
        cache_seqlens,
        page_table,
        return_softmax_lse,
        keywords,
    )


def get_scheduler_metadata(*arguments: Any, **keywords: Any) -> None:
    """None, which flash_attn_with_kvcache takes as scheduler_metadata: it needs no plan."""


def _refuse(
    qv: Any, q_descale: Any, k_descale: Any, v_descale: Any, attention_chunk: int, sm_margin: int
) -> None:
    _refuse_arrays(qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    for name, number in (("attention_chunk", attention_chunk), ("sm_margin", sm_margin)):
        if number:
            raise NotImplementedError(f"`{name}` must be 0: no backend serves it, got {number}")


def _refuse_arrays(**given: Any) -> None:
    for name, array in given.items():
        if array is not None:
            raise NotImplementedError(f"`{name}` must be None: no backend serves it")
