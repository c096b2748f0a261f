"""The SparseK operator: names and specification; the work is in csrc/binding/sparsek.c."""

from typing import Any

from . import _C


def sparsek(scores: Any, k: float, *, lengths: Any = None) -> tuple[Any, Any]:
    """Gates from 0 to 1 whose sum is k: the greatest scores' are 1, those of the least are 0.

    p_j = clip(z_j - tau, 0, 1), with the tau at which the gates of a row's m scores z sum to k: the
    nearest such p to z, piecewise linear in z. Where k is an integer and the k-th greatest score is
    1 or more above the next, tau is the middle between that next one and the k-th less 1. A score
    of -inf is no candidate and not counted in m; one of +inf has gate 1 and takes one of k. Where
    k >= m all gates are 1 and tau is -inf, where k <= 0 they are 0 and tau is +inf. A NaN among a
    row's candidates makes its tau, and the gates of the candidates, NaN.

    Sums are taken of z less a z nearby, so that scores far from 0 lose nothing but what tau's own
    rounding takes. The gates have a gradient, tau has none: with I the candidates whose gate is
    neither 0 nor 1, by the bits of tau, dz_j = dp_j - (mean of dp over I) in I, else 0, of any row
    with a NaN too.

    Args:
        scores: (..., m) of float64, float32, float16 or bfloat16, any strides.
        k: any finite number, an integer or not.
        lengths: int32, broadcastable to (...): of each row the first so many scores are candidates;
            the others' gates are 0, whatever they hold. On the CPU others than from 0 to m are a
            ValueError, on a GPU the nearest counts.

    Returns:
        (gates (..., m), tau (...)), float64 where scores are, else float32.

    Raises:
        ValueError: a shape or value; the message names the argument, the rule and what came.
        TypeError: no array, no number, or a dtype.
        NotImplementedError: no backend serves the call (each one's reason is in the message);
            torch's forward-mode, and second derivatives.

    Source: Lou et al., "Sparser is Faster and Less is More: Efficient Sparse Attention for
    Long-Range Transformers", 2024.
    """
    return _C.sparsek(scores, k, lengths)


def sparsek_lists(
    scores: Any,
    k: float,
    *,
    sq: int,
    window: int = 0,
    q_offset: Any = None,
    q_lengths: Any = None,
    k_lengths: Any = None,
    k_start: Any = None,
) -> tuple[Any, Any, Any]:
    """sparsek for each query of a causal sequence, as lists of keys for attention to them alone.

    The candidates of row i, at position i' = i + sk - sq on the key axis, are the keys up to
    i' - window, from k_start on. tau and gates are sparsek's of their scores. A list holds the
    ceil(k) greatest candidates, or all where there are fewer; among equal scores the lower key
    number is the greater. Where more keys than that have a gate (many equal ones), the rest are
    cut: they have no entry, but their part in the gradient.

    As prefixes grow tau never falls, so all rows are computed in one pass over the scores, in
    memory of the present support, and a row's bits depend on its candidates alone; on a GPU by
    blocks of 512 rows, each in its own view of the scores, and tau is the greatest so far.

    Args:
        scores: (b, hk, sk) of float64, float32, float16 or bfloat16, any strides.
        k: any finite number, an integer or not.
        sq: how many queries there are.
        window: 0 or more: how many keys up to the query's own are left out, as attention to them
            comes from elsewhere.
        q_offset: as in attention: i' = i + q_offset instead.
        q_lengths: as in attention; rows past it have an empty list.
        k_lengths: as in attention.
        k_start: as in attention.

    Returns:
        (key_lists, gates, tau): (b, hk, sq, ceil(k)) int32, in ascending order, then -1; as many
        gates, 0 where there is no key; and (b, hk, sq). Gates and tau are float64 where scores are,
        else float32. A row with a NaN has lists in which that counts as +inf, and gates of NaN.

    Raises:
        ValueError, TypeError, NotImplementedError: as sparsek.

    Source: as sparsek.
    """
    return _C.sparsek_lists(scores, k, sq, window, q_offset, q_lengths, k_lengths, k_start)
