"""What sparsek_attention means, and its gradients, in NumPy: the keys of each row as a list.

attention_sparse (reference_sparse.py) of lists of single keys, with SparseK's gates and the window
united, and the gradient of the gates through SparseK's (reference_sparsek.py). Gates are those of
the bits of tau, which are judged by themselves: which keys have one depends on them.
"""

import numpy as np
import reference
import reference_sparse
import reference_sparsek

LIMITS = ("q_offset", "q_lengths", "k_lengths", "k_start")


def kept_of(z, tau, k, keep_all):
    """Numbers of the candidates z that a row sees, ascending."""
    if not keep_all:
        return reference_sparsek.greatest(z, k)
    p = reference_sparsek.gates_of(z, tau, k)
    return np.flatnonzero(~(p <= 0) & ~np.isneginf(z))


def lists(scores, tau, k, *, keep_all=False, window=0, **limits):
    """(key_lists, gates), (b, hk, sq, L) with the L of the longest; gates in tau's dtype."""
    sq = tau.shape[-1]
    inside = reference_sparsek.candidates(scores, sq, window=window, **limits)
    z = scores.astype(tau.dtype)
    kept = {}
    for b, h, i in np.ndindex(tau.shape):
        keys = np.flatnonzero(inside[b, i])
        kept[b, h, i] = keys[kept_of(z[b, h, keys], tau[b, h, i], k, keep_all)]
    longest = max((len(x) for x in kept.values()), default=0)
    found = np.full((*tau.shape, longest), -1, np.int32)
    gates = np.zeros(found.shape, tau.dtype)
    for at, keys in kept.items():
        found[at][: len(keys)] = keys
        gates[at][: len(keys)] = reference_sparsek.gates_of(z[at[:2]][keys], tau[at], k)
    return found, gates


def tau_of(scores, k, *, sq, window=0, **limits):
    return reference_sparsek.sparsek_lists(scores, k, sq=sq, window=window, **limits)[2]


def du_of(scores, key_lists, tau, dgates, k, *, window=0, **limits):
    given = {"window": window, **limits}
    return reference_sparsek.lists_gradient(
        scores.astype(tau.dtype), key_lists, tau, dgates, k, sq=tau.shape[-1], **given
    )


def complaints(results, q, k, v, scores, k_keep, *, window, keep_all=False, **keywords):
    """Of {name: array}: tau, and as far as given out, lse, dq, dk, dv, dscores, dsink."""
    limits = {n: x for n, x in keywords.items() if n in LIMITS} | {"window": window}
    rest = {n: x for n, x in keywords.items() if n not in LIMITS}
    places = {n: x for n, x in limits.items() if n != "window"}
    tau = results["tau"]
    want = tau_of(scores, k_keep, sq=q.shape[2], **limits)
    found = []
    eps = float(np.finfo(tau.dtype).eps)
    with np.errstate(all="ignore"):
        off = ~(np.abs(tau - want) <= 2 * eps * (1 + np.abs(want)))
    off &= (tau != want.astype(tau.dtype)) & ~(np.isnan(tau) & np.isnan(want))
    if off.any():
        found.append(f"tau is {tau[off][0]}, not {want[off][0]}")
    key_lists, gates = lists(scores, tau, k_keep, keep_all=keep_all, **limits)
    whole = {
        **{"q_block": 1, "k_block": 1, "gate": gates, "causal": True},
        **{"window_union": (window - 1, 0) if window else None},
        **places,
        **rest,
    }
    given = {n: x for n, x in results.items() if n not in ("tau", "ends", "dscores")}
    found += reference_sparse.complaints(given, q, k, v, key_lists, **whole)
    if "dscores" not in results:
        return found
    runs = [reference_sparse.attention_sparse(q, k, v, key_lists, **whole)]
    if q.dtype != np.float64:
        runs.append(reference_sparse.attention_sparse(q, k, v, key_lists, **whole, low=True))
    ref, *low = (
        du_of(scores, key_lists, tau, run.gradients["dgate"], k_keep, **limits) for run in runs
    )
    got = results["dscores"]
    own = np.dtype(np.float64 if got.dtype == np.float64 else np.float32)
    size = runs[0].sizes["dgate"] * max(1, tau.shape[-1]) ** 0.5
    limit = 2 * np.max(np.abs(low[0] - ref), initial=0) if low else 0
    limit += 2 * reference.ulp(np.max(np.abs(ref), initial=0), got.dtype)
    limit += 32 * size * float(np.finfo(own).eps) + 1e-30
    if low:  # sums of products with rounded outputs
        limit += size * float(reference.finfo(q.dtype).eps) / 2 * bool(keywords.get("key_gate"))
    error = np.max(np.abs(got.astype(ref.dtype) - ref), initial=0)
    if not error <= limit:
        found.append(f"dscores error {error:.3g} is above {limit:.3g}")
    return found
