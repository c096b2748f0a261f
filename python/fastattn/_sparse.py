"""Attention to lists of keys: names, defaults and their specification, as in _attention.py."""

from typing import Any, Literal

from ._attention import Layout, _in_c


@_in_c
def attention_sparse(
    q: Any,
    k: Any,
    v: Any,
    key_lists: Any,
    *,
    counts: Any = None,
    q_block: int = 1,
    k_block: int = 64,
    gate: Any = None,
    key_gate: bool = False,
    window_union: tuple[int | None, int | None] | None = None,
    validate: bool = False,
    causal: bool | Literal["top-left"] = False,
    window: tuple[int | None, int | None] | None = None,
    q_offset: Any = None,
    q_lengths: Any = None,
    k_lengths: Any = None,
    k_start: Any = None,
    softcap: float = 0.0,
    sink: Any = None,
    scale: float | None = None,
    layout: Layout = "bhsd",
    return_lse: bool = False,
    return_mass: bool = False,
    out: Any = None,
    deterministic: bool = False,
    backend: Literal["sm90", "sm80", "cpu"] | None = None,
) -> Any:
    """attention of each block of queries to the keys that its list names.

    Rows i of one block of queries see key j where attention's causal, window and lengths let them
    and the list names its block j // k_block, or window_union has it. With g_j the gate of the
    entry that names the key, and 1 in the union's window or without gates:

        s_j = softcap(scale * (q_i . k_j))           times g_j inside of softcap, with key_gate
        lse = log(exp(sink_h) + sum_j exp(s_j))      no first term without a sink
        o_i = sum_j exp(s_j - lse) * g_j * v_j

    A gate of 0 hides nothing: its key stays in the sum, so that results over disjoint keys merge by
    merge_states. A row that sees nothing has output 0 and lse -inf, or the sink's value.

    Torch tensors q, k, v, gate and sink may require grad: out and lse then have a grad_fn, mass has
    none; there are no second derivatives. Autocast casts q, k and v, as in attention. Keys that no
    row of a block sees are not read.

    Args:
        q: (b, hq, sq, d), or (b, sq, hq, d) with layout="bshd"; as in attention.
        k: (b, hk, sk, d); the query heads that share a key head share its lists.
        v: (b, hk, sk, dv).
        key_lists: (b or 1, hk or 1, ceil(sq / q_block), L) int32, any strides: numbers of blocks of
            keys, in any order. One outside of the sequence's keys, as -1, is nothing, anywhere. A
            block that is named twice counts twice.
        counts: (b or 1, hk or 1, ceil(sq / q_block)) int32: how many entries of each list count,
            from the first on; clamped to 0 .. L. None: all.
        q_block: rows of a block of queries: 1, 64 or 128.
        k_block: keys of a block: 1, 16, 32, 64 or 128. Block n has the keys from n * k_block on,
            counted from the sequence's key 0 whatever k_start is. One that the diagonal, a window
            or a length cuts is cut for each row.
        gate: of key_lists' shape, float32, or float64 where q is; b and hk may be 1 in either.
            Those of void entries, and of entries that no row of the block sees, reach nothing.
        key_gate: whether gates multiply scores, too.
        window_union: (left, right) as window, not None: keys that are seen besides, whether listed
            or not; cut by causal, lengths and k_start, but not by window. A key that is listed,
            too, counts once, with gate 1, and gives its entry neither gradient nor mass.
        validate: whether to read lists and counts first, for a ValueError where an entry is neither
            -1 nor a block of the sequence, a block is named twice, or a count is out of range. Not
            on a GPU, nor in a program that is recorded.
        causal: as in attention.
        window: as in attention.
        q_offset: as in attention.
        q_lengths: as in attention.
        k_lengths: as in attention.
        k_start: as in attention.
        softcap: as in attention.
        sink: as in attention.
        scale: as in attention.
        layout: "bhsd" or "bshd", of q, k, v and the output.
        return_lse: also return lse, as in attention.
        return_mass: also return mass, float32 of key_lists' shape: the sum of exp(s_j - lse) over
            an entry's keys and rows, and all heads and sequences that share the list.
        out: as in attention.
        deterministic: of the backward pass; on the CPU it always is.
        backend: None is the best that can; or "sm90", "sm80", "cpu".

    Returns:
        out, or a tuple of out, lse and mass, as far as asked for; kind and device of q.

    Raises:
        ValueError: a shape or value; the message names the argument, the rule and what came.
        TypeError: no array, or a dtype, as lists of int64.
        NotImplementedError: no backend serves the call (each one's reason is in the message): on a
            GPU float16 and bfloat16 alone are; a transform of torch's other than its gradient.

    Source: blocks chosen by the queries: Yuan et al., "Native Sparse Attention", 2025, section 3;
    gated values: Lou et al., "Sparser is Faster and Less is More", 2024.
    """
    raise NotImplementedError  # never runs: see csrc/binding/sparse.c


@_in_c
def attention_sparse_varlen(
    q: Any,
    k: Any,
    v: Any,
    key_lists: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    counts: Any = None,
    q_block: int = 1,
    k_block: int = 64,
    gate: Any = None,
    key_gate: bool = False,
    window_union: tuple[int | None, int | None] | None = None,
    validate: bool = False,
    seqused_q: Any = None,
    seqused_k: Any = None,
    q_offset: Any = None,
    causal: bool | Literal["top-left"] = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    sink: Any = None,
    scale: float | None = None,
    return_lse: bool = False,
    return_mass: bool = False,
    out: Any = None,
    deterministic: bool = False,
    backend: Literal["sm90", "sm80", "cpu"] | None = None,
) -> Any:
    """attention_sparse of sequences packed end to end, as attention_varlen has them.

    Args:
        q: (total_q, hq, d).
        k: (total_k, hk, d).
        v: (total_k, hk, dv).
        key_lists: (hk or 1, N, L) int32. Sequence n's first block of queries is number sum of
            ceil(length / q_block) over the sequences before it, by cu_seqlens_q; N is that sum over
            all or more, so that total_q // q_block + b always is enough. Numbers of blocks count
            within each sequence.
        cu_seqlens_q: (b + 1,) int32, as in attention_varlen.
        cu_seqlens_k: likewise.
        max_seqlen_q: no sequence has more queries.
        max_seqlen_k: no sequence has more keys.
        counts: (hk or 1, N) int32, as in attention_sparse.
        q_block: as in attention_sparse.
        k_block: as in attention_sparse.
        gate: of key_lists' shape, as in attention_sparse.
        key_gate: as in attention_sparse.
        window_union: as in attention_sparse.
        validate: as in attention_sparse.
        seqused_q: as in attention_varlen.
        seqused_k: as in attention_varlen.
        q_offset: as in attention_varlen.
        causal: as in attention.
        window: as in attention.
        softcap: as in attention.
        sink: as in attention.
        scale: as in attention.
        return_lse: also return lse, (hq, total_q).
        return_mass: also return mass, of key_lists' shape.
        out: as in attention.
        deterministic: as in attention_sparse.
        backend: as in attention_sparse.

    Returns:
        out (total_q, hq, dv), or a tuple of it, lse and mass, as far as asked for.

    Raises:
        ValueError, TypeError, NotImplementedError: as attention_sparse.

    Source: as attention_sparse.
    """
    raise NotImplementedError  # never runs: see csrc/binding/sparse.c


@_in_c
def attention_sparse_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    key_lists: Any,
    *,
    dlse: Any = None,
    need_dq: bool = True,
    need_dk: bool = True,
    need_dv: bool = True,
    need_dgate: bool = False,
    need_dsink: bool = False,
    counts: Any = None,
    q_block: int = 1,
    k_block: int = 64,
    gate: Any = None,
    key_gate: bool = False,
    window_union: tuple[int | None, int | None] | None = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: Any = None,
    seqused_k: Any = None,
    causal: bool | Literal["top-left"] = False,
    window: tuple[int | None, int | None] | None = None,
    q_offset: Any = None,
    q_lengths: Any = None,
    k_lengths: Any = None,
    k_start: Any = None,
    softcap: float = 0.0,
    sink: Any = None,
    scale: float | None = None,
    layout: Layout = "bhsd",
    deterministic: bool = False,
    backend: Literal["sm90", "sm80", "cpu"] | None = None,
) -> tuple[Any, Any, Any, Any, Any]:
    """The gradients of attention_sparse, or with cu_seqlens_q of attention_sparse_varlen.

    Of a loss, given those of out and lse. Exactly 0 for what no row sees, and for rows that see
    nothing. Torch tensors that require grad need no call of this.

    Args:
        dout: gradient of the loss with respect to out, of its shape and dtype; None: zeros, with
            dlse given.
        q: as in the forward call, as are all arguments that are not described here.
        k: likewise.
        v: likewise.
        out: what the forward call gave.
        lse: what it gave with return_lse=True.
        key_lists: the forward's.
        dlse: gradient with respect to lse, of its shape and dtype; None: zeros.
        need_dq: whether dq is wanted; what is not is not computed.
        need_dk: likewise.
        need_dv: likewise.
        need_dgate: likewise.
        need_dsink: likewise.
        counts: the forward's.
        q_block: the forward's.
        k_block: the forward's.
        gate: the forward's.
        key_gate: the forward's.
        window_union: the forward's.
        cu_seqlens_q: the forward's, None where nothing is packed.
        cu_seqlens_k: likewise.
        max_seqlen_q: likewise.
        max_seqlen_k: likewise.
        seqused_q: likewise.
        seqused_k: likewise.
        causal: the forward's.
        window: the forward's.
        q_offset: the forward's.
        q_lengths: the forward's, as the next two without meaning where sequences are packed.
        k_lengths: the forward's.
        k_start: the forward's.
        softcap: the forward's.
        sink: the forward's.
        scale: the forward's.
        layout: of q, k, v, out and their gradients.
        deterministic: the same bits in every run; on the CPU it always is so.
        backend: as in attention_sparse.

    Returns:
        (dq, dk, dv, dgate, dsink), each like the array that it is the gradient of, None where not
        wanted.

    Raises:
        ValueError, TypeError, NotImplementedError: as attention_sparse.

    Source: as attention_sparse.
    """
    raise NotImplementedError  # never runs: see csrc/binding/sparse.c
