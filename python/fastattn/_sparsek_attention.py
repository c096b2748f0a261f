"""Attention to the keys that SparseK keeps: names, defaults and specification, as _attention.py."""

from typing import Any, Literal

from ._attention import Layout, _in_c


@_in_c
def sparsek_attention(
    q: Any,
    k: Any,
    v: Any,
    scores: Any,
    k_keep: float,
    *,
    window: int,
    key_gate: bool = False,
    keep_all: bool = False,
    q_offset: Any = None,
    q_lengths: Any = None,
    k_lengths: Any = None,
    k_start: Any = None,
    softcap: float = 0.0,
    sink: Any = None,
    scale: float | None = None,
    layout: Layout = "bhsd",
    return_lse: bool = False,
    return_selection: bool = False,
    out: Any = None,
    deterministic: bool = False,
    backend: Literal["sm90", "sm80", "cpu"] | None = None,
) -> Any:
    """Causal attention of each query to k_keep keys that their scores choose, and to a window.

    Row i, at position i' = i + sk - sq on the key axis, sees the keys i' - window + 1 .. i' with a
    gate of 1. Its candidates are the keys before those, from k_start on; p are their sparsek gates,
    by scores and k_keep. Of them it sees the ceil(k_keep) greatest, or all where there are fewer;
    among equal scores the lower key number is the greater. With g_j = p_j for these:

        s_j = softcap(scale * (q_i . k_j))           times g_j inside of softcap, with key_gate
        lse = log(exp(sink_h) + sum_j exp(s_j))      no first term without a sink
        o_i = sum_j exp(s_j - lse) * g_j * v_j

    A gate of 0 hides nothing: its key stays in the sum, so that results over disjoint keys merge by
    merge_states. A row that sees nothing has output 0 and lse -inf, or the sink's value. A NaN
    among a row's candidates makes tau and the gates that it sees NaN.

    The choice takes one pass over the scores, for tau never falls as prefixes grow; no list is kept
    for each query, but one number for each row and each key. Keys that no row of a block of queries
    sees are not read. Torch tensors q, k, v, scores and sink may require grad: out and lse then
    have a grad_fn; there are no second derivatives. The choice itself has no gradient, the gates
    do, and so scores learn: du_j = sum of (dg_j - mean of dg) over the rows with 0 < p_j < 1, where
    the mean is over all such candidates of a row, those that were cut among them, with dg 0.

    Args:
        q: (b, hq, sq, d), or (b, sq, hq, d) with layout="bshd"; as in attention.
        k: (b, hk, sk, d); the query heads that share a key head share its choice.
        v: (b, hk, sk, dv).
        scores: (b, hk, sk), float32 or of q's dtype; float64 where q is. Any strides.
        k_keep: any finite number, an integer or not.
        window: 0 or more: how many keys up to the query's own are seen whatever their scores.
        key_gate: whether gates multiply scores, too.
        keep_all: see all candidates whose gate is not 0, which may be more than k_keep: all of them
            where scores are equal.
        q_offset: as in attention.
        q_lengths: as in attention.
        k_lengths: as in attention.
        k_start: as in attention.
        softcap: as in attention.
        sink: as in attention.
        scale: as in attention.
        layout: "bhsd" or "bshd", of q, k, v and the output.
        return_lse: also return lse, as in attention.
        return_selection: also return tau (b, hk, sq), as sparsek_lists gives it, and ends
            (b, hk, sk) int32, the row after the last that keeps a key as a candidate. It is not
            above the first row that has it as one where none does. Rows to come will not keep a key
            whose end is not sq, but for those that were no candidate yet.
        out: as in attention.
        deterministic: of the backward pass; on the CPU it always is.
        backend: None is the best that can; or "sm90", "sm80", "cpu".

    Returns:
        out, or a tuple of out, lse, tau and ends, as far as asked for; kind and device of q.

    Raises:
        ValueError: a shape or value; the message names the argument, the rule and what came.
        TypeError: no array, or a dtype.
        NotImplementedError: no backend serves the call (each one's reason is in the message), which
            is any on a GPU so far; a transform of torch's other than its gradient.

    Source: Lou et al., "Sparser is Faster and Less is More: Efficient Sparse Attention for
    Long-Range Transformers", 2024, section 3.
    """
    raise NotImplementedError  # never runs: see csrc/binding/selection.c


@_in_c
def sparsek_attention_varlen(
    q: Any,
    k: Any,
    v: Any,
    scores: Any,
    k_keep: float,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    window: int,
    key_gate: bool = False,
    keep_all: bool = False,
    seqused_q: Any = None,
    seqused_k: Any = None,
    q_offset: Any = None,
    softcap: float = 0.0,
    sink: Any = None,
    scale: float | None = None,
    return_lse: bool = False,
    return_selection: bool = False,
    out: Any = None,
    deterministic: bool = False,
    backend: Literal["sm90", "sm80", "cpu"] | None = None,
) -> Any:
    """sparsek_attention of sequences packed end to end, as attention_varlen has them.

    Args:
        q: (total_q, hq, d).
        k: (total_k, hk, d).
        v: (total_k, hk, dv).
        scores: (hk, total_k), as in sparsek_attention.
        k_keep: as in sparsek_attention, of each sequence.
        cu_seqlens_q: (b + 1,) int32, as in attention_varlen.
        cu_seqlens_k: likewise.
        max_seqlen_q: no sequence has more queries.
        max_seqlen_k: no sequence has more keys.
        window: as in sparsek_attention.
        key_gate: as in sparsek_attention.
        keep_all: as in sparsek_attention.
        seqused_q: as in attention_varlen.
        seqused_k: as in attention_varlen.
        q_offset: as in attention_varlen.
        softcap: as in attention.
        sink: as in attention.
        scale: as in attention.
        return_lse: also return lse, (hq, total_q).
        return_selection: also return tau (hk, total_q) and ends (hk, total_k), in rows of each
            sequence's own.
        out: as in attention.
        deterministic: as in sparsek_attention.
        backend: as in sparsek_attention.

    Returns:
        out (total_q, hq, dv), or a tuple of it, lse, tau and ends, as far as asked for.

    Raises:
        ValueError, TypeError, NotImplementedError: as sparsek_attention.

    Source: as sparsek_attention.
    """
    raise NotImplementedError  # never runs: see csrc/binding/selection.c


@_in_c
def sparsek_attention_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    scores: Any,
    k_keep: float,
    out: Any,
    lse: Any,
    tau: Any,
    ends: Any,
    *,
    window: int,
    dlse: Any = None,
    need_dq: bool = True,
    need_dk: bool = True,
    need_dv: bool = True,
    need_dscores: bool = True,
    need_dsink: bool = False,
    key_gate: bool = False,
    keep_all: bool = False,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: Any = None,
    seqused_k: Any = None,
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
    """The gradients of sparsek_attention, or with cu_seqlens_q of sparsek_attention_varlen.

    Of a loss, given those of out and lse. Exactly 0 for what no row sees, and for rows that see
    nothing. Torch tensors that require grad need no call of this.

    Args:
        dout: gradient of the loss with respect to out, of its shape and dtype; None: zeros, with
            dlse given.
        q: as in the forward call, as are all arguments that are not described here.
        k: likewise.
        v: likewise.
        scores: likewise.
        k_keep: likewise.
        out: what the forward call gave.
        lse: what it gave with return_lse=True.
        tau: what it gave with return_selection=True.
        ends: likewise.
        window: the forward's.
        dlse: gradient with respect to lse, of its shape and dtype; None: zeros.
        need_dq: whether dq is wanted; what is not is not computed.
        need_dk: likewise.
        need_dv: likewise.
        need_dscores: likewise.
        need_dsink: likewise.
        key_gate: the forward's.
        keep_all: the forward's.
        cu_seqlens_q: the forward's, None where nothing is packed.
        cu_seqlens_k: likewise.
        max_seqlen_q: likewise.
        max_seqlen_k: likewise.
        seqused_q: likewise.
        seqused_k: likewise.
        q_offset: the forward's.
        q_lengths: the forward's, as the next two without meaning where sequences are packed.
        k_lengths: the forward's.
        k_start: the forward's.
        softcap: the forward's.
        sink: the forward's.
        scale: the forward's.
        layout: of q, k, v, out and their gradients.
        deterministic: the same bits in every run; on the CPU it always is so.
        backend: as in sparsek_attention.

    Returns:
        (dq, dk, dv, dscores, dsink), each like the array that it is the gradient of, None where not
        wanted.

    Raises:
        ValueError, TypeError, NotImplementedError: as sparsek_attention.

    Source: as sparsek_attention.
    """
    raise NotImplementedError  # never runs: see csrc/binding/selection.c
