"""What sparsek and sparsek_lists mean, in NumPy: one line of scores at a time, nothing fast.

Computed in float64, in extended precision for float64 scores.
"""

import numpy as np
import reference


def real_of(scores):
    return np.longdouble if scores.dtype == np.float64 else np.float64


def threshold(z, k):
    """tau of finite z with 0 < k < m: where f(tau), the sum of clip(z - tau, 0, 1), is k."""
    s = np.sort(z)[::-1]
    if k == int(k) and s[int(k) - 1] - s[int(k)] >= 1:
        return (s[int(k) - 1] - 1 + s[int(k)]) / 2  # the middle of the plateau
    points = np.unique(np.concatenate([s, s - 1]))
    low, high = 0, len(points) - 1  # f(points[low]) >= k > f(points[high])
    if np.clip(s - points[0], 0, 1).sum() < k:
        return points[0]  # of a size of which z - 1 rounds to z: f steps over k there, as below
    while high - low > 1:
        middle = (low + high) // 2
        if np.clip(s - points[middle], 0, 1).sum() >= k:
            low = middle
        else:
            high = middle
    c = (points[low] + points[high]) / 2
    ones, some = (s - c >= 1).sum(), (s > c).sum()
    if some == ones:
        return points[high]
    return min(c + ((s[ones:some] - c).sum() + ones - k) / (some - ones), points[high])


def gates_of(z, tau, k):
    """Of scores whose tau is known; NaN where that is, but for -inf, which is no candidate."""
    p = np.zeros(z.shape, np.result_type(z, tau))
    certain = np.isposinf(z)
    finite = np.isfinite(z) & np.isfinite(tau)
    p[finite] = np.clip(z[finite] - tau, 0, 1)
    if np.isneginf(tau):
        p[np.isfinite(z)] = 1
    p[certain] = k > 0
    if np.isnan(tau):
        p[~np.isneginf(z)] = np.nan
    return p


def sparsek_of(z, k):
    """(gates, tau) of the candidates z."""
    finite = z[np.isfinite(z)]
    left = k - np.isposinf(z).sum()  # +inf has gate 1 and takes one of k
    if np.isnan(z).any():
        tau = np.nan
    elif left <= 0:
        tau = np.inf
    elif left >= len(finite):
        tau = -np.inf
    else:
        tau = threshold(finite, left)
    tau = z.dtype.type(tau)
    return gates_of(z, tau, k), tau


def greatest(z, k):
    """Numbers, ascending, of the ceil(k) greatest candidates, or of all there are: of equal ones
    the lower number is the greater; a NaN counts as +inf."""
    ranks = np.where(np.isnan(z), np.inf, z)
    order = np.argsort(-ranks, kind="stable")[: max(0, int(np.ceil(k)))]
    return np.sort(order[~np.isneginf(ranks[order])])


def sparsek(scores, k, lengths=None):
    """(gates (..., m), tau (...)) of scores (..., m)."""
    z = scores.astype(real_of(scores))
    gates, tau = np.zeros(z.shape, z.dtype), np.zeros(z.shape[:-1], z.dtype)
    n = np.broadcast_to(scores.shape[-1] if lengths is None else lengths, tau.shape)
    for at in np.ndindex(tau.shape):
        gates[at][: n[at]], tau[at] = sparsek_of(z[at][: n[at]], k)
    return gates, tau


def candidates(scores, sq, window=0, **limits):
    """(b, sq, sk) bool: keys 0 .. i' - window of row i."""
    b, _, sk = scores.shape
    return reference.interval(b, sq, sk, window=(None, -window), **limits)[0]


def sparsek_lists(scores, k, *, sq, **limits):
    """(key_lists, gates (b, h, sq, ceil(k)), tau (b, h, sq))."""
    z = scores.astype(real_of(scores))
    inside = candidates(scores, sq, **limits)
    shape = (*scores.shape[:2], sq)
    lists = np.full((*shape, max(0, int(np.ceil(k)))), -1, np.int32)
    gates, tau = np.zeros(lists.shape, z.dtype), np.zeros(shape, z.dtype)
    for b, h, i in np.ndindex(shape):
        keys = np.flatnonzero(inside[b, i])
        p, tau[b, h, i] = sparsek_of(z[b, h, keys], k)
        kept = greatest(z[b, h, keys], k)
        lists[b, h, i, : len(kept)] = keys[kept]
        gates[b, h, i, : len(kept)] = p[kept]
    return lists, gates, tau


def gradient_of(z, tau, dgates, k):
    """dz, given the bits of tau: z and tau in the dtype of tau, for which gates are 0 < p < 1."""
    p = gates_of(z, tau, k)
    inside = (p > 0) & (p < 1)
    dz = np.zeros(z.shape, np.longdouble)
    if inside.any():
        dz[inside] = dgates[inside] - dgates[inside].astype(np.longdouble).mean()
    return dz


def sparsek_gradient(scores, tau, dgates, k, lengths=None):
    z, dz = scores.astype(tau.dtype), np.zeros(scores.shape, np.longdouble)
    n = np.broadcast_to(scores.shape[-1] if lengths is None else lengths, tau.shape)
    for at in np.ndindex(tau.shape):
        own = slice(n[at])
        dz[at][own] = gradient_of(z[at][own], tau[at], dgates[at][own], k)
    return dz


def lists_gradient(scores, lists, tau, dgates, k, *, sq, **limits):
    """Of keys that are cut from the lists, too, whose gates have no gradient of their own."""
    z, dz = scores.astype(tau.dtype), np.zeros(scores.shape, np.longdouble)
    inside = candidates(scores, sq, **limits)
    for b, h, i in np.ndindex(tau.shape):
        keys, there = np.flatnonzero(inside[b, i]), lists[b, h, i] >= 0
        dp = np.zeros(scores.shape[2], dgates.dtype)
        dp[lists[b, h, i][there]] = dgates[b, h, i][there]
        dz[b, h, keys] += gradient_of(z[b, h, keys], tau[b, h, i], dp[keys], k)
    return dz
