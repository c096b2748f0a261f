"""FlashAttention 2's functions, as flash-attn 2.8 has them, over fastattn.attention and its kin.

Layouts are (b, s, h, d) and (total, h, d); causal and windows are aligned to the bottom right, and
a row that sees nothing gives 0. Beyond flash-attn: any device and dtype that attention serves, any
head size, gradients of the lse, and sinks (`s_aux`). Differences: a row that sees nothing has
lse -inf, not +inf; alibi_slopes that require grad are refused, where flash-attn leaves their
gradient out; what no backend serves is a NotImplementedError.
"""

from typing import Any

from .. import _flash


def flash_attn_func(
    q: Any,
    k: Any,
    v: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    s_aux: Any = None,
) -> Any:
    """fastattn.attention with FlashAttention 2's arguments.

    Args:
        q: (b, sq, hq, d).
        k: (b, sk, hk, d); hq is a multiple of hk.
        v: (b, sk, hk, dv).
        dropout_p: the seed comes from torch's generator.
        softmax_scale: default d ** -0.5.
        causal: the last query sees the last key.
        window_size: (left, right), inclusive; below 0: unbounded.
        softcap: 0 or below: off.
        alibi_slopes: (hq,) or (b, hq) float32.
        deterministic: of the backward pass.
        return_attn_probs: return (out, lse, None), lse (b, hq, sq) float32. The third would be the
            dropout's pattern, which is not made: with dropout_p, NotImplementedError.
        s_aux: (hq,), sinks, as transformers names them.

    Returns:
        out (b, sq, hq, dv), or (out, lse, None).
    """
    keywords = _options(dropout_p, alibi_slopes, return_attn_probs) | _flash.options(
        softmax_scale, causal, window_size, softcap, deterministic, s_aux
    )
    return _result(_flash.attend(q, k, v, return_attn_probs, keywords), return_attn_probs)


def flash_attn_kvpacked_func(
    q: Any,
    kv: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """flash_attn_func of k and v in one array, kv (b, sk, 2, hk, d)."""
    k, v = _flash.unpack("kv", kv, 2, 2)
    rest: Any = (window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn_func(q, k, v, dropout_p, softmax_scale, causal, *rest)


def flash_attn_qkvpacked_func(
    qkv: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """flash_attn_func of q, k and v in one array, qkv (b, s, 3, h, d)."""
    q, k, v = _flash.unpack("qkv", qkv, 2, 3)
    rest: Any = (window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn_func(q, k, v, dropout_p, softmax_scale, causal, *rest)


def flash_attn_varlen_func(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Any = None,
    *,
    s_aux: Any = None,
) -> Any:
    """fastattn.attention_varlen with FlashAttention 2's arguments.

    Args:
        q: (total_q, hq, d).
        k: (total_k, hk, d).
        v: (total_k, hk, dv).
        cu_seqlens_q: (b + 1,) int32; sequence n is rows cu_seqlens_q[n] to cu_seqlens_q[n + 1] - 1.
        cu_seqlens_k: likewise, of k and v.
        max_seqlen_q: no sequence has more queries.
        max_seqlen_k: no sequence has more keys.
        block_table: (b, blocks) int32, attention_varlen's page_table; k and v are (num_blocks,
            block_size, hk, d), of any block_size, of which cu_seqlens_k says how many rows count.
        return_attn_probs: return (out, lse, None), lse (hq, total_q).

    All others as in flash_attn_func, by each sequence's own lengths.

    Returns:
        out (total_q, hq, dv), or (out, lse, None).
    """
    keywords = _options(dropout_p, alibi_slopes, return_attn_probs) | _flash.options(
        softmax_scale, causal, window_size, softcap, deterministic, s_aux
    )
    if block_table is not None:
        keywords |= {"page_table": block_table, "seqused_k": cu_seqlens_k.diff()}
        cu_seqlens_k = None
    places = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    found = _flash.attend_varlen((q, k, v), *places, return_attn_probs, keywords)
    return _result(found, return_attn_probs)


def flash_attn_varlen_kvpacked_func(
    q: Any,
    kv: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """flash_attn_varlen_func of k and v in one array, kv (total_k, 2, hk, d)."""
    k, v = _flash.unpack("kv", kv, 1, 2)
    places = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    rest: Any = (window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn_varlen_func(q, k, v, *places, dropout_p, softmax_scale, causal, *rest)


def flash_attn_varlen_qkvpacked_func(
    qkv: Any,
    cu_seqlens: Any,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """flash_attn_varlen_func of q, k and v in one array, qkv (total, 3, h, d)."""
    q, k, v = _flash.unpack("qkv", qkv, 1, 3)
    places = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    rest: Any = (window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn_varlen_func(q, k, v, *places, dropout_p, softmax_scale, causal, *rest)


def flash_attn_with_kvcache(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    k: Any = None,
    v: Any = None,
    rotary_cos: Any = None,
    rotary_sin: Any = None,
    cache_seqlens: Any = None,
    cache_batch_idx: Any = None,
    cache_leftpad: Any = None,
    block_table: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Any = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    s_aux: Any = None,
) -> Any:
    """fastattn.attention_kvcache with FlashAttention 2's arguments.

    Args:
        q: (b, sq, hq, d).
        k_cache: (b_cache, s_max, hk, d), or with block_table (num_blocks, block_size, hk, d).
        v_cache: likewise, of dv.
        k: (b, s_new, hk, d), written into the cache at cache_seqlens, in place.
        v: (b, s_new, hk, dv).
        rotary_cos: (s_max, rotary_dim / 2), with new keys only.
        rotary_sin: likewise.
        cache_seqlens: an int, or (b,) int32: the keys that are there. None: the cache is full.
        cache_batch_idx: (b,) int32: each sequence's entry of the cache.
        cache_leftpad: (b,) int32: the first key that counts.
        block_table: (b, blocks) int32, attention_kvcache's page_table; any block_size.
        softmax_scale: default d ** -0.5.
        causal: the last query sees the last key.
        window_size: (left, right), inclusive; below 0: unbounded.
        softcap: 0 or below: off.
        rotary_interleaved: pairs are (0, 1), (2, 3), ...; else (0, rotary_dim / 2), ...
        alibi_slopes: (hq,) or (b, hq) float32.
        num_splits: as in attention_kvcache.
        return_softmax_lse: return (out, lse), lse (b, hq, sq) float32.
        s_aux: (hq,), sinks.

    Returns:
        out (b, sq, hq, dv), or (out, lse). There is no gradient: what requires grad is refused.
    """
    keywords = _flash.options(softmax_scale, causal, window_size, softcap, None, s_aux) | {
        "cache_batch_idx": cache_batch_idx,
        "cache_leftpad": cache_leftpad,
        "rotary_cos": rotary_cos,
        "rotary_sin": rotary_sin,
        "rotary_interleaved": rotary_interleaved,
        "alibi_slopes": alibi_slopes,
        "num_splits": num_splits,
    }
    return _flash.attend_cache(
        _flash.attention_in_blocks,
        (q, k_cache, v_cache),
        (k, v),
        cache_seqlens,
        block_table,
        return_softmax_lse,
        keywords,
    )


def _options(dropout_p: float, alibi_slopes: Any, return_attn_probs: bool) -> dict[str, Any]:
    if return_attn_probs and dropout_p:
        raise NotImplementedError(
            "`return_attn_probs` with dropout would return its pattern, a matrix of every query "
            f"and key, which is not made: pass dropout_p=0.0, got {dropout_p}"
        )
    return {"dropout_p": dropout_p, "alibi_slopes": alibi_slopes}


def _result(found: Any, return_attn_probs: bool) -> Any:
    return (*found, None) if return_attn_probs else found
